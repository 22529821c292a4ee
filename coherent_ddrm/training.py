"""The parts of a training run: run folder, checkpoints, log, and what surrounds a step.

Only safetensors and JSON are written and read. A checkpoint is written beside its final name and renamed, so a killed
run never leaves half of one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from coherent_ddrm.config import ConfigError, config_hash, dump_config
from coherent_ddrm.data import DataError, DecodedCache, ShardDataset, ids_for_step
from coherent_ddrm.images import write_image
from coherent_ddrm.learner import Learner
from coherent_ddrm.masks import MAKERS
from coherent_ddrm.models.dit import SIZES

# ---------------------------------------------------------------------------------------------- run folder


def write_atomic(path: Path, text: str) -> None:
    """Write beside and rename: `path` is whole or absent."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


class RunFolder:
    """`out/`: config.yaml, log.jsonl, sheets/, tensorboard/, checkpoints/step-00000000/.

    Resuming raises ConfigError if the newest checkpoint has another config, unless only keys in FREE differ.
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
        if state["step"] > self.config.optim.steps:
            raise ConfigError(f"{saved[-1]} is beyond optim.steps {self.config.optim.steps}; ask for more steps")
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
        self.total, self.passes = 0.0, 0
        self.progress = tqdm(total=steps, initial=start, disable=not active, unit="step", mininterval=5)
        if active:
            from torch.utils.tensorboard import SummaryWriter

            folder.create()
            self.file = open(folder.folder / "log.jsonl", "a", buffering=1, encoding="utf-8")
            self.board = SummaryWriter(str(folder.folder / "tensorboard"), purge_step=start)
        self.since = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        """Take in the loss of one pass; nothing is read back from the device here."""
        self.total, self.passes = self.total + loss, self.passes + 1

    def write(self, accelerator: Accelerator, step: int, **values: float) -> None:
        """Mean loss since the last call, over all ranks, pictures per second, and `values`."""
        loss = float(accelerator.reduce(self.total / self.passes, "mean"))
        speed = (step - self.done) * self.batch / (time.perf_counter() - self.since)
        self.scores(step, loss=loss, pictures=step * self.batch, per_second=speed, **values)
        self.progress.update(step - self.done)
        self.progress.set_postfix(loss=f"{loss:.4f}", pictures_per_s=f"{speed:.1f}")
        self.total, self.passes, self.done, self.since = 0.0, 0, step, time.perf_counter()

    def scores(self, step: int, **values: float) -> None:
        """One row."""
        if self.active:
            row = {"step": step, "time": round(time.time(), 1), **{k: float(f"{v:.6g}") for k, v in values.items()}}
            self.file.write(json.dumps(row) + "\n")
            for key, value in values.items():
                self.board.add_scalar(key, value, step)

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


class Validation(Protocol):
    """What a training script scores and draws, on fixed pictures, holes, times and noise."""

    def scores(self, net: nn.Module) -> dict[str, float]: ...

    def sheet(self, net: nn.Module) -> np.ndarray: ...


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


def bf16_is_fast() -> bool:
    """Whether matrix products in bf16 are faster than in fp32 here: any current GPU, CPUs with bf16 instructions."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def make_accelerator(precision: str, accumulate: int) -> Accelerator:
    """accelerate's engine, on the CPU where there is no CUDA device. precision: fp32, bf16, or auto (bf16 if fast)."""
    low = precision == "bf16" or (precision == "auto" and bf16_is_fast())
    return Accelerator(
        mixed_precision="bf16" if low else "no",
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


def report(folder: RunFolder, done: int, learner: Learner, validation: Validation, log: Log) -> None:
    """Validate, draw a sheet and save, each in its own rhythm, and all after the last step. Not counted as training."""
    every, last, begin = folder.config.log, done == folder.config.optim.steps, time.perf_counter()
    if last or done % every.validate == 0:
        log.scores(done, **validation.scores(learner.averaged()))
    if last or done % every.sheet == 0:
        write_image(folder.sheets / f"{done:08d}.png", validation.sheet(learner.averaged()))
    if last or done % every.save == 0:
        folder.save(done, learner, every.keep)
    log.since += time.perf_counter() - begin


def check_run(run: object, source: ShardDataset | DecodedCache, predictor: nn.Module | None = None) -> None:
    """Raise ConfigError for what a config's types cannot tell: names, and how networks and data fit."""
    if run.data.holes not in MAKERS:
        raise ConfigError(f"data.holes: unknown maker {run.data.holes!r}: choose one of {', '.join(MAKERS)}")
    size = getattr(run.model, "size", None)
    if size is not None and size not in SIZES:
        raise ConfigError(f"model.size: unknown size {size!r}: choose one of {', '.join(SIZES)}")
    if size is not None and source.resolution % SIZES[size]["patch"]:
        raise ConfigError(f"the pictures have {source.resolution} px, no multiple of the patch of size {size}")
    if predictor is not None and predictor.channels != 1 + source.num_labels:
        theirs = predictor.channels - 1
        raise ConfigError(f"objective.predictor plans {theirs} labels, the shards have {source.num_labels}")


def activation_bytes(loss_of: Callable[[], Tensor]) -> int:
    """Bytes that the backward pass of one loss keeps, each tensor counted once."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss_of()
    return sum(kept.values())


def describe(
    net: nn.Module,
    source: ShardDataset | DecodedCache,
    run: object,
    start: int,
    world: int,
    share: int,
    loss_of: Callable[[dict, int, Sequence[int]], Tensor],
) -> str:
    """What is about to run: parameters, memory per process (one sample is run to measure it), steps."""
    steps, batch, count = run.optim.steps, run.optim.batch, len(source)
    parameters = sum(p.numel() for p in net.parameters())
    held = sum(p.untyped_storage().nbytes() for p in net.parameters())
    one = source.batch(ids_for_step(0, 1, count, 0))
    activations = max(0, activation_bytes(lambda: loss_of(one, 0, [0])) - held) * share
    return (
        f"{type(net).__name__}: {parameters / 1e6:.2f} M parameters\n"
        f"memory per process: weights, average, gradients, optimizer {20 * parameters / 2**20:.0f} MiB; activations of "
        f"{share} pictures about {activations / 2**20:.0f} MiB\n"
        f"{count} pictures; {steps} steps of {batch}, {steps * batch / 1e6:.3f} M, {steps * batch / count:.0f} epochs\n"
        f"{world} process(es); starting at step {start}"
    )
