"""The denoiser contract, `denoiser(x_t, t, **condition) -> x0_hat`, and the conversions between x0, eps and v.

All follow from x_t = alpha_t x_0 + sigma_t z. eps is the estimate of z; v = alpha_t z - sigma_t x_0
(https://arxiv.org/abs/2202.00512, appendix D). alpha_t and sigma_t broadcast over x_t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from coherent_ddrm.schedule import Schedule


class Denoiser(Protocol):
    """Predicts the clean image. x_t: (B, C, H, W) noisy, t: (B,) or (B, 1, H, W) in [0, 1] -> x0_hat like x_t."""

    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor: ...


@dataclass
class Bound:
    """A denoiser with its condition filled in: the (x_t, t) -> x0_hat that samplers take."""

    denoiser: Denoiser
    condition: dict[str, Tensor | None]

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.denoiser(x_t, t, **self.condition)


def eps_from_x0(x_t: Tensor, x0: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """z such that x_t = alpha_t x0 + sigma_t z. Needs sigma_t > 0."""
    return (x_t - alpha_t * x0) / sigma_t


def x0_from_eps(x_t: Tensor, eps: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """x0 such that x_t = alpha_t x0 + sigma_t eps. Needs alpha_t > 0."""
    return (x_t - sigma_t * eps) / alpha_t


def v_from_x0(x_t: Tensor, x0: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """v = alpha_t z - sigma_t x0 with z read off x_t. Needs sigma_t > 0."""
    return alpha_t * eps_from_x0(x_t, x0, alpha_t, sigma_t) - sigma_t * x0


def x0_from_v(x_t: Tensor, v: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """The inverse of `v_from_x0`; defined for every t because alpha_t² + sigma_t² > 0."""
    return (alpha_t * x_t - sigma_t * v) / (alpha_t**2 + sigma_t**2)
