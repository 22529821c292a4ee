"""Make a study's folder: check all pictures, write each under a random id, write study.json last.

Pictures are decoded and written anew as PNG, so neither a file's name nor what its maker wrote into it (comments,
profiles, compression) tells a rater which method it is from.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import ValidationError

from coherent_ddrm.errors import UserError
from coherent_ddrm.export import write_atomic
from coherent_ddrm.images import encode, read_hole, read_image, read_size
from coherent_ddrm.jobs import SUFFIXES
from coherent_ddrm.study.new_folder import new_folder
from coherent_ddrm.study.questions import FILE, PICTURES, Catch, Picture, Study

PROMPT = "Which of the two fills the hole better?"
TITLE = "Which picture is better?"


@dataclass
class Sources:
    """Where the pictures are, matched by name (the suffix may differ)."""

    truth: Path
    masks: Path
    results: dict[str, Path]  # method -> folder


def create(
    sources: Sources,
    folder: Path,
    *,
    questions: int = 20,
    catches: int = 5,
    seed: int = 0,
    title: str = TITLE,
    prompt: str = PROMPT,
) -> Study:
    """Write a study to `folder`, which must not exist yet or be empty. UserError or ImageError for what cannot be."""
    with new_folder(folder) as temporary:
        matched = match(sources)
        methods = list(sources.results)
        most = len(matched) * len(methods) * (len(methods) - 1) // 2
        if questions > most:
            raise UserError(f"--questions {questions}: these pictures and methods give only {most} comparisons")
        shares = {files.name: _hole_share(files) for files in matched}
        widest = sorted(shares, key=lambda name: -shares[name])[: max(1, len(shares) // 2)]  # where a broken hole shows
        (temporary / PICTURES).mkdir()
        pictures = [_write(files, temporary / PICTURES, bool(catches) and files.name in widest) for files in matched]
        try:
            study = Study(
                id=_new_id(),
                title=title,
                prompt=prompt,
                seed=seed,
                questions=questions,
                catches=catches,
                methods=methods,
                pictures=pictures,
            )
        except ValidationError as error:
            raise UserError(f"{folder}: {error.errors()[0]['msg']}") from error
        write_atomic(temporary / FILE, study.model_dump_json(indent=1).encode() + b"\n")
    return study


def parse_results(texts: Iterable[str]) -> dict[str, Path]:
    """["ours=out/", "telea=other/"] -> {"ours": Path("out"), ...}. UserError for less than two or two of one name."""
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        name = name.strip()
        if not equals or not path or not name or len(name) > 60 or not name.isprintable():
            raise UserError(f"--results {text!r}: write NAME=FOLDER with a name of at most 60 letters")
        if name in found:
            raise UserError(f"--results: two folders are called {name!r}; give each method a name of its own")
        found[name] = Path(path)
    if len(found) < 2:
        raise UserError("--results: a comparison needs at least two methods, each as --results NAME=FOLDER")
    return found


@dataclass(frozen=True)
class Files:
    """The files of one picture; results in the order of the methods."""

    name: str
    truth: Path
    mask: Path
    results: tuple[Path, ...]


def match(sources: Sources) -> list[Files]:
    """Each picture that the results have; truth and masks may hold more. UserError for one that a folder lacks."""
    folders = [sources.truth, sources.masks, *sources.results.values()]
    listed = [_pictures(folder) for folder in folders]
    names = sorted(set().union(*listed[2:]))
    if not names:
        raise UserError(f"{folders[2]}: no pictures in this folder")
    for folder, files in zip(folders, listed, strict=True):
        lacking = [name for name in names if name not in files]
        if lacking:
            raise UserError(f"{folder}: no picture called {lacking[0]!r}, but there is a result of that name")
    rows = [[files[name] for files in listed] for name in names]
    return [Files(name, row[0], row[1], tuple(row[2:])) for name, row in zip(names, rows, strict=True)]


def _pictures(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of pictures")
    files = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    found = {path.stem: path for path in files if path.is_file()}
    if len(found) < len(files):
        raise UserError(f"{folder}: two pictures share a name, or a folder is called like a picture")
    return found


def _hole_share(files: Files) -> float:
    """The share of the picture that its hole covers. UserError if sizes differ or there is no hole."""
    height, width = read_size(files.truth)
    for other in (files.mask, *files.results):
        h, w = read_size(other)
        if (h, w) != (height, width):
            raise UserError(f"{other} is {w} x {h}, but {files.truth} is {width} x {height}; bring them to one size")
    hole = read_hole(files.mask)
    if not hole.any():
        raise UserError(f"{files.mask}: nothing is white, so there is no hole to judge")
    return float(hole.mean())


def _write(files: Files, folder: Path, with_catch: bool) -> Picture:
    """All that raters may see of one picture."""
    truth, hole = read_image(files.truth), read_hole(files.mask)
    catch = Catch(truth=_put(truth, folder), broken=_put(broken(truth, hole), folder)) if with_catch else None
    return Picture(
        name=files.name,
        truth=_put(truth, folder),
        input=_put(_with_hole(truth, hole), folder),
        results=[_put(read_image(result), folder) for result in files.results],
        catch=catch,
    )


def broken(truth: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """A result that nobody prefers: (h, w, 3) uint8 with coloured blocks of noise in the hole."""
    height, width = hole.shape
    block = max(1, max(height, width) // 16)
    shape = (height // block + 1, width // block + 1, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8).repeat(block, 0).repeat(block, 1)
    return np.where(hole[..., None], noise[:height, :width], truth)


def _with_hole(truth: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """(h, w, 4): transparent where pixels are missing, and nothing of the truth left there."""
    return np.dstack([np.where(hole[..., None], np.uint8(128), truth), np.where(hole, 0, 255).astype(np.uint8)])


def _put(picture: np.ndarray, folder: Path) -> str:
    name = _new_id()
    if picture.shape[-1] == 4:
        Image.fromarray(picture).save(folder / f"{name}.png")
    else:
        (folder / f"{name}.png").write_bytes(encode(picture, "PNG"))
    return name


def _new_id() -> str:
    return secrets.token_hex(12)
