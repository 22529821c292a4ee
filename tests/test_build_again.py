"""Same pictures, same bytes: with workers, ranks, interruptions, failures and crashes."""

import subprocess
import sys
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from shard_building import (
    QUIET,
    SAME,
    TOOLS,
    Workers,
    build,
    build_shards,
    contents,
    folder_of,
    make_reference,
    start_crashing_maker,
    start_dying_maker,
    start_meeting_maker,
)

from coherent_ddrm.images import encode
from coherent_ddrm.shard_writer import ShardWriter


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Path, Path]:
    return make_reference(tmp_path_factory.mktemp("reference"))


def test_two_worker_processes_give_the_same_bytes(reference, tmp_path):
    """The command itself, started from another folder."""
    images, out = reference
    command = [sys.executable, str(TOOLS / "build_shards.py"), str(images), str(tmp_path / "out"), "--size", "16"]
    subprocess.run([*command, *SAME, "--quiet", "--workers", "2"], cwd=tmp_path, check=True)
    assert contents(tmp_path / "out") == contents(out)


def test_results_come_in_order_however_the_workers_finish(tmp_path, monkeypatch):
    monkeypatch.setattr("workers.CHUNK", 1)
    pool = Workers(2, partial(start_meeting_maker, tmp_path))
    results = list(pool.results([{"number": i} for i in range(5)]))
    pool.close()
    assert [result.row["number"] for result in results] == [0, 1, 2, 3, 4]
    assert results[0].members["process"] != results[1].members["process"]


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
    command = [str(images), str(copy), "--size", "16", *QUIET, *SAME]
    killed = get_context("fork").Process(target=build_shards.main, args=(command,))  # fork: torch is loaded already
    killed.start()
    deadline = time.time() + 60
    while not (copy / "shard-000000.tar").exists() and killed.is_alive() and time.time() < deadline:
        time.sleep(0.002)
    killed.kill()
    killed.join()
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

    add = ShardWriter.add
    monkeypatch.setattr(ShardWriter, "add", fail)
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
    """The segmentation fault of a decoder, played by a maker that ends the process on one picture."""
    monkeypatch.setattr("samples.start_maker", start_crashing_maker)
    few = folder_of(tmp_path / "few", 2)
    (few / "01.png").write_bytes(encode(np.full((24, 24, 3), 250, np.uint8), "PNG"))
    manifest = build(few, tmp_path / "out", "--segmentation", "none", "--workers", "1")
    assert [entry["path"] for entry in manifest["skipped"]] == ["01.png"] and manifest["samples"] == 1
    assert "crashed" in manifest["skipped"][0]["reason"]


def test_a_worker_may_die_while_results_are_being_written(monkeypatch):
    """A slow consumer: the death shows when the next chunk is handed out, before the dead one's result is taken."""
    monkeypatch.setattr("workers.CHUNK", 1)
    pool = Workers(1, start_dying_maker)
    results = []
    for result in pool.results([{"number": i} for i in range(8)]):
        results.append(result)
        time.sleep(0.3)
    pool.close()
    assert [result.row["number"] for result in results] == list(range(8))
    assert [result.row["number"] for result in results if result.skipped] == [3]
