"""Pull-push: a smooth fill of the hole from the known pixels (Gortler et al., The Lumigraph, 1996, section 3.4.2).

Pull: average known pixels into coarser and coarser grids until each cell knows something. Push: go back down, each
level filling its unknown cells from the coarser one. A few small convolutions, differentiable, any size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pull_push(x: Tensor, known: Tensor) -> Tensor:
    """Known pixels as they are, the hole filled smoothly; 0 (mid grey) where a picture has no known pixel at all.

    Args:
        x: (B, C, H, W); hole pixels are not read.
        known: (B, 1, H, W), 1 on known pixels.
    """
    known = known.to(x.dtype)
    value = torch.where(known > 0, x, torch.zeros_like(x))
    if min(x.shape[-2:]) == 1:
        weight = known.sum(dim=(2, 3), keepdim=True)
        mean = value.sum(dim=(2, 3), keepdim=True) / weight.clamp(min=1)
        return torch.where(known > 0, value, mean.expand_as(value))
    weight = F.avg_pool2d(known, 2, ceil_mode=True)
    coarse = F.avg_pool2d(value, 2, ceil_mode=True) / weight.clamp(min=1e-6)
    coarse = pull_push(coarse, (weight > 0).to(x.dtype))
    fine = F.interpolate(coarse, size=x.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(known > 0, value, fine)
