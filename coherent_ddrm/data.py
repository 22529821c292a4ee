"""Shards -> batches of uint8, in an order that is a function of (seed, epoch) alone.

Which samples make up global step n depends on seed, batch size and number of samples, not on processes, workers or
what ran before; so a resumed run, on any number of machines, goes on with exactly the next samples. Reading is by
position: an index row, then one pread of the sample. Only members with a suffix from a fixed list are decoded, and
nothing is unpickled.
"""

import fcntl
import io
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from coherent_ddrm.shards import (
    IMAGE_SUFFIXES,
    INDEX,
    INDEX_START,
    MANIFEST,
    DataError,
    check_sizes,
    index_of,
    read_manifest,
    row_key,
    split_sample,
    temporary_name,
    write_json,
)

__all__ = ["Batch", "DataError", "DecodedCache", "Sample", "ShardDataset", "batches", "ids_for_step", "open_dataset"]

IGNORE = 255
OPEN_SHARDS = 128  # file handles kept, two a shard
CACHE_BELOW = 128  # pixels; larger pictures cost more disk than decoding costs time
FORMAT_OF = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}

Batch = dict  # image (B,H,W,3), edges (B,H,W), segmentation (B,H,W) uint8; class_id (B,) int64; key list[str]


@dataclass(frozen=True)
class Sample:
    """One sample. image (H, W, 3), edges (H, W), segmentation (H, W; 255 = ignore), all uint8; class_id -1 = none."""

    key: str
    image: np.ndarray
    edges: np.ndarray
    segmentation: np.ndarray
    class_id: int
    caption: str | None
    info: dict


class _File:
    """A file read by position. Closed when nobody holds it any more, so another thread's read is never cut off."""

    def __init__(self, path: Path) -> None:
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            self.descriptor = -1
            raise DataError(f"{path}: cannot be opened ({error.strerror}).") from error

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.descriptor, length, offset)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class ShardDataset:
    """Random access to a folder of shards; memory does not grow with the number of samples.

    Safe to use from threads and forked processes, and to pickle. Raises DataError when the folder and its manifest
    disagree.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.label_names: list[str] = self.manifest["label_names"]
        self.class_names: list[str] = self.manifest["class_names"]
        self.resolution: int = self.manifest["resolution"]
        self.dataset_hash: str = self.manifest["dataset_hash"]
        self._tars = [self.folder / shard["name"] for shard in self.manifest["shards"]]
        self._first = np.cumsum([0] + [shard["samples"] for shard in self.manifest["shards"]])  # (shards + 1,)
        for shard in self.manifest["shards"]:
            check_sizes(self.folder, shard)
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def __reduce__(self) -> tuple:
        return ShardDataset, (self.folder,)

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def num_labels(self) -> int:
        return len(self.label_names)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def keys(self) -> "_Keys":
        """All keys as a sequence read on demand: len(), indexing, iteration."""
        return _Keys(self)

    def key(self, i: int) -> str:
        return self._row(i)[2]

    def class_id(self, i: int) -> int:
        return int(self._row(i)[1]["class_id"])

    def read(self, i: int) -> Sample:
        """Sample i, decoded. Raises IndexError, or DataError naming shard and key."""
        shard, row, key = self._row(i)
        parts = self._members(shard, row, key)
        image, edges, segmentation = self._arrays(shard, row, key, parts)
        try:
            info = json.loads(parts["json"]) if "json" in parts else {}
        except ValueError as error:
            raise DataError(f"{self._tars[shard]}, sample {key}: its JSON is damaged ({error}).") from error
        caption = info.get("caption") if isinstance(info, dict) else None
        return Sample(key, image, edges, segmentation, int(row["class_id"]), caption, info)

    def batch(self, ids: np.ndarray) -> Batch:
        """Samples `ids` (B,) stacked: image (B,H,W,3), edges, segmentation (B,H,W) uint8, class_id (B,) int64, key."""
        count, side = len(ids), self.resolution
        batch: Batch = {
            "image": np.empty((count, side, side, 3), np.uint8),
            "edges": np.empty((count, side, side), np.uint8),
            "segmentation": np.empty((count, side, side), np.uint8),
            "class_id": np.empty(count, np.int64),
            "key": [],
        }
        for place, i in enumerate(ids):
            shard, row, key = self._row(int(i))
            arrays = self._arrays(shard, row, key, self._members(shard, row, key))
            batch["image"][place], batch["edges"][place], batch["segmentation"][place] = arrays
            batch["class_id"][place] = row["class_id"]
            batch["key"].append(key)
        return batch

    def _open_shard(self, shard: int) -> tuple[_File, _File]:
        tar = self._tars[shard]
        return _File(tar), _File(index_of(tar))

    def _row(self, i: int) -> tuple[int, np.void, str]:
        """(shard, INDEX row, key) of sample i; refuses a row that points outside its shard."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        i %= len(self)
        shard = int(np.searchsorted(self._first, i, side="right")) - 1
        start = INDEX_START + (i - int(self._first[shard])) * INDEX.itemsize
        row = np.frombuffer(self._open(shard)[1].read(start, INDEX.itemsize), INDEX)[0]
        try:
            key = row_key(row, self.manifest["shards"][shard]["bytes"])
        except DataError as error:
            raise DataError(f"{self._tars[shard]}, sample {i}: {error}; run check_shards.py.") from error
        return shard, row, key

    def _members(self, shard: int, row: np.void, key: str) -> dict[str, bytes]:
        """The bytes of each member, in one read."""
        data = self._open(shard)[0].read(int(row["offset"]), int(row["length"]))
        try:
            return split_sample(data, row)
        except DataError as error:
            raise DataError(f"{self._tars[shard]}, sample {key}: {error}; run check_shards.py.") from error

    def _arrays(self, shard: int, row: np.void, key: str, parts: dict[str, bytes]) -> tuple[np.ndarray, ...]:
        """(image, edges, segmentation); a missing map is all 0 (no edge) or all 255 (no label)."""
        side = self.resolution
        if "image" not in parts:
            raise DataError(f"{self._tars[shard]}, sample {key}: it has no picture.")
        try:
            image = _decode(parts["image"], FORMAT_OF[IMAGE_SUFFIXES[row["image_suffix"]]], "RGB")
            edges = _decode(parts["edges"], "PNG", "L") if "edges" in parts else np.zeros((side, side), np.uint8)
            labels = parts.get("segmentation")
            segmentation = np.full((side, side), IGNORE, np.uint8) if labels is None else _decode(labels, "PNG", "L")
        except Exception as error:  # Pillow raises nearly anything on a damaged file
            raise DataError(f"{self._tars[shard]}, sample {key}: a picture in it is damaged ({error}).") from error
        for array in (image, edges, segmentation):
            if array.shape[:2] != (side, side):
                raise DataError(f"{self._tars[shard]}, sample {key}: {array.shape[:2]}, but {MANIFEST} says {side} px.")
        return image, edges, segmentation


