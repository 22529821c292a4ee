"""Every method on every picture and hole, once: resumable, and shared out over processes.

Beside the results of a method and a kind of hole lies record-RANK.jsonl, a line per picture, written after its files.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from coherent_ddrm.errors import UserError
from coherent_ddrm.evaluation.gallery import Gallery
from coherent_ddrm.evaluation.methods import Method
from coherent_ddrm.images import read_image, write_image


def carry_out(gallery: Gallery, method: Method, batch: int, rank: int = 0, world: int = 1, quiet: bool = False) -> None:
    """Fill what this process has to fill and has not yet. Results do not depend on batch, rank or world."""
    for kind in gallery.kinds:
        done = records(gallery, method.label, kind)
        mine = [key for key in gallery.keys[rank::world] if key not in done]
        folder = gallery.folder / "results" / method.label / kind
        folder.mkdir(parents=True, exist_ok=True)
        chunks = list(_chunks(mine, batch))
        with open(folder / f"record-{rank}.jsonl", "a", buffering=1) as log:
            for keys in tqdm(chunks, desc=f"{method.label}, {kind}", unit="batch", disable=quiet or not chunks):
                log.writelines(json.dumps(row) + "\n" for row in _fill(gallery, method, kind, keys))


def _fill(gallery: Gallery, method: Method, kind: str, keys: Sequence[str]) -> list[dict]:
    truths, holes = [gallery.truth(key) for key in keys], [gallery.hole(kind, key) for key in keys]
    count, rows = gallery.setting.candidates, []
    every = lambda arrays: np.stack([array for array in arrays for _ in range(count)])  # noqa: E731
    seeds = [_seed(gallery.setting.seed, kind, key, k) for key in keys for k in range(count)]
    filled = method.fill(every(truths), every(holes), seeds)
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
    """What was noted of each picture that is done, by its key. A line cut short by a kill does not count."""
    found: dict[str, dict] = {}
    for file in sorted((gallery.folder / "results" / label / kind).glob("record-*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if gallery.result(label, kind, row["key"]).is_file():
                found[row["key"]] = row
    return found


def ranks() -> tuple[int, int]:
    """(rank, number of processes) that torchrun or accelerate launched."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def adopt(gallery: Gallery, label: str, folder: Path) -> None:
    """Take in results that another program made: FOLDER/KIND/KEY.png, or FOLDER/KEY.png where there is one kind.

    Raises UserError for a file that is missing or of another size. A copy lies in the report's folder afterwards; what
    differs in known pixels stays as it is, and is counted.
    """
    for kind in gallery.kinds:
        place = folder / kind if (folder / kind).is_dir() or len(gallery.kinds) > 1 else folder
        target = gallery.folder / "results" / label / kind
        target.mkdir(parents=True, exist_ok=True)
        rows = []
        for key in gallery.keys:
            for k in range(gallery.setting.candidates):
                goal = gallery.result(label, kind, key, k)
                picture = read_image(_lossless(place, goal.stem))
                if picture.shape[:2] != (gallery.setting.size,) * 2:
                    height, width = picture.shape[:2]
                    raise UserError(f"{place}/{goal.stem}: {width} x {height}, the truth has {gallery.setting.size} px")
                write_image(goal, picture)
            rows.append({"key": key, "nfe": None, "seconds": None, "memory": None})
        (target / "record-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _lossless(folder: Path, stem: str) -> Path:
    found = [
        folder / f"{stem}{suffix}"
        for suffix in (".png", ".bmp", ".tif", ".tiff")
        if (folder / f"{stem}{suffix}").is_file()
    ]
    if found:
        return found[0]
    lossy = [path.name for path in folder.glob(f"{stem}.*")]
    what = f"only {lossy[0]}, which is not lossless" if lossy else "nothing"
    raise UserError(f"{folder}: {what} for {stem!r}; results are scored as PNG, named as the pictures in truth/")


def _chunks(keys: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (keys[first : first + size] for first in range(0, len(keys), size))


def _seed(seed: int, kind: str, key: str, candidate: int) -> int:
    """The same for every method, so that all start from the same noise."""
    return zlib.crc32(f"{seed}/{kind}/{key}/{candidate}".encode()) >> 1
