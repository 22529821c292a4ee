"""The file format of shards: plain WebDataset tars, an offset index beside each, a manifest beside all.

    shard-000000.tar         USTAR; per sample <key>.png|jpg|webp, <key>.edges.png, <key>.segmentation.png, <key>.json
    shard-000000.index.npy   one INDEX row per sample
    shard-000000.json        what the shard holds and what was left out, written when the shard is complete
    manifest.json            the whole folder, written when every shard is

Every file appears under its name only when it is complete. Nothing here is ever unpickled.
"""

import hashlib
import io
import json
import os
import re
import tarfile
import threading
import zlib
from pathlib import Path

import numpy as np

FORMAT = 1
MANIFEST = "manifest.json"
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
IMAGE_SUFFIXES = (".png", ".jpg", ".webp")
MEMBERS = ("image", "edges", "segmentation", "json")
SUFFIXES = {"edges": ".edges.png", "segmentation": ".segmentation.png", "json": ".json"}
BLOCK = 512
INDEX = np.dtype(
    [
        ("key", "S80"),
        ("offset", "<i8"),  # of the sample's first header in the tar
        ("length", "<i8"),  # of the sample, headers and padding included
        ("crc", "<u4"),  # crc32 of these bytes
        ("class_id", "<i4"),  # -1: no class
        ("image_suffix", "<u4"),  # position in IMAGE_SUFFIXES
        ("members", "<i8", (4, 2)),  # offset in the tar and length of each of MEMBERS; length 0: absent
    ]
)


class DataError(ValueError):
    """A shard, index or manifest is missing, damaged or not what it should be; the message names it."""


# numpy reads a header through Python's parser, which in 3.11 can fail when threads use it at once ("AST constructor
# recursion depth mismatch", https://github.com/python/cpython/issues/106905).
ONE_AT_A_TIME = threading.Lock()


def shard_name(shard: int) -> str:
    return f"shard-{shard:06d}"


def key_of(relative_path: str) -> str:
    """A WebDataset key for a file: its readable name and a hash of its path, so unique, without dots and slashes."""
    digest = hashlib.sha256(os.fsencode(relative_path)).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(relative_path)[0])[-60:]
    return f"{readable}-{digest}"


def member_name(key: str, member: str, image_suffix: str) -> str:
    return key + (image_suffix if member == "image" else SUFFIXES[member])


def header(name: str, size: int) -> bytes:
    """A member's USTAR header, which depends on nothing but its name and size."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode, info.uid, info.gid = size, 0, 0o644, 0, 0
    return info.tobuf(tarfile.USTAR_FORMAT)


def split_sample(data: bytes, row: np.void) -> dict[str, bytes]:
    """The members of one sample, from its bytes in the tar and its INDEX row.

    Proved by the checksum and by each member's name; what the index does not name is never looked at. Raises DataError.
    """
    start, length, key = int(row["offset"]), int(row["length"]), row["key"].decode("ascii", "replace")
    if len(data) != length or zlib.crc32(data) != row["crc"]:
        raise DataError("damaged (its checksum is wrong)")
    parts = {}
    for member, (offset, size) in zip(MEMBERS, row["members"].tolist(), strict=True):
        if not size:
            continue
        at, name = offset - start, member_name(key, member, IMAGE_SUFFIXES[row["image_suffix"]])
        if at < BLOCK or size < 0 or at + size > length or data[at - BLOCK : at] != header(name, size):
            raise DataError(f"the index does not point at {name}")
        parts[member] = data[at : at + size]
    return parts


def row_key(row: np.void, tar_size: int) -> str:
    """The key of an INDEX row. Raises DataError if it is none, or if the row points outside its tar."""
    key = row["key"].decode("ascii", "replace")
    inside = 0 <= row["offset"] and 0 < row["length"] <= tar_size - row["offset"]
    if not KEY.fullmatch(key) or row["image_suffix"] >= len(IMAGE_SUFFIXES) or not inside:
        raise DataError(f"its index row (key {key!r}) is damaged")
    return key


def read_index(path: Path) -> np.ndarray:
    """The (N,) INDEX rows of a shard. Raises DataError."""
    try:
        with ONE_AT_A_TIME:
            rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a readable index ({error}).") from error
    if not isinstance(rows, np.ndarray) or rows.dtype != INDEX or rows.ndim != 1:
        raise DataError(f"{path}: not an index of format {FORMAT}; build the shards again.")
    return rows


def _index_start() -> int:
    """Length of the .npy header before INDEX rows. The same for any count: numpy pads it for growing arrays."""
    lengths = set()
    for rows in (0, 10**9):
        buffer = io.BytesIO()
        header = {"descr": np.lib.format.dtype_to_descr(INDEX), "fortran_order": False, "shape": (rows,)}
        np.lib.format.write_array_header_1_0(buffer, header)
        lengths.add(buffer.tell())
    (length,) = lengths
    return length


INDEX_START = _index_start()


def read_manifest(folder: Path) -> dict:
    """The manifest of a complete folder of shards. Raises DataError."""
    path = folder / MANIFEST
    if not path.exists():
        raise DataError(
            f"{folder}: no {MANIFEST} here. Name a folder made by build_shards.py; an unfinished one has none."
        )
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path}: format {manifest.get('format')!r}, but this version reads {FORMAT}; build again.")
    wanted = {
        "shards": list,
        "label_names": list,
        "class_names": list,
        "resolution": int,
        "samples": int,
        "dataset_hash": str,
    }
    for name, kind in wanted.items():
        if not isinstance(manifest.get(name), kind):
            raise DataError(f"{path}: {name!r} is missing or no {kind.__name__}.")
    for position, shard in enumerate(manifest["shards"]):
        if not isinstance(shard, dict) or shard.get("name") != f"{shard_name(position)}.tar":
            raise DataError(f"{path}: entry {position} of 'shards' is not {shard_name(position)}.tar.")
    return manifest


def check_sizes(folder: Path, shard: dict) -> None:
    """Refuse a shard whose tar or index has another size than the manifest says. Raises DataError."""
    tar = folder / shard["name"]
    for path, size in ((tar, shard["bytes"]), (index_of(tar), INDEX_START + shard["samples"] * INDEX.itemsize)):
        found = path.stat().st_size if path.exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes, its manifest says {size}"
            raise DataError(f"{path}: {state}. Copy it again or build again; check_shards.py tells all.")


def index_of(tar: Path) -> Path:
    return tar.with_suffix(".index.npy")


def temporary_name(path: Path) -> Path:
    """Hidden, beside `path`, and different for every process of every machine that shares the folder."""
    return path.with_name(f".{path.name}.tmp-{os.uname().nodename}-{os.getpid()}")


def write_json(path: Path, content: object) -> None:
    """Write JSON beside `path`, then rename. Sorted keys: the same content gives the same bytes."""
    temporary = temporary_name(path)
    with open(temporary, "w", encoding="ascii") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises DataError."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON ({error}).") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: a JSON object was expected, not a {type(content).__name__}.")
    return content


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dataset_hash(shards: list[dict], label_names: list[str], class_names: list[str]) -> str:
    """One hash for a folder of shards: of all shard hashes and of the names their ids stand for."""
    content = [[shard["sha256"] for shard in shards], label_names, class_names]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