class _Keys:
    def __init__(self, dataset: ShardDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: int) -> str:
        return self._dataset.key(i)


def _decode(data: bytes, format: str, mode: str) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=(format,)) as picture:
        if picture.mode != mode:
            raise ValueError(f"its mode is {picture.mode}, not {mode}")
        return np.asarray(picture)


# ---------------------------------------------------------------------------------------------- decoded once


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

    def __reduce__(self) -> tuple:
        return DecodedCache, (self.dataset, self.folder)

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, ids: np.ndarray) -> Batch:
        """As ShardDataset.batch()."""
        ids = np.asarray(ids)
        batch: Batch = {name: self._arrays[name][ids] for name in self.ARRAYS}
        batch["key"] = [self.dataset.key(int(i)) for i in ids]
        return batch

    def _path(self, name: str) -> Path:
        return self.folder / f"cache-{self.dataset_hash[:16]}.{name}{'' if name == 'json' else '.npy'}"

    def _shape(self, name: str) -> tuple[int, ...]:
        count, side = len(self.dataset), self.resolution
        return {"image": (count, side, side, 3), "class_id": (count,)}.get(name, (count, side, side))

    def _load(self, name: str) -> np.ndarray:
        try:
            array = np.load(self._path(name), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{self._path(name)}: unreadable ({error}); delete cache-* there to have it made again."
            ) from error
        if array.shape != self._shape(name) or array.dtype != (np.int64 if name == "class_id" else np.uint8):
            raise DataError(
                f"{self._path(name)}: {array.dtype} {array.shape}; delete cache-* there to have it made again."
            )
        return array

    def _make(self) -> None:
        lock = self.folder / f"cache-{self.dataset_hash[:16]}.lock"
        try:
            file = open(lock, "w")  # held until the cache is there
        except OSError as error:
            raise DataError(
                f"{self.folder}: not writable ({error.strerror}); give a cache folder, or cache=False."
            ) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not self._path("json").exists():  # else another process made it while we waited
                self._write()

    def _write(self) -> None:
        need = sum(int(np.prod(self._shape(name))) for name in self.ARRAYS)
        free = shutil.disk_usage(self.folder).free
        if need > 0.95 * free:
            raise DataError(
                f"{self.folder}: the decoded cache takes {need:,} bytes, {free:,} are free; use cache=False."
            )
        for stale in self.folder.glob(
            f".cache-{self.dataset_hash[:16]}.*.tmp-*"
        ):  # from a killed run; we hold the lock
            stale.unlink()
        names = {name: temporary_name(self._path(name)) for name in self.ARRAYS}
        arrays = {
            name: np.lib.format.open_memmap(path, "w+", np.int64 if name == "class_id" else np.uint8, self._shape(name))
            for name, path in names.items()
        }
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for _ in pool.map(lambda ids: self._fill(arrays, ids), _slices(len(self.dataset), 64)):
                pass
        for name, path in names.items():
            arrays[name].flush()
            os.replace(path, self._path(name))
        write_json(self._path("json"), {"dataset_hash": self.dataset_hash, "samples": len(self.dataset)})

    def _fill(self, arrays: dict[str, np.ndarray], ids: range) -> None:
        batch = self.dataset.batch(np.arange(ids.start, ids.stop))
        for name in self.ARRAYS:
            arrays[name][ids.start : ids.stop] = batch[name]


def _slices(count: int, length: int) -> Iterator[range]:
    for start in range(0, count, length):
        yield range(start, min(count, start + length))


def open_dataset(
    folder: str | os.PathLike[str], cache: bool | None = None, cache_folder: str | os.PathLike[str] | None = None
) -> ShardDataset | DecodedCache:
    """Open shards. cache: True decodes once into memory-mapped files, False never, None does below 128 px."""
    dataset = ShardDataset(folder)
    if cache is None:
        cache = dataset.resolution < CACHE_BELOW
    return DecodedCache(dataset, cache_folder) if cache else dataset


# ---------------------------------------------------------------------------------------------- order


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


def batches(
    source: ShardDataset | DecodedCache,
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
