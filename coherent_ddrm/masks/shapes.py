"""Fixed patterns and single windows: RePaint's four of them (https://arxiv.org/abs/2201.09865), halves, boxes."""

import numpy as np


def every_second_line(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    hole = np.zeros((height, width), bool)
    hole[1::2] = True
    return hole


def super_resolve(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    hole = np.ones((height, width), bool)
    hole[::2, ::2] = False
    return hole


def half(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    side = int(rng.integers(4))  # top, bottom, left, right
    h, w = (0.5, 1.0) if side < 2 else (1.0, 0.5)
    return window(height, width, h, w, side % 2, side % 2)


def box(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    h, w, y, x = rng.random(4).tolist()
    return window(height, width, 0.3 + 0.3 * h, 0.3 + 0.3 * w, y, x)


def outpaint(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    h, w, y, x = rng.random(4).tolist()
    return ~window(height, width, 0.4 + 0.4 * h, 0.4 + 0.4 * w, y, x)


def window(height: int, width: int, h_share: float, w_share: float, y_share: float, x_share: float) -> np.ndarray:
    """True in a window of the given shares of the sides; its position goes from 0 (top, left) to 1 (bottom, right)."""
    h, w = round(h_share * height), round(w_share * width)
    y, x = round(y_share * (height - h)), round(x_share * (width - w))
    window = np.zeros((height, width), bool)
    window[y : y + h, x : x + w] = True
    return window
