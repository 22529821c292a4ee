"""LaMa's holes, https://arxiv.org/abs/2109.07161: wide polygonal strokes or boxes."""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from coherent_ddrm.masks.drawing import FIRST_512, Maker, empty_canvas, fit


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


def _strokes(canvas: np.ndarray, grow: float, p: Lama, rng: np.random.Generator) -> None:
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


def _boxes(canvas: np.ndarray, grow: float, p: Lama, rng: np.random.Generator) -> None:
    """Boxes at least `box_margin` away from the border."""
    height, width = canvas.shape
    margin = round(grow * p.box_margin)
    boxes = int(rng.integers(p.box_times[0], p.box_times[1] + 2))
    for u_h, u_w, u_y, u_x in rng.random((boxes, 4)).tolist():
        low, span = p.box_side[0], p.box_side[1] - p.box_side[0]
        h, w = int(grow * (low + u_h * span)), int(grow * (low + u_w * span))
        y, x = margin + int(u_y * (height - 2 * margin - h + 1)), margin + int(u_x * (width - 2 * margin - w + 1))
        canvas[y : y + h, x : x + w] = 1


def lama_maker(at_256: Lama, at_512: Lama) -> Maker:
    """LaMa's mixture: one kind, strokes or boxes, per picture."""

    def maker(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        p = at_512 if min(height, width) >= FIRST_512 else at_256
        canvas, grow = empty_canvas(height, width, p.base)
        draw = _boxes if rng.random() < p.box_weight / (1 + p.box_weight) else _strokes
        draw(canvas, grow, p, rng)
        return fit(canvas, height, width)

    return maker
