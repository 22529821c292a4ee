"""The parts of a training run: averaged weights, optimizers, rate, run folder, checkpoints, log.

Only safetensors and JSON are written and read. A checkpoint is written beside its final name and renamed, so a killed
run never leaves half of one.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from coherent_ddrm.config import ConfigError, config_hash, dump_config
from coherent_ddrm.data import DataError

# ---------------------------------------------------------------------------------------------- weights and optimizers


class EMA:
    """Exponential moving average of a network's parameters in fp32, by name.

    The decay of step n is min(decay, (1 + n) / (10 + n)), so that early averages do not remember the start.
    """

    def __init__(self, net: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p.detach().float().clone() for name, p in net.named_parameters()}

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        now = [p.detach().float() for _, p in net.named_parameters()]
        torch._foreach_lerp_(list(self.weights.values()), now, 1 - decay)

    @torch.no_grad()
    def copy_to(self, net: nn.Module) -> None:
        for name, p in net.named_parameters():
            p.copy_(self.weights[name])


def make_optimizers(net: nn.Module, name: str, lr: float, weight_decay: float, betas: tuple[float, float]) -> list:
    """[AdamW], or [Muon for the matrices inside `blocks`, AdamW for all else]. lr is the rate of both.

    Muon, https://kellerjordan.github.io/posts/muon/ , with the update scaled to AdamW's size
    (https://arxiv.org/abs/2502.16982), so that one rate and one weight decay serve both.
    """
    parameters = dict(net.named_parameters())
    inside = lambda n, p: name == "muon" and p.ndim == 2 and "blocks." in n and "modulation" not in n  # noqa: E731
    matrices = [p for n, p in parameters.items() if inside(n, p)]
    decayed = [p for n, p in parameters.items() if not inside(n, p) and p.ndim >= 2]
    plain = [p for n, p in parameters.items() if not inside(n, p) and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    if not matrices:
        return [adamw]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def learning_rate(step: int, lr: float, steps: int, warmup: int, cooldown: float) -> float:
    """Linear warm-up, flat, linear fall to 0 over the last `cooldown` share of the steps. `step` counts from 0."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    fall = min(1.0, (steps - step) / max(1.0, cooldown * steps))
    return lr * min(rise, fall)


def flatten_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as named tensors, "parameter.name"; numbers become 0-dim tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v).detach().clone() for i, row in state.items() for k, v in row.items()}


def restore_state(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """The inverse of `flatten_state`; groups and rates stay as they were built."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in flat.items():
        i, key = name.split(".", 1)
        state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Learner:
    """A network with its averaged weights and optimizers: all that a training checkpoint holds."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: str,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        warmup: int,
        cooldown: float,
        steps: int,
        ema: float,
    ):
        self.net, self.ema = net, EMA(net, ema)
        self.optimizers = make_optimizers(net, optimizer, lr, weight_decay, betas)
        self.rate = 0.0
        self._plan = dict(lr=lr, steps=steps, warmup=warmup, cooldown=cooldown)

    def set_rate(self, step: int) -> None:
        """Give every optimizer the learning rate of `step`."""
        self.rate = learning_rate(step, **self._plan)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate

    def average(self, step: int) -> None:
        """Take the weights after `step` into the average."""
        self.ema.update(self.net, step)

    def averaged(self) -> nn.Module:
        """A copy of the network with the averaged weights, in eval mode."""
        net = copy.deepcopy(self.net)
        self.ema.copy_to(net)
        return net.eval()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """File name -> named tensors."""
        files = {"net": dict(self.net.state_dict()), "ema": self.ema.weights}
        return files | {f"optimizer-{i}": flatten_state(o) for i, o in enumerate(self.optimizers)}

    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of `tensors`; strict."""
        self.net.load_state_dict(tensors["net"], strict=True)
        device = next(self.net.parameters()).device
        self.ema.weights = {name: tensors["ema"][name].to(device) for name in self.ema.weights}
        for i, optimizer in enumerate(self.optimizers):
            restore_state(optimizer, tensors[f"optimizer-{i}"])


# ---------------------------------------------------------------------------------------------- run folder


def write_atomic(path: Path, text: str) -> None:
    """Write beside and rename: `path` is whole or absent."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


