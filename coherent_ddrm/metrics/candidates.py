"""How different several results for one hole are."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from coherent_ddrm.metrics.perceptual import DistanceNetwork, perceptual_distance
from coherent_ddrm.metrics.pixels import l1


def diversity(candidates: Tensor, hole: Tensor | None = None, network: DistanceNetwork | None = None) -> Tensor:
    """Mean distance over the K (K - 1) / 2 pairs of candidates, (B,): LPIPS or alike with a network, else L1.

    candidates: uint8 (K, B, 3, H, W); hole: (B, 1, H, W), to measure there alone.
    """
    if len(candidates) < 2:
        raise ValueError(f"diversity needs 2 candidates or more, got {len(candidates)}")
    pairs = combinations(candidates, 2)
    if network is None:
        values = [l1(a.float() / 255, b.float() / 255, hole) for a, b in pairs]
    else:
        values = [perceptual_distance(network, a, b, hole) for a, b in pairs]
    return torch.stack(values).mean(dim=0)
