"""Fréchet distance of two sets of feature vectors, as Gaussians.

FID, https://arxiv.org/abs/1706.08500: |m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Its bias falls as 1 / N, which
https://arxiv.org/abs/1911.07023 takes out by a straight line through FIDs of subsets, read off at 1 / N = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from coherent_ddrm.errors import UserError

FEWEST, PER_DIMENSION = 100, 2  # vectors of each set, below which no straight line in 1 / N is to be seen


def fid(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance of features (N, d) and (M, d), in float64, exact for singular covariances too.

    With S = RᵀR, R the triangular factor of the centred features, tr (S1 S2)^(1/2) is the sum of the singular values of
    R1 R2ᵀ: no root of a matrix is taken, so fewer vectors than dimensions are no special case.
    """
    _check(real, fake, 2)
    real, fake = real.double(), fake.double()
    shift = real.mean(dim=0) - fake.mean(dim=0)
    r1, r2 = _factor(real), _factor(fake)
    cross = torch.linalg.svdvals(r1 @ r2.T).sum()
    return max(0.0, float(shift @ shift + r1.square().sum() + r2.square().sum() - 2 * cross))


class Extrapolated(NamedTuple):
    """FID at endless sets. `spread`: standard deviation over repeated subsets, not over other pictures; `fitted`: the
    smallest and largest N of the line."""

    value: float
    spread: float
    fitted: tuple[int, int]


def fid_infinity(
    real: Tensor, fake: Tensor, points: int = 8, repeats: int = 8, seed: int = 0, paired: bool = False
) -> Extrapolated:
    """FID extrapolated to 1 / N = 0 over subsets of both sets alike, N from a quarter of the smaller set to all of it.

    The sizes are even in 1 / N; each of `repeats` lines has its own subsets. It may come out below 0 for two sets of
    one distribution. The paper shrinks the generated set alone, beside 50,000 real pictures; here both are small, and
    the bias of both goes. 2 vectors per dimension are needed: with fewer the bias is no straight line in 1 / N, and
    much of it may be left.

    paired: row i of `fake` was made of row i of `real`; subsets then take both, so that all N are alike in that.
    """
    _check(real, fake, max(FEWEST, PER_DIMENSION * real.shape[1]))
    if paired and len(real) != len(fake):
        raise ValueError(f"{len(real)} and {len(fake)} vectors are no pairs")
    generator = torch.Generator().manual_seed(seed)
    most = min(len(real), len(fake))
    sizes = [round(1 / x) for x in torch.linspace(1 / most, 4 / most, points, dtype=torch.float64).tolist()]
    values = torch.tensor(
        [[fid(*_subsets(real, fake, n, generator, paired)) for n in sizes] for _ in range(repeats)],
        dtype=torch.float64,
    )  # (repeats, points)
    inverse = 1 / torch.tensor(sizes, dtype=torch.float64)
    line = torch.stack([torch.ones_like(inverse), inverse], dim=1)  # (points, 2)
    intercepts = torch.linalg.lstsq(line, values.T).solution[0]  # (repeats,)
    return Extrapolated(float(intercepts.mean()), float(intercepts.std()), (sizes[-1], sizes[0]))


def _factor(features: Tensor) -> Tensor:
    """R (min(N, d), d) with RᵀR the covariance of features (N, d)."""
    centred = (features - features.mean(dim=0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R


def _subsets(real: Tensor, fake: Tensor, size: int, generator: torch.Generator, paired: bool) -> tuple[Tensor, Tensor]:
    chosen = [torch.randperm(len(real), generator=generator)[:size]]
    chosen.append(chosen[0] if paired else torch.randperm(len(fake), generator=generator)[:size])
    return real[chosen[0].to(real.device)], fake[chosen[1].to(fake.device)]


def _check(real: Tensor, fake: Tensor, fewest: int) -> None:
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features are (N, d) and (M, d), got {tuple(real.shape)} and {tuple(fake.shape)}")
    if min(len(real), len(fake)) < fewest:
        raise UserError(f"{len(real)} and {len(fake)} pictures: this distance needs {fewest} of each or more")
