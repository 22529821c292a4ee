"""Losses of stage two: pure functions that give one value per sample."""

from __future__ import annotations

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


def diffusion_loss(x0_hat: Tensor, x0: Tensor, hole: Tensor, sigma_t: Tensor) -> Tensor:
    """v-weighted squared error over the hole. x0_hat, x0: (B, C, H, W); sigma_t: (B,) -> (B,)"""
    error = hole_mean((x0_hat.float() - x0.float()) ** 2, hole)
    return v_weight(sigma_t) * error
