"""Shards -> batches of uint8, in an order that is a function of (seed, epoch) alone.

Which samples make up global step n depends on seed, batch size and number of samples, not on processes, workers or
what ran before; so a resumed run, on any number of machines, goes on with exactly the next samples.
"""

import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from coherent_ddrm.data_cache import DecodedCache
from coherent_ddrm.dataset import Batch, Sample, ShardDataset
from coherent_ddrm.shards import DataError

__all__ = [
    "Batch",
    "DataError",
    "DecodedCache",
    "Sample",
    "ShardDataset",
    "Tolerant",
    "batches",
    "ids_for_step",
    "open_dataset",
]

CACHE_BELOW = 128  # pixels; larger pictures cost more disk than decoding costs time


def open_dataset(
    folder: str | os.PathLike[str], cache: bool | None = None, cache_folder: str | os.PathLike[str] | None = None
) -> ShardDataset | DecodedCache:
    """Open shards. cache: True decodes once into memory-mapped files, False never, None does below 128 px."""
    dataset = ShardDataset(folder)
    if cache is None:
        cache = dataset.resolution < CACHE_BELOW
    return DecodedCache(dataset, cache_folder) if cache else dataset


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """(length,) all ids once, shuffled. By sorting raw output: unlike permutation(), fixed across numpy versions."""
    order = np.argsort(np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(length), kind="stable")
    order.setflags(write=False)
    return order


def ids_for_step(step: int, global_batch: int, length: int, seed: int) -> np.ndarray:
    """(global_batch,) ids of the samples of a global step; a pure function.

    Batches run straight on across the end of an epoch, so every epoch holds every sample exactly once.
    """
    if step < 0 or global_batch < 1 or length < 1 or seed < 0:
        raise ValueError(
            f"ids_for_step() needs step >= 0, global_batch >= 1, length >= 1, seed >= 0; got {step}, {global_batch}, "
            f"{length}, {seed}."
        )
    position, parts, wanted = step * global_batch, [], global_batch
    while wanted:
        epoch, start = divmod(position, length)
        part = _permutation(length, seed, epoch)[start : start + wanted]
        parts.append(part)
        position, wanted = position + len(part), wanted - len(part)
    return np.concatenate(parts)


class Tolerant:
    """A dataset whose damaged samples are left out: each counted, named on stderr, and replaced by the next whole one.

    Which sample takes its place is a function of the data alone, so resumed runs and other numbers of processes see the
    same. Each process counts what it meets.

    Args:
        limit: share of the samples that may be damaged; one more raises DataError.
    """

    def __init__(self, source: ShardDataset | DecodedCache, limit: float):
        self.source, self.limit = source, limit
        self.damaged: dict[int, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, ids: np.ndarray) -> Batch:
        """As ShardDataset.batch()."""
        try:
            return self.source.batch(ids)
        except DataError:
            one_by_one = [self._whole(int(i)) for i in ids]
        stacked: Batch = {k: np.concatenate([one[k] for one in one_by_one]) for k in one_by_one[0] if k != "key"}
        return stacked | {"key": [key for one in one_by_one for key in one["key"]]}

    def _whole(self, i: int) -> Batch:
        """Sample i, or the next that can be read."""
        for place in range(i, i + len(self)):
            try:
                return self.source.batch(np.array([place % len(self)]))
            except DataError as error:
                self._note(place % len(self), str(error))
        raise DataError("no sample can be read")

    def _note(self, i: int, why: str) -> None:
        with self._lock:
            if i in self.damaged:
                return
            self.damaged[i] = why
            print(f"warning: left out: {why}", file=sys.stderr)
            if len(self.damaged) > self.limit * len(self):
                raise DataError(
                    f"{len(self.damaged)} of {len(self)} samples are damaged, more than data.damaged {self.limit:g} "
                    f"allows; the last: {why}"
                )


def batches(
    source: ShardDataset | DecodedCache | Tolerant,
    global_batch: int,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    prefetch: int = 2,
) -> Iterator[tuple[int, Batch]]:
    """(step, this rank's share of the global batch) from `start_step` on, without end.

    Rank r takes ids r, r + world, ... of the step. workers: threads that read ahead, 0 reads on demand; prefetch:
    batches kept ready. Order and content depend on neither. An error in a thread is raised at its step. Close with
    .close(), or let it go out of use.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world}: ranks count from 0 to {world - 1}.")
    if global_batch % world:
        raise ValueError(f"A global batch of {global_batch} cannot be split evenly over {world} processes.")
    if len(source) == 0:
        raise DataError(f"{getattr(source, 'folder', source)}: the dataset has no samples.")
    ids_for_step(start_step, global_batch, len(source), seed)  # bad arguments are refused here, not at the first batch

    def load(step: int) -> Batch:
        return source.batch(ids_for_step(step, global_batch, len(source), seed)[rank::world])

    return _in_turn(load, start_step) if workers == 0 else _ahead(load, start_step, workers, max(prefetch, workers))


def _in_turn(load, step: int) -> Iterator[tuple[int, Batch]]:
    while True:
        yield step, load(step)
        step += 1


def _ahead(load, step: int, workers: int, ahead: int) -> Iterator[tuple[int, Batch]]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
    waiting: deque[Future] = deque()
    try:
        while True:
            while len(waiting) < ahead:
                waiting.append(pool.submit(load, step + len(waiting)))
            yield step, waiting.popleft().result()
            step += 1
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
