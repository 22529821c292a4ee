"""Every method on every picture and hole, once: resumable, and shared out over processes.

Beside the results of a method lies method.json, which says how they are made; others are not mixed with them. Beside
those of a kind of hole lies record-RANK.jsonl, a line per picture, written after its files.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from coherent_ddrm.errors import UserError
from coherent_ddrm.evaluation.gallery import Gallery
from coherent_ddrm.evaluation.methods import Method
from coherent_ddrm.export import read_json, write_atomic
from coherent_ddrm.images import read_image, write_image

ADOPTED = {"made_by": "another program"}
LOSSLESS = (".png", ".bmp", ".tif", ".tiff")


def claim(gallery: Gallery, label: str, facts: Mapping[str, Any]) -> None:
    """Say how the results called `label` are made. UserError if those that are there were made otherwise."""
    folder = gallery.folder / "results" / label
    file, facts = folder / "method.json", json.loads(json.dumps(facts))
    if file.is_file():
        there = read_json(file)
        names = [name for name in {**there, **facts} if there.get(name) != facts.get(name)]
        if names:
            raise UserError(
                f"{folder} holds results with {names[0]} {there.get(names[0])!r}, not {facts.get(names[0])!r}; "
                "remove them, or evaluate into another folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(facts, indent=1).encode() + b"\n")


def carry_out(gallery: Gallery, method: Method, batch: int, rank: int = 0, world: int = 1, quiet: bool = False) -> None:
    """Fill what this process has to fill and has not yet.

    Results do not depend on batch, rank or world; nfe and seconds noted are those of the batch (a line search, as
    CoPaint's, goes on until its last picture is done).
    """
    for kind in gallery.kinds:
        done = records(gallery, method.label, kind)
        mine = [key for key in gallery.keys[rank::world] if key not in done]
        folder = gallery.folder / "results" / method.label / kind
        folder.mkdir(parents=True, exist_ok=True)
        chunks = list(_chunks(mine, batch))
        with open(folder / f"record-{rank}.jsonl", "a+", buffering=1) as log:
            _end_line(log)
            for keys in tqdm(chunks, desc=f"{method.label}, {kind}", unit="batch", disable=quiet or not chunks):
                log.writelines(json.dumps(row) + "\n" for row in _fill(gallery, method, kind, keys))


def _end_line(log: Any) -> None:
    """A line that a kill cut short gets its end, so that the next one stands alone."""
    size = log.seek(0, os.SEEK_END)
    if size:
        log.seek(size - 1)
        if log.read(1) != "\n":
            log.write("\n")


def _fill(gallery: Gallery, method: Method, kind: str, keys: Sequence[str]) -> list[dict]:
    given, holes = [gallery.given(kind, key) for key in keys], [gallery.hole(kind, key) for key in keys]
    count, rows = gallery.setting.candidates, []
    every = lambda arrays: np.stack([array for array in arrays for _ in range(count)])  # noqa: E731
    seeds = [_seed(gallery.setting.seed, kind, key, k) for key in keys for k in range(count)]
    filled = method.fill(every(given), every(holes), seeds)
    for i, key in enumerate(keys):
        for k in range(count):
            write_image(gallery.result(method.label, kind, key, k), filled.pictures[i * count + k])
        rows.append(
            {
                "key": key,
                "nfe": filled.nfe,
                "seconds": round(filled.seconds / len(seeds), 6),
                "memory": None if filled.memory is None else round(filled.memory, 1),
            }
        )
    return rows


def records(gallery: Gallery, label: str, kind: str) -> dict[str, dict]:
    """What was noted of each picture whose candidates are all there, by its key. A line cut short does not count."""
    found: dict[str, dict] = {}
    for file in sorted((gallery.folder / "results" / label / kind).glob("record-*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            files = [gallery.result(label, kind, row["key"], k) for k in range(gallery.setting.candidates)]
            if all(file.is_file() for file in files):
                found[row["key"]] = row
    return found


# -- pictures of another program ---------------------------------------------------------------------------------------


def find_results(gallery: Gallery, folder: Path) -> dict[Path, Path]:
    """Where each picture that another program made has to lie -> where it lies: FOLDER/KIND/KEY.png, or FOLDER/KEY.png
    where there is one kind. UserError for one that is missing, lossy or of another size."""
    found: dict[Path, Path] = {}
    for kind in gallery.kinds:
        place = folder / kind if (folder / kind).is_dir() or len(gallery.kinds) > 1 else folder
        for key in gallery.keys:
            for k in range(gallery.setting.candidates):
                goal = gallery.result("-", kind, key, k)
                file = _lossless(place, goal.stem)
                height, width = read_image(file).shape[:2]
                if (height, width) != (gallery.setting.size,) * 2:
                    raise UserError(f"{file}: {width} x {height}, the truth has {gallery.setting.size} px")
                found[goal.relative_to(gallery.folder / "results" / "-")] = file
    return found


def adopt(gallery: Gallery, label: str, files: Mapping[Path, Path]) -> None:
    """Take in what `find_results` found, in place of what was taken in so before. What differs in known pixels stays.

    UserError where results of a method of ours are called so.
    """
    folder = gallery.folder / "results" / label
    claim(gallery, label, ADOPTED)
    for kind in gallery.kinds:
        (folder / kind).mkdir(exist_ok=True)
    for goal, file in files.items():
        if not (folder / goal).is_file() or not file.samefile(folder / goal):
            write_image(folder / goal, read_image(file))
    rows = [{"key": key, "nfe": None, "seconds": None, "memory": None} for key in gallery.keys]
    for kind in gallery.kinds:
        (folder / kind / "record-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _lossless(folder: Path, stem: str) -> Path:
    for suffix in LOSSLESS:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    lossy = [path.name for path in folder.glob(f"{stem}.*")]
    what = f"only {lossy[0]}, which is not lossless" if lossy else "nothing"
    raise UserError(f"{folder}: {what} for {stem!r}; results are scored as PNG, named as the pictures in given/")


def _chunks(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (keys[first : first + size] for first in range(0, len(keys), size))


def _seed(seed: int, kind: str, key: str, candidate: int) -> int:
    """The same for every method, so that all start from the same noise."""
    return zlib.crc32(f"{seed}/{kind}/{key}/{candidate}".encode()) >> 1
