"""Seeded hole makers: the published training mixtures and evaluation sets by name, and this project's own mixture.

A maker is a function `(height, width, rng) -> (H, W) bool`, True where pixels are MISSING. `make_hole` and `make_holes`
draw from `MAKERS` by name; each sample has its own random key, so a hole depends neither on its batch nor on ambient
state. Published sizes are in pixels of a 256 or 512 picture: holes are drawn on a canvas of that size and subsampled,
so the share of missing pixels stays the same at 64. From 384 pixels (shorter side) on, the published 512 sets are used.

| name                       | hole                                                                  | paper         |
|----------------------------|-----------------------------------------------------------------------|---------------|
| lama-train                 | wide polygonal strokes or boxes, 1 : 1                                | LaMa          |
| lama-thin, -medium, -thick | evaluation strokes of three widths or boxes (1 : 0.3), area <= 0.5    | LaMa          |
| mat-large, mat-small       | zig-zag brush strokes plus boxes up to half and up to full size       | CoModGAN, MAT |
| repaint-thin, -thick       | LaMa's thin and thick sets                                            | RePaint       |
| repaint-every-second-line  | rows 1, 3, 5, ... missing                                             | RePaint       |
| repaint-super-resolve      | only every second pixel, in both directions, is known                 | RePaint       |
| repaint-expand             | only the centre is known, a quarter of each side (64 of 256)          | RePaint       |
| repaint-half               | the right half is missing                                             | RePaint       |
| half                       | one of the four halves, at random                                     | this project  |
| box                        | one box inside the picture, 30-60 % of each side                      | this project  |
| center-box                 | the centre box, half of each side                                     | Context Enc.  |
| perlin                     | Perlin noise below a random order value, area up to 100 %             | RAD           |
| outpaint                   | all but a random window, 40-80 % of each side                         | this project  |
| coherent-train             | `COHERENT_TRAIN`: a mixture of the above with many large holes        | this project  |

LaMa https://arxiv.org/abs/2109.07161, CoModGAN https://arxiv.org/abs/2103.10428, MAT https://arxiv.org/abs/2203.15270,
RePaint https://arxiv.org/abs/2201.09865, RAD https://arxiv.org/abs/2412.09191, brush strokes: DeepFill v2, Algorithm 1,
https://arxiv.org/abs/1806.03589, Context Encoders https://arxiv.org/abs/1604.07379.
"""

import difflib
import math
from collections.abc import Sequence

import numpy as np

from coherent_ddrm.masks import shapes
from coherent_ddrm.masks.drawing import MAX_TRIES, Maker, limited
from coherent_ddrm.masks.lama import LAMA_256, LAMA_512, LAMA_TRAIN, lama_maker
from coherent_ddrm.masks.mat import MAT_LARGE, MAT_SMALL, mat_maker
from coherent_ddrm.masks.perlin import perlin_hole

Key = int | tuple[int, ...]

STREAM = 0x401E  # first word of every key, so that other users of the same (seed, step, sample) draw other numbers
SMALLEST_SIDE = 8

# Weights of the mixture our networks train on. Mean hole share 0.45; half of the holes miss half the picture or more.
COHERENT_TRAIN = {
    "lama-thick": 0.15,  # wide strokes, mean share 0.28
    "lama-medium": 0.05,  # narrower strokes, 0.24
    "box": 0.05,  # 0.20
    "half": 0.15,  # 0.50
    "outpaint": 0.25,  # 0.64
    "mat-large": 0.20,  # 0.41
    "perlin": 0.15,  # 0.50, from one pixel to everything
}

EVALUATION_SETS: dict[str, tuple[str, ...]] = {
    "lama": ("lama-thin", "lama-medium", "lama-thick"),
    "mat": ("mat-large", "mat-small"),
    "repaint-6": (
        "repaint-thin",
        "repaint-thick",
        "repaint-every-second-line",
        "repaint-super-resolve",
        "repaint-expand",
        "repaint-half",
    ),
    "large": ("lama-thick", "mat-large", "half", "outpaint", "center-box"),  # this project's own: large holes
}


_MIXTURE_NAMES = tuple(COHERENT_TRAIN)
_MIXTURE_EDGES = np.cumsum(list(COHERENT_TRAIN.values()))[:-1]


