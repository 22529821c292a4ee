"""CoModGAN's and MAT's free-form holes: zig-zag brush strokes plus boxes.

CoModGAN https://arxiv.org/abs/2103.10428, MAT https://arxiv.org/abs/2203.15270, the strokes: DeepFill v2, Algorithm 1,
https://arxiv.org/abs/1806.03589.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from coherent_ddrm.masks.drawing import FIRST_512, Maker, empty_canvas, fit


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


def _boxes(canvas: np.ndarray, most: int, share: float, rng: np.random.Generator) -> None:
    """Fewer than `most` boxes with sides up to `share` of the picture's, centred anywhere, so they may overhang."""
    height, width = canvas.shape
    for u_h, u_w, u_y, u_x in rng.random((int(rng.integers(most)), 4)).tolist():
        h, w = int(u_h * share * height), int(u_w * share * width)
        y, x = int(u_y * height) - h // 2, int(u_x * width) - w // 2
        canvas[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)] = 1


def _strokes(canvas: np.ndarray, grow: float, p: Mat, rng: np.random.Generator) -> None:
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


def mat_maker(sets: dict[int, Mat]) -> Maker:
    """CoModGAN's free-form holes: boxes up to half size, boxes up to full size, brush strokes, randomly flipped."""

    def maker(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        p = sets[512 if min(height, width) >= FIRST_512 else 256]
        canvas, grow = empty_canvas(height, width, p.base)
        _strokes(canvas, grow, p, rng)
        flip_y, flip_x = rng.random(2) < 0.5
        canvas = np.ascontiguousarray(canvas[:: -1 if flip_y else 1, :: -1 if flip_x else 1])
        _boxes(canvas, p.half_boxes, 0.5, rng)
        _boxes(canvas, p.full_boxes, 1.0, rng)
        return fit(canvas, height, width)

    return maker
