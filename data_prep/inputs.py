"""What goes in: the pictures of a folder tree, in a fixed order, with their classes and captions."""

import csv
import hashlib
import json
import os
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from coherent_ddrm.jobs import SUFFIXES
from coherent_ddrm.shards import DataError


def walk(folder: Path, below: str = "") -> Iterator[tuple[str, str]]:
    """(kind, relative path) of everything under `folder`, sorted, one directory in memory at a time."""
    try:
        entries = sorted(os.scandir(folder / below), key=lambda entry: os.fsencode(entry.name))
    except OSError:
        yield "unreadable folder", below
        return
    for entry in entries:
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.is_symlink() and entry.is_dir():
            yield "linked folder", path
        elif entry.is_dir(follow_symlinks=False):
            yield from walk(folder, path)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            yield "picture", path
        else:
            yield "other", path


class ClassTable:
    """The CSV of classes and captions, on disk (SQLite) so that its size costs no memory."""

    def __init__(self, path: Path | None, columns: tuple[str, str, str]) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix="classes-", suffix=".sqlite")  # lives as long as self
        self._table = sqlite3.connect(self._file.name)
        self._table.execute("CREATE TABLE rows (image TEXT PRIMARY KEY, label TEXT, caption TEXT) WITHOUT ROWID")
        self.count = 0
        if path is not None:
            self._read(path, columns)

    def _read(self, path: Path, columns: tuple[str, str, str]) -> None:
        image_column, label_column, caption_column = columns
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                found = reader.fieldnames or []
                if image_column not in found or not {label_column, caption_column} & set(found):
                    raise DataError(
                        f"{path}: the header {','.join(found)!r} lacks the column {image_column!r}, or both "
                        f"{label_column!r} and {caption_column!r}; name them with --image-column, --label-column, "
                        "--caption-column."
                    )
                for line in reader:
                    label = (line.get(label_column) or "").strip() or None
                    caption = (line.get(caption_column) or "").strip() or None
                    self._add(path, reader.line_num, (line[image_column] or "").strip(), label, caption)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: not a readable UTF-8 CSV ({error}).") from error

    def _add(self, path: Path, number: int, image: str, label: str | None, caption: str | None) -> None:
        image = image.replace("\\", "/").removeprefix("./")
        known = self.find(image)
        if known not in ((None, None), (label, caption)):
            raise DataError(f"{path}, line {number}: {image!r} was {known[0]!r} on an earlier line, now {label!r}.")
        self._table.execute("INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", (image, label, caption))
        self.count += 1

    def find(self, image: str) -> tuple[str | None, str | None]:
        """(label, caption) of a relative path."""
        query = "SELECT label, caption FROM rows WHERE image = ?"
        try:
            return self._table.execute(query, (image,)).fetchone() or (None, None)
        except UnicodeEncodeError:  # a file name that is not UTF-8 cannot stand in a UTF-8 CSV
            return None, None

    def names(self) -> list[str]:
        query = "SELECT DISTINCT label FROM rows WHERE label IS NOT NULL ORDER BY label"
        return [name for (name,) in self._table.execute(query)]


def list_inputs(images: Path, table: ClassTable, listing: Path) -> dict:
    """Write `listing`, one JSON line per picture; returns counts and a hash. Every rank writes the same one."""
    counts, not_entered, digest, classed = Counter(), [], hashlib.sha256(), 0
    with open(listing, "wb") as file:
        for kind, path in walk(images):
            counts[kind] += 1
            if kind.endswith("folder"):
                not_entered.append(f"{path} ({kind})")
            if kind != "picture":
                continue
            label, caption = table.find(path)
            classed += (label, caption) != (None, None)
            line = json.dumps({"path": path, "class": label, "caption": caption}).encode() + b"\n"
            digest.update(line)
            file.write(line)
    return {
        "pictures": counts["picture"],
        "other_files": counts["other"],
        "folders_not_entered": not_entered,
        "pictures_in_csv": classed,
        "csv_rows_without_picture": max(0, table.count - classed),
        "sha256": digest.hexdigest(),
    }


class Listing:
    """A list of inputs, cut into shards and read one shard at a time; memory holds one offset per shard."""

    def __init__(self, path: Path, per_shard: int) -> None:
        self.path, self.per_shard = path, per_shard
        self.pictures, self._starts, offset = 0, [], 0
        with open(path, "rb") as file:
            for line in file:
                if self.pictures % per_shard == 0:
                    self._starts.append(offset)
                self.pictures += 1
                offset += len(line)

    @property
    def shards(self) -> int:
        return len(self._starts)

    def count(self, shard: int) -> int:
        return min(self.per_shard, self.pictures - shard * self.per_shard)

    def rows(self, shard: int) -> list[dict]:
        """The pictures of one shard: path, class, caption."""
        with open(self.path, "rb") as file:
            file.seek(self._starts[shard])
            return [json.loads(line) for line in islice(file, self.per_shard)]
