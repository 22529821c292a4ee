"""What the makers share: drawing at the size a paper states, sampled down, and drawing again until a hole is usable."""

from collections.abc import Callable

import cv2
import numpy as np

Maker = Callable[[int, int, np.random.Generator], np.ndarray]

MAX_TRIES = 1000
FIRST_512 = 384  # the shorter side from which the published 512 parameters apply


def empty_canvas(height: int, width: int, base: int) -> tuple[np.ndarray, float]:
    """An empty uint8 canvas in the picture's aspect, shorter side >= base, and how much it is larger than `base`.

    Strokes are drawn at no less than the published size: cv2 rounds thin lines up (2 becomes 3 pixels), which at 64
    would enlarge every hole.
    """
    shorter = min(height, width)
    grow = max(1.0, base / shorter)
    return np.zeros((round(height * grow), round(width * grow)), np.uint8), max(1.0, shorter / base)


def fit(canvas: np.ndarray, height: int, width: int) -> np.ndarray:
    """The canvas sampled at the picture's pixel centres, (H, W) bool. Sampling keeps the area, smoothing would not."""
    if canvas.shape != (height, width):
        canvas = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return canvas.astype(bool)


def limited(maker: Maker, at_most: float = 1.0) -> Maker:
    """`maker` drawn again until at least one pixel is missing, one is known, and the hole share is <= `at_most`."""

    def again(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        for _ in range(MAX_TRIES):
            hole = maker(height, width, rng)
            missing = np.count_nonzero(hole)
            if 0 < missing < hole.size and missing <= at_most * hole.size:
                return hole
        raise RuntimeError(f"no hole of share <= {at_most} in {MAX_TRIES} tries at {height}x{width}; use a larger size")

    return again
