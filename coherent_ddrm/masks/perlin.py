"""RAD's holes, https://arxiv.org/abs/2412.09191: Perlin noise below a random order value."""

import numpy as np


def perlin_hole(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """The k lowest pixels of Perlin noise, k uniform in 1..HW, its period uniform from 1 pixel to the shorter side."""
    period = rng.uniform(1, min(height, width))
    y, x = (np.arange(n, dtype=np.float32) / period + rng.random(dtype=np.float32) for n in (height, width))
    noise = perlin_noise(y, x, rng).ravel()
    k = int(rng.integers(height * width))
    return (noise <= np.partition(noise, k)[k]).reshape(height, width)


def perlin_noise(y: np.ndarray, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
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
