"""Inpainting: A keeps the known pixels and zeroes the hole. A = At = pinv = diag(known), so U = V = I and S = known."""

from __future__ import annotations

import torch
from torch import Tensor

from coherent_ddrm.operators.base import SpectralOperator


class Inpainting(SpectralOperator):
    """A x = known * x; y is shaped like x, its hole pixels are 0.

    Args:
        hole: (B, 1, H, W), 1 where pixels are missing; one hole per sample.
    """

    def __init__(self, hole: Tensor):
        self.hole = hole > 0.5  # (B, 1, H, W) bool
        self.S = (~self.hole).float()

    def A(self, x: Tensor) -> Tensor:
        return torch.where(self.hole.to(x.device), torch.zeros_like(x), x)

    At = pinv = V = Vt = A

    def repeat(self, count: int) -> Inpainting:
        return Inpainting(self.hole.float().repeat_interleave(count, dim=0))

    def window(self, y: Tensor, top: int, left: int, side: int) -> tuple[Inpainting, Tensor]:
        """Crops of the hole and of y."""
        rows, columns = slice(top, top + side), slice(left, left + side)
        return Inpainting(self.hole[..., rows, columns].float()), y[..., rows, columns]

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """Written as a selection: a sum would round, and known pixels are promised to the bit."""
        return torch.where(self.hole.to(x.device), x, y)

    replace = project
