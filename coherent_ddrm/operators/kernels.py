"""Blur kernels (kh, kw): odd sides, centred, non-negative, sum 1.

An angle is in degrees, counter-clockwise as seen: 0 lies along a row, 90 along a column.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = 1023  # side of a kernel; beyond it is a slip of the keyboard


def gaussian(sigma: float, size: int | None = None) -> Tensor:
    """The round Gaussian of standard deviation `sigma` pixels. (size, size); the side defaults to 3 sigma each way."""
    return anisotropic(sigma, sigma, 0, size)


def anisotropic(sigma_x: float, sigma_y: float, angle: float, size: int | None = None) -> Tensor:
    """The Gaussian of standard deviation sigma_x along `angle` and sigma_y across it. (size, size)

    The side defaults to 3 standard deviations each way. DDRM's are anisotropic(20, 1, 0, 9) and gaussian(10, 5).
    """
    _positive(sigma_x=sigma_x, sigma_y=sigma_y)
    if size is None:
        size = 2 * math.ceil(3 * max(sigma_x, sigma_y)) + 1
    along, across = _turned(size, angle)
    return _normalised(torch.exp(-0.5 * ((along / sigma_x) ** 2 + (across / sigma_y) ** 2)))


def motion(length: float, angle: float) -> Tensor:
    """A line of `length` pixels along `angle`, one pixel wide, smooth at its rim. (size, size), size > length"""
    _positive(length=length)
    along, across = _turned(2 * math.ceil((length + 1) / 2) + 1, angle)
    return _normalised((1 - across.abs()).clamp(min=0) * ((length + 1) / 2 - along.abs()).clamp(0, 1))


def uniform(size: int) -> Tensor:
    """A square of `size` x `size` equal numbers."""
    return _normalised(torch.ones(_side(size), size))


def _turned(size: int, angle: float) -> tuple[Tensor, Tensor]:
    """Each pixel's distance from the centre along the direction and across it. 2 x (size, size)"""
    reach = torch.arange(_side(size)) - size // 2
    up, right = torch.meshgrid(-reach.double(), reach.double(), indexing="ij")
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return cos * right + sin * up, cos * up - sin * right


def _normalised(kernel: Tensor) -> Tensor:
    return (kernel / kernel.sum()).float()


def _side(size: int) -> int:
    if size not in range(1, LARGEST + 1, 2):
        raise ValueError(f"the kernel's side is {size}; an odd whole number up to {LARGEST} is needed")
    return size


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; a number of pixels above 0 is needed")
