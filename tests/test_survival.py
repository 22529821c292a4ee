"""What a run survives: kills, signals, damaged files, a full disk, numbers that are none."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_runs import ROOT, arguments, disc_shards, rows, train

from coherent_ddrm import checkpoints, run_folder, training
from coherent_ddrm.checkpoints import read_checkpoint, verify_checkpoint, write_checkpoint
from coherent_ddrm.config import DiffusionRun
from coherent_ddrm.data import DataError, Tolerant, ids_for_step, open_dataset
from coherent_ddrm.errors import CheckpointError
from coherent_ddrm.export import sha256
from coherent_ddrm.run_folder import RunFolder
from coherent_ddrm.run_lock import RunLock, RunLocked
from coherent_ddrm.tasks.diffusion import DiffusionTask

TINY = ["--model.size", "tiny", "--optim.warmup", "1", "--optim.cooldown", "0.0"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return disc_shards(tmp_path_factory.mktemp("discs"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, shards):
    """A run of 12 steps that nothing happened to."""
    out = tmp_path_factory.mktemp("straight") / "run"
    train("diffusion", out, shards, *TINY, "--optim.steps", "12")
    return weights(out, 12)


def weights(out, step):
    folder = Path(out) / "checkpoints" / f"step-{step:08d}"
    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[f][k], two[f][k]) for f in one for k in one[f])


def start(out, shards, *options):
    """The training script in a process of its own."""
    command = [sys.executable, str(ROOT / "train" / "diffusion.py"), *arguments(out, shards, *TINY, *options)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, text=True)


def wait_for(condition, process, seconds=90):
    end = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < end:
        time.sleep(0.01)
    assert condition(), process.communicate()[1][-2000:]


# ---- one checkpoint --------------------------------------------------------------------------------------------------


def state(value):
    return {"net": {"w": torch.full((3, 4), float(value))}, "ema": {"w": torch.zeros(2)}}


def test_what_is_written_is_read(tmp_path):
    write_checkpoint(tmp_path / "c", state(1), {"step": 7})
    tensors, facts = read_checkpoint(tmp_path / "c")
    assert torch.equal(tensors["net"]["w"], torch.ones(3, 4)) and facts == {"step": 7}
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "c").iterdir()}
    assert len(modes) == 1, "some files are more private than others"


def test_every_flipped_byte_is_found(tmp_path):
    """One in each file, at the start, in the middle and at the end."""
    write_checkpoint(tmp_path / "c", state(1), {"step": 7})
    for file in sorted((tmp_path / "c").iterdir()):
        whole = file.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(CheckpointError, match=r"torn or altered|not readable|no table|missing|manifest"):
                verify_checkpoint(tmp_path / "c")
        file.write_bytes(whole)
    verify_checkpoint(tmp_path / "c")


def test_torn_missing_and_stray_files_are_named(tmp_path):
    write_checkpoint(tmp_path / "c", state(1), {"step": 7})
    file = tmp_path / "c" / "net.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match=r"net\.safetensors: torn or altered"):
        read_checkpoint(tmp_path / "c")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"net\.safetensors: missing"):
        read_checkpoint(tmp_path / "c")
    file.write_bytes(whole)
    (tmp_path / "c" / "more.safetensors").write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"more\.safetensors: torn or altered"):
        read_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("point", ["save_file", "sha256", "_flush", "os.replace"])
def test_a_save_that_is_cut_short_leaves_the_old_one(tmp_path, monkeypatch, point):
    """At each step of a save, its first and a later call: the old checkpoint stays whole, nothing is left beside it."""
    write_checkpoint(tmp_path / "c", state(1), {"step": 7})
    owner, name = (checkpoints.os, "replace") if point == "os.replace" else (checkpoints, point)
    original = getattr(owner, name)
    for survived in (0, 1):
        calls = []

        def cut(*args, survived=survived, calls=calls):
            calls.append(args)
            if len(calls) == survived + 1:
                raise OSError(28, "No space left on device")
            return original(*args)

        monkeypatch.setattr(owner, name, cut)
        with pytest.raises(OSError, match="No space"):
            write_checkpoint(tmp_path / "c", state(2), {"step": 8})
        monkeypatch.setattr(owner, name, original)
        assert read_checkpoint(tmp_path / "c")[1] == {"step": 7}
        assert [path.name for path in tmp_path.iterdir()] == ["c"]


# ---- a run's folder --------------------------------------------------------------------------------------------------


def test_the_last_and_the_best_are_kept(tmp_path):
    folder = RunFolder(tmp_path, DiffusionRun())
    folder.create()
    for step in (1, 2, 3, 4, 5):
        folder.save(step, state(step), keep=2)
        if step == 2:
            folder.mark_best(2, "val_loss", 0.5)
    assert [path.name[-1] for path in folder.saved()] == ["2", "4", "5"] and folder.best() == ("step-00000002", 0.5)
    (folder.checkpoints / ".step-00000009.tmp").mkdir()
    folder.create()
    assert not list(folder.checkpoints.glob(".*"))


def test_a_save_killed_between_its_renames_is_put_back(tmp_path):
    folder = RunFolder(tmp_path, DiffusionRun())
    folder.save(3, state(3), keep=2)
    os.replace(folder.checkpoints / "step-00000003", folder.checkpoints / ".step-00000003.old")
    (folder.checkpoints / ".step-00000003.tmp").mkdir()
    folder.create()
    assert folder.newest().name == "step-00000003" and not list(folder.checkpoints.glob(".*"))


def test_resuming_reads_through_each_file_once(tmp_path, monkeypatch):
    """When it is verified, by one process; all then map the files."""
    folder, read = RunFolder(tmp_path, DiffusionRun()), []
    folder.save(3, state(3), keep=2)
    monkeypatch.setattr(checkpoints, "sha256", lambda path: read.append(path.name) or sha256(path))
    tensors, facts = folder.load(folder.newest())
    assert sorted(read) == ["ema.safetensors", "net.safetensors", "state.json"]
    assert facts["step"] == 3 and torch.equal(tensors["net"]["w"], state(3)["net"]["w"])


def test_a_dry_run_changes_nothing(tmp_path, shards, capsys):
    train("diffusion", tmp_path / "run", shards, *TINY, "--optim.steps", "4")
    (tmp_path / "run" / "checkpoints" / "step-00000004" / "ema.safetensors").write_bytes(b"torn")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    train("diffusion", tmp_path / "run", shards, *TINY, "--optim.steps", "4", "--dry-run")
    said = capsys.readouterr()
    assert "starting at step 2" in said.out and "torn or altered" in said.err
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_used(tmp_path, capsys):
    folder = RunFolder(tmp_path, DiffusionRun())
    for step in (1, 2, 3):
        folder.save(step, state(step), keep=3)
    (folder.checkpoints / "step-00000003" / "ema.safetensors").write_bytes(b"torn")
    shutil.rmtree(folder.checkpoints / "step-00000002")
    assert folder.newest().name == "step-00000001"
    assert "ema.safetensors: torn or altered" in capsys.readouterr().err
    assert (folder.checkpoints / "damaged-step-00000003").is_dir()
    shutil.rmtree(folder.checkpoints / "step-00000001")
    assert folder.newest() is None


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, shards, straight, capsys):
    train("diffusion", tmp_path / "run", shards, *TINY, "--optim.steps", "8")
    file = tmp_path / "run" / "checkpoints" / "step-00000008" / "net.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    train("diffusion", tmp_path / "run", shards, *TINY, "--optim.steps", "12")
    said = capsys.readouterr()
    assert "starting at step 6" in said.out and "step-00000008/net.safetensors: torn or altered" in said.err
    assert same(weights(tmp_path / "run", 12), straight)


def test_one_run_per_folder(tmp_path):
    first, worker, second = RunLock(tmp_path), RunLock(tmp_path), RunLock(tmp_path)
    first.take_first()
    worker.take_worker()
    with pytest.raises(RunLocked, match=rf"process {os.getpid()} on .* still trains here"):
        second.take_first()
    first.release()  # the launcher was killed, a worker lives on
    with pytest.raises(RunLocked, match="still trains here"):
        second.take_first()
    worker.release()
    second.take_first()  # the files are still there, and mean nothing
    with pytest.raises(RunLocked):
        first.take_first()


def test_a_second_start_is_refused(tmp_path, shards):
    one = start(tmp_path / "run", shards, "--optim.steps", "100000", "--log.save", "100000")
    try:
        wait_for(lambda: (tmp_path / "run" / "log.jsonl").exists(), one)
        two = start(tmp_path / "run", shards, "--optim.steps", "100000", "--log.save", "100000")
        error = two.communicate(timeout=90)[1]
        assert two.returncode == 2 and f"process {one.pid} on" in error and "Traceback" not in error
    finally:
        one.kill()
        one.communicate()


# ---- signals and kills -----------------------------------------------------------------------------------------------


def test_sigterm_saves_and_leaves(tmp_path, shards, straight):
    """The exit code is that of a process ended by SIGTERM; the same command goes on to the same weights."""
    out = tmp_path / "run"
    running = start(out, shards, "--optim.steps", "12", "--log.save", "100", "--log.validate", "100")
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n") >= 3, running)
    running.send_signal(signal.SIGTERM)
    error = running.communicate(timeout=60)[1]
    saved = RunFolder(out, None).saved()
    assert running.returncode == 128 + signal.SIGTERM and "asked to stop: saved at step" in error
    assert len(saved) == 1 and 3 <= int(saved[0].name[-8:]) < 12
    train("diffusion", out, shards, *TINY, "--optim.steps", "12")
    assert same(weights(out, 12), straight)


def test_a_stop_does_not_write_a_step_twice(tmp_path, shards, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(run_folder, "write_checkpoint", lambda *args: written.append(args[0].name))
    monkeypatch.setattr(training, "agree", lambda accelerator, value, stop: (True, True))
    with pytest.raises(SystemExit) as left:
        train("diffusion", tmp_path / "run", shards, *TINY, "--optim.steps", "4", "--log.save", "1")
    assert left.value.code == 128 + signal.SIGTERM and written == ["step-00000001"]
    assert "asked to stop: saved at step 1" in capsys.readouterr().err


def test_killed_twice_and_the_same_weights(tmp_path, shards, straight):
    """SIGKILL while it trains and while it writes a checkpoint; tests/benchmarks/survival.py does it 20 times."""
    out = tmp_path / "run"
    for killed_at in (4, 8):
        running = start(out, shards, "--optim.steps", "12")
        ready = out / "checkpoints"
        wait_for(lambda at=killed_at, ready=ready: any(ready.glob(f".step-{at:08d}*")) or
                 (ready / f"step-{at:08d}").exists(), running)  # fmt: skip
        running.kill()
        running.communicate()
    train("diffusion", out, shards, *TINY, "--optim.steps", "12")
    assert same(weights(out, 12), straight)


# ---- disk, data, numbers ---------------------------------------------------------------------------------------------


def test_a_full_disk_fails_the_save_and_not_the_run(tmp_path, shards, straight, capsys):
    """A file system with room for two checkpoints, of which one moment needs three."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        train("diffusion", mount / "run", shards, *TINY, "--optim.steps", "4")
        room = shutil.disk_usage(mount).free
        (mount / "filler").write_bytes(bytes(room - 200_000))
        options = [*TINY, "--log.sheet", "100", "--log.validate", "100"]
        with pytest.raises(SystemExit) as left:
            train("diffusion", mount / "run", shards, *options, "--optim.steps", "8")
        error = capsys.readouterr().err
        assert "checkpoint of step 6 cannot be written" in error and "the run goes on" in error
        assert left.value.code == 2 and "step 8 cannot be written" in error and "make room and start again" in error
        folder = RunFolder(mount / "run", None)
        assert folder.newest().name == "step-00000004" and not list(folder.checkpoints.glob(".*"))
        (mount / "filler").unlink()
        train("diffusion", mount / "run", shards, *TINY, "--optim.steps", "12", "--log.save", "12", "--log.keep", "1")
        assert same(weights(mount / "run", 12), straight)
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False)


