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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

Maker = Callable[[int, int, np.random.Generator], np.ndarray]
Key = int | tuple[int, ...]

STREAM = 0x401E  # first word of every key, so that other users of the same (seed, step, sample) draw other numbers
MAX_TRIES = 1000
SMALLEST_SIDE = 8
FIRST_512 = 384  # the shorter side from which the published 512 parameters apply

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


# --- drawing at the published size ------------------------------------------------------------------------------------


def _canvas(height: int, width: int, base: int) -> tuple[np.ndarray, float]:
    """An empty uint8 canvas in the picture's aspect, shorter side >= base, and how much it is larger than `base`.

    Strokes are drawn at no less than the published size: cv2 rounds thin lines up (2 becomes 3 pixels), which at 64
    would enlarge every hole.
    """
    shorter = min(height, width)
    grow = max(1.0, base / shorter)
    return np.zeros((round(height * grow), round(width * grow)), np.uint8), max(1.0, shorter / base)


def _fit(canvas: np.ndarray, height: int, width: int) -> np.ndarray:
    """The canvas sampled at the picture's pixel centres, (H, W) bool. Sampling keeps the area, smoothing would not."""
    if canvas.shape != (height, width):
        canvas = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return canvas.astype(bool)


def _limited(maker: Maker, at_most: float = 1.0) -> Maker:
    """`maker` drawn again until at least one pixel is missing, one is known, and the hole share is <= `at_most`."""

    def limited(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        for _ in range(MAX_TRIES):
            hole = maker(height, width, rng)
            missing = np.count_nonzero(hole)
            if 0 < missing < hole.size and missing <= at_most * hole.size:
                return hole
        raise RuntimeError(f"no hole of share <= {at_most} in {MAX_TRIES} tries at {height}x{width}; use a larger size")

    return limited


# --- LaMa -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lama:
    """Parameters of one LaMa set, in pixels of a picture of side `base`. LaMa draws up to one more than `times`."""

    base: int
    times: tuple[int, int]  # strokes
    width: int
    length: int
    box_weight: float = 0.0  # against weight 1 for strokes
    box_times: tuple[int, int] = (1, 1)
    box_side: tuple[int, int] = (1, 2)
    box_margin: int = 0


LAMA_TRAIN = Lama(256, (1, 5), 100, 200, 1.0, (1, 4), (30, 150), 10)
LAMA_256 = {
    "thin": Lama(256, (4, 50), 10, 40),
    "medium": Lama(256, (4, 5), 50, 100, 0.3, (1, 5), (10, 50), 0),
    "thick": Lama(256, (1, 5), 100, 200, 0.3, (1, 3), (30, 150), 10),
}
LAMA_512 = {
    "thin": Lama(512, (4, 70), 20, 100),
    "medium": Lama(512, (4, 10), 100, 200, 0.3, (1, 5), (30, 150), 0),
    "thick": Lama(512, (1, 5), 250, 450, 0.3, (1, 4), (30, 300), 10),
}


def _lama_strokes(canvas: np.ndarray, grow: float, p: Lama, rng: np.random.Generator) -> None:
    """Strokes of 1 to 5 segments, each with its own direction (0, 1, 2 or 3 rad), length and width."""
    height, width = canvas.shape
    strokes = int(rng.integers(p.times[0], p.times[1] + 2))
    for i, start in enumerate(rng.random((strokes, 3)).tolist()):
        x, y = int(start[0] * width), int(start[1] * height)
        for turn, length, thick in rng.random((1 + int(5 * start[2]), 3)).tolist():
            angle = 0.01 + int(4 * turn)
            if i % 2 == 0:
                angle = -angle
            reach = grow * (10 + int(length * p.length))
            x_to = min(max(int(x + reach * math.sin(angle)), 0), width)
            y_to = min(max(int(y + reach * math.cos(angle)), 0), height)
            cv2.line(canvas, (x, y), (x_to, y_to), 1, round(grow * (5 + int(thick * p.width))))
            x, y = x_to, y_to


def _lama_boxes(canvas: np.ndarray, grow: float, p: Lama, rng: np.random.Generator) -> None:
    """Boxes at least `box_margin` away from the border."""
    height, width = canvas.shape
    margin = round(grow * p.box_margin)
    boxes = int(rng.integers(p.box_times[0], p.box_times[1] + 2))
    for u_h, u_w, u_y, u_x in rng.random((boxes, 4)).tolist():
        low, span = p.box_side[0], p.box_side[1] - p.box_side[0]
        h, w = int(grow * (low + u_h * span)), int(grow * (low + u_w * span))
        y, x = margin + int(u_y * (height - 2 * margin - h + 1)), margin + int(u_x * (width - 2 * margin - w + 1))
        canvas[y : y + h, x : x + w] = 1


def _lama(at_256: Lama, at_512: Lama) -> Maker:
    """LaMa's mixture: one kind, strokes or boxes, per picture."""

    def maker(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        p = at_512 if min(height, width) >= FIRST_512 else at_256
        canvas, grow = _canvas(height, width, p.base)
        draw = _lama_boxes if rng.random() < p.box_weight / (1 + p.box_weight) else _lama_strokes
        draw(canvas, grow, p, rng)
        return _fit(canvas, height, width)

    return maker


# --- CoModGAN / MAT ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mat:
    """Parameters of one MAT set: counts are drawn below these numbers, widths in pixels of a picture of side `base`."""

    base: int
    half_boxes: int
    full_boxes: int
    strokes: int
    width: tuple[int, int] = (12, 48)


MAT_LARGE = {256: Mat(256, 4, 2, 8), 512: Mat(512, 5, 3, 9)}
MAT_SMALL = {256: Mat(256, 3, 2, 4, (6, 24)), 512: Mat(512, 3, 2, 4)}  # 256: the 512 set, halved


def _mat_boxes(canvas: np.ndarray, most: int, share: float, rng: np.random.Generator) -> None:
    """Fewer than `most` boxes with sides up to `share` of the picture's, centred anywhere, so they may overhang."""
    height, width = canvas.shape
    for u_h, u_w, u_y, u_x in rng.random((int(rng.integers(most)), 4)).tolist():
        h, w = int(u_h * share * height), int(u_w * share * width)
        y, x = int(u_y * height) - h // 2, int(u_x * width) - w // 2
        canvas[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)] = 1


def _mat_strokes(canvas: np.ndarray, grow: float, p: Mat, rng: np.random.Generator) -> None:
    """Zig-zag strokes (DeepFill v2, Algorithm 1): 4 to 17 segments, direction reversed at every second one."""
    height, width = canvas.shape
    radius = math.hypot(height, width) / 8
    for _ in range(int(rng.integers(p.strokes))):
        segments = int(rng.integers(4, 18))
        angles = rng.uniform(2 * math.pi / 5 - 2 * math.pi / 15, 2 * math.pi / 5 + 2 * math.pi / 15, segments)
        angles[::2] *= -1
        lengths = rng.normal(radius, radius / 2, segments).clip(0, 2 * radius)
        x, y, thick = (rng.random(3) * (width, height, p.width[1] - p.width[0])).tolist()
        points = [(int(x), int(y))]
        for dx, dy in zip((lengths * np.cos(angles)).tolist(), (lengths * np.sin(angles)).tolist(), strict=True):
            x, y = min(max(x + dx, 0), width), min(max(y + dy, 0), height)
            points.append((int(x), int(y)))
        cv2.polylines(canvas, [np.array(points, np.int32)], False, 1, round(grow * (p.width[0] + thick)))


def _mat(sets: dict[int, Mat]) -> Maker:
    """CoModGAN's free-form holes: boxes up to half size, boxes up to full size, brush strokes, randomly flipped."""

    def maker(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        p = sets[512 if min(height, width) >= FIRST_512 else 256]
        canvas, grow = _canvas(height, width, p.base)
        _mat_strokes(canvas, grow, p, rng)
        flip_y, flip_x = rng.random(2) < 0.5
        canvas = np.ascontiguousarray(canvas[:: -1 if flip_y else 1, :: -1 if flip_x else 1])
        _mat_boxes(canvas, p.half_boxes, 0.5, rng)
        _mat_boxes(canvas, p.full_boxes, 1.0, rng)
        return _fit(canvas, height, width)

    return maker


# --- fixed and simple geometry ----------------------------------------------------------------------------------------


def _every_second_line(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    hole = np.zeros((height, width), bool)
    hole[1::2] = True
    return hole


def _super_resolve(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    hole = np.ones((height, width), bool)
    hole[::2, ::2] = False
    return hole


def _half(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    side = int(rng.integers(4))  # top, bottom, left, right
    h, w = (0.5, 1.0) if side < 2 else (1.0, 0.5)
    return _window(height, width, h, w, side % 2, side % 2)


def _box(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    h, w, y, x = rng.random(4).tolist()
    return _window(height, width, 0.3 + 0.3 * h, 0.3 + 0.3 * w, y, x)


def _outpaint(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    h, w, y, x = rng.random(4).tolist()
    return ~_window(height, width, 0.4 + 0.4 * h, 0.4 + 0.4 * w, y, x)


def _window(height: int, width: int, h_share: float, w_share: float, y_share: float, x_share: float) -> np.ndarray:
    """True in a window of the given shares of the sides; its position goes from 0 (top, left) to 1 (bottom, right)."""
    h, w = round(h_share * height), round(w_share * width)
    y, x = round(y_share * (height - h)), round(x_share * (width - w))
    window = np.zeros((height, width), bool)
    window[y : y + h, x : x + w] = True
    return window


# --- RAD --------------------------------------------------------------------------------------------------------------


def _perlin(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """The k lowest pixels of Perlin noise, k uniform in 1..HW, its period uniform from 1 pixel to the shorter side."""
    period = rng.uniform(1, min(height, width))
    y, x = (np.arange(n, dtype=np.float32) / period + rng.random(dtype=np.float32) for n in (height, width))
    noise = _perlin_noise(y, x, rng).ravel()
    k = int(rng.integers(height * width))
    return (noise <= np.partition(noise, k)[k]).reshape(height, width)


def _perlin_noise(y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Perlin's noise, (H, W), at the lattice coordinates y (H,) and x (W,).

    The noise is sum over corners of fade_y fade_x (g_y d_y + g_x d_x), so rows can be summed first, then columns.
    """
    iy, ix = y.astype(np.intp), x.astype(np.intp)
    y, x = (y - np.floor(y))[:, None], x - np.floor(x)  # not `- iy`: integers would make it all float64
    fade_y, fade_x = (t * t * t * (t * (6 * t - 15) + 10) for t in (y, x))
    angle = rng.random((iy[-1] + 2, ix[-1] + 2), dtype=np.float32) * (2 * np.pi)
    g_y, g_x = np.sin(angle), np.cos(angle)
    along_y = (1 - fade_y) * y * g_y[iy] + fade_y * (y - 1) * g_y[iy + 1]  # (H, columns of the lattice)
    along_x = (1 - fade_y) * g_x[iy] + fade_y * g_x[iy + 1]
    left = along_y[:, ix] + along_x[:, ix] * x  # (H, W)
    right = along_y[:, ix + 1] + along_x[:, ix + 1] * (x - 1)
    return left + fade_x * (right - left)


# --- by name ----------------------------------------------------------------------------------------------------------


def _coherent_train(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    name = _MIXTURE_NAMES[int(np.searchsorted(_MIXTURE_EDGES, rng.random(), side="right"))]
    return MAKERS[name](height, width, rng)


_MIXTURE_NAMES = tuple(COHERENT_TRAIN)
_MIXTURE_EDGES = np.cumsum(list(COHERENT_TRAIN.values()))[:-1]

MAKERS: dict[str, Maker] = {
    "lama-train": _limited(_lama(LAMA_TRAIN, LAMA_TRAIN)),
    "lama-thin": _limited(_lama(LAMA_256["thin"], LAMA_512["thin"]), at_most=0.5),
    "lama-medium": _limited(_lama(LAMA_256["medium"], LAMA_512["medium"]), at_most=0.5),
    "lama-thick": _limited(_lama(LAMA_256["thick"], LAMA_512["thick"]), at_most=0.5),
    "mat-large": _limited(_mat(MAT_LARGE)),
    "mat-small": _limited(_mat(MAT_SMALL)),
    "repaint-every-second-line": _every_second_line,
    "repaint-super-resolve": _super_resolve,
    "repaint-expand": lambda height, width, rng: ~_window(height, width, 0.25, 0.25, 0.5, 0.5),
    "repaint-half": lambda height, width, rng: _window(height, width, 1.0, 0.5, 0.0, 1.0),
    "half": _half,
    "box": _box,
    "center-box": lambda height, width, rng: _window(height, width, 0.5, 0.5, 0.5, 0.5),
    "perlin": _perlin,
    "outpaint": _outpaint,
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
