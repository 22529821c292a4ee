"""The writer of shards: a tar whose bytes depend on its samples alone, and its index."""

import hashlib
import os
import zlib
from pathlib import Path
from types import TracebackType

import numpy as np

from coherent_ddrm.shards import (
    BLOCK,
    IMAGE_SUFFIXES,
    INDEX,
    KEY,
    MEMBERS,
    DataError,
    header,
    index_of,
    member_name,
    sha256_of,
    shard_name,
    temporary_name,
)


class ShardWriter:
    """Writes one shard and its index. Leaving the `with` block renames both into place; an error leaves neither."""

    def __init__(self, folder: Path, shard: int) -> None:
        self.tar_path = folder / f"{shard_name(shard)}.tar"
        self.index_path = index_of(self.tar_path)
        self.rows: list[tuple] = []
        self.size = 0
        self._hash = hashlib.sha256()

    def __enter__(self) -> "ShardWriter":
        self._temporary = temporary_name(self.tar_path)
        self._file = open(self._temporary, "wb")  # closed in __exit__
        return self

    def add(self, key: str, members: dict[str, bytes], image_suffix: str, class_id: int = -1) -> None:
        """Append a sample. `members`: bytes for some of MEMBERS; "image" must be there."""
        if not KEY.fullmatch(key):
            raise DataError(f"The key {key!r} may hold only letters, digits, '_' and '-', at most 80 of them.")
        start, crc, places = self.size, 0, np.zeros((len(MEMBERS), 2), np.int64)
        for position, member in enumerate(MEMBERS):
            if member not in members:
                continue
            payload = members[member]
            block = (
                header(member_name(key, member, image_suffix), len(payload)) + payload + bytes(-len(payload) % BLOCK)
            )
            places[position] = self.size + BLOCK, len(payload)
            crc = zlib.crc32(block, crc)
            self._write(block)
        suffix = IMAGE_SUFFIXES.index(image_suffix)
        self.rows.append((key.encode(), start, self.size - start, crc, class_id, suffix, places))

    def _write(self, block: bytes) -> None:
        self._file.write(block)
        self._hash.update(block)
        self.size += len(block)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
            return
        self._write(bytes(2 * BLOCK))  # the end mark of a tar
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = np.array(self.rows, INDEX)
        temporary = temporary_name(self.index_path)
        with open(temporary, "wb") as file:
            np.save(file, index, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.index_path)
        os.replace(self._temporary, self.tar_path)

    def record(self) -> dict:
        """What a manifest says about this shard, once it is closed."""
        return {
            "name": self.tar_path.name,
            "samples": len(self.rows),
            "bytes": self.size,
            "sha256": self._hash.hexdigest(),
            "index_sha256": sha256_of(self.index_path),
        }
