"""From folders of all sorts of pictures to shards: nothing crashes, nothing is lost, same input same bytes."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coherent_ddrm.data import ShardDataset
from coherent_ddrm.images import encode
from coherent_ddrm.shards import key_of, read_json

TOOLS = Path(__file__).parent.parent / "data_prep"
sys.path.insert(0, str(TOOLS))

import build_shards  # noqa: E402
import check_shards  # noqa: E402

QUIET = ("--quiet", "--workers", "0")


def photo(seed: int, height: int = 24, width: int = 30) -> np.ndarray:
    """A dark disc on a light, noisy wall."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    disc = np.hypot(y - height / 2, x - width / 2) < 0.33 * height
    picture = np.where(disc[..., None], rng.integers(0, 90, 3), 210) + rng.normal(0, 4, (height, width, 3))
    return np.clip(picture, 0, 255).astype(np.uint8)


def folder_of(path: Path, count: int) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (path / f"{i:02d}.png").write_bytes(encode(photo(i), "PNG"))
    return path


def build(images: Path, out: Path, *options: str, size: int = 16, code: int = 0) -> dict | None:
    command = [str(images), str(out), "--size", str(size), *QUIET, *options]
    assert build_shards.main(command) == code
    return read_json(out / "manifest.json") if (out / "manifest.json").exists() else None


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def is_sound(folder: Path) -> bool:
    return not list(check_shards.check_folder(folder, decode=True))


# ---------------------------------------------------------------------------------------------- what goes in