FULL = """
import runpy, sys
from coherent_ddrm import run_folder

def full(*args):
    raise OSError(28, "No space left on device")

run_folder.write_checkpoint = full
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize("spread", [False, True])
def test_all_processes_leave_when_the_first_cannot_save(tmp_path, shards, spread):
    """Two processes without a launcher, which would end the second: each says why, and exits with 2."""
    options = [*TINY, "--optim.steps", "2", "--optim.optimizer", "adamw", "--optim.shard", str(spread)]
    command = [sys.executable, "-c", FULL, ROOT / "train" / "diffusion.py", *arguments(tmp_path, shards, *options)]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29400 + os.getpid() % 200), "WORLD_SIZE": "2"}
    running = []
    for rank in ("0", "1"):
        place = {**meeting, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        settings = {**os.environ, **place, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, env=settings, text=True, cwd=ROOT))
    try:
        errors = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, error in zip(running, errors, strict=True):
        assert process.returncode == 2 and "Traceback" not in error, error[-2000:]
        assert "error: the checkpoint of step 2 cannot be written" in error


def damage(shards, to, sample=5):
    """A copy of the shards in which one sample's picture is noise."""
    shutil.copytree(shards, to, ignore=shutil.ignore_patterns("cache-*", ".cache-*"))
    dataset = open_dataset(to, cache=False)
    shard, row, key = dataset._row(sample)
    place, length = int(row["offset"]), int(row["length"])
    tar = dataset._tars[shard]
    data = bytearray(tar.read_bytes())
    begin = data.index(b"\x89PNG", place) if b"\x89PNG" in data[place : place + length] else place + 512
    data[begin + 20 : begin + 60] = bytes(40)
    tar.write_bytes(bytes(data))
    return key


