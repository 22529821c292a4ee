"""Compressed sensing by a subsampled Walsh-Hadamard transform, A = R H D P per channel: A Aᵀ = I, U = I and S = 1.

P permutes the pixels, D flips signs, H is the orthonormal transform, R keeps m = n / ratio rows, all drawn once from
the seed. As in DDRM, https://arxiv.org/abs/2201.11793 ; the signs spread the mean of a picture over all rows
(https://arxiv.org/abs/1011.1595).
"""

from __future__ import annotations

import torch
from torch import Tensor

from coherent_ddrm.operators.base import SpectralOperator, require_size
from coherent_ddrm.operators.transforms import walsh_hadamard


class CompressedSensing(SpectralOperator):
    """A x = m random numbers about each channel, (B, C, H, W) -> (B, C, m) with m = round(H W / ratio).

    Args:
        ratio: from 2 to 20, whole or not; 4 keeps a quarter.
        size: (H, W) of x, H W a power of two.
        seed: a seed or a CPU generator; the same seed is the same operator on every device.

    Raises:
        ValueError: for another ratio or size, and from A for a picture of another size.
    """

    def __init__(self, ratio: float, size: tuple[int, int], seed: int | torch.Generator = 0):
        n = size[0] * size[1]
        if not 2 <= ratio <= 20:
            raise ValueError(f"ratio is {ratio}; a number from 2 (half the numbers) to 20 is needed")
        if n < 2 or n & (n - 1):
            raise ValueError(
                f"the picture is {size[0]} x {size[1]}, {n} pixels; the Walsh-Hadamard transform needs a power of two: "
                f"resize so that both sides are powers of two"
            )
        rng = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        self.size = tuple(size)
        self.order = torch.randperm(n, generator=rng)
        self.back = self.order.argsort()
        self.sign = torch.randint(0, 2, (n,), generator=rng) * 2.0 - 1
        self.rows = torch.randperm(n, generator=rng)[: max(1, round(n / ratio))].sort().values
        self.S = torch.ones(())

    def A(self, x: Tensor) -> Tensor:
        require_size(x, self.size)
        shuffled = self.sign.to(x.device) * x.flatten(-2)[..., self.order.to(x.device)]  # (B, C, n)
        return walsh_hadamard(shuffled)[..., self.rows.to(x.device)]

    def At(self, y: Tensor) -> Tensor:
        """(B, C, m) -> (B, C, H, W)"""
        full = y.new_zeros(*y.shape[:-1], len(self.order)).index_copy(-1, self.rows.to(y.device), y)  # (B, C, n)
        shuffled = self.sign.to(y.device) * walsh_hadamard(full)
        return shuffled[..., self.back.to(y.device)].unflatten(-1, self.size)

    pinv = At
