"""The pictures and holes that all methods are given, as files, so that any program can fill them too.

    OUT/setting.json   truth/KEY.png   holes/KIND/KEY.png (white = missing)   given/KIND/KEY.png (grey in the hole)
    OUT/results/METHOD/KIND/KEY.png   OUT/hashes.json

The setting is written first; another one in the same folder is refused, the same one goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from coherent_ddrm.data import DataError, ShardDataset
from coherent_ddrm.errors import UserError
from coherent_ddrm.evaluation.setting import Setting
from coherent_ddrm.export import read_json, write_atomic
from coherent_ddrm.images import fit, read_hole, read_image, read_size, write_image
from coherent_ddrm.masks import MAKERS, make_hole
from coherent_ddrm.own_pictures import list_pictures

SMALLEST_HOLE = 0.001  # share of the pixels; drawn again below
GREY = np.uint8(128)  # in the hole of what a method is given

MASK_SUFFIXES = (".png", ".bmp", ".webp", ".gif")


class Source(NamedTuple):
    """A picture of the data."""

    name: str  # its path in the data's folder without suffix; masks of one's own are named so
    read: Callable[[], np.ndarray]  # -> uint8 (R, R, 3)
    shape: Callable[[], tuple[int, int]]  # (height, width) before it became a square


class Gallery:
    """The files of one evaluation, in `folder`. UserError for a kind of hole that there is not."""

    def __init__(self, folder: Path, setting: Setting):
        self.folder, self.setting = folder, setting
        self.kinds = dict(_kind(text) for text in setting.masks)  # -> the folder of its masks, None for a maker's
        if len(self.kinds) < len(setting.masks):
            raise UserError(f"two kinds of holes have one name in {', '.join(setting.masks)}; NAME=FOLDER names one")

    @cached_property
    def keys(self) -> list[str]:
        """Names of the pictures, in order."""
        return read_json(self.folder / "setting.json")["keys"]

    def truth(self, key: str) -> np.ndarray:
        """uint8 (R, R, 3)"""
        return read_image(self.folder / "truth" / f"{key}.png")

    def hole(self, kind: str, key: str) -> np.ndarray:
        """bool (R, R), True = missing"""
        return read_hole(self.folder / "holes" / kind / f"{key}.png")

    def given(self, kind: str, key: str) -> np.ndarray:
        """uint8 (R, R, 3), grey in the hole"""
        return read_image(self.folder / "given" / kind / f"{key}.png")

    def result(self, method: str, kind: str, key: str, candidate: int = 0) -> Path:
        """Where a result lies."""
        name = key if self.setting.candidates == 1 else f"{key}-{candidate + 1}"
        return self.folder / "results" / method / kind / f"{name}.png"

    # -- making --------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Write the setting, or check that it is the one that is there.

        Raises:
            UserError: the folder holds another evaluation, or nothing can be read from the data.
        """
        wanted = json.loads(json.dumps(asdict(self.setting)))
        file = self.folder / "setting.json"
        if file.exists():
            there = read_json(file)
            if changed := [name for name in wanted if there.get(name) != wanted[name]]:
                name = changed[0]
                raise UserError(
                    f"{self.folder} holds an evaluation with {name} {there.get(name)!r}, not {wanted[name]!r}; "
                    "name another folder, or ask for the same"
                )
            return
        keys = list(find_pictures(self.setting))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(wanted | {"keys": keys}, indent=1).encode() + b"\n")

    def make(self, rank: int = 0, world: int = 1) -> None:
        """Write this process's share of pictures and holes, those that are not there yet."""
        places = ["truth", *(f"{what}/{kind}" for what in ("holes", "given") for kind in self.kinds)]
        for place in places:
            (self.folder / place).mkdir(parents=True, exist_ok=True)
        pictures = find_pictures(self.setting)
        if list(pictures) != self.keys:
            raise UserError(f"{self.setting.data}: not the pictures that {self.folder} was begun with")
        for key in self.keys[rank::world]:
            if all((self.folder / place / f"{key}.png").is_file() for place in places):
                continue
            picture = pictures[key].read()
            write_image(self.folder / "truth" / f"{key}.png", picture)
            for kind, masks in self.kinds.items():
                hole = self._make_hole(kind, masks, key, pictures[key])
                write_image(self.folder / "holes" / kind / f"{key}.png", np.uint8(255) * hole)
                write_image(self.folder / "given" / kind / f"{key}.png", np.where(hole[..., None], GREY, picture))

    def verify(self) -> dict[str, str]:
        """Hashes of pictures and holes, written once and compared ever after. UserError if one was changed."""
        places = {"truth": self.folder / "truth"} | {k: self.folder / "holes" / k for k in self.kinds}
        found = {name: hash_of([place / f"{key}.png" for key in self.keys]) for name, place in places.items()}
        file = self.folder / "hashes.json"
        if not file.exists():
            write_atomic(file, json.dumps(found, indent=1).encode() + b"\n")
        if changed := [name for name, value in read_json(file).items() if found.get(name) != value]:
            raise UserError(f"{places[changed[0]]}: pictures there were changed since; evaluate into another folder")
        return found

    def hashes(self) -> dict[str, str]:
        """What `verify` found when these pictures and holes were made."""
        return read_json(self.folder / "hashes.json")

    @cached_property
    def _masks(self) -> dict[str, dict[str, list[Path]]]:
        """Per kind, masks of one's own by their names in their folder, without suffix."""
        found: dict[str, dict[str, list[Path]]] = {}
        for kind, folder in self.kinds.items():
            for file in sorted(folder.rglob("*")) if folder else ():
                if file.suffix.lower() in MASK_SUFFIXES:
                    name = str(file.relative_to(folder).with_suffix(""))
                    found.setdefault(kind, {}).setdefault(name, []).append(file)
            found.setdefault(kind, {})
        return found

    def _make_hole(self, kind: str, masks: Path | None, key: str, source: Source) -> np.ndarray:
        side, name = self.setting.size, source.name
        if masks is None:
            seed = (self.setting.seed, zlib.crc32(key.encode()))
            return make_hole(kind, side, side, seed=seed, area=(SMALLEST_HOLE, 1.0))
        there = self._masks[kind]
        files = [file for stem in dict.fromkeys((name, key)) for file in there.get(stem, ())]
        if len(files) != 1:
            raise UserError(f"{masks}: {len(files)} masks named {name!r}; one is needed, as a lossless picture")
        mask, (height, width) = read_hole(files[0]), source.shape()
        if mask.shape not in ((height, width), (mask.shape[0],) * 2):
            raise UserError(
                f"{files[0]}: {mask.shape[1]} x {mask.shape[0]}; a mask has the size of its picture, here {width} x "
                f"{height}, or is a square, for the square that the picture becomes"
            )
        hole = fit(mask.astype(np.uint8), side, self.setting.resize, labels=True) == 1
        if not hole.any():
            raise UserError(f"{files[0]}: hides nothing; white = missing")
        return hole


