"""What a run says: a progress bar, a line of JSON per call, TensorBoard. Silent on all ranks but the first."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm


class Log:
    """A log that cannot be written (a full disk) is missing lines and a warning, not the end of the run."""

    def __init__(self, folder: Path, steps: int, start: int, batch: int, active: bool):
        self.active, self.batch, self.done = active, batch, start
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.progress = tqdm(total=steps, initial=start, disable=not active, unit="step", mininterval=5)
        if active:
            from torch.utils.tensorboard import SummaryWriter

            self.file = open(folder / "log.jsonl", "a", buffering=1, encoding="utf-8")
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
        self.since = time.perf_counter()

    def add(self, losses: dict[str, Tensor]) -> None:
        """Take in the losses of one pass, 0-dim tensors; nothing is read back from the device here."""
        for name, value in losses.items():
            self.totals[name] = self.totals.get(name, 0) + value.float()
            self.counts[name] = self.counts.get(name, 0) + 1  # not every pass has every value

    def write(self, accelerator: Accelerator, step: int, **values: float) -> None:
        """Mean losses since the last call, over all ranks, pictures per second, and `values`."""
        names = sorted(self.totals)  # the same on all ranks
        means = torch.stack([self.totals[name] / self.counts[name] for name in names])
        means = accelerator.reduce(means, "mean").tolist()
        speed = (step - self.done) * self.batch / (time.perf_counter() - self.since)
        losses = dict(zip(names, means, strict=True))
        self.scores(step, **losses, pictures=step * self.batch, per_second=speed, **values)
        self.progress.update(step - self.done)
        self.progress.set_postfix(loss=f"{losses['loss']:.4f}", pictures_per_s=f"{speed:.1f}")
        self.totals, self.counts, self.done, self.since = {}, {}, step, time.perf_counter()

    def scores(self, step: int, **values: float) -> None:
        """One row."""
        if not self.active:
            return
        row = {"step": step, "time": round(time.time(), 1), **{k: float(f"{v:.6g}") for k, v in values.items()}}
        try:
            self.file.write(json.dumps(row) + "\n")
            for key, value in values.items():
                self.board.add_scalar(key, value, step)
        except OSError as error:
            self.warn(f"the log cannot be written ({error})")

    def warn(self, message: str) -> None:
        """Say it on stderr, above the progress bar."""
        if self.active:
            self.progress.write(f"warning: {message}", file=sys.stderr)

    def pause(self, seconds: float) -> None:
        """Time that was not spent on training."""
        self.since += seconds

    def close(self) -> None:
        self.progress.close()
        if self.active:
            self.file.close()
            self.board.close()
