"""EDM's preconditioning (https://arxiv.org/abs/2206.00364, Equation 7), centred on a fill of the hole.

With x0 ~ N(f, s²) per pixel and v = alpha_t² s² + sigma_t², the best linear guess is
base = f + alpha_t s² / v (x_t - alpha_t f). The network predicts the rest: x0_hat = base + s sigma_t / sqrt(v) F. Its
input (x_t - alpha_t f) / sqrt(v) and its target have unit variance at every t. At t = 0 the output is x_t for any F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coherent_ddrm.schedule import Schedule, expand


def precondition(
    schedule: Schedule, x_t: Tensor, t: Tensor, fill: Tensor, known: Tensor, data_std: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(centred, base, scale) with x0_hat = base + scale F(centred, ...).

    Args:
        x_t, fill: (B, C, H, W); known: (B, 1, H, W), where time is 0 instead of t, (B,) or (B, 1, H, W).

    Returns:
        centred and base (B, C, H, W), scale (B, 1, H, W), fp32.
    """
    alpha_t, sigma_t = schedule(expand(t, x_t).float() * (1 - known))  # (B, 1, H, W) each
    variance = alpha_t**2 * data_std**2 + sigma_t**2
    residual = x_t - alpha_t * fill
    base = fill + alpha_t * data_std**2 / variance * residual
    return residual / torch.sqrt(variance), base, data_std * sigma_t / torch.sqrt(variance)