@pytest.mark.parametrize("cache", [False, True])
def test_a_damaged_picture_is_left_out_counted_and_named(tmp_path, shards, cache, capsys):
    key = damage(shards, tmp_path / "shards")
    source, whole = open_dataset(tmp_path / "shards", cache=cache), open_dataset(shards, cache=False)
    tolerant = Tolerant(source, limit=1 / 24)
    batch = tolerant.batch(np.array([4, 5, 6]))
    assert batch["key"] == [whole.key(4), whole.key(6), whole.key(6)] and len(tolerant.damaged) == 1
    assert np.array_equal(batch["image"][2], whole.batch(np.array([6]))["image"][0])
    assert f"sample {key}" in capsys.readouterr().err
    tolerant.batch(np.array([5, 5]))
    assert len(tolerant.damaged) == 1 and not capsys.readouterr().err  # named once
    with pytest.raises(DataError, match=r"1 of 24 samples are damaged, more than data.damaged 0\.01 allows"):
        Tolerant(source, limit=0.01).batch(np.array([5]))


def test_a_run_with_a_damaged_picture(tmp_path, shards, capsys):
    damage(shards, tmp_path / "shards")
    options = [*TINY, "--optim.steps", "3", "--data.val", shards]
    with pytest.raises(SystemExit) as left:
        train("diffusion", tmp_path / "strict", tmp_path / "shards", *options)
    assert left.value.code == 2 and "more than data.damaged 0.001 allows" in capsys.readouterr().err
    train("diffusion", tmp_path / "mild", tmp_path / "shards", *options, "--data.damaged", "0.05")
    assert "left out" in capsys.readouterr().err and rows(tmp_path / "mild")[-1]["step"] == 3