def test_all_kinds_of_pictures_and_all_kinds_of_trouble(tmp_path):
    images = folder_of(tmp_path / "images", 1)
    (images / "deep" / "er").mkdir(parents=True)
    good = Image.fromarray(photo(1))
    good.save(images / "deep" / "a.jpg")
    good.convert("L").save(images / "deep" / "er" / "grey.webp")
    good.convert("CMYK").save(images / "cmyk.tif")
    Image.fromarray(photo(2)[..., 0].astype(np.uint16) * 257).save(images / "deep16.png")
    good.convert("RGBA").save(images / "UPPER.PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    good.save(images / "turned.jpg", exif=exif)
    (images / "no.picture.jpg").write_text("hello")
    (images / "cut.png").write_bytes(encode(photo(3), "PNG")[:-400])
    (images / "empty.png").write_bytes(b"")
    Image.new("1", (5000, 4000)).save(images / "bomb.png")
    Image.new("RGB", (200, 15)).save(images / "thin.png")
    (images / "notes.txt").write_text("not a picture")
    (images / "linked").symlink_to(images / "deep", target_is_directory=True)
    (images / "broken.png").symlink_to(tmp_path / "absent.png")
    manifest = build(images, tmp_path / "out", "--max-pixels", "1000000")
    reasons = {entry["path"]: entry["reason"] for entry in manifest["skipped"]}
    assert set(reasons) == {"no.picture.jpg", "cut.png", "empty.png", "bomb.png", "thin.png", "broken.png"}
    assert "5000 x 4000 is more pixels" in reasons["bomb.png"]
    assert "200 x 15 is smaller than --min-size 16" in reasons["thin.png"]
    assert "cannot be read" in reasons["broken.png"] and "cut short" in reasons["cut.png"]
    assert manifest["samples"] == 7 and manifest["inputs"]["pictures"] == 13
    assert manifest["inputs"]["other_files"] == 1
    assert manifest["inputs"]["folders_not_entered"] == ["linked (linked folder)"]
    assert is_sound(tmp_path / "out")
    infos = {sample.info["path"]: sample.info for sample in map(ShardDataset(tmp_path / "out").read, range(7))}
    assert infos["turned.jpg"]["size"] == [30, 24]


def test_keys_are_safe_and_unique():
    paths = ["a/b.png", "a_b.png", "a/b.jpg", "../b.png", "ä.png", "a.b.png", "x" * 300 + ".png", "\udcff.png"]
    keys = [key_of(path) for path in paths]
    assert len(set(keys)) == len(keys)
    assert all(len(key) <= 80 and not set(key) & set("./\\ ") and key.isascii() for key in keys)


def test_file_names_that_are_not_unicode(tmp_path):
    images = folder_of(tmp_path / "images", 1)
    with open(os.fsencode(images) + b"/\xff\xfe.png", "wb") as file:
        file.write(encode(photo(5), "PNG"))
    build(images, tmp_path / "out")
    assert len(ShardDataset(tmp_path / "out")) == 2


@pytest.mark.parametrize("policy", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("format", ["png", "webp", "jpg"])
def test_fit_and_format(tmp_path, policy, format):
    out = tmp_path / "out"
    build(folder_of(tmp_path / "images", 2), out, "--fit", policy, "--format", format, "--segmentation", "none")
    assert is_sound(out)
    assert (ShardDataset(out).read(0).image[0, 0] > 245).all() == (policy == "pad")


# ---------------------------------------------------------------------------------------------- segmentation, classes


def test_saliency_with_classes(tmp_path):
    images = folder_of(tmp_path / "images", 4)
    (tmp_path / "c.csv").write_text(
        "image,label,caption\n00.png,Shirt,a shirt\n01.png,Hat,\n02.png,Shirt,\nx.png,Shoe,\n"
    )
    manifest = build(images, tmp_path / "out", "--classes", str(tmp_path / "c.csv"))
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.label_names == ["background", "Hat", "Shirt", "Shoe"] and dataset.class_names == [
        "Hat",
        "Shirt",
        "Shoe",
    ]
    assert manifest["class_counts"] == {"": 1, "Hat": 1, "Shirt": 2} and manifest["saliency"] == {"kept": 4}
    assert manifest["inputs"]["csv_rows_without_picture"] == 1
    for i, (class_id, caption) in enumerate([(1, "a shirt"), (0, None), (1, None), (-1, None)]):
        sample = dataset.read(i)
        assert (sample.class_id, sample.caption) == (class_id, caption)
        assert sample.segmentation[8, 8] == (255 if class_id < 0 else class_id + 1) and sample.segmentation[0, 0] == 0


def test_another_split_takes_the_first_ones_names(tmp_path):
    images = folder_of(tmp_path / "images", 2)
    (tmp_path / "c.csv").write_text("image,label\n00.png,Shirt\n01.png,Hat\n")
    build(images, tmp_path / "train", "--classes", str(tmp_path / "c.csv"))
    (tmp_path / "v.csv").write_text("image,label\n00.png,Shirt\n")
    names = ("--label-names", str(tmp_path / "train" / "manifest.json"))
    build(images, tmp_path / "val", "--classes", str(tmp_path / "v.csv"), *names)
    train, val = ShardDataset(tmp_path / "train"), ShardDataset(tmp_path / "val")
    assert val.label_names == train.label_names and val.class_id(0) == train.class_id(0) == 1
    (tmp_path / "v.csv").write_text("image,label\n00.png,Sock\n")
    build(images, tmp_path / "bad", "--classes", str(tmp_path / "v.csv"), *names, code=2)


def test_saliency_without_classes_and_a_refused_cut(tmp_path):
    images = folder_of(tmp_path / "images", 1)
    Image.new("RGB", (40, 40), (90, 90, 90)).save(images / "flat.png")
    manifest = build(images, tmp_path / "out")
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.label_names == ["background", "foreground"] and manifest["saliency"] == {"kept": 1, "refused": 1}
    assert set(np.unique(dataset.read(0).segmentation)) == {0, 1}
    assert set(np.unique(dataset.read(1).segmentation)) == {255}


def test_label_maps_beside_the_pictures(tmp_path):
    images, maps = folder_of(tmp_path / "images", 4), tmp_path / "maps"
    maps.mkdir()
    ids = np.zeros((24, 30), np.uint8)
    ids[:, 15:] = 2
    ids[:4] = 11
    for name in ("00.png", "01.png"):
        (maps / name).write_bytes(encode(ids, "PNG"))
    (maps / "02.png").write_bytes(encode(ids[:-1], "PNG"))
    manifest = build(images, tmp_path / "out", "--segmentation", f"labels:{maps}", "--ignore-label", "11")
    reasons = {entry["path"]: entry["reason"] for entry in manifest["skipped"]}
    assert "is (30, 23), its picture (30, 24)" in reasons["02.png"] and "no such file" in reasons["03.png"]
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.label_names == ["label 0", "label 1", "label 2"]
    assert set(np.unique(dataset.read(0).segmentation)) == {0, 2, 255}
    (tmp_path / "names.txt").write_text("sky\nroad\n")
    named = ("--label-names", str(tmp_path / "names.txt"), "--ignore-label", "11")
    manifest = build(images, tmp_path / "named", "--segmentation", f"labels:{maps}", *named, code=1)
    assert "holds the id 2, but there are 2 label names" in manifest["skipped"][0]["reason"]


FAKE_TRANSFORMERS = """
import types, numpy, torch
class AutoConfig:
    @staticmethod
    def from_pretrained(name):
        if name != "toy": raise OSError(name + " is not a folder\\nand not a model")
        return types.SimpleNamespace(id2label={"0": "wall", "1": "thing"})
class AutoImageProcessor:
    from_pretrained = classmethod(lambda cls, name: cls())
    def __call__(self, images, return_tensors):
        class Inputs(dict):
            def to(self, device): return self
        return Inputs(pixel_values=torch.from_numpy(images.copy()))
    def post_process_semantic_segmentation(self, outputs, target_sizes):
        assert tuple(outputs.shape) == tuple(target_sizes[0])
        return [outputs]
class AutoModelForSemanticSegmentation:
    from_pretrained = classmethod(lambda cls, name, use_safetensors: cls())
    def to(self, device): return self
    def eval(self): return self
    def __call__(self, pixel_values): return (pixel_values.float().mean(-1) < 128).long()
"""


def test_a_segmentation_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "transformers.py").write_text(FAKE_TRANSFORMERS)
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    images = folder_of(tmp_path / "images", 2)
    try:
        build(images, tmp_path / "out", "--segmentation", "model:toy")
        build(images, tmp_path / "bad", "--segmentation", "model:other", code=2)
    finally:
        sys.modules.pop("transformers", None)
    assert "model:other: other is not a folder and not a model" in capsys.readouterr().err
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.label_names == ["wall", "thing"]
    assert dataset.read(0).segmentation[8, 8] == 1 and dataset.read(0).segmentation[0, 0] == 0


# ---------------------------------------------------------------------------------------------- same bytes, always


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Path, Path]:
    """(pictures, their shards): 11 pictures, one of them bad, in shards of 4."""
    root = tmp_path_factory.mktemp("reference")
    images = folder_of(root / "images", 11)
    (images / "05.png").write_bytes(b"bad")
    build(images, root / "out", "--samples-per-shard", "4", "--split", "train")
    return images, root / "out"


