"""The sampler contract and the only loop over time in the library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from coherent_ddrm.denoiser import Denoiser, evaluations
from coherent_ddrm.operators import Inpainting, LinearOperator, Observation, Operator, SpectralOperator
from coherent_ddrm.rng import normal
from coherent_ddrm.schedule import time_grid

Rng = Sequence[torch.Generator]


class Sampler:
    """One method: `start` makes the first x_t, `step` goes from t to s < t, `travel` goes back to s > t.

    `nfe` counts network evaluations per picture. No state but that is kept between moves unless a method says so.
    """

    default_steps = 50  # what the method's authors take, or what does well

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.nfe = 0

    def times(self, steps: int, shift: float = 1.0) -> list[float]:
        """The times to walk for `steps` steps: a plain grid, unless the method travels back."""
        return time_grid(steps, shift)

    def start(self, z: Tensor, t: float) -> Tensor:
        """x_t at the first time (usually 1) from standard normal noise z (B, C, H, W)."""
        return z

    def step(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        """x_t -> x_s for s < t."""
        raise TypeError(f"{type(self).__name__} does not define step(x_t, t, s, rng)")

    def travel(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        """x_s ~ q(x_s | x_t), s > t: x_s = r x_t + sqrt(sigma_s² - r² sigma_t²) z with r = alpha_s / alpha_t."""
        alpha_t, sigma_t = self.alpha_sigma(t, x_t)
        alpha_s, sigma_s = self.alpha_sigma(s, x_t)
        ratio = alpha_s / alpha_t
        spread = (sigma_s**2 - (ratio * sigma_t) ** 2).clamp(min=0).sqrt()
        return ratio * x_t + spread * normal(x_t, rng)

    def alpha_sigma(self, t: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t) as 0-dim tensors on the device of `like`, in fp32."""
        return self.schedule(torch.tensor(t, dtype=torch.float32, device=like.device))

    def predict(self, x_t: Tensor, t: float) -> Tensor:
        """x0_hat = denoiser(x_t, t) in fp32, one network evaluation. (B, C, H, W)"""
        self.nfe += evaluations(self.denoiser)
        return self.denoiser(x_t, torch.full((1,), t, dtype=torch.float32, device=x_t.device).expand(len(x_t))).float()


class Restorer(Sampler):
    """A method that restores a measurement: `observation` holds y, A and sigma_y."""

    needs: type[Operator] = LinearOperator  # the least an operator must be
    network = "any prior"
    knows_noise = False  # whether sigma_y is used
    internal: frozenset[str] = frozenset()  # arguments that are for programs, not for a person to choose

    def __init__(self, denoiser: Denoiser, observation: Observation):
        super().__init__(denoiser)
        if not isinstance(observation.operator, self.needs):
            raise ValueError(
                f"{type(self).__name__} {NEEDS[self.needs]}, which {type(observation.operator).__name__} is not; "
                f"choose another method or operator"
            )
        self.observation, self.operator = observation, observation.operator
        self.y, self.sigma_y = observation.y, observation.sigma_y


NEEDS = {
    Inpainting: "inpaints: it needs an operator of known pixels",
    LinearOperator: "needs a linear operator with a pseudo-inverse",
    SpectralOperator: "needs an operator with a singular value decomposition",
}

LOOK = 16  # moves between two looks at whether x_t is finite
Callback = Callable[[int, float, Tensor], "Tensor | None"]


def sample(sampler: Sampler, z: Tensor, times: Sequence[float], rng: Rng, callback: Callback | None = None) -> Tensor:
    """Walk from noise z (B, C, H, W) along `times` (first 1, last 0) and return x0.

    `callback(i, s, x_s)` is called after move i; a tensor that it returns replaces x_s. It must raise to stop.
    Raises FloatingPointError naming the first move after which x_s was not finite.
    """
    x_t = sampler.start(z, times[0])
    moves = len(times) - 1
    broken = torch.full((), moves, device=z.device)  # first move that failed; looked at now and then, as looking waits
    for i, (t, s) in enumerate(pairwise(times)):
        x_t = sampler.step(x_t, t, s, rng) if s < t else sampler.travel(x_t, t, s, rng)
        if callback is not None:
            changed = callback(i, s, x_t)
            x_t = x_t if changed is None else changed
        broken = torch.where(x_t.isfinite().all(), broken, broken.clamp(max=i))
        if (i + 1) % LOOK == 0 or i + 1 == moves:
            _stop_if(broken, sampler, times)
    return x_t


def _stop_if(broken: Tensor, sampler: Sampler, times: Sequence[float]) -> None:
    """Raise FloatingPointError if a move was broken."""
    if (i := int(broken)) < len(times) - 1:
        raise FloatingPointError(
            f"{type(sampler).__name__}: x_t is not finite after move {i + 1} of {len(times) - 1} (t {times[i]:.4g} -> "
            f"{times[i + 1]:.4g}); the network's weights or the method's settings are unfit"
        )