class RunFolder:
    """`out/`: config.yaml, log.jsonl, sheets/, tensorboard/, checkpoints/step-00000000/.

    Raises ConfigError if the folder belongs to a run with another config, unless only keys in FREE differ.
    """

    FREE = ("log", "out", "init", "data.workers", "optim.compile", "optim.steps", "optim.cooldown")

    def __init__(self, out: str, config: object):
        self.folder, self.config = Path(out), config
        self.checkpoints = self.folder / "checkpoints"

    def create(self) -> None:
        """Make the folder and save the resolved config."""
        (self.folder / "sheets").mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        for stale in self.checkpoints.glob(".*"):
            shutil.rmtree(stale)
        write_atomic(self.folder / "config.yaml", dump_config(self.config))

    @property
    def sheets(self) -> Path:
        return self.folder / "sheets"

    def save(self, step: int, learner: Learner, keep: int) -> Path:
        """The state after `step` steps; older checkpoints beyond `keep` go after the rename."""
        final = self.checkpoints / f"step-{step:08d}"
        beside = self.checkpoints / f".step-{step:08d}"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, group in learner.tensors().items():
            save_file({k: v.detach().cpu().contiguous() for k, v in group.items()}, beside / f"{name}.safetensors")
        state = {"step": step, "config": _plain(self.config), "config_hash": config_hash(self.config)}
        (beside / "state.json").write_text(json.dumps(state, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(beside, final)
        for old in self.saved()[:-keep]:
            shutil.rmtree(old)
        return final

    def saved(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(path for path in self.checkpoints.glob("step-*") if (path / "state.json").exists())

    def resume(self, learner: Learner) -> int:
        """Load the newest checkpoint into `learner` and return its step, 0 for a new run."""
        saved = self.saved()
        if not saved:
            return 0
        state = json.loads((saved[-1] / "state.json").read_text())
        self._refuse_other(state["config"], saved[-1])
        learner.load({file.stem: load_file(file) for file in saved[-1].glob("*.safetensors")})
        return state["step"]

    def _refuse_other(self, theirs: dict, checkpoint: Path) -> None:
        mine, theirs = _flat(_plain(self.config)), _flat(theirs)
        changed = [k for k in sorted(mine.keys() | theirs.keys()) if mine.get(k) != theirs.get(k)]
        changed = [k for k in changed if not any(k == free or k.startswith(free + ".") for free in self.FREE)]
        if changed:
            listed = "; ".join(f"{k} was {theirs.get(k)!r}, is {mine.get(k)!r}" for k in changed)
            raise ConfigError(f"{checkpoint} has another config ({listed}); choose another --out, or put it back")


def _plain(config: object) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


# ---------------------------------------------------------------------------------------------- log


class Log:
    """Loss and speed: a progress bar, one line of JSON per call, TensorBoard. Silent on all ranks but the first."""

    def __init__(self, folder: RunFolder, steps: int, start: int, batch: int, active: bool):
        self.active, self.batch, self.done = active, batch, start
        self.total, self.passes, self.norm = 0.0, 0, 0.0
        self.progress = tqdm(total=steps, initial=start, disable=not active, unit="step", mininterval=5)
        if active:
            from torch.utils.tensorboard import SummaryWriter

            folder.create()
            self.file = open(folder.folder / "log.jsonl", "a", buffering=1, encoding="utf-8")
            self.board = SummaryWriter(str(folder.folder / "tensorboard"))
        self.since = time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor | None) -> None:
        """Take in one pass; nothing is read back from the device here."""
        self.total, self.passes = self.total + loss, self.passes + 1
        self.norm = norm if norm is not None else self.norm

    def write(self, accelerator: Accelerator, step: int, rate: float, keys: Iterable[str]) -> None:
        """Mean loss since the last call, over all ranks. Raises NonFiniteLoss naming the step and this batch's keys."""
        loss = float(accelerator.reduce(self.total / self.passes, "mean"))
        check_finite(loss + float(self.norm), step, keys)
        speed = (step - self.done) * self.batch / (time.perf_counter() - self.since)
        self.scores(
            step, loss=loss, grad_norm=float(self.norm), rate=rate, pictures=step * self.batch, per_second=speed
        )
        self.progress.update(step - self.done)
        self.progress.set_postfix(loss=f"{loss:.4f}", pictures_per_s=f"{speed:.1f}")
        self.total, self.passes, self.done, self.since = 0.0, 0, step, time.perf_counter()

    def scores(self, step: int, **values: float) -> None:
        """One row. The time that making the values took does not count as training time."""
        if self.active:
            row = {"step": step, "time": round(time.time(), 1), **{k: float(f"{v:.6g}") for k, v in values.items()}}
            self.file.write(json.dumps(row) + "\n")
            for key, value in values.items():
                self.board.add_scalar(key, value, step)
        self.since = time.perf_counter()

    def close(self) -> None:
        self.progress.close()
        if self.active:
            self.file.close()
            self.board.close()


class NonFiniteLoss(RuntimeError):
    """The loss stopped being a number."""


def check_finite(loss: float, step: int, keys: Iterable[str]) -> None:
    """Raise NonFiniteLoss naming the step and the keys of the batch."""
    if not math.isfinite(loss):
        raise NonFiniteLoss(f"loss or gradient is {loss} at step {step}; the batch was: {', '.join(keys)}")


# ---------------------------------------------------------------------------------------------- parts of a loop


def start_from(net: nn.Module, folder: str | None) -> nn.Module:
    """`net` with the weights exported to `folder`, or as it is for None. ConfigError unless they fit exactly."""
    if folder is None:
        return net
    try:
        net.load_state_dict(load_file(Path(folder) / "diffusion_pytorch_model.safetensors"), strict=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"init {folder}: {' '.join(str(error).split())[:300]}") from None
    return net


@contextmanager
def readable_errors() -> Iterator[None]:
    """What a user can mend leaves as one line per fault and exit code 2."""
    try:
        yield
    except (ConfigError, DataError, NonFiniteLoss) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def make_accelerator(precision: str, accumulate: int) -> Accelerator:
    """accelerate's engine, on the CPU where there is no CUDA device."""
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        gradient_accumulation_steps=accumulate,
        cpu=not torch.cuda.is_available(),
    )


def prepare(accelerator: Accelerator, objective: nn.Module, learner: Learner) -> tuple[nn.Module, list]:
    """(objective, optimizers) as accelerate wraps them."""
    objective, *optimizers = accelerator.prepare(objective, *learner.optimizers)
    return objective, optimizers


def per_pass(batch: int, world: int, accumulate: int) -> int:
    """Pictures that one process takes at once. ConfigError if the batch does not divide."""
    if batch % (world * accumulate):
        raise ConfigError(f"optim.batch {batch} does not divide over {world} processes times {accumulate} passes each")
    return batch // (world * accumulate)


def passes(batch: dict, share: int, rank: int, world: int) -> Iterator[tuple[dict, list[int]]]:
    """Split one rank's batch into passes of `share`: (part, places of its samples in the global batch)."""
    for first in range(0, len(batch["key"]), share):
        part = {key: value[first : first + share] for key, value in batch.items()}
        yield part, [rank + world * i for i in range(first, first + share)]


def describe(net: nn.Module, pictures: int, steps: int, batch: int, start: int, world: int) -> str:
    """What is about to run, in a few lines."""
    parameters = sum(p.numel() for p in net.parameters())
    return (
        f"{type(net).__name__}: {parameters / 1e6:.2f} M parameters; weights, average, gradients and optimizer take "
        f"about {20 * parameters / 2**20:.0f} MiB per process\n"
        f"{pictures} pictures; {steps} steps of {batch} = {steps * batch / 1e6:.2f} M pictures, "
        f"{steps * batch / pictures:.0f} epochs; {world} process(es); starting at step {start}"
    )
