"""A folder of shards as a sequence of samples, read by position: an index row, then one pread of the sample.

Only members with a suffix from a fixed list are decoded, and nothing is unpickled.
"""

import io
import json
import os
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
)

IGNORE = 255
OPEN_SHARDS = 128  # file handles kept, two a shard
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
