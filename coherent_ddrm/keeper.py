"""What is kept of a run while it goes on, and taken up when it comes back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn

from coherent_ddrm.config import ConfigError
from coherent_ddrm.images import write_image
from coherent_ddrm.learner import Learner
from coherent_ddrm.ranks import first_does
from coherent_ddrm.run_folder import RunFolder, Tensors
from coherent_ddrm.run_log import Log
from coherent_ddrm.weights import one_line

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

    All processes call it. Only the first one scores and writes; what goes wrong there is raised on all.
    """

    def __init__(self, folder: RunFolder, task: State, validation: Validation, log: Log, counts: dict[str, int]):
        self.folder, self.task, self.validation, self.log = folder, task, validation, log
        self.skipped, self.in_a_row = counts.get("skipped", 0), counts.get("in_a_row", 0)
        self.saved = -1  # the step of the last checkpoint that was written

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
        tensors = self.task.tensors() if self.task.kept_by else {}
        state = {"keys": keys, "loss": str(loss), "gradient": str(norm)}
        held = first_does(self.task.accelerator, self._dump, first, tensors, state)
        raise NonFinite(
            f"loss or gradient is {loss + norm:.4g} at step {step}, the last of {IN_A_ROW} in a row; {held}; "
            f"the batch was: {', '.join(keys)}"
        )

    def _dump(self, step: int, tensors: Tensors, state: dict) -> str:
        """Write a state to look into; where it is, or why not."""
        try:
            where = self.folder.dump(step, tensors, state)
        except (OSError, SafetensorError) as error:
            return f"the state before them cannot be written ({one_line(error)})"
        return f"{where} holds the state before them (laid into checkpoints/ of another --out, it shows them again)"

    def report(self, done: int) -> None:
        """Validate, draw a sheet, save, each in its own rhythm and all after the last step; not timed as training."""
        every, last, begin = self.folder.config.log, done == self.folder.config.optim.steps, time.perf_counter()
        validate, draw, save = (last or done % often == 0 for often in (every.validate, every.sheet, every.save))
        score = None
        if validate or draw:
            averaged = self.task.main.averaged() if self.task.kept_by else None
            score = first_does(self.task.accelerator, self._look, averaged, done, validate, draw)
        if save or score is not None:
            self.save(done, must=last, score=score)
        self.log.pause(time.perf_counter() - begin)

    def _look(self, net: nn.Module, done: int, validate: bool, draw: bool) -> float | None:
        """Validate and draw; the score to keep as the best so far, the lower the better, or None."""
        score = self._score(net, done) if validate else None
        if draw:
            self._draw(net, done)
        return score

    def _score(self, net: nn.Module, done: int) -> float | None:
        scores = self.validation.scores(net)
        self.log.scores(done, **scores)
        name = self.validation.best
        score = -scores[name[1:]] if name.startswith("-") else scores[name]
        return score if score < self.folder.best()[1] else None

    def _draw(self, net: nn.Module, done: int) -> None:
        try:
            write_image(self.folder.sheets / f"{done:08d}.png", self.validation.sheet(net))
        except OSError as error:
            self.log.warn(f"the sheet of step {done} cannot be written ({error})")

    def save(self, done: int, must: bool, score: float | None = None) -> bool:
        """Write a checkpoint, as the best if it has a `score`; whether it could be written. No step is written twice.

        Raises NonFinite for weights that are no numbers; OSError only if it `must` be written.
        """
        if done == self.saved:
            return True
        tensors = self.task.tensors() if self.task.kept_by else {}
        if not first_does(self.task.accelerator, self._write, done, tensors, must, score):
            return False
        self.saved = done
        return True

    def _write(self, done: int, tensors: Tensors, must: bool, score: float | None) -> bool:
        for name, group in tensors.items():
            if not all(bool(v.isfinite().all()) for v in group.values() if v.is_floating_point()):
                raise NonFinite(f"{name} holds numbers that are not finite after step {done}; it is not saved")
        counts = {"skipped": self.skipped, "in_a_row": self.in_a_row}
        try:
            self.folder.save(done, tensors, self.folder.config.log.keep, {"counts": counts})
        except (OSError, SafetensorError) as error:
            message = f"the checkpoint of step {done} cannot be written ({one_line(error)})"
            if must:
                raise OSError(f"{message}; the last good one stays, make room and start again") from error
            self.log.warn(f"{message}; the run goes on, the last good one stays")
            return False
        if score is not None:
            self.folder.mark_best(done, self.validation.best, score)
        return True


def resume(accelerator: Accelerator, folder: RunFolder, task: State, put_aside: bool) -> tuple[int, dict[str, int]]:
    """Load the newest whole checkpoint on every rank -> (its step, its counts); (0, {}) for a new run.

    The first process alone reads through the files to verify them. put_aside: damaged ones; else nothing is changed.
    """
    found = first_does(accelerator, folder.newest, put_aside)
    if found is None:
        return 0, {}
    tensors, state = folder.load(found)
    try:
        task.load(tensors)
    except (KeyError, RuntimeError) as error:
        raise ConfigError(f"{found} does not fit these networks ({one_line(error)[:200]})") from error
    return state["step"], state.get("counts", {})
