"""The auxiliary losses in training: how they are balanced, that they keep apart, that such a run resumes exactly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from training_runs import arguments, disc_shards, rows, train

from coherent_ddrm.config import AuxiliaryConfig, DiffusionRun, DiTConfig, OptimConfig
from coherent_ddrm.data import open_dataset
from coherent_ddrm.losses import low_noise
from coherent_ddrm.models.perceptual import make_perceptual
from coherent_ddrm.tasks.diffusion import DiffusionTask

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return disc_shards(tmp_path_factory.mktemp("discs"))


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("perceptual") / "export"
    torch.manual_seed(0)
    make_perceptual("tiny", num_labels=2).save_pretrained(folder)
    return str(folder)


def make_task(shards, accumulate=1, **auxiliary) -> tuple[DiffusionTask, dict]:
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    run = DiffusionRun(
        model=DiTConfig(size="tiny"),
        optim=OptimConfig(batch=8, steps=10, warmup=1, optimizer="adamw"),
        auxiliary=AuxiliaryConfig(**{"width": 8, "start": 0, "cutoff": 0.8, **auxiliary}),
    )
    source = open_dataset(shards)
    task = DiffusionTask(run, source, Accelerator(cpu=True, gradient_accumulation_steps=accumulate))
    with torch.no_grad():  # a fresh network returns its fill: give it something of its own
        for weight in task.main.net.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return task, source.batch(range(8))


def step(task, batch, number, shares=1):
    for learner in task.learners.values():
        learner.set_rate(number)
    for i in range(shares):
        size = 8 // shares
        part = {key: value[i * size : (i + 1) * size] for key, value in batch.items()}
        with task.accelerator.accumulate(*task.objectives):
            losses = task.backward(part, number, range(i * size, (i + 1) * size), look=True)
    return losses


def finish(task, number):
    task.clip(1.0)
    task.update(number)
    task.zero_grad()


def test_weight_0_builds_and_computes_nothing(shards):
    task, batch = make_task(shards)
    assert not task.auxiliary and task.auxiliary.perceptual is None and list(task.learners) == ["transformer"]
    task.prepare(False)
    assert step(task, batch, 0).keys() == {"loss", "norm_diffusion"}


def test_weight_1_pulls_as_strongly_as_diffusion_on_the_same_samples(shards, perceptual):
    task, batch = make_task(shards, perceptual=1.0, network=perceptual, adversarial=0.5)
    task.prepare(False)
    shown = task.show(task.examples(batch, 0, range(8)))
    x0_hat = task.bare(*shown.inputs).detach()
    losses, pulls = task.pull(x0_hat, shown, 0)
    assert losses.keys() == {"loss", "perceptual", "adversarial"} and not pulls["perceptual"].any()  # nothing known yet
    task.auxiliary.update()
    losses, pulls = task.pull(x0_hat, shown, 1)
    low = low_noise(shown.t, 0.8)[:, None, None, None] * pulls["diffusion"]
    assert 0 < float(low.norm()) < float(pulls["diffusion"].norm())
    assert float(pulls["perceptual"].norm()) == pytest.approx(float(low.norm()), rel=1e-3)
    assert float(pulls["adversarial"].norm()) == pytest.approx(0.5 * float(low.norm()), rel=1e-3)
    noisy = low_noise(shown.t, 0.8) == 0
    assert noisy.any() and not pulls["perceptual"][noisy].any() and not pulls["adversarial"][noisy].any()
    known = 1 - shown.hole
    assert not (pulls["perceptual"] * known).any() and not (pulls["adversarial"] * known).any()


def test_each_network_learns_from_its_own_loss_alone(shards):
    task, batch = make_task(shards, adversarial=1.0)
    task.prepare(False)
    shown = task.show(task.examples(batch, 0, range(8)))
    x0_hat = task.bare(*shown.inputs)
    task.pull(x0_hat.detach(), shown, 0)
    judge = task.auxiliary.learner.net
    assert all(p.grad is None and p.requires_grad for p in judge.parameters())
    task.teach(x0_hat, shown)
    assert all(p.grad is None for p in task.main.net.parameters())
    assert any(p.grad.any() for p in judge.parameters())


def test_the_discriminator_learns_alone_first(shards):
    task, batch = make_task(shards, adversarial=1.0, start=2)
    task.prepare(False)
    for number in range(3):
        losses = step(task, batch, number)
        assert ("adversarial" in losses) == (number >= 2) and "discriminator" in losses
        finish(task, number)


def test_passes_add_up_to_one_batch(shards, perceptual):
    """One pass of 8 and two of 4 leave the same weights, the balance and the discriminator's included."""
    results = []
    for shares in (1, 2):
        task, batch = make_task(shards, shares, perceptual=0.5, network=perceptual, adversarial=0.5)
        task.prepare(False)
        for number in range(3):
            step(task, batch, number, shares)
            finish(task, number)
        results.append(task.tensors())
    one, two = results
    assert {"net", "discriminator-net", "balance"} <= one.keys() == two.keys()
    for name in ("balance", "net", "discriminator-net"):
        for key in one[name]:
            torch.testing.assert_close(one[name][key], two[name][key], rtol=2e-3, atol=2e-5)


