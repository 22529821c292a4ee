"""Distance of two pictures in the features of a network, over the whole picture or over the hole.

LPIPS, https://arxiv.org/abs/1801.03924, through the package `lpips`; on a network trained here, the cosine distance of
its features. A network gives one map of distances per layer; the score is the sum over layers of each map's mean, as
LPIPS has it. Over the hole, each map is first brought to the picture's size, as `lpips` does for its spatial output:
places just outside the hole see into it, so a mean over the hole says more than a picture cut to the hole would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from coherent_ddrm.metrics.pixels import mean_over


class DistanceNetwork(Protocol):
    """What two pictures are compared with."""

    def layers(self, images: Tensor) -> list[Tensor]:
        """uint8 (B, 3, H, W) -> features of each layer, (B, C, h, w)."""
        ...

    def maps(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[Tensor]:
        """Layers of two pictures -> one map of distances per layer, (B, 1, h, w)."""
        ...


def whole_distance(maps: list[Tensor]) -> Tensor:
    """Sum over layers of the mean distance, (B,)."""
    return torch.stack([layer.flatten(1).mean(dim=1) for layer in maps]).sum(dim=0)


def hole_distance(maps: list[Tensor], hole: Tensor) -> Tensor:
    """Sum over layers of the mean distance over the hole (B, 1, H, W); (B,), nan for an empty hole."""
    full = [F.interpolate(layer, hole.shape[-2:], mode="bilinear", align_corners=False) for layer in maps]
    return mean_over(torch.stack(full).sum(dim=0), hole)


@torch.no_grad()
def perceptual_distance(network: DistanceNetwork, x: Tensor, truth: Tensor, where: Tensor | None = None) -> Tensor:
    """Distance of uint8 pictures (B, 3, H, W), over `where` (B, 1, H, W) if given; (B,)."""
    maps = network.maps(network.layers(x), network.layers(truth))
    return whole_distance(maps) if where is None else hole_distance(maps, where)
