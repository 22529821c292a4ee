"""One run per folder: a second start is refused while any process of the first still lives.

Launchers that are killed leave workers behind (each worker of torchrun is a session of its own), and these would go on
writing checkpoints. So every process holds a lock of the kernel's, which goes with the process: a stale lock file is
nothing but a file, and the next run takes it over.
"""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import IO


class RunLocked(RuntimeError):
    """Another process trains in the folder."""


class RunLock:
    """The first process holds `.lock` alone; all others share `.lock-workers`.

    `take_first` comes before `take_worker` of any other process of the same run (a barrier between them).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._held: list[IO[str]] = []

    def take_first(self) -> None:
        """Raises RunLocked, which names the process that is in the way."""
        self._held = [self._take(".lock", fcntl.LOCK_EX)]
        workers = self._take(".lock-workers", fcntl.LOCK_EX)  # nobody else can start now: only an old run can hold it
        workers.truncate(0)
        workers.close()

    def take_worker(self) -> None:
        """Raises RunLocked."""
        self._held = [self._take(".lock-workers", fcntl.LOCK_SH)]

    def release(self) -> None:
        for file in self._held:
            file.close()
        self._held = []

    def _take(self, name: str, kind: int) -> IO[str]:
        file = open(self.folder / name, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holders = ", ".join(file.read().split("\n")).strip(", ") or "an unknown process"
            file.close()
            self.release()
            raise RunLocked(
                f"{self.folder}: {holders} still trains here; stop it (a killed launcher leaves its workers behind), "
                "or choose another --out"
            ) from None
        if kind == fcntl.LOCK_EX:
            file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return file
