"""Small folders of pictures, and the shard tools run on them, for the tests of data_prep."""

import os
import sys
import time
from pathlib import Path

import numpy as np

from coherent_ddrm.images import encode
from coherent_ddrm.shards import read_json

TOOLS = Path(__file__).parent.parent / "data_prep"
sys.path.insert(0, str(TOOLS))

import build_shards  # noqa: E402
import check_shards  # noqa: E402
from records import Result  # noqa: E402
from workers import Workers  # noqa: E402

__all__ = ["Workers", "build_shards", "check_shards"]  # found here, where the path to them is set

QUIET = ("--quiet", "--workers", "0")
SAME = ("--samples-per-shard", "4", "--split", "train")


def photo(seed: int, height: int = 24, width: int = 30) -> np.ndarray:
    """A dark disc on a light, noisy wall."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    disc = np.hypot(y - height / 2, x - width / 2) < 0.33 * height
    picture = np.where(disc[..., None], rng.integers(0, 90, 3), 210) + rng.normal(0, 4, (height, width, 3))
    return np.clip(picture, 0, 255).astype(np.uint8)


def folder_of(path: Path, count: int) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (path / f"{i:02d}.png").write_bytes(encode(photo(i), "PNG"))
    return path


def build(images: Path, out: Path, *options: str, size: int = 16, code: int = 0) -> dict | None:
    command = [str(images), str(out), "--size", str(size), *QUIET, *options]
    assert build_shards.main(command) == code
    return read_json(out / "manifest.json") if (out / "manifest.json").exists() else None


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def is_sound(folder: Path) -> bool:
    return not list(check_shards.check_folder(folder, decode=True))


def make_reference(root: Path) -> tuple[Path, Path]:
    """(pictures, their shards): 11 pictures, one of them bad, in shards of 4."""
    images = folder_of(root / "images", 11)
    (images / "05.png").write_bytes(b"bad")
    build(images, root / "out", *SAME)
    return images, root / "out"


def start_crashing_maker(images: Path, options, plan: dict):
    """In place of samples.start_maker: no torch, so quick to start, and a white picture ends its process."""

    def make(row: dict) -> Result:
        content = (images / row["path"]).read_bytes()
        if content == encode(np.full((24, 24, 3), 250, np.uint8), "PNG"):
            os._exit(9)
        return Result(row, {"image": content, "json": b"{}"})

    return make


def start_meeting_maker(folder: Path):
    """Picture 0 is ready only after picture 1 is, in another process."""

    def make(row: dict) -> Result:
        if row["number"] == 1:
            (folder / "met").touch()
        deadline = time.time() + 60
        while row["number"] == 0 and not (folder / "met").exists() and time.time() < deadline:
            time.sleep(0.01)
        return Result(row, {"process": os.getpid()})

    return make


def start_dying_maker():
    """Picture 3 ends its process."""

    def make(row: dict) -> Result:
        if row["number"] == 3:
            os._exit(9)
        return Result(row, {})

    return make
