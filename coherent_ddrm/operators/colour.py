"""Colourisation: y is a weighted sum of the channels, A Aᵀ = |w|² I, so U = I and S = |w|."""

from __future__ import annotations

import torch
from torch import Tensor

from coherent_ddrm.operators.base import SpectralOperator


class Colourisation(SpectralOperator):
    """A x = sum_c w_c x_c, (B, C, H, W) -> (B, 1, H, W). DDNM, https://arxiv.org/abs/2212.00490, section 3.

    Args:
        weights: w, one per channel; (0.299, 0.587, 0.114) is the luma of video and JPEG.

    Raises:
        ValueError: for weights that are all 0 or not finite, and from A for a picture of another number of channels.
    """

    def __init__(self, weights: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)):
        self.weights = torch.tensor(weights, dtype=torch.float32).reshape(-1, 1, 1)  # (C, 1, 1)
        self.S = self.weights.double().norm().float()
        if not 0 < float(self.S) < float("inf"):
            raise ValueError(f"the weights are {weights}; finite numbers that are not all 0 are needed")

    def A(self, x: Tensor) -> Tensor:
        if x.shape[-3] != len(self.weights):
            raise ValueError(f"the picture has {x.shape[-3]} channels, there are {len(self.weights)} weights")
        return (self.weights.to(x.device) * x).sum(-3, keepdim=True)

    def At(self, y: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, C, H, W)"""
        return self.weights.to(y.device) * y

    def window(self, y: Tensor, top: int, left: int, side: int) -> tuple[Colourisation, Tensor]:
        """A crop of y."""
        return self, y[..., top : top + side, left : left + side]
