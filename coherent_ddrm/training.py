"""The training loop, the only one: what surrounds a step, and what a run survives.

A script brings a `Task`, networks with their optimizers and the gradient of one pass; `fit` does the rest. A step is a
function of the weights and (seed, step) alone: a run that was killed goes on, by the same command, to the same weights.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from coherent_ddrm.config import ConfigError
from coherent_ddrm.data import DecodedCache, ShardDataset, Tolerant, batches
from coherent_ddrm.keeper import Keeper, Validation, resume
from coherent_ddrm.launch import describe
from coherent_ddrm.learner import Learner
from coherent_ddrm.ranks import agree, first_does
from coherent_ddrm.run_folder import RunFolder
from coherent_ddrm.run_lock import RunLock
from coherent_ddrm.run_log import Log

TERMINATED = 128 + signal.SIGTERM  # exit code after a signal to stop, as of a process that did not catch it


class Task:
    """What is learned. The first learner's network is validated and exported.

    Args:
        learners: by name; the first one's files in a checkpoint have no prefix.
        objectives: the modules that data parallelism wraps, one per learner; `prepare` replaces them.
    """

    def __init__(self, learners: dict[str, Learner], objectives: list[nn.Module], accelerator: Accelerator):
        self.learners, self.objectives, self.accelerator = learners, objectives, accelerator
        self.optimizers: list[list] = []

    @property
    def main(self) -> Learner:
        return next(iter(self.learners.values()))

    @property
    def kept_by(self) -> bool:
        """Whether this process gathers what is kept of the run: the first, or all that share a network."""
        return self.accelerator.is_main_process or self.main.spread

    def loss_of(self, part: dict, step: int, places: Sequence[int]) -> Tensor:
        """The loss of some samples of the global batch of `step`, 0-dim."""
        raise TypeError(f"{type(self).__name__} does not define loss_of(part, step, places)")

    def backward(self, part: dict, step: int, places: Sequence[int], look: bool) -> dict[str, Tensor]:
        """Add the gradients of one pass; its losses, "loss" among them. `look`: this step is logged."""
        loss = self.loss_of(part, step, places)
        self.accelerator.backward(loss)
        return {"loss": loss.detach()}

    def prepare(self, compile: bool) -> None:
        """Have accelerate wrap the objectives and optimizers; torch.compile the first objective if asked to."""
        for i, learner in enumerate(self.learners.values()):
            if learner.spread:  # sharding.py has wrapped and compiled it
                self.optimizers.append([self.accelerator.prepare(optimizer) for optimizer in learner.optimizers])
                continue
            if compile and not i:  # the others see few samples, a different number each time
                self.objectives[i].compile()
            self.objectives[i], *optimizers = self.accelerator.prepare(self.objectives[i], *learner.optimizers)
            self.optimizers.append(optimizers)

    def clip(self, largest: float) -> Tensor:
        """Clip each learner's gradient; the main one's norm, NaN if any is not finite."""
        norms = [self.accelerator.clip_grad_norm_(k.net.parameters(), largest) for k in self.learners.values()]
        norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        return norms[0] + sum(0 * norm for norm in norms[1:])

    def update(self, step: int) -> None:
        for optimizer in (o for row in self.optimizers for o in row):
            optimizer.step()
        for learner in self.learners.values():
            learner.average(step)

    def zero_grad(self) -> None:
        for optimizer in (o for row in self.optimizers for o in row):
            optimizer.zero_grad()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint holds: file name -> named tensors."""
        files = {}
        for i, (name, learner) in enumerate(self.learners.items()):
            files |= {f"{name}-{key}" if i else key: group for key, group in learner.tensors().items()}
        return files

    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of `tensors`; strict."""
        for i, (name, learner) in enumerate(self.learners.items()):
            prefix = f"{name}-" if i else ""
            learner.load({key: tensors[prefix + key] for key in learner.files})

    def export(self, folder: Path) -> None:
        """The averaged weights, ready for the pipeline."""
        averaged = self.main.averaged()
        if self.accelerator.is_main_process:
            averaged.save_pretrained(folder / "export")


# ---------------------------------------------------------------------------------------------- the loop


def fit(
    run: object,
    task: Task,
    source: ShardDataset | DecodedCache,
    make_validation: Callable[[], Validation],
    dry_run: bool = False,
) -> None:
    """Train `task` as `run` says, on from the newest checkpoint of its folder, to the last step.

    Raises:
        ConfigError, DataError: what a person can mend.
        RunLocked: another process trains in the folder.
        NonFinite: steps with numbers that are not finite, IN_A_ROW of them.
        SystemExit: with TERMINATED, after SIGTERM or SIGUSR1 (a pre-empted node) and a save.
    """
    accelerator, optim = task.accelerator, run.optim
    world, main = accelerator.num_processes, accelerator.is_main_process
    share = per_pass(optim.batch, world, optim.accumulate)
    if optim.shard and not task.main.spread:
        raise ConfigError("optim.shard: only train/diffusion.py spreads its network; the others are small")
    folder = RunFolder(run.out, run)
    with nullcontext() if dry_run else locked(folder, accelerator), StopSignal() as signalled:
        start, counts = resume(accelerator, folder, task, put_aside=not dry_run)
        if task.kept_by:
            about = describe(task, source, run, start, world, share)
        if main:
            print(about, flush=True)
        if dry_run:
            return
        first_does(accelerator, folder.write_config)
        validation = make_validation()
        task.prepare(optim.compile)
        with closing(Log(folder.folder, optim.steps, start, optim.batch, main)) as log:
            keeper = Keeper(folder, task, validation, log, counts)
            walk(run, task, Tolerant(source, run.data.damaged), start, keeper, signalled)
        accelerator.wait_for_everyone()
        if task.kept_by:
            task.export(folder.folder)
    accelerator.end_training()


def walk(run: object, task: Task, stream: Tolerant, start: int, keeper: Keeper, signalled: StopSignal) -> None:
    """The steps from `start` to the last."""
    accelerator, optim, log = task.accelerator, run.optim, keeper.log
    rank, world = accelerator.process_index, accelerator.num_processes
    share = per_pass(optim.batch, world, optim.accumulate)
    for step, batch in batches(stream, optim.batch, run.seed, start, rank, world, run.data.workers):
        if step >= optim.steps:
            break
        done, look = step + 1, (step + 1) % run.log.every == 0
        for learner in task.learners.values():
            learner.set_rate(step)
        total = 0.0
        for part, places in passes(batch, share, rank, world):
            with accelerator.accumulate(*task.objectives):
                losses = task.backward(part, step, places, look)
            log.add(losses)
            total = total + losses["loss"]
        norm = task.clip(optim.clip)
        finite, stop = agree(accelerator, norm + total, signalled.stop)
        if finite:
            task.update(step)
        keeper.count(finite, step, batch["key"], float(norm), float(total))
        task.zero_grad()
        if look:
            log.write(accelerator, done, rate=task.main.rate, grad_norm=float(norm), skipped=keeper.skipped)
        keeper.report(done)
        if stop and done < optim.steps:
            keeper.save(done, must=True)
            log.warn(f"asked to stop: saved at step {done}; the same command goes on from here")
            accelerator.wait_for_everyone()
            raise SystemExit(TERMINATED)


class StopSignal:
    """`stop` becomes true at SIGTERM or SIGUSR1 (which SLURM can send before it ends a job); nothing else happens."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.stop = False

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers there alone
            self.before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in getattr(self, "before", {}).items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.stop = True


@contextmanager
def locked(folder: RunFolder, accelerator: Accelerator) -> Iterator[None]:
    """The run folder, made and held by all processes of this run. RunLocked if another run's live in it."""
    lock = RunLock(folder.folder)

    def take() -> None:
        folder.folder.mkdir(parents=True, exist_ok=True)
        lock.take_first()
        folder.create()

    try:
        first_does(accelerator, take)
        if not accelerator.is_main_process:
            lock.take_worker()
        yield
    finally:
        lock.release()


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