def test_gradient_norms_are_those_of_the_last_layer(shards, perceptual):
    """The norm of the sum of all pulls at the last layer is the norm of its gradient."""
    task, batch = make_task(shards, perceptual=1.0, network=perceptual)
    task.prepare(False)
    step(task, batch, 0)
    finish(task, 0)
    shown = task.show(task.examples(batch, 1, range(8)))
    x0_hat = task.bare(*shown.inputs)
    _, pulls = task.pull(x0_hat.detach(), shown, 1)
    norms = task.last_layer(shown, {**pulls, "all": sum(pulls.values())})
    (x0_hat * sum(pulls.values())).sum().backward()
    assert float(norms["norm_all"]) == pytest.approx(float(task.main.net.last_layer.grad.norm()), rel=1e-4)
    assert 0 < float(norms["norm_perceptual"]) < float(norms["norm_diffusion"])


OPTIONS = ["--model.size", "tiny", "--optim.warmup", "1", "--optim.cooldown", "0.0", "--auxiliary.width", "8"]
OPTIONS += ["--auxiliary.adversarial", "0.3", "--auxiliary.perceptual", "0.3", "--auxiliary.start", "1"]
OPTIONS += ["--auxiliary.cutoff", "0.9"]


def test_a_run_with_all_losses_resumes_exactly(tmp_path, shards, perceptual):
    """Stopped at 2 and resumed to 4 equals 4 straight, to the bit, every file of the checkpoint."""
    options = [*OPTIONS, "--auxiliary.network", perceptual]
    train("diffusion", tmp_path / "a", shards, *options, "--optim.steps", "4")
    for steps in ("2", "4"):
        train("diffusion", tmp_path / "b", shards, *options, "--optim.steps", steps)
    a, b = (tmp_path / run / "checkpoints" / "step-00000004" for run in "ab")
    files = sorted(path.name for path in a.glob("*.safetensors"))
    assert {"balance.safetensors", "discriminator-net.safetensors", "discriminator-ema.safetensors"} <= set(files)
    for name in files:
        mine, theirs = load_file(a / name), load_file(b / name)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine), name
    wanted = {"loss", "perceptual", "adversarial", "discriminator", "norm_diffusion", "norm_perceptual"}
    assert wanted <= [row for row in rows(tmp_path / "a") if "loss" in row][-1].keys()


def test_two_processes_balance_alike(tmp_path, shards, perceptual):
    """Two processes of 4 and one of 8: the same losses, the discriminator's included."""
    options = [*OPTIONS, "--auxiliary.network", perceptual, "--optim.steps", "3"]
    train("diffusion", tmp_path / "one", shards, *options)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = arguments(tmp_path / "two", shards, *options)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launch, str(ROOT / "train" / "diffusion.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = ([row for row in rows(tmp_path / run) if "loss" in row] for run in ("one", "two"))
    for name in ("loss", "perceptual", "discriminator", "adversarial"):
        mine, theirs = ([row.get(name, 0.0) for row in run] for run in (one, two))
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5), name