SAME = ("--samples-per-shard", "4", "--split", "train")


def test_two_worker_processes_give_the_same_bytes(reference, tmp_path):
    images, out = reference
    build(images, tmp_path / "out", *SAME, "--workers", "2")
    assert contents(tmp_path / "out") == contents(out)


def test_ranks_give_the_same_bytes_in_any_order(reference, tmp_path, monkeypatch):
    images, out = reference
    assert build(images, tmp_path / "out", *SAME, "--rank", "1", "--world", "2") is None
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    build(images, tmp_path / "out", *SAME)
    assert contents(tmp_path / "out") == contents(out)


@pytest.mark.parametrize("lost", ["shard-000001.tar", "shard-000001.json", "shard-000002.index.npy", "manifest.json"])
def test_what_is_missing_is_made_again_and_nothing_else(reference, tmp_path, lost):
    images, out = reference
    copy = tmp_path / "out"
    copy.mkdir()
    for name, content in contents(out).items():
        (copy / name).write_bytes(content)
    (copy / lost).unlink()
    (copy / ".shard-000001.tar.tmp-elsewhere-1").write_bytes(b"half")
    kept = (copy / "shard-000000.tar").stat().st_ino
    build(images, copy, *SAME)
    if "000001" in lost:  # its own leftovers go with it
        assert not list(copy.glob(".shard-*"))
    (copy / ".shard-000001.tar.tmp-elsewhere-1").unlink(missing_ok=True)
    assert contents(copy) == contents(out) and (copy / "shard-000000.tar").stat().st_ino == kept


def test_a_killed_run_continues(reference, tmp_path):
    images, out = reference
    copy = tmp_path / "out"
    command = [sys.executable, str(TOOLS / "build_shards.py"), str(images), str(copy), "--size", "16", *QUIET, *SAME]
    killed = subprocess.Popen(command)
    deadline = time.time() + 60
    while not (copy / "shard-000000.tar").exists() and killed.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for name, content in contents(copy).items():
        if not name.startswith("."):  # what has its name is whole
            assert content == contents(out)[name]
    build(images, copy, *SAME)
    assert {n: c for n, c in contents(copy).items() if n[0] != "."} == contents(out)


