"""The reader: right samples, the same order for any number of processes, damage refused, nothing foreign decoded."""

import io
import json
import os
import pickle
import tarfile
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from coherent_ddrm.data import DataError, DecodedCache, ShardDataset, batches, ids_for_step, open_dataset
from coherent_ddrm.images import encode
from coherent_ddrm.shard_writer import ShardWriter
from coherent_ddrm.shards import BLOCK, FORMAT, INDEX, dataset_hash, key_of, read_json, write_json

SIDE = 8


def make_shards(
    folder: Path, counts: tuple[int, ...] = (5, 0, 4), segmentation: bool = True, format: str = "png"
) -> Path:
    """A folder of shards with made-up samples; sample i's picture is all i."""
    folder.mkdir(parents=True, exist_ok=True)
    records, number = [], 0
    for shard, count in enumerate(counts):
        with ShardWriter(folder, shard) as writer:
            for _ in range(count):
                members = {
                    "image": encode(np.full((SIDE, SIDE, 3), number, np.uint8), {"jpg": "JPEG"}.get(format, format)),
                    "edges": encode(np.full((SIDE, SIDE), 2 * number, np.uint8), "PNG"),
                    "json": json.dumps({"caption": f"number {number}", "class_id": number % 3}).encode(),
                }
                if segmentation:
                    members["segmentation"] = encode(np.full((SIDE, SIDE), number % 4, np.uint8), "PNG")
                writer.add(key_of(f"folder/{number}.x.png"), members, f".{format}", number % 3)
                number += 1
        records.append(writer.record())
    write_manifest(folder, records)
    return folder


def write_manifest(folder: Path, records: list[dict]) -> None:
    labels, classes = ["a", "b", "c", "d"], ["x", "y", "z"]
    manifest = {
        "format": FORMAT,
        "resolution": SIDE,
        "samples": sum(record["samples"] for record in records),
        "label_names": labels,
        "class_names": classes,
        "shards": records,
        "dataset_hash": dataset_hash(records, labels, classes),
    }
    write_json(folder / "manifest.json", manifest)


# ---------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ids_per_step_do_not_depend_on_the_number_of_processes(tmp_path, world):
    source = ShardDataset(make_shards(tmp_path))
    for step in range(8):  # 8 x 4 samples of 9: over three epoch borders
        shares = [next(batches(source, 4, seed=5, start_step=step, rank=r, world=world)) for r in range(world)]
        got = np.stack([batch["image"][:, 0, 0, 0] for _, batch in shares], 1).ravel()
        assert np.array_equal(got, ids_for_step(step, 4, 9, 5))


