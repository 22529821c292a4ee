"""Pictures to samples, in this process or in several; results come in the order of the pictures."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from records import Result

from coherent_ddrm.shards import DataError

CHUNK = 8  # pictures per task

Make = Callable[[dict], Result]  # a row of the listing -> its sample


class InProcess:
    """--workers 0: the same work in this process, for debugging."""

    def __init__(self, start: Callable[[], Make]) -> None:
        self._make = start()

    def results(self, rows: list[dict]) -> Iterator[Result]:
        return map(self._make, rows)

    def close(self) -> None:
        pass


class Workers:
    """Processes that make samples, each with its own `start()`. A picture that kills its process is left out."""

    def __init__(self, count: int, start: Callable[[], Make]) -> None:
        self.count, self._start = count, start
        self.pool = self._new_pool(count)
        self._check()

    def _new_pool(self, count: int) -> ProcessPoolExecutor:
        spawn = multiprocessing.get_context("spawn")  # fork would copy the threads of torch in an unknown state
        return ProcessPoolExecutor(count, spawn, _start_worker, (self._start,))

    def _check(self) -> None:
        """Start one worker for real, so that a broken installation is an error and not a thousand skipped pictures."""
        try:
            self.pool.submit(_make_chunk, []).result()
        except BrokenProcessPool as error:
            raise DataError("A worker process did not start; its message stands above.") from error

    def results(self, rows: list[dict]) -> Iterator[Result]:
        waiting: deque[tuple[list[dict], Future]] = deque()
        chunks = iter([rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)])
        while True:
            for chunk in islice(chunks, 3 * self.count - len(waiting)):
                waiting.append((chunk, self._submit(chunk)))
            if not waiting:
                return
            chunk, future = waiting.popleft()
            try:
                made = future.result()
            except BrokenProcessPool:
                made = self._one_by_one(chunk)
                self.pool.shutdown(wait=False)
                self.pool = self._new_pool(self.count)
                waiting = deque((other, self._submit(other)) for other, _ in waiting)
            yield from made

    def _submit(self, chunk: list[dict]) -> Future:
        """Hand out a chunk, to new workers if one has died meanwhile; whose chunk that was shows when it is taken."""
        try:
            return self.pool.submit(_make_chunk, chunk)
        except BrokenProcessPool:
            self.pool = self._new_pool(self.count)
            return self.pool.submit(_make_chunk, chunk)

    def _one_by_one(self, chunk: list[dict]) -> list[Result]:
        """Each picture by itself, after some picture of this chunk or of another ended a worker."""
        made, pool = [], self._new_pool(1)
        for row in chunk:
            try:
                made += pool.submit(_make_chunk, [row]).result()
            except BrokenProcessPool:
                reason = "crashed: its decoder ended the worker process (or memory ran out)"
                made.append(Result(row, skipped=reason))
                pool = self._new_pool(1)
        pool.shutdown(wait=False)
        return made

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


# What runs in a worker process.

_make: Make | None = None


def _start_worker(start: Callable[[], Make]) -> None:
    global _make
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _make = start()


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers; without this they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _make_chunk(rows: list[dict]) -> list[Result]:
    return [_make(row) for row in rows]