def _coherent_train(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    name = _MIXTURE_NAMES[int(np.searchsorted(_MIXTURE_EDGES, rng.random(), side="right"))]
    return MAKERS[name](height, width, rng)


MAKERS: dict[str, Maker] = {
    "lama-train": limited(lama_maker(LAMA_TRAIN, LAMA_TRAIN)),
    "lama-thin": limited(lama_maker(LAMA_256["thin"], LAMA_512["thin"]), at_most=0.5),
    "lama-medium": limited(lama_maker(LAMA_256["medium"], LAMA_512["medium"]), at_most=0.5),
    "lama-thick": limited(lama_maker(LAMA_256["thick"], LAMA_512["thick"]), at_most=0.5),
    "mat-large": limited(mat_maker(MAT_LARGE)),
    "mat-small": limited(mat_maker(MAT_SMALL)),
    "repaint-every-second-line": shapes.every_second_line,
    "repaint-super-resolve": shapes.super_resolve,
    "repaint-expand": lambda height, width, rng: ~shapes.window(height, width, 0.25, 0.25, 0.5, 0.5),
    "repaint-half": lambda height, width, rng: shapes.window(height, width, 1.0, 0.5, 0.0, 1.0),
    "half": shapes.half,
    "box": shapes.box,
    "center-box": lambda height, width, rng: shapes.window(height, width, 0.5, 0.5, 0.5, 0.5),
    "perlin": perlin_hole,
    "outpaint": shapes.outpaint,
    "coherent-train": _coherent_train,
}
MAKERS["repaint-thin"] = MAKERS["lama-thin"]
MAKERS["repaint-thick"] = MAKERS["lama-thick"]


def make_hole(name: str, height: int, width: int, seed: Key, area: tuple[float, float] | None = None) -> np.ndarray:
    """The hole of maker `name` for the key `seed`, (H, W) bool, True = missing.

    `area=(low, high)` draws again, from the same key, until the share of missing pixels is in the range, ends included.
    """
    maker = _find(name)
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(f"a hole needs sides of at least {SMALLEST_SIDE} pixels, got {height}x{width}")
    rng = np.random.default_rng([STREAM, *_words(seed)])
    if area is None:
        return maker(height, width, rng)
    low, high = area
    if not 0 <= low <= high <= 1:
        raise ValueError(f"area must be (low, high) with 0 <= low <= high <= 1, got {area}")
    best = math.inf
    for _ in range(MAX_TRIES):
        hole = maker(height, width, rng)
        share = np.count_nonzero(hole) / hole.size
        if low <= share <= high:
            return hole
        best = min(best, share, key=lambda s: max(low - s, s - high))
    raise ValueError(
        f"{name!r} at {height}x{width} gave no hole share in [{low}, {high}] in {MAX_TRIES} tries; "
        f"the best share seen was {best:.4f}. Widen the range or take another maker"
    )


def make_holes(
    name: str,
    batch: int,
    height: int,
    width: int,
    seed: Key = 0,
    area: tuple[float, float] | None = None,
    seeds: Sequence[Key] | None = None,
) -> np.ndarray:
    """One hole per sample, (B, 1, H, W) bool. Sample i has the key (*seed, i), or `seeds[i]` where `seeds` is given."""
    if seeds is None:
        seeds = [(*_words(seed), i) for i in range(batch)]
    elif len(seeds) != batch:
        raise ValueError(f"seeds must hold one key per sample: got {len(seeds)} for a batch of {batch}")
    holes = np.empty((batch, 1, height, width), bool)
    for i, key in enumerate(seeds):
        holes[i, 0] = make_hole(name, height, width, key, area)
    return holes


def _words(seed: Key) -> tuple[int, ...]:
    """The key as a tuple of integers, checked."""
    words = tuple(seed) if isinstance(seed, tuple | list) else (seed,)
    if not words or not all(isinstance(word, int | np.integer) and word >= 0 for word in words):
        raise ValueError(f"seed must be an integer >= 0 or a tuple of them, got {seed!r}")
    return words


def _find(name: str) -> Maker:
    """The maker called `name`, or an error that lists the names and guesses."""
    if name in MAKERS:
        return MAKERS[name]
    close = difflib.get_close_matches(name, MAKERS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown hole maker {name!r}.{hint} Known: {', '.join(sorted(MAKERS))}")
