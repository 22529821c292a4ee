"""Shards decoded once into memory-mapped arrays, for small pictures: there decoding costs more than the disk."""

import fcntl
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from coherent_ddrm.dataset import Batch, ShardDataset
from coherent_ddrm.shards import DataError, read_json, temporary_name, write_json

AT_ONCE = 64  # samples a thread decodes at a time


class DecodedCache:
    """A dataset decoded into memory-mapped arrays beside its shards: reading a batch is a copy. For small pictures.

    Made once, under a lock, by whichever process comes first; its name carries the dataset's hash, so a stale one is
    never used. Same interface as ShardDataset where batches are concerned.
    """

    ARRAYS = ("image", "edges", "segmentation", "class_id")

    def __init__(self, dataset: ShardDataset, folder: str | os.PathLike[str] | None = None) -> None:
        self.dataset = dataset
        self.folder = Path(folder) if folder else dataset.folder
        self.label_names, self.class_names = dataset.label_names, dataset.class_names
        self.num_labels, self.num_classes = dataset.num_labels, dataset.num_classes
        self.resolution, self.dataset_hash, self.manifest = dataset.resolution, dataset.dataset_hash, dataset.manifest
        self.keys, self.key, self.read = dataset.keys, dataset.key, dataset.read
        if not self._path("json").exists():
            self._make()
        self._arrays = {name: self._load(name) for name in self.ARRAYS}
        self._damaged = {int(i): why for i, why in read_json(self._path("json")).get("damaged", {}).items()}

    def __reduce__(self) -> tuple:
        return DecodedCache, (self.dataset, self.folder)

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, ids: np.ndarray) -> Batch:
        """As ShardDataset.batch(); a sample that could not be decoded is refused here, not when the cache is made."""
        ids = np.asarray(ids)
        if self._damaged:
            for i in ids:
                if int(i) in self._damaged:
                    raise DataError(self._damaged[int(i)])
        batch: Batch = {name: self._arrays[name][ids] for name in self.ARRAYS}
        batch["key"] = [self.dataset.key(int(i)) for i in ids]
        return batch

    def _path(self, name: str) -> Path:
        suffix = "" if name in ("json", "lock") else ".npy"
        return self.folder / f"cache-{self.dataset_hash[:16]}.{name}{suffix}"

    def _shape(self, name: str) -> tuple[int, ...]:
        count, side = len(self.dataset), self.resolution
        return {"image": (count, side, side, 3), "class_id": (count,)}.get(name, (count, side, side))

    def _load(self, name: str) -> np.ndarray:
        path, remedy = self._path(name), "delete cache-* there to have it made again"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: unreadable ({error}); {remedy}.") from error
        if array.shape != self._shape(name) or array.dtype != _dtype(name):
            raise DataError(f"{path}: {array.dtype} {array.shape}; {remedy}.")
        return array

    def _make(self) -> None:
        try:
            lock = open(self._path("lock"), "w")  # held until the cache is there
        except OSError as error:
            raise DataError(
                f"{self.folder}: not writable ({error.strerror}); give a cache folder, or cache=False."
            ) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self._path("json").exists():  # else another process made it while we waited
                self._check_space()
                self._write()

    def _check_space(self) -> None:
        need = sum(int(np.prod(self._shape(name))) for name in self.ARRAYS)
        free = shutil.disk_usage(self.folder).free
        if need > 0.95 * free:
            raise DataError(
                f"{self.folder}: the decoded cache takes {need:,} bytes, {free:,} are free; use cache=False."
            )

    def _write(self) -> None:
        """Fill hidden arrays, then rename them; the JSON, which says that all are there, comes last."""
        for stale in self.folder.glob(f".cache-{self.dataset_hash[:16]}.*.tmp-*"):  # a killed run's; we hold the lock
            stale.unlink()
        hidden = {name: temporary_name(self._path(name)) for name in self.ARRAYS}
        arrays = {
            name: np.lib.format.open_memmap(path, "w+", _dtype(name), self._shape(name))
            for name, path in hidden.items()
        }
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            starts = range(0, len(self.dataset), AT_ONCE)
            faults = list(pool.map(lambda start: self._fill(arrays, start), starts))
        for name, path in hidden.items():
            arrays[name].flush()
            os.replace(path, self._path(name))
        facts = {"dataset_hash": self.dataset_hash, "samples": len(self.dataset)}
        write_json(self._path("json"), facts | {"damaged": {str(i): why for part in faults for i, why in part.items()}})

    def _fill(self, arrays: dict[str, np.ndarray], start: int) -> dict[int, str]:
        """Decode AT_ONCE samples. Those that cannot be stay 0 and are returned, with the reason."""
        faults: dict[int, str] = {}
        for i in range(start, min(start + AT_ONCE, len(self.dataset))):
            try:
                batch = self.dataset.batch(np.array([i]))
            except DataError as error:
                faults[i] = str(error)
                continue
            for name in self.ARRAYS:
                arrays[name][i] = batch[name][0]
        return faults


def _dtype(name: str) -> type:
    return np.int64 if name == "class_id" else np.uint8
