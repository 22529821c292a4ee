"""Differences of neighbouring pixels: the seam along the hole's border, sharpness inside. Pictures in [0, 1]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from coherent_ddrm.metrics.pixels import mean_over

FLAT = 1 / 255  # mean gradient of the truth below which no ratio to it means anything


def seam(x: Tensor, truth: Tensor, hole: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring pixels along the hole's border, (B,).

    The border: pixels whose 3 x 3 neighbourhood holds known and missing ones. nan where there is none: no hole, or all.
    x, truth: (B, C, H, W); hole: (B, 1, H, W).
    """
    hole = hole.to(x.dtype)
    near = F.max_pool2d(hole, 3, stride=1, padding=1) * F.max_pool2d(1 - hole, 3, stride=1, padding=1)  # (B, 1, H, W)
    error, total = 0.0, 0.0
    for axis in (-2, -1):
        pair = (near.narrow(axis, 0, near.shape[axis] - 1) + near.narrow(axis, 1, near.shape[axis] - 1)).clamp(max=1)
        wrong = (x.diff(dim=axis) - truth.diff(dim=axis)).abs().mean(dim=1, keepdim=True)
        error, total = error + (pair * wrong).flatten(1).sum(dim=1), total + pair.flatten(1).sum(dim=1)
    return error / total  # 0 / 0 without a border


def gradient_magnitude(x: Tensor) -> Tensor:
    """Length of the forward differences, a mean over channels. (B, C, H, W) -> (B, 1, H - 1, W - 1)"""
    across, down = x[..., :-1, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, :-1]
    return (across**2 + down**2).sqrt().mean(dim=1, keepdim=True)


def sharpness(x: Tensor, truth: Tensor, hole: Tensor) -> Tensor:
    """Mean gradient magnitude in the hole over the truth's there, (B,): 1 = as sharp.

    nan without a hole, and where the truth's is below 1 / 255: there the ratio tells of rounding and noise, and one
    flat picture would decide a mean over many.
    """
    inside = hole[..., :-1, :-1]
    ours, theirs = (mean_over(gradient_magnitude(v), inside) for v in (x, truth))
    return (ours / theirs).masked_fill(theirs < FLAT, float("nan"))