def test_a_failure_in_the_middle_leaves_no_half_shard(reference, tmp_path, monkeypatch):
    images, out = reference

    def fail(self, *arguments, **keywords):
        if len(self.rows) == 2 and self.tar_path.name == "shard-000001.tar":
            raise OSError(28, "No space left on device")
        return add(self, *arguments, **keywords)

    add = build_shards.ShardWriter.add
    monkeypatch.setattr(build_shards.ShardWriter, "add", fail)
    build(images, tmp_path / "out", *SAME, code=2)
    assert sorted(p.name for p in (tmp_path / "out").glob("*shard-*")) == [
        "shard-000000.index.npy",
        "shard-000000.json",
        "shard-000000.tar",
    ]
    monkeypatch.undo()
    build(images, tmp_path / "out", *SAME)
    assert contents(tmp_path / "out") == contents(out)


def test_a_picture_that_kills_its_worker_is_left_out(tmp_path, monkeypatch):
    """The segmentation fault of a decoder, played by a model that ends the process on one picture."""
    call = "def __call__(self, pixel_values):"
    crash = f"{call}\n        import os\n        if pixel_values[12, 12, 0] > 200: os._exit(9)\n       "
    (tmp_path / "transformers.py").write_text(FAKE_TRANSFORMERS.replace(call, crash))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    few = folder_of(tmp_path / "few", 2)
    (few / "01.png").write_bytes(encode(np.full((24, 24, 3), 250, np.uint8), "PNG"))
    try:
        manifest = build(few, tmp_path / "out", "--segmentation", "model:toy", "--workers", "1")
    finally:
        sys.modules.pop("transformers", None)
    assert [entry["path"] for entry in manifest["skipped"]] == ["01.png"] and manifest["samples"] == 1
    assert "crashed" in manifest["skipped"][0]["reason"]


# ---------------------------------------------------------------------------------------------- the user's mistakes


@pytest.mark.parametrize(
    "options,message",
    [
        (("--size", "32"), "options.size: 16 then, 32 now"),
        (("--segmentation", "none"), "options.segmentation: 'saliency' then, 'none' now"),
        (("--segmentation", "magic"), "use labels:DIR, saliency, model:NAME or none"),
        (("--segmentation", "labels:"), "use labels:DIR"),
        (("--segmentation", "labels:/does/not/exist"), "no such folder"),
        (("--classes", "/does/not/exist.csv"), "/does/not/exist.csv"),
        (("--rank", "2", "--world", "2"), "ranks count from 0 to 1"),
        (("--rank", "0"), "belong together"),
        (("--overwrite", "--rank", "0", "--world", "2"), "one would delete what another wrote"),
    ],
)
def test_mistakes_are_one_clear_line(reference, options, message, capsys):
    images, out = reference
    before = contents(out)
    build(images, out, *SAME, *options, code=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("build_shards: ")
    assert contents(out) == before


def test_other_pictures_in_the_same_folder_are_refused_until_overwrite(tmp_path, capsys):
    images, out = folder_of(tmp_path / "images", 2), tmp_path / "out"
    build(images, out)
    folder_of(images, 3)
    before = contents(out)
    build(images, out, code=2)
    assert "inputs.pictures: 2 then, 3 now" in capsys.readouterr().err and contents(out) == before
    (out / "mine.txt").write_text("not the tool's")
    assert build(images, out, "--overwrite")["samples"] == 3
    assert (out / "mine.txt").exists() and is_sound(out)


def test_csv_mistakes(tmp_path, capsys):
    images = folder_of(tmp_path / "images", 1)
    table = tmp_path / "c.csv"
    for text, message in (
        ("file,class\n00.png,a\n", "lacks the column 'image'"),
        ("image,label\n00.png,a\n00.png,b\n", "line 3: '00.png' was 'a'"),
        (b"image,label\n\xff\xfe,a\n", "not a readable UTF-8 CSV"),
    ):
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
        build(images, tmp_path / "out", "--classes", str(table), code=2)
        assert message in capsys.readouterr().err
    table.write_text("\ufefffile,class\n./00.png,a\n", encoding="utf-8")
    columns = ("--image-column", "file", "--label-column", "class")
    assert build(images, tmp_path / "out", "--classes", str(table), *columns)["class_names"] == ["a"]


def test_empty_missing_and_nested_folders(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    build(tmp_path / "empty", tmp_path / "out", code=2)
    assert "no picture in this folder" in capsys.readouterr().err
    build(tmp_path / "absent", tmp_path / "out", code=2)
    assert "no such folder" in capsys.readouterr().err
    images = folder_of(tmp_path / "images", 1)
    build(images, images / "out", code=2)
    assert "lies inside" in capsys.readouterr().err


def test_only_bad_pictures_is_a_failure_with_a_manifest(tmp_path):
    images = folder_of(tmp_path / "images", 1)
    (images / "00.png").write_bytes(b"bad")
    assert build(images, tmp_path / "out", code=1)["skipped_count"] == 1
    assert is_sound(tmp_path / "out")


def test_help_does_not_load_torch():
    code = f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import build_shards\n"
    code += "try: build_shards.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'kornia', 'cv2', 'transformers') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("[]\n")


@pytest.mark.parametrize(
    "environment,expected",
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, (1, 4)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"}, (2, 4)),
        # an array job's tasks carry SLURM_PROCID too
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (2, 3)),
    ],
)
def test_ranks_from_the_launcher(monkeypatch, environment, expected):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert build_shards.rank_and_world(build_shards.parser().parse_args(["a", "b"])) == expected


