"""A network spread over two processes: the same run as in one, and checkpoints that either takes up."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import ROOT, arguments, disc_shards, rows, train

OPTIONS = ["--model.size", "tiny", "--optim.steps", "4", "--optim.warmup", "1", "--optim.optimizer", "adamw"]
OPTIONS += ["--auxiliary.adversarial", "0.2", "--auxiliary.start", "1", "--auxiliary.cutoff", "0.9"]
SPREAD = ["--optim.shard", "True", "--optim.checkpointing", "True"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return disc_shards(tmp_path_factory.mktemp("discs"))


def launch(out, shards, *options, processes=2):
    """train/diffusion.py by torchrun."""
    command = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", str(processes)]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(ROOT / "train" / "diffusion.py")]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command += arguments(out, shards, *options)
    return subprocess.run(command, env=settings, capture_output=True, text=True, cwd=ROOT, timeout=240, check=False)


def losses(out):
    return [row["loss"] for row in rows(out) if "loss" in row]


def checkpoint(out, step):
    files = sorted((out / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    return {f"{file.stem}.{key}": value for file in files for key, value in load_file(file).items()}


def assert_alike(a, b):
    """Each tensor by its own size: sums in another order, divided by roots of squares, differ in the last digits."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(b[name], value, rtol=0, atol=0.02 * scale + 1e-9, msg=name)


def test_spread_over_two_processes_equals_one(tmp_path, shards):
    """Losses, weights, averages, optimizers, discriminator; then each goes on from the other's checkpoint."""
    train("diffusion", tmp_path / "one", shards, *OPTIONS)
    two = launch(tmp_path / "two", shards, *OPTIONS, *SPREAD)
    assert two.returncode == 0, two.stderr[-3000:]
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    assert_alike(checkpoint(tmp_path / "one", 4), checkpoint(tmp_path / "two", 4))
    assert_alike(*(load_file(next((tmp_path / run / "export").glob("*.safetensors"))) for run in ("one", "two")))

    for run in ("one", "two"):
        copy = tmp_path / f"{run}-on"
        shutil.copytree(tmp_path / run, copy)
        shutil.rmtree(copy / "checkpoints" / "step-00000004")
        (copy / "log.jsonl").unlink()
    train("diffusion", tmp_path / "two-on", shards, *OPTIONS)
    one = launch(tmp_path / "one-on", shards, *OPTIONS, *SPREAD)
    assert one.returncode == 0, one.stderr[-3000:]
    for run in ("one-on", "two-on"):
        assert losses(tmp_path / run) == pytest.approx(losses(tmp_path / "one")[2:], abs=1e-5)
        assert_alike(checkpoint(tmp_path / "one", 4), checkpoint(tmp_path / run, 4))


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        ("diffusion", ["--optim.optimizer", "adamw"], "one process has nobody to share with"),
        ("structure", [], "only train/diffusion.py"),
        ("diffusion", ["--optim.optimizer", "muon"], "muon"),
    ],
)
def test_what_cannot_be_spread_says_so(tmp_path, shards, capsys, script, options, words):
    with pytest.raises(SystemExit) as stopped:
        train(script, tmp_path / "run", shards, "--optim.steps", "2", "--optim.shard", "True", *options)
    assert stopped.value.code == 2 and words in capsys.readouterr().err
