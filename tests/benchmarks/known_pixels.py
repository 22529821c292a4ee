"""A folder of photographs with half, thick and box holes through the command line:

    python tests/benchmarks/known_pixels.py PICTURES OUT [--size 64] [--limit N]

Counts known pixels that differ from the input (there must be none) and writes a sheet per hole kind.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from coherent_ddrm.cli import main as coherent_ddrm
from coherent_ddrm.images import fit, read_hole, read_image, write_image
from coherent_ddrm.masks import make_hole
from coherent_ddrm.sheets import contact_sheet

KINDS = ("half", "lama-thick", "box")
SHEET = 16


def prepare(pictures: Path, out: Path, size: int, limit: int | None) -> list[str]:
    """Pictures at `size` and one mask per kind as PNG; the names."""
    names = []
    for i, path in enumerate(sorted(pictures.iterdir())[:limit]):
        names.append(f"{path.stem}.png")
        image = fit(read_image(path), size)
        write_image(out / "input" / names[-1], image)
        for kind in KINDS:
            hole = make_hole(kind, *image.shape[:2], seed=(1, i))
            write_image(out / f"{kind}-mask" / names[-1], np.repeat(hole[..., None], 3, 2).astype(np.uint8) * 255)
    return names


def compare(out: Path, kind: str, names: list[str]) -> tuple[int, int]:
    """(known pixels, those that differ) over all pictures."""
    known = differ = 0
    for name in names:
        image, result = read_image(out / "input" / name), read_image(out / kind / name)
        outside = ~read_hole(out / f"{kind}-mask" / name)
        known += int(outside.sum())
        differ += int((image != result).any(axis=-1)[outside].sum())
    return known, differ


def sheet(out: Path, kind: str, names: list[str]) -> np.ndarray:
    """Input, result and truth of evenly chosen pictures, two triples a row."""
    triples = []
    for i in np.linspace(0, len(names) - 1, SHEET).astype(int):
        image, result = read_image(out / "input" / names[i]), read_image(out / kind / names[i])
        hole = read_hole(out / f"{kind}-mask" / names[i])
        triples.append([np.where(hole[..., None], np.uint8(128), image), result, image])
    rows = [left + right for left, right in zip(triples[::2], triples[1::2], strict=True)]
    return contact_sheet(rows, ["input", "result", "truth"] * 2, cell=96)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--checkpoint")
    options = parser.parse_args()
    for folder in ("input", *(f"{kind}-mask" for kind in KINDS)):
        (options.out / folder).mkdir(parents=True, exist_ok=True)
    names = prepare(options.pictures, options.out, options.size, options.limit)
    chosen = ["--checkpoint", options.checkpoint] if options.checkpoint else []
    for kind in KINDS:
        begin = time.perf_counter()
        folders = [str(options.out / name) for name in ("input", f"{kind}-mask")]
        arguments = ["inpaint", *folders, "-o", str(options.out / kind), "--seed", "0", "--batch-size", "32", *chosen]
        if coherent_ddrm(arguments):
            raise SystemExit(2)
        known, differ = compare(options.out, kind, names)
        seconds = time.perf_counter() - begin
        print(f"{kind}: {len(names)} pictures, {known} known pixels, {differ} differ; {seconds:.0f} s", flush=True)
        write_image(options.out / f"sheet-{kind}.png", sheet(options.out, kind, names))


if __name__ == "__main__":
    main()
