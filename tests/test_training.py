"""The parts of a run: optimizers, averages, checkpoints; and both training scripts end to end on made-up shards."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from training_runs import arguments, disc_shards, rows, train

from coherent_ddrm.config import ConfigError, DiffusionRun, DiTConfig, JointRun, OptimConfig, optimizer_options
from coherent_ddrm.data import ids_for_step, open_dataset
from coherent_ddrm.examples import draw_times, logit_normal_time, make_examples
from coherent_ddrm.learner import EMA, Learner, learning_rate, make_optimizers
from coherent_ddrm.losses import diffusion_loss, hole_mean, min_snr_weight, v_weight
from coherent_ddrm.models.dit import make_dit
from coherent_ddrm.run_folder import RunFolder
from coherent_ddrm.run_log import Log
from coherent_ddrm.tasks.joint import JointTask
from coherent_ddrm.training import passes, per_pass

ROOT = Path(__file__).parent.parent


def learner_of(optimizer="muon"):
    torch.manual_seed(0)
    run = DiffusionRun(optim=OptimConfig(optimizer=optimizer, steps=10, warmup=2))
    return Learner(make_dit("tiny"), **optimizer_options(run)), run


def learn(learner, step):
    learner.set_rate(step)
    generator = torch.Generator().manual_seed(step)
    x_t = torch.randn(2, 3, 16, 16, generator=generator)
    learner.net(x_t, torch.tensor([0.4, 0.8])).square().mean().backward()
    for optimizer in learner.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    learner.average(step)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_equals_never_stopped(tmp_path, optimizer):
    straight, run = learner_of(optimizer)
    for step in range(6):
        learn(straight, step)
    first, _ = learner_of(optimizer)
    for step in range(3):
        learn(first, step)
    RunFolder(tmp_path, run).save(3, first.tensors(), keep=2)
    second, _ = learner_of(optimizer)
    folder = RunFolder(tmp_path, run)
    tensors, state = folder.load(folder.newest())
    second.load(tensors)
    assert state["step"] == 3 and second.files == list(first.tensors())
    for step in range(3, 6):
        learn(second, step)
    for mine, theirs in zip(straight.tensors().values(), second.tensors().values(), strict=True):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_another_config_is_refused_but_longer_runs_are_not(tmp_path):
    learner, run = learner_of()
    saved = RunFolder(tmp_path, run).save(1, learner.tensors(), keep=2)
    run.optim.steps = 99
    assert RunFolder(tmp_path, run).load(saved)[1]["step"] == 1
    run.optim.lr = 0.5
    with pytest.raises(ConfigError, match=r"optim.lr was 0.001, is 0.5"):
        RunFolder(tmp_path, run).load(saved)


def test_learning_rate():
    rates = [learning_rate(step, 1.0, steps=100, warmup=10, cooldown=0.2) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:80] == [1.0] * 71
    assert rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)


def test_ema_follows_the_closed_form():
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    ema = EMA(net, decay=0.9)
    torch.nn.init.ones_(net.weight)
    expected = 0.0
    for step in range(50):
        ema.update(net, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + 1 - decay
    assert float(ema.weights["weight"]) == pytest.approx(expected, rel=1e-5)


def test_muon_takes_the_matrices_of_the_blocks_and_nothing_is_forgotten():
    net = make_dit("tiny", structure_channels=3)
    muon, adamw = make_optimizers(net, "muon", 1e-3, 0.01, (0.9, 0.99))
    names = {id(p): n for n, p in net.named_parameters()}
    of = lambda optimizer: [names[id(p)] for group in optimizer.param_groups for p in group["params"]]  # noqa: E731
    assert sorted(of(muon) + of(adamw)) == sorted(names.values())
    assert "blocks.0.attention.q.weight" in of(muon) and "blocks.0.modulation.weight" in of(adamw)


def test_batches_split_over_processes_and_passes():
    assert per_pass(64, 2, 4) == 8
    with pytest.raises(ConfigError, match="64 does not divide over 3 processes"):
        per_pass(64, 3, 1)
    ids = ids_for_step(0, 12, 100, 0)
    places = []
    for rank in range(2):
        mine = {"key": [str(i) for i in ids[rank::2]]}
        for part, where in passes(mine, 3, rank, 2):
            assert [str(ids[i]) for i in where] == part["key"]
            places += where
    assert sorted(places) == list(range(12))


# ---- examples and losses ---------------------------------------------------------------------------------------------


def made_up_batch(count=8, side=32):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (count, side, side, 3), np.uint8)
    maps = generator.integers(0, 3, (2, count, side, side), np.uint8)
    return {"image": image, "edges": maps[0], "segmentation": maps[1], "key": [str(i) for i in range(count)]}


def test_examples_depend_on_their_place_alone():
    batch = made_up_batch()
    args = dict(holes="coherent-train", seed=1, step=5, global_batch=8, prior=0.3, draws=2)
    whole = make_examples(batch, places=range(8), **args)
    odd = make_examples({k: v[1::2] for k, v in batch.items()}, places=range(1, 8, 2), **args)
    assert all(torch.equal(getattr(whole, k)[1::2], getattr(odd, k)) for k in ("x0", "hole", "u", "choice", "pure"))
    assert torch.equal(whole.noise(2)[[2, 3, 6, 7]], odd.noise(2)[:4])
    assert whole.x0.min() >= -1 and whole.x0.max() <= 1
    strata = (whole.u * 8).floor().long()
    assert torch.equal(strata, torch.stack([torch.arange(8), (torch.arange(8) + 4) % 8], 1)), "not stratified"


def test_flips_move_picture_and_maps_together():
    batch = made_up_batch(32)
    batch["edges"] = batch["image"][..., 0]
    examples = make_examples(batch, "half", 0, 0, range(32), 32)
    assert torch.equal(((examples.x0[:, 0] + 1) * 127.5).round().byte(), examples.edges)
    flipped = [(examples.edges[i].numpy() != batch["edges"][i]).any() for i in range(32)]
    assert 5 < sum(flipped) < 27


def test_logit_normal_quantiles():
    t = logit_normal_time(torch.tensor([0.5, 0.8413447]), mean=0.4, std=1.0)
    torch.testing.assert_close(t, torch.sigmoid(torch.tensor([0.4, 1.4])), rtol=1e-4, atol=0)


def test_drawn_times_include_pure_noise():
    examples = make_examples(made_up_batch(), "half", 0, 0, range(8), 8, draws=2)
    t = draw_times(examples, (0.8, 1.2), pure_noise=0.5).view(8, 2)
    chosen = examples.pure < 0.5
    assert chosen.any() and (t[chosen] == 1).all() and (t[~chosen] < 1).all()
    assert torch.equal(t[~chosen], logit_normal_time(examples.u, 0.8, 1.2)[~chosen])


def test_diffusion_loss_by_hand():
    x0 = torch.zeros(1, 3, 2, 2)
    x0_hat = torch.tensor([[1.0, 2.0], [0.0, 9.0]]).expand(1, 3, 2, 2)
    hole = torch.tensor([[1.0, 1.0], [1.0, 0.0]])[None, None]
    assert float(hole_mean(x0_hat**2, hole)) == pytest.approx(5 / 3)
    weight = v_weight(torch.tensor([0.5]))
    assert float(diffusion_loss(x0_hat, x0, hole, weight)) == pytest.approx(5 / 3 / 0.25)
    snr = min_snr_weight(torch.tensor([0.5, 0.9]), torch.tensor([0.5, 0.1]))
    torch.testing.assert_close(snr, torch.tensor([1.0, 5.0]))


# ---- both scripts ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return disc_shards(tmp_path_factory.mktemp("discs"))


def test_both_stages_train_validate_and_resume(tmp_path, shards):
    """Stage one, then stage two on its plans; stopped at 2 and resumed to 4 equals 4 straight, to the bit."""
    train("structure", tmp_path / "one", shards, "--optim.steps", "2")
    assert {"val_edge_f1", "val_iou"} <= rows(tmp_path / "one")[-1].keys()
    options = ["--model.size", "tiny", "--objective.predictor", tmp_path / "one" / "export", "--optim.warmup", "1"]
    options += ["--optim.cooldown", "0.0"]
    train("diffusion", tmp_path / "a", shards, *options, "--optim.steps", "4")
    for steps in ("2", "4"):
        train("diffusion", tmp_path / "b", shards, *options, "--optim.steps", steps)
    a, b = (load_file(tmp_path / run / "checkpoints" / "step-00000004" / "ema.safetensors") for run in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / "a" / "sheets" / "00000004.png").exists()
    assert (tmp_path / "a" / "export" / "config.json").exists()
    losses = [row["loss"] for row in rows(tmp_path / "a") if "loss" in row]
    assert losses == [row["loss"] for row in rows(tmp_path / "b") if "loss" in row]


def test_two_processes_see_what_one_sees(tmp_path, shards):
    """Two processes of 4 pictures, by torchrun, and one process that accumulates two passes of 4: the same losses."""
    options = ["--model.size", "tiny", "--optim.steps", "3", "--optim.warmup", "1"]
    train("diffusion", tmp_path / "one", shards, *options, "--optim.accumulate", "2")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(ROOT / "train" / "diffusion.py"), *arguments(tmp_path / "two", shards, *options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = ([row["loss"] for row in rows(tmp_path / run) if "loss" in row] for run in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-5)
    a, b = (load_file(tmp_path / run / "checkpoints" / "step-00000003" / "net.safetensors") for run in ("one", "two"))
    assert all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)


def test_draws_share_a_step(tmp_path, shards):
    train("diffusion", tmp_path / "k", shards, "--model.size", "tiny", "--optim.steps", "2", "--objective.draws", "2")
    assert len(rows(tmp_path / "k")) == 3


def test_dry_run_writes_nothing_and_faults_are_one_line(tmp_path, shards, capsys):
    train("diffusion", tmp_path / "dry", shards, "--model.size", "tiny", "--dry-run")
    printed = capsys.readouterr().out
    parameters = sum(p.numel() for p in make_dit("tiny", structure_channels=3).parameters())
    assert f"{parameters / 1e6:.2f} M parameters" in printed and not (tmp_path / "dry").exists()
    activations = int(printed.split("pictures about ")[1].split(" MiB")[0])
    assert 1 <= activations < 100
    with pytest.raises(SystemExit) as left:
        train("diffusion", tmp_path / "dry", tmp_path / "nowhere", "--model.size", "tiny")
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith("error: ") and "nowhere" in error and error.count("\n") == 1


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, shards, capsys):
    """A hopeless learning rate: the run ends with the step and the keys of its batch, and saves nothing broken."""
    options = ["--model.size", "tiny", "--optim.steps", "20", "--optim.lr", "1e30", "--optim.warmup", "1"]
    with pytest.raises(SystemExit) as left:
        train("diffusion", tmp_path / "nan", shards, *options, "--log.save", "1")
    error = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code == 2 and "error: loss or gradient is" in error and "at step" in error
    keys = error.split("the batch was: ")[1].split(", ")
    assert len(keys) == 8 and all(key.isdigit() or "-" in key for key in keys)
    for saved in (tmp_path / "nan" / "checkpoints").glob("step-*/net.safetensors"):
        assert all(weights.isfinite().all() for weights in load_file(saved).values())


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--data.holes", "nope", "unknown maker 'nope'"),
        ("--model.size", "huge", "unknown size 'huge'"),
        ("--log.every", "0", "log.every"),
        ("--objective.predicted", "1.5", "objective.predicted"),
    ],
)
def test_values_are_checked_before_work(tmp_path, shards, capsys, option, value, rule):
    with pytest.raises(SystemExit) as left:
        train("diffusion", tmp_path / "bad", shards, option, value)
    assert left.value.code == 2 and rule in capsys.readouterr().err and not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--objective.predictor", "/nowhere"], "/nowhere: no such folder"),
        (["--auxiliary.perceptual", "1", "--auxiliary.network", "/nowhere"], "/nowhere: neither a folder"),
    ],
)
def test_networks_that_are_not_there_are_one_line(tmp_path, shards, capsys, options, rule):
    with pytest.raises(SystemExit) as left:
        train("diffusion", tmp_path / "bad", shards, *options)
    error = capsys.readouterr().err
    assert left.value.code == 2 and rule in error and error.startswith("error: ") and error.count("\n") == 1


def test_fewer_steps_than_done_are_refused(tmp_path):
    learner, run = learner_of()
    saved = RunFolder(tmp_path, run).save(9, learner.tensors(), keep=2)
    run.optim.steps = 5
    with pytest.raises(ConfigError, match=r"beyond optim\.steps 5"):
        RunFolder(tmp_path, run).load(saved)


@pytest.mark.gpu
def test_both_stages_on_a_gpu(tmp_path, shards):
    train("structure", tmp_path / "one", shards, "--optim.steps", "2")
    options = ["--model.size", "tiny", "--objective.predictor", tmp_path / "one" / "export"]
    train("diffusion", tmp_path / "two", shards, *options, "--optim.steps", "4")
    assert rows(tmp_path / "two")[-1]["val_loss"] > 0


JOINT = ["--model.size", "tiny", "--optim.warmup", "1", "--optim.cooldown", "0.0", "--objective.predicted", "1.0"]


def test_joint_training_flows_back_and_resumes(tmp_path, shards):
    """Stopped at 2 and resumed to 4 equals 4 straight, both stages; with no loss of its own stage one still learns."""
    options = [*JOINT, "--structure_weight", "0", "--objective.drop_structure", "0"]
    train("joint", tmp_path / "a", shards, *options, "--optim.steps", "4")
    for steps in ("2", "4"):
        train("joint", tmp_path / "b", shards, *options, "--optim.steps", steps)
    first, a, b = (tmp_path / run / "checkpoints" / f"step-0000000{n}" for run, n in (("a", 2), ("a", 4), ("b", 4)))
    for name in ("ema", "structure-ema", "net", "structure-net"):
        mine, theirs, before = (load_file(folder / f"{name}.safetensors") for folder in (a, b, first))
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)
        assert any(not torch.equal(mine[k], before[k]) for k in mine if mine[k].is_floating_point()), name
    last = [row for row in rows(tmp_path / "a") if "val_loss" in row][-1]
    assert {"val_loss", "val_psnr", "val_edge_f1", "val_iou"} <= last.keys()
    assert (tmp_path / "a" / "export-structure" / "config.json").exists()
    script = [
        sys.executable,
        str(ROOT / "train" / "export.py"),
        str(tmp_path / "a"),
        "-o",
        str(tmp_path / "checkpoint"),
    ]
    subprocess.run(script, check=True, capture_output=True)
    assert (tmp_path / "checkpoint" / "structure" / "config.json").exists()


def test_the_gradient_into_the_plan_is_stage_twos(shards, tmp_path):
    """Of stage one's weights: by the task's one backward pass, and by differentiating the diffusion loss itself."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    run = JointRun(model=DiTConfig(size="tiny"), structure_weight=0.0)
    run.objective.predicted = 1.0
    source = open_dataset(shards)
    task = JointTask(run, source, Accelerator(cpu=True))
    with torch.no_grad():
        for weight in task.main.net.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    batch, places = source.batch(np.arange(8)), range(8)
    planner = task.learners["structure"].net
    task.loss_of(batch, 0, places).backward()
    expected = {name: p.grad.clone() for name, p in planner.named_parameters() if p.grad is not None}
    for net in (planner, task.main.net):
        net.zero_grad()
    task.prepare(False)
    task.backward(batch, 0, places, look=False)
    for name, p in planner.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-7)
    assert sum(float(g.abs().sum()) for g in expected.values()) > 0


def test_the_log_means_over_the_passes_that_had_a_value(tmp_path):
    """A loss of every pass, and a norm that only the last of them measured."""
    AcceleratorState._reset_state(reset_partial_state=True)
    log = Log(tmp_path, steps=4, start=0, batch=8, active=True)
    for loss in (1.0, 2.0, 3.0):
        log.add({"loss": torch.tensor(loss)})
    log.add({"loss": torch.tensor(6.0), "norm": torch.tensor(5.0)})
    log.write(Accelerator(cpu=True), 4)
    log.close()
    assert rows(tmp_path)[0]["loss"] == 3.0 and rows(tmp_path)[0]["norm"] == 5.0