def test_every_epoch_holds_every_sample_once():
    stream = np.concatenate([ids_for_step(step, 4, 9, 1) for step in range(27)])
    epochs = stream.reshape(-1, 9)
    assert all(np.array_equal(np.sort(epoch), np.arange(9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_a_batch_larger_than_the_data_runs_through_several_epochs():
    assert np.array_equal(ids_for_step(0, 20, 6, 0), np.concatenate([ids_for_step(i, 4, 6, 0) for i in range(5)]))


def test_order_changes_with_the_seed_and_is_frozen():
    assert not np.array_equal(ids_for_step(0, 8, 100, 0), ids_for_step(0, 8, 100, 1))
    # A known answer: if it changes, resumed runs would see other samples.
    assert ids_for_step(0, 8, 10, 0).tolist() == [3, 2, 1, 8, 6, 0, 7, 4]


@pytest.mark.parametrize("arguments", [(-1, 4, 9, 0), (0, 0, 9, 0), (0, 4, 0, 0), (0, 4, 9, -1)])
def test_impossible_steps_are_refused(arguments):
    with pytest.raises(ValueError, match="ids_for_step"):
        ids_for_step(*arguments)


# ---------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("workers,prefetch", [(1, 1), (2, 2), (3, 5)])
def test_threads_change_nothing(tmp_path, workers, prefetch):
    source = ShardDataset(make_shards(tmp_path))
    plain = list(islice(batches(source, 4, seed=2), 7))
    threaded = list(islice(batches(source, 4, seed=2, workers=workers, prefetch=prefetch), 7))
    for (step, batch), (other_step, other) in zip(plain, threaded, strict=True):
        assert step == other_step and batch["key"] == other["key"]
        assert all(np.array_equal(batch[name], other[name]) for name in ("image", "edges", "segmentation", "class_id"))


def test_resuming_gives_the_rest_of_the_run(tmp_path):
    source = ShardDataset(make_shards(tmp_path))
    whole = [batch["key"] for _, batch in islice(batches(source, 4, seed=3), 10)]
    rest = [(step, batch["key"]) for step, batch in islice(batches(source, 4, seed=3, start_step=6, workers=2), 4)]
    assert rest == list(zip(range(6, 10), whole[6:], strict=True))


def test_an_error_in_a_thread_arrives_at_its_step_and_threads_end(tmp_path):
    source = ShardDataset(make_shards(tmp_path))
    bad = int(ids_for_step(2, 3, 9, 0)[1])
    damage(source, bad)
    stream = batches(ShardDataset(tmp_path), 3, seed=0, workers=2)
    assert [next(stream)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(DataError, match=source.key(bad)):
        next(stream)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data_")]


def test_closing_ends_the_threads(tmp_path):
    stream = batches(ShardDataset(make_shards(tmp_path)), 3, seed=0, workers=2)
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data_")]


def test_wrong_splits_are_refused_at_once(tmp_path):
    source = ShardDataset(make_shards(tmp_path))
    with pytest.raises(ValueError, match="cannot be split evenly over 2"):
        batches(source, 5, seed=0, world=2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        batches(source, 4, seed=0, rank=2, world=2)
    with pytest.raises(DataError, match="no samples"):
        batches(ShardDataset(make_shards(tmp_path / "empty", (0,))), 4, seed=0)


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("format", ["png", "webp", "jpg"])
def test_samples_come_back(tmp_path, format):
    dataset = ShardDataset(make_shards(tmp_path, format=format))
    assert (len(dataset), dataset.num_labels, dataset.num_classes, dataset.resolution) == (9, 4, 3, SIDE)
    for i in range(9):
        sample = dataset.read(i)
        assert np.abs(sample.image.astype(int) - i).max() <= (2 if format == "jpg" else 0)
        assert (sample.edges == 2 * i).all() and (sample.segmentation == i % 4).all()
        assert sample.class_id == i % 3 == dataset.class_id(i) and sample.caption == f"number {i}"
        assert sample.key == dataset.key(i) == dataset.keys[i]
    assert dataset.key(-1) == dataset.key(8) and len(set(dataset.keys)) == 9
    with pytest.raises(IndexError):
        dataset.read(9)


def test_a_missing_segmentation_is_all_ignored(tmp_path):
    dataset = ShardDataset(make_shards(tmp_path, segmentation=False))
    assert (dataset.read(0).segmentation == 255).all()


def test_plain_webdataset_reads_the_same_keys_and_bytes(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    dataset = ShardDataset(make_shards(tmp_path, (5, 4)))
    url = str(tmp_path / "shard-{000000..000001}.tar")
    samples = list(webdataset.WebDataset(url, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == list(dataset.keys)
    for i, sample in enumerate(samples):
        shard, row, key = dataset._row(i)
        ours = dataset._members(shard, row, key)
        theirs = {"image": "png", "edges": "edges.png", "segmentation": "segmentation.png", "json": "json"}
        assert {name: sample[suffix] for name, suffix in theirs.items()} == ours


def test_it_survives_pickling_and_forking(tmp_path):
    dataset = ShardDataset(make_shards(tmp_path))
    dataset.read(0)  # handles are open now
    copy = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copy.read(3).image, dataset.read(3).image)
    child = os.fork()
    if child == 0:
        os._exit(0 if all((dataset.read(i).image == i).all() for i in range(9)) else 1)
    assert all((dataset.read(i).image == i).all() for i in range(9))
    assert os.waitpid(child, 0)[1] == 0


def test_few_handles_serve_many_shards_and_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("coherent_ddrm.dataset.OPEN_SHARDS", 2)
    dataset = ShardDataset(make_shards(tmp_path, (1,) * 12))
    before = len(os.listdir("/proc/self/fd"))
    for _, batch in islice(batches(dataset, 12, seed=0, workers=3), 5):
        assert sorted(batch["image"][:, 0, 0, 0]) == list(range(12))
    assert len(os.listdir("/proc/self/fd")) <= before + 4


# ---------------------------------------------------------------------------------------------- damage and malice


def damage(dataset: ShardDataset, i: int, byte: int = BLOCK + 60) -> None:
    shard, row, _ = dataset._row(i)
    path = dataset.folder / dataset.manifest["shards"][shard]["name"]
    content = bytearray(path.read_bytes())
    content[int(row["offset"]) + byte] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("byte", [0, 100, BLOCK, BLOCK + 40, 2 * BLOCK - 1])
def test_one_flipped_byte_is_noticed(tmp_path, byte):
    dataset = ShardDataset(make_shards(tmp_path))
    damage(dataset, 6, byte)
    with pytest.raises(DataError, match=rf"shard-000002\.tar, sample {dataset.key(6)}: damaged"):
        ShardDataset(tmp_path).read(6)
    ShardDataset(tmp_path).read(5)


def test_a_cut_or_missing_file_is_refused_at_open(tmp_path):
    tar = make_shards(tmp_path) / "shard-000002.tar"
    content = tar.read_bytes()
    tar.write_bytes(content[:-BLOCK])
    with pytest.raises(DataError, match=r"shard-000002\.tar: has \d+ bytes, its manifest says"):
        ShardDataset(tmp_path)
    tar.unlink()
    with pytest.raises(DataError, match=r"shard-000002\.tar: is missing"):
        ShardDataset(tmp_path)
    tar.write_bytes(content)
    (tmp_path / "shard-000000.index.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"shard-000000\.index\.npy"):
        ShardDataset(tmp_path)


def test_a_folder_without_or_with_a_strange_manifest_is_refused(tmp_path):
    with pytest.raises(DataError, match="unfinished"):
        ShardDataset(tmp_path)
    make_shards(tmp_path)
    manifest = read_json(tmp_path / "manifest.json")
    for change, message in (
        ({"format": 99}, "format 99"),
        ({"resolution": "8"}, "'resolution'"),
        ({"shards": [{"name": "../evil.tar"}]}, "entry 0"),
    ):
        write_json(tmp_path / "manifest.json", manifest | change)
        with pytest.raises(DataError, match=message):
            ShardDataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="JSON"):
        ShardDataset(tmp_path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_foreign_members_are_never_touched(tmp_path, monkeypatch):
    """A pickle, a path that climbs, a link: in the tar, but not in the index, so not in the data."""
    folder = make_shards(tmp_path / "shards", (3,))
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    key = ShardDataset(folder).key(0)
    with tarfile.open(folder / "shard-000000.tar", "a", format=tarfile.USTAR_FORMAT) as tar:
        for name in (f"{key}.pkl", f"{key}.pyd", "../../evil.png", "/etc/evil.json"):
            payload = pickle.dumps(Bomb())
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
        link = tarfile.TarInfo(f"{key}.edges.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    record = read_json(folder / "manifest.json")["shards"][0]
    write_manifest(folder, [record | {"bytes": (folder / "shard-000000.tar").stat().st_size}])
    dataset = ShardDataset(folder)
    assert len(dataset) == 3
    assert [int(dataset.read(i).image[0, 0, 0]) for i in range(3)] == [0, 1, 2]
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("key", b"../../etc/passwd", "index row"),
        ("key", b"a.b", "index row"),
        ("image_suffix", 9, "index row"),
        ("offset", -512, "index row"),
        ("length", 10**15, "index row"),
        ("crc", 1, "checksum"),
        ("members", [[0, 10]] * 4, "does not point at"),
        ("members", [[BLOCK, 10**12]] * 4, "does not point at"),
    ],
)
def test_a_forged_index_row_is_refused(tmp_path, field, value, message):
    path = make_shards(tmp_path) / "shard-000000.index.npy"
    rows = np.load(path)
    rows[1][field] = value
    np.save(path, rows)
    assert rows.dtype == INDEX
    with pytest.raises(DataError, match=message):
        ShardDataset(tmp_path).read(1)


def test_a_picture_of_another_size_is_refused(tmp_path):
    make_shards(tmp_path)
    manifest = read_json(tmp_path / "manifest.json")
    write_json(tmp_path / "manifest.json", manifest | {"resolution": 2 * SIDE})
    with pytest.raises(DataError, match="says 16 px"):
        ShardDataset(tmp_path).batch(np.array([0]))


# ---------------------------------------------------------------------------------------------- cache


def test_the_cache_equals_direct_reading(tmp_path):
    make_shards(tmp_path)
    cached, direct = open_dataset(tmp_path), open_dataset(tmp_path, cache=False)
    assert isinstance(cached, DecodedCache) and isinstance(direct, ShardDataset)
    for (_, a), (_, b) in zip(islice(batches(cached, 4, 0), 5), islice(batches(direct, 4, 0), 5), strict=True):
        assert a["key"] == b["key"]
        for name in ("image", "edges", "segmentation", "class_id"):
            assert np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype
    assert len(cached) == 9 and cached.num_labels == 4 and cached.key(2) == direct.key(2)
    assert np.array_equal(pickle.loads(pickle.dumps(cached)).batch([4])["image"], direct.batch([4])["image"])


def test_the_cache_is_made_once_and_never_stale(tmp_path, monkeypatch):
    make_shards(tmp_path)
    open_dataset(tmp_path)
    monkeypatch.setattr(ShardDataset, "batch", lambda *_: pytest.fail("decoded again"))
    open_dataset(tmp_path)
    monkeypatch.undo()
    make_shards(tmp_path, (2, 2))  # other data in the same folder
    assert len(open_dataset(tmp_path).batch(np.arange(4))["key"]) == 4


def test_a_cache_that_was_killed_half_way_is_made_again(tmp_path, monkeypatch):
    make_shards(tmp_path)
    monkeypatch.setattr(DecodedCache, "_fill", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        open_dataset(tmp_path)
    monkeypatch.undo()
    assert (open_dataset(tmp_path).batch([3])["image"] == 3).all()
    assert not list(tmp_path.glob(".cache-*"))


def test_a_damaged_cache_says_what_to_do(tmp_path):
    make_shards(tmp_path)
    open_dataset(tmp_path)
    (image,) = tmp_path.glob("cache-*.image.npy")
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(DataError, match=r"delete cache-\*"):
        open_dataset(tmp_path)


def test_a_cache_folder_of_its_own(tmp_path):
    make_shards(tmp_path / "shards")
    (tmp_path / "fast").mkdir()
    cached = open_dataset(tmp_path / "shards", cache=True, cache_folder=tmp_path / "fast")
    assert (cached.batch([5])["image"] == 5).all() and not list((tmp_path / "shards").glob("cache-*"))