def test_a_missing_shard_is_an_error_before_work(tmp_path, shards, capsys):
    shutil.copytree(shards, tmp_path / "shards", ignore=shutil.ignore_patterns("cache-*"))
    next((tmp_path / "shards").glob("*.tar")).unlink()
    with pytest.raises(SystemExit) as left:
        train("diffusion", tmp_path / "run", tmp_path / "shards", *TINY)
    assert left.value.code == 2 and "shard-000000.tar" in capsys.readouterr().err


def poison(monkeypatch, bad):
    """Losses of the steps in `bad` are no numbers."""
    original = DiffusionTask.diffusion

    def loss_of(self, x0_hat, shown):
        loss = original(self, x0_hat, shown)
        return loss * float("nan") if self.step in bad else loss

    backward = DiffusionTask.backward

    def noted(self, part, step, places, look):
        self.step = step
        return backward(self, part, step, places, look)

    monkeypatch.setattr(DiffusionTask, "step", -1, raising=False)
    monkeypatch.setattr(DiffusionTask, "diffusion", loss_of)
    monkeypatch.setattr(DiffusionTask, "backward", noted)


def test_steps_without_numbers_are_left_out(tmp_path, shards, monkeypatch, capsys):
    """Two in a row are survived, with the batch named and the weights as they were."""
    poison(monkeypatch, {3, 4})
    train("diffusion", tmp_path / "run", shards, *TINY, "--optim.steps", "6", "--log.save", "1", "--log.keep", "9")
    before, after, later = (weights(tmp_path / "run", step) for step in (3, 5, 6))
    assert same(before, after) and not same(after, later)
    error = capsys.readouterr().err
    source = open_dataset(shards)
    assert all(source.key(int(i)) in error for i in ids_for_step(3, 8, 24, 0))
    assert error.count("no step is taken") == 2 and rows(tmp_path / "run")[-1]["step"] == 6
    assert [row["skipped"] for row in rows(tmp_path / "run") if "skipped" in row][-1] == 2


