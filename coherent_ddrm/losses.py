"""Losses of stage two: pure functions that give one value per sample."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

SIGMA_FLOOR = 0.05  # below it the v-weight would blow rounding up (as in JiT, https://arxiv.org/abs/2511.13720)


def v_weight(sigma_t: Tensor) -> Tensor:
    """What turns a squared error of x0_hat into the squared error of v: 1 / sigma_t².

    With x_t given, z = (x_t - alpha_t x0) / sigma_t. Per unit of x0, flow's v = z - x0 changes by
    -(alpha_t / sigma_t + 1) = -1 / sigma_t, and variance preserving's v = alpha_t z - sigma_t x0 by
    -(alpha_t² + sigma_t²) / sigma_t, the same.
    """
    return sigma_t.clamp(min=SIGMA_FLOOR) ** -2


def hole_mean(value: Tensor, hole: Tensor) -> Tensor:
    """Mean over the hole. value: (B, C, H, W), hole: (B, 1, H, W) -> (B,); 0 for an empty hole."""
    total = (value * hole).flatten(1).sum(dim=1)
    return total / (hole.flatten(1).sum(dim=1) * value.shape[1]).clamp(min=1)


def min_snr_weight(alpha_t: Tensor, sigma_t: Tensor, limit: float = 5.0) -> Tensor:
    """min((alpha_t / sigma_t)², limit), https://arxiv.org/abs/2303.09556 (Equation 5), for an error of x0_hat."""
    return ((alpha_t / sigma_t.clamp(min=SIGMA_FLOOR)) ** 2).clamp(max=limit)


def diffusion_loss(x0_hat: Tensor, x0: Tensor, hole: Tensor, weight: Tensor) -> Tensor:
    """Weighted squared error over the hole. x0_hat, x0: (B, C, H, W); weight: (B,) -> (B,)"""
    return weight * hole_mean((x0_hat.float() - x0.float()) ** 2, hole)


class FeatureNet(Protocol):
    """What `perceptual_loss` compares with, such as models.perceptual.PerceptualNet."""

    def features(self, x: Tensor) -> list[Tensor]: ...


def perceptual_loss(net: FeatureNet, x0_hat: Tensor, x0: Tensor) -> Tensor:
    """Squared difference of features, a mean over each layer, summed over the layers; (B,).

    LaMa, https://arxiv.org/abs/2109.07161, Equation 3: the paper takes the mean over its four layers, the code their
    sum, times 30, beside 10 |error| on known pixels. This is the code's sum, without the 30.

    Args:
        net: frozen. No gradient goes through the features of x0.
        x0_hat: (B, 3, H, W) in [-1, 1], the composite: the prediction in the hole, x0 elsewhere.
        x0: (B, 3, H, W), the truth.
    """
    with torch.no_grad():
        truth = net.features(x0)
    layers = zip(net.features(x0_hat), truth, strict=True)
    return torch.stack([((a.float() - b.float()) ** 2).flatten(1).mean(dim=1) for a, b in layers]).sum(dim=0)


def low_noise(t: Tensor, cutoff: float = 0.4) -> Tensor:
    """(1 + cos(pi t / cutoff)) / 2: 1 at t = 0, falling smoothly to 0 at `cutoff`, 0 beyond. t: any shape -> alike.

    Where noise is strong, x0_hat is a mean over many pictures, and has to be: losses on its sharpness stay out.
    """
    if not 0 < cutoff <= 1:
        raise ValueError(f"cutoff is {cutoff}; it must be above 0 and at most 1")
    return (1 + torch.cos(math.pi * (t.float() / cutoff).clamp(0, 1))) / 2
