"""Scores of a result against the truth, on the whole picture or on the hole alone. Pictures are float in [0, 1]."""

from __future__ import annotations

import kornia.metrics
from torch import Tensor

from coherent_ddrm.losses import hole_mean


def _mean(value: Tensor, where: Tensor | None) -> Tensor:
    """Mean per sample of value (B, C, H, W), over `where` (B, 1, H, W) if given. (B,)"""
    return value.flatten(1).mean(dim=1) if where is None else hole_mean(value, where.to(value.dtype))


def l1(x: Tensor, truth: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean absolute error, (B,)."""
    return _mean((x - truth).abs(), where)


def psnr(x: Tensor, truth: Tensor, where: Tensor | None = None) -> Tensor:
    """10 log10(1 / mean squared error) in dB, (B,)."""
    return -10 * _mean((x - truth) ** 2, where).clamp(min=1e-10).log10()


def ssim(x: Tensor, truth: Tensor, where: Tensor | None = None) -> Tensor:
    """Structural similarity: RGB, Gaussian window 11 / 1.5, data range 1, windows fully inside the picture; (B,).

    `where` averages the map over window centres in it. Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861
    """
    value = kornia.metrics.ssim(x, truth, window_size=11, max_val=1.0, padding="valid")
    return _mean(value, None if where is None else where[..., 5:-5, 5:-5])
