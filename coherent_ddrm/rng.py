"""Randomness as an argument: one generator per picture, keyed, never ambient.

A picture's noise depends on its own key alone, so it is the same in a batch of 1 and of 8, on any number of processes,
and after a resume. Generators live on the CPU and the numbers are moved, so that a seed means the same on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator that is a function of `key`, a tuple of non-negative integers such as (seed, step, sample)."""
    words = [len(key), *(word for number in key for word in (number & 0xFFFFFFFF, number >> 32))]  # no two keys alike
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed & (2**63 - 1))


def normal(like: Tensor, rng: Sequence[torch.Generator]) -> Tensor:
    """Standard normal noise shaped, typed and placed like `like` (B, ...); row b is drawn from rng[b].

    Raises ValueError when there is not exactly one generator per row.
    """
    if len(rng) != len(like):
        raise ValueError(f"{len(rng)} generators for a batch of {len(like)}; one per picture is needed")
    rows = [torch.randn(like.shape[1:], generator=g, dtype=torch.float32, device=g.device) for g in rng]
    return torch.stack([row.to(like.device) for row in rows]).to(like.dtype)
