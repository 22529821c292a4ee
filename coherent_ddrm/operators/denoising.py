"""Denoising: A = I, so that y = x + sigma_y n; every singular value is 1."""

from __future__ import annotations

import torch
from torch import Tensor

from coherent_ddrm.operators.base import SpectralOperator


class Denoising(SpectralOperator):
    """A x = x; y is shaped like x."""

    def __init__(self) -> None:
        self.S = torch.ones(())

    def A(self, x: Tensor) -> Tensor:
        return x

    At = pinv = V = Vt = A

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """There is no null space: all of y is kept, to the bit."""
        return y

    def window(self, y: Tensor, top: int, left: int, side: int) -> tuple[Denoising, Tensor]:
        """A crop of y."""
        return self, y[..., top : top + side, left : left + side]