def test_a_state_that_cannot_be_dumped_does_not_hide_why(tmp_path, shards, monkeypatch, capsys):
    poison(monkeypatch, {0, 1, 2})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "failed").write_text("no folder")
    with pytest.raises(SystemExit) as left:
        train("diffusion", tmp_path / "run", shards, *TINY, "--optim.steps", "4")
    error = capsys.readouterr().err
    assert left.value.code == 2 and "at step 2, the last of 3 in a row" in error
    assert "the state before them cannot be written (" in error and "the batch was: " in error


def test_three_steps_without_numbers_stop_the_run_and_can_be_shown_again(tmp_path, shards, monkeypatch, capsys):
    poison(monkeypatch, {3, 4, 5, 6})
    options = [*TINY, "--optim.steps", "9", "--log.save", "2"]
    with pytest.raises(SystemExit) as left:
        train("diffusion", tmp_path / "run", shards, *options)
    error = capsys.readouterr().err
    assert left.value.code == 2 and "at step 5, the last of 3 in a row" in error
    dumped = tmp_path / "run" / "failed" / "step-00000003"
    assert read_checkpoint(dumped)[1]["step"] == 3 and len(read_checkpoint(dumped)[1]["keys"]) == 8
    shutil.copytree(dumped, tmp_path / "again" / "checkpoints" / "step-00000003")
    with pytest.raises(SystemExit):
        train("diffusion", tmp_path / "again", shards, *options)
    assert "at step 5, the last of 3 in a row" in capsys.readouterr().err
    saved = [path.name for path in RunFolder(tmp_path / "run", None).saved()]
    assert saved == ["step-00000002", "step-00000004"]  # the second with the weights of step 3
    for path in RunFolder(tmp_path / "run", None).saved():
        assert all(v.isfinite().all() for v in read_checkpoint(path)[0]["net"].values())