# ---------------------------------------------------------------------------------------------- check_shards


def problems(folder: Path, capsys) -> str:
    assert check_shards.main([str(folder)]) == 1
    return capsys.readouterr().out


@pytest.fixture
def copy(reference, tmp_path) -> Path:
    for name, content in contents(reference[1]).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_a_sound_folder_is_sound(copy, capsys):
    assert check_shards.main([str(copy), "--decode"]) == 0
    assert capsys.readouterr().out.endswith("10 samples in 3 shards, 1 left out: sound.\n")


def test_a_flipped_byte_is_found_and_named(copy, capsys):
    dataset = ShardDataset(copy)
    tar = copy / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[int(dataset._row(5)[1]["offset"]) + 600] ^= 4
    tar.write_bytes(content)
    found = problems(copy, capsys)
    assert "shard-000001.tar: its sha256" in found and f"({dataset.key(5)}): damaged" in found


def test_a_cut_tar_and_a_missing_one_are_found(copy, capsys):
    tar = copy / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-2048])
    assert "has" in (found := problems(copy, capsys)) and "sha256" in found
    tar.unlink()
    assert "shard-000001.tar: is missing" in problems(copy, capsys)


def test_a_missing_member_is_found_even_if_all_hashes_fit(copy, capsys):
    """A shard rewritten without one edge map, its index and manifest brought into line."""
    from coherent_ddrm.shards import ShardWriter, dataset_hash, write_json

    dataset = ShardDataset(copy)
    with ShardWriter(copy, 0) as writer:
        for i in range(4):
            shard, row, key = dataset._row(i)
            members = dataset._members(shard, row, key)
            if i == 2:
                del members["edges"]
            writer.add(key, members, ".png", int(row["class_id"]))
    manifest = read_json(copy / "manifest.json")
    manifest["shards"][0] = writer.record()
    names = manifest["label_names"], manifest["class_names"]
    write_json(copy / "manifest.json", manifest | {"dataset_hash": dataset_hash(manifest["shards"], *names)})
    assert f"({dataset.key(2)}): without edges" in problems(copy, capsys)


def test_a_shard_too_many_and_false_sums_are_found(copy, capsys):
    (copy / "shard-000009.tar").write_bytes(b"")
    assert "shard-000009.tar: not in manifest.json" in problems(copy, capsys)
    manifest = read_json(copy / "manifest.json")
    manifest["skipped"] = []
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "11 pictures went in, 10 samples and 0 left out" in problems(copy, capsys)
    manifest["label_names"] = ["background"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "dataset_hash" in problems(copy, capsys)


def test_bytes_that_belong_to_nothing_are_found(copy, capsys):
    import tarfile

    with tarfile.open(copy / "shard-000000.tar", "a", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("extra.pkl")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert "after the last sample" in problems(copy, capsys)


def test_a_folder_that_cannot_be_checked(tmp_path, capsys):
    assert check_shards.main([str(tmp_path)]) == 2
    assert "no manifest.json" in capsys.readouterr().err
