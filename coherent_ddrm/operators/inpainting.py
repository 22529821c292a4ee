"""Inpainting: A keeps the known pixels and zeroes the hole. A = At = pinv = diag(known), so V = U = I and S = known."""

from __future__ import annotations

import torch
from torch import Tensor


class Inpainting:
    """A x = known * x.

    Args:
        hole: (B, 1, H, W), 1 where pixels are missing; one hole per sample.
    """

    def __init__(self, hole: Tensor):
        self.hole = hole > 0.5  # (B, 1, H, W) bool

    @property
    def S(self) -> Tensor:
        """Singular values on the pixel grid: 1 on known pixels, 0 in the hole. (B, 1, H, W)"""
        return (~self.hole).float()

    def A(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W) with the hole zeroed."""
        return torch.where(self.hole, torch.zeros_like(x), x)

    At = pinv = A

    def V(self, x: Tensor) -> Tensor:
        """The identity: pixels are already the spectral coordinates."""
        return x

    Vt = Ut = V

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """x + pinv(y - A x), the null-space projection (https://arxiv.org/abs/2212.00490, Equation 7).

        Written as a selection: the sum would round, and known pixels are promised to the bit.
        """
        return torch.where(self.hole, x, y)
