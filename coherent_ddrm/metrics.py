"""Scores of a result against the truth, on the whole picture or on the hole alone. Pictures are float in [0, 1]."""

from __future__ import annotations

import kornia.metrics
import torch.nn.functional as F
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


def seam(x: Tensor, truth: Tensor, hole: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels along the hole's border, (B,).

    The border: pixels whose 3 x 3 neighbourhood holds known and missing ones. 0 where a picture has none.
    """
    hole = hole.to(x.dtype)
    near = F.max_pool2d(hole, 3, stride=1, padding=1) * F.max_pool2d(1 - hole, 3, stride=1, padding=1)  # (B, 1, H, W)
    error, total = 0.0, 0.0
    for axis in (-2, -1):
        pair = (near.narrow(axis, 0, near.shape[axis] - 1) + near.narrow(axis, 1, near.shape[axis] - 1)).clamp(max=1)
        wrong = (x.diff(dim=axis) - truth.diff(dim=axis)).abs().mean(dim=1, keepdim=True)
        error, total = error + (pair * wrong).flatten(1).sum(dim=1), total + pair.flatten(1).sum(dim=1)
    return error / total.clamp(min=1)
