"""What is kept of a run while it goes on, and taken up when it comes back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn

from coherent_ddrm.config import ConfigError
from coherent_ddrm.images import write_image
from coherent_ddrm.learner import Learner
from coherent_ddrm.run_folder import RunFolder
from coherent_ddrm.run_log import Log

IN_A_ROW = 3  # steps with numbers that are not finite, after which a run stops


class Validation(Protocol):
    """What a run scores and draws, on fixed pictures, holes, times and noise. `best` names the score of the best."""

    best: str  # "val_loss", the lower the better, or "-val_iou", the higher the better

    def scores(self, net: nn.Module) -> dict[str, float]: ...

    def sheet(self, net: nn.Module) -> np.ndarray: ...


class State(Protocol):
    """What a checkpoint holds and comes back into; a training.Task."""

    accelerator: Accelerator
    main: Learner
    kept_by: bool

    def tensors(self) -> dict[str, dict[str, Tensor]]: ...

    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None: ...


class NonFinite(RuntimeError):
    """A loss, a gradient or a weight stopped being a number."""


class Keeper:
    """What is kept of a run while it goes on: scores, sheets, checkpoints, and the steps that could not be taken.

    Only the first process writes. `report` and `save` are for the processes that `task.kept_by` tells.
    """

    def __init__(self, folder: RunFolder, task: State, validation: Validation, log: Log, counts: dict[str, int]):
        self.folder, self.task, self.validation, self.log = folder, task, validation, log
        self.skipped, self.in_a_row = counts.get("skipped", 0), counts.get("in_a_row", 0)

    def count(self, finite: bool, step: int, keys: Sequence[str], norm: float, loss: float) -> None:
        """Take note of a step, on all ranks. Raises NonFinite for the last of IN_A_ROW that were not taken."""
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if finite:
            return
        self.skipped += 1
        keys = gather_object(list(keys))
        self.log.warn(f"step {step}: loss {loss:.4g}, gradient {norm:.4g}; no step is taken. Batch: {', '.join(keys)}")
        if self.in_a_row < IN_A_ROW:
            return
        first = step + 1 - self.in_a_row  # the weights have not changed since
        where = self.folder.folder / "failed" / f"step-{first:08d}"
        tensors = self.task.tensors() if self.task.kept_by else {}
        if self.writes:
            self.folder.dump(first, tensors, {"keys": keys, "loss": str(loss), "gradient": str(norm)})
        self.task.accelerator.wait_for_everyone()
        raise NonFinite(
            f"loss or gradient is {loss + norm:.4g} at step {step}, the last of {IN_A_ROW} in a row; {where} holds the "
            "state before them (laid into checkpoints/ of another --out, it shows them again); the batch was: "
            + ", ".join(keys)
        )

    def report(self, done: int) -> None:
        """Validate, draw a sheet, save, each in its own rhythm and all after the last step; not timed as training."""
        every, last, begin = self.folder.config.log, done == self.folder.config.optim.steps, time.perf_counter()
        validate, draw = (last or done % often == 0 for often in (every.validate, every.sheet))
        averaged = self.task.main.averaged() if validate or draw else None
        score = self._score(averaged, done) if validate else None
        if draw and self.writes:
            self._draw(averaged, done)
        if last or score is not None or done % every.save == 0:
            saved = self.save(done, must=last)
            if score is not None and saved and self.writes:
                self.folder.mark_best(done, self.validation.best, score)
        self.log.pause(time.perf_counter() - begin)

    @property
    def writes(self) -> bool:
        return self.task.accelerator.is_main_process

    def _score(self, net: nn.Module, done: int) -> float | None:
        """The score to keep as the best so far, the lower the better; None if it is not."""
        best: list[float | None] = [None]
        if self.writes:
            scores = self.validation.scores(net)
            self.log.scores(done, **scores)
            name = self.validation.best
            score = -scores[name[1:]] if name.startswith("-") else scores[name]
            best = [score if score < self.folder.best()[1] else None]
        if self.task.main.spread:  # all that share the network save together
            broadcast_object_list(best)
        return best[0]

    def _draw(self, net: nn.Module, done: int) -> None:
        try:
            write_image(self.folder.sheets / f"{done:08d}.png", self.validation.sheet(net))
        except OSError as error:
            self.log.warn(f"the sheet of step {done} cannot be written ({error})")

    def save(self, done: int, must: bool) -> bool:
        """Write a checkpoint; whether it could be written. Raises OSError only if it `must` be."""
        tensors = self.task.tensors()
        if not self.writes:
            return True
        for name, group in tensors.items():
            if not all(bool(v.isfinite().all()) for v in group.values() if v.is_floating_point()):
                raise NonFinite(f"{name} holds numbers that are not finite after step {done}; it is not saved")
        counts = {"skipped": self.skipped, "in_a_row": self.in_a_row}
        try:
            self.folder.save(done, tensors, self.folder.config.log.keep, {"counts": counts})
        except (OSError, SafetensorError) as error:
            message = f"the checkpoint of step {done} cannot be written ({' '.join(str(error).split())})"
            if must:
                raise OSError(f"{message}; the last good one stays, make room and start again") from error
            self.log.warn(f"{message}; the run goes on, the last good one stays")
            return False
        return True


def resume(accelerator: Accelerator, folder: RunFolder, task: State) -> tuple[int, dict[str, int]]:
    """Load the newest whole checkpoint on every rank -> (its step, its counts); (0, {}) for a new run."""
    found = [str(folder.newest() or "")] if accelerator.is_main_process else [""]
    broadcast_object_list(found)
    if not found[0]:
        return 0, {}
    tensors, state = folder.load(Path(found[0]))
    try:
        task.load(tensors)
    except (KeyError, RuntimeError) as error:
        raise ConfigError(f"{found[0]} does not fit these networks ({' '.join(str(error).split())[:200]})") from error
    return state["step"], state.get("counts", {})
