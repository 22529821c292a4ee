"""Pixel by pixel scores of a result against the truth, on the whole picture or on a part. Pictures are float in [0, 1].

PSNR and SSIM of one picture each; SSIM as Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861.
"""

from __future__ import annotations

import kornia.metrics
from torch import Tensor

from coherent_ddrm.losses import hole_mean

WINDOW, BORDER = 11, 5  # SSIM's window, and how many pixels of the picture's border are no centre of one
SMALLEST_ERROR = 1e-10  # PSNR of equal pictures is 100 dB, not infinite: a mean over pictures stays a number


def mean_over(value: Tensor, where: Tensor | None) -> Tensor:
    """Mean per sample of value (B, C, H, W), over `where` (B, 1, H, W) if given; nan where that is empty. (B,)"""
    if where is None:
        return value.flatten(1).mean(dim=1)
    empty = ~where.flatten(1).any(dim=1)
    return hole_mean(value, where.to(value.dtype)).masked_fill(empty, float("nan"))


def l1(x: Tensor, truth: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean absolute error, (B,)."""
    return mean_over((x - truth).abs(), where)


def psnr(x: Tensor, truth: Tensor, where: Tensor | None = None) -> Tensor:
    """10 log10(1 / mean squared error) in dB, at most 100, (B,)."""
    return -10 * mean_over((x - truth) ** 2, where).clamp(min=SMALLEST_ERROR).log10()


def ssim(x: Tensor, truth: Tensor, where: Tensor | None = None) -> Tensor:
    """Structural similarity: RGB, Gaussian window 11 / 1.5, data range 1, windows fully inside the picture; (B,).

    `where` averages the map over window centres in it; nan for a picture that has none.
    """
    if min(x.shape[-2:]) < WINDOW:
        raise ValueError(f"ssim() needs pictures of {WINDOW} pixels a side or more, got {tuple(x.shape[-2:])}")
    value = kornia.metrics.ssim(x, truth, window_size=WINDOW, max_val=1.0, padding="valid")
    return mean_over(value, None if where is None else where[..., BORDER:-BORDER, BORDER:-BORDER])