def find_pictures(setting: Setting) -> dict[str, Source]:
    """Each picture that is scored, by its key, in order. UserError if there are none, or two have one key."""
    root = Path(setting.data)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of pictures or shards")
    if (root / "manifest.json").is_file():
        return _in_shards(root, setting)
    names = list_pictures(root)
    if not names:
        raise UserError(f"{root}: no pictures and no shards in there")
    read = lambda name: fit(read_image(root / name), setting.size, setting.resize)  # noqa: E731
    chosen = [names[i] for i in _spread(len(names), setting.count)]
    return _by_key(
        root,
        [
            Source(str(Path(name).with_suffix("")), partial(read, name), partial(read_size, root / name))
            for name in chosen
        ],
    )


def _by_key(root: Path, sources: Sequence[Source]) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for source in sources:
        key = _key(source.name)
        if key in found:
            raise UserError(
                f"{root}: {found[key].name!r} and {source.name!r} would both be called {key!r}; results are told "
                "apart by name, rename one"
            )
        found[key] = source
    return found


def _in_shards(root: Path, setting: Setting) -> dict[str, Source]:
    try:
        shards = ShardDataset(root)
    except DataError as error:
        raise UserError(str(error)) from error
    if shards.resolution != setting.size:
        raise UserError(f"{root}: pictures of {shards.resolution} px, {setting.size} are wanted; give the photographs")
    read = lambda i: shards.batch(np.array([i]))["image"][0]  # noqa: E731
    chosen = _spread(len(shards), setting.count)
    shape = lambda: (setting.size, setting.size)  # noqa: E731
    return _by_key(root, [Source(_key(shards.key(i)), partial(read, i), shape) for i in chosen])


def hash_of(files: Sequence[Path]) -> str:
    """sha256 of the pixels of all pictures, whatever wrote the files."""
    digest = hashlib.sha256()
    for file in files:
        with Image.open(file) as picture:
            digest.update(np.asarray(picture).tobytes())
    return digest.hexdigest()


def _spread(length: int, count: int) -> Sequence[int]:
    """`count` places evenly over `length`, all of them for 0 or too many."""
    return range(length) if not 0 < count < length else np.linspace(0, length - 1, count).astype(int).tolist()


def _kind(text: str) -> tuple[str, Path | None]:
    name, equals, folder = text.partition("=")
    if equals:
        if not Path(folder).is_dir() or _key(name) != name:
            raise UserError(f"masks {text!r}: NAME=FOLDER, a plain name and a folder that is there")
        return name, Path(folder)
    if name not in MAKERS:
        raise UserError(f"unknown kind of hole {name!r}: choose of {', '.join(sorted(MAKERS))}, or NAME=FOLDER")
    return name, None


def _key(text: str) -> str:
    """A name that is safe as that of a file: letters and digits of any script, '.', '_' and '-'."""
    return re.sub(r"[^\w.-]", "_", text).lstrip(".") or "_"
