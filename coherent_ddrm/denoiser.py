"""The denoiser contract, `denoiser(x_t, t, **condition) -> x0_hat`, and the conversions between x0, eps and v.

All follow from x_t = alpha_t x_0 + sigma_t z. eps is the estimate of z; v = alpha_t z - sigma_t x_0
(https://arxiv.org/abs/2202.00512, appendix D). alpha_t and sigma_t broadcast over x_t. `DiscreteDenoiser` adapts a
network that predicts any of them at trained timesteps; coherent_ddrm.priors reads such networks from files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from coherent_ddrm.schedule import Schedule, VPDiscrete, expand


class Denoiser(Protocol):
    """Predicts the clean image. x_t: (B, C, H, W) noisy, t: (B,) or (B, 1, H, W) in [0, 1] -> x0_hat like x_t."""

    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, **condition: Tensor) -> Tensor: ...


def takes_pixel_times(denoiser: Denoiser) -> bool:
    """Whether t may be (B, 1, H, W)."""
    return getattr(denoiser, "per_pixel_time", False)


def evaluations(denoiser: Denoiser) -> int:
    """Of a network, in one call."""
    return getattr(denoiser, "evaluations", 1)


@dataclass
class Bound:
    """A denoiser with its condition filled in: the (x_t, t) -> x0_hat that samplers take."""

    denoiser: Denoiser
    condition: dict[str, Tensor | None]

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    @property
    def per_pixel_time(self) -> bool:
        return takes_pixel_times(self.denoiser)

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


PREDICTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": x0_from_eps,
    "v_prediction": x0_from_v,
    "sample": lambda x_t, x0, alpha_t, sigma_t: x0,
}  # diffusers' names -> (x_t, prediction, alpha_t, sigma_t) -> x0


@dataclass
class DiscreteDenoiser:
    """A network that predicts eps, v or x0 at trained timesteps, as a denoiser; what diffusers' UNet2DModel needs.

    The network is told `schedule.timestep(t)`, a float between trained timesteps. Of an output of 2 C channels the
    second half, a learned variance, is not used. At alpha_t near 0, x0 = (x_t - sigma_t eps) / alpha_t magnifies the
    error of eps by 1 / alpha_t (150 for DDPM's linear betas, 20,000 for cosine ones): `clip` bounds x0_hat, as those
    networks' own samplers do. At alpha_t = 0 eps says nothing about x0, so "epsilon" is refused there.

    Args:
        net: (x_t, timestep (B,), class_labels) -> prediction (B, C or 2 C, H, W), or an object with it as `.sample`.
        prediction: a name in `PREDICTIONS`.
        clip: x0_hat is clamped to [-clip, clip]; None = not (gradients pass everywhere then).
        timestep_scale: the network is told so many times the timestep.
        resolution, channels, labels: side it was trained at (None = unknown or any), C, number of classes (0 = none).
        shift: of the time grid that suits it, see schedule.time_grid.
        multiple: what sides of pictures must be a multiple of.
    """

    net: Callable[..., Any]
    schedule: VPDiscrete
    prediction: str = "epsilon"
    clip: float | None = None
    timestep_scale: float = 1.0
    resolution: int | None = None
    channels: int = 3
    labels: int = 0
    shift: float = 1.0
    multiple: int = 1
    per_pixel_time = False

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction {self.prediction!r}: choose one of {', '.join(PREDICTIONS)}")
        if self.prediction == "epsilon" and self.schedule.alphas_cumprod[-1] == 0:
            raise ValueError("a network that predicts epsilon cannot start at alpha_t = 0 (zero terminal SNR)")

    def __call__(self, x_t: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """x0_hat in fp32. x_t: (B, C, H, W); t: (B,) in [0, 1]; class_labels: (B,) integers if it has classes."""
        if t.ndim != 1:
            raise ValueError(f"t has shape {tuple(t.shape)}; this network takes one time per picture, (B,)")
        if (class_labels is None) != (self.labels == 0):
            rule = f"give class_labels (B,), 0 ... {self.labels - 1}" if self.labels else "leave class_labels out"
            raise ValueError(f"this network knows {self.labels} classes; {rule}")
        given = {} if class_labels is None else {"class_labels": class_labels}
        timestep = self.timestep_scale * self.schedule.timestep(t)
        output = self.net(x_t.to(getattr(self.net, "dtype", x_t.dtype)), timestep, **given)
        output = output if isinstance(output, Tensor) else output.sample
        if output.shape[1] not in (self.channels, 2 * self.channels):
            raise ValueError(f"the network returned {output.shape[1]} channels for a picture of {self.channels}")
        alpha_t, sigma_t = self.schedule(expand(t, x_t))  # (B, 1, 1, 1)
        x0_hat = PREDICTIONS[self.prediction](x_t.float(), output[:, : self.channels].float(), alpha_t, sigma_t)
        return x0_hat if self.clip is None else torch.clamp(x0_hat, -self.clip, self.clip)
