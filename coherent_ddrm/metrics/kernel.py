"""Kernel distance of two sets of feature vectors: unbiased at any number of pictures, so it serves small sets.

KID, https://arxiv.org/abs/1801.01401: the squared maximum mean discrepancy with the kernel (x·y / d + 1)³.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from coherent_ddrm.errors import UserError


class Kid(NamedTuple):
    """Mean and standard deviation over subsets of the squared discrepancy, and how many vectors a subset has."""

    value: float
    spread: float
    subset: int


def kid(real: Tensor, fake: Tensor, subsets: int = 100, subset: int = 1000, seed: int = 0, paired: bool = False) -> Kid:
    """KID of features (N, d) and (M, d), a mean over random subsets of 1000, or of half the smaller set.

    paired: row i of `fake` was made of row i of `real` (a result and its truth): no subset then holds both. Else the
    pairs, which are alike, would pull the value below that of two independent sets, below 0 even.
    """
    from torchmetrics.image.kid import poly_mmd

    size = min(subset, len(real) // 2, len(fake) // 2)
    if size < 2:
        raise UserError(f"{len(real)} and {len(fake)} pictures: KID needs 4 of each or more")
    if paired and len(real) != len(fake):
        raise ValueError(f"{len(real)} and {len(fake)} vectors are no pairs")
    generator = torch.Generator().manual_seed(seed)
    sets = [features.double() for features in (real, fake)]

    def draw() -> tuple[Tensor, Tensor]:
        if paired:
            rows = torch.randperm(len(real), generator=generator).to(real.device)
            chosen = rows[:size], rows[size : 2 * size]
        else:
            chosen = [torch.randperm(len(x), generator=generator)[:size].to(x.device) for x in sets]
        return sets[0][chosen[0]], sets[1][chosen[1]]

    values = torch.stack([poly_mmd(*draw()) for _ in range(subsets)])
    return Kid(float(values.mean()), float(values.std(unbiased=False)), size)
