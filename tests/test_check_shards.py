"""check_shards.py finds and names every kind of damage."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from shard_building import check_shards, contents, make_reference

from coherent_ddrm.data import ShardDataset
from coherent_ddrm.shard_writer import ShardWriter
from coherent_ddrm.shards import dataset_hash, read_json, write_json


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Path, Path]:
    return make_reference(tmp_path_factory.mktemp("reference"))


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
    with tarfile.open(copy / "shard-000000.tar", "a", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("extra.pkl")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert "after the last sample" in problems(copy, capsys)


def test_a_folder_that_cannot_be_checked(tmp_path, capsys):
    assert check_shards.main([str(tmp_path)]) == 2
    assert "no manifest.json" in capsys.readouterr().err
