"""Noise schedules and time grids. x_t = alpha_t x_0 + sigma_t z with t in [0, 1]; 0 is data, 1 is noise.

Every schedule is a function `schedule(t) -> (alpha_t, sigma_t)` of tensors of any shape, so time may differ per sample
or per pixel. Flow: https://arxiv.org/abs/2210.02747 ; VP-linear: https://arxiv.org/abs/2011.13456 (Equation 33) ;
VP-cosine: https://arxiv.org/abs/2102.09672 (Equation 17, without its small offset). VPDiscrete is a table: the levels
that a DDPM of another library was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

Schedule = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Flow:
    """Rectified flow: alpha_t = 1 - t, sigma_t = t."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t


@dataclass(frozen=True)
class VPCosine:
    """Variance preserving: alpha_t = cos(pi t / 2), sigma_t = sin(pi t / 2)."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(t * (math.pi / 2)).clamp(min=0), torch.sin(t * (math.pi / 2))  # cos(pi / 2) rounds below 0


@dataclass(frozen=True)
class VPLinear:
    """Variance preserving with a linear beta(t) = beta_0 + t (beta_1 - beta_0), DDPM's schedule in continuous time."""

    beta_0: float = 0.1
    beta_1: float = 20.0

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0
        return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))


@dataclass(frozen=True)
class VPDiscrete:
    """Variance preserving, from the table of a DDPM with T noise levels (https://arxiv.org/abs/2006.11239).

    t = k / T is level k: alpha_t = 1 at level 0, the data, and sqrt(alphas_cumprod[k - 1]) at level k >= 1, where the
    network was trained at timestep k - 1. Between levels log alpha_t is linear (a constant beta); where the last level
    holds no data (alpha_1 = 0, "zero terminal SNR", https://arxiv.org/abs/2305.08891), alpha_t is linear on the way to
    it. A t that differs from k / T by no more than the rounding of fp32 is level k to the bit.
    """

    alphas_cumprod: tuple[float, ...] = field(repr=False)  # T values of DDPM's alpha-bar = alpha_t², falling

    def __post_init__(self) -> None:
        values = (1.0, *self.alphas_cumprod)
        falling = all(high >= low >= 0 for high, low in pairwise(values))
        if len(values) < 2 or not falling or values[1] == 1 or values[-2] == 0:
            raise ValueError("alphas_cumprod must fall from below 1, and only its last value may be 0")

    @property
    def levels(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        level = self._level(t)
        table = _log_alpha(self.alphas_cumprod, t.device, level.dtype)
        below = level.floor().clamp(0, self.levels - 1)
        share, index = level - below, below.long()
        low, high = table[index], table[index + 1]
        log_alpha = torch.where(high.isinf(), low + torch.log1p(-share), torch.lerp(low, high.nan_to_num(), share))
        return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))

    def timestep(self, t: Tensor) -> Tensor:
        """What the network is told at t: t T - 1, a float between trained timesteps, 0 below the first."""
        return (self._level(t) - 1).clamp(min=0)

    def _level(self, t: Tensor) -> Tensor:
        """t T, whole numbers free of rounding; in fp32 at least."""
        level = t.to(torch.promote_types(t.dtype, torch.float32)) * self.levels
        return torch.where((level - level.round()).abs() <= self.levels * 2**-23, level.round(), level)


@lru_cache(maxsize=16)
def _log_alpha(alphas_cumprod: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(T + 1,) log alpha of levels 0 ... T; -inf where alpha is 0."""
    return torch.tensor((1.0, *alphas_cumprod), dtype=torch.float64).log().div(2).to(dtype).to(device)


SCHEDULES: dict[str, Callable[[], Schedule]] = {"flow": Flow, "vp-cosine": VPCosine, "vp-linear": VPLinear}


def make_schedule(name: str) -> Schedule:
    """The schedule called `name`; ValueError names the known ones."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]()


def expand(value: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...) so that it broadcasts over `like`; per-pixel values pass unchanged."""
    return value.reshape(-1, *[1] * (like.ndim - 1)) if value.ndim == 1 else value


def add_noise(schedule: Schedule, x0: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """x_t = alpha_t x0 + sigma_t z. x0, z: (B, ...); t: (B,) or per pixel."""
    alpha_t, sigma_t = schedule(expand(t, x0))
    return alpha_t * x0 + sigma_t * z


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """`steps` + 1 times from 1 down to 0, t = shift u / (1 + (shift - 1) u) for even u.

    shift > 1 spends more of the steps at high noise, where large holes are decided
    (https://arxiv.org/abs/2403.03206, Equation 23).
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 is needed")
    u = [1 - i / steps for i in range(steps + 1)]
    return [shift * v / (1 + (shift - 1) * v) for v in u]


def travel_path(
    times: Sequence[float], length: int, repeats: int, window: tuple[float, float] = (0.3, 0.7)
) -> list[float]:
    """`times` with time travel: at every `length`-th grid point in `window`, go back `length` points and come again.

    `repeats` passes in all over each such stretch (1 = no travel). `window` is a share of the grid, not a time. Going
    back is one jump: the chain of small forward steps and the single jump are the same Gaussian.
    RePaint, https://arxiv.org/abs/2201.09865, section 4.2; the window is ours (METHODS: DDNM + few resamplings).
    """
    if length < 1 or repeats < 1:
        raise ValueError(f"time travel has length {length} and repeats {repeats}; both must be at least 1")
    steps = len(times) - 1
    low, high = (round(share * steps) for share in window)
    path = [times[0]]
    for i in range(1, steps + 1):
        path.append(times[i])
        left = steps - i
        if low <= left <= high and left % length == 0 and i >= length:
            path += (repeats - 1) * list(times[i - length : i + 1])
    return path
