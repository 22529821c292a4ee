"""Super-resolution by average pooling: y is the mean of each f x f block, A Aᵀ = I / f², so U = I and S = 1 / f."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from coherent_ddrm.operators.base import SpectralOperator

FACTORS = range(2, 17)


class AveragePooling(SpectralOperator):
    """A x = block means, (B, C, H, W) -> (B, C, H / f, W / f). DDNM, https://arxiv.org/abs/2212.00490, section 3.

    Args:
        factor: f, a whole number from 2 to 16.

    Raises:
        ValueError: for another factor, and from A when a side of the picture is no multiple of it.
    """

    def __init__(self, factor: int):
        check_factor(factor)
        self.factor = int(factor)
        self.S = torch.tensor(1 / factor)

    def A(self, x: Tensor) -> Tensor:
        check_sides(x.shape[-2:], self.factor)
        return F.avg_pool2d(x, self.factor)

    def At(self, y: Tensor) -> Tensor:
        """Each number of y spread evenly over its block. (B, C, h, w) -> (B, C, h f, w f)"""
        return self.pinv(y) / self.factor**2

    def pinv(self, y: Tensor) -> Tensor:
        """Each number of y repeated over its block. (B, C, h, w) -> (B, C, h f, w f)"""
        return y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)

    def window(self, y: Tensor, top: int, left: int, side: int) -> tuple[AveragePooling, Tensor]:
        """A crop of y; ValueError unless top, left and side are multiples of the factor."""
        f = self.factor
        if top % f or left % f or side % f:
            raise ValueError(f"a window of {side} at ({top}, {left}) cuts through blocks of {f}; use multiples of {f}")
        return self, y[..., top // f : (top + side) // f, left // f : (left + side) // f]


def check_factor(factor: int) -> None:
    """ValueError unless `factor` is one of FACTORS."""
    if factor not in FACTORS:
        raise ValueError(f"factor is {factor}; a whole number from {FACTORS[0]} to {FACTORS[-1]} is needed")


def check_sides(size: tuple[int, int], factor: int) -> None:
    """ValueError unless both sides (H, W) are multiples of `factor`."""
    height, width = size
    if height % factor or width % factor or 0 in (height, width):
        raise ValueError(f"the picture is {height} x {width}; both sides must be multiples of the factor {factor}")
