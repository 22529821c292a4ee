"""The sampler contract and the only loop over time in the library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from coherent_ddrm.denoiser import Denoiser
from coherent_ddrm.rng import normal

Rng = Sequence[torch.Generator]


class Sampler:
    """One method: `step` goes from t to s < t, `travel` goes back to s > t. Counts network evaluations in `nfe`."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser
        self.schedule = denoiser.schedule
        self.nfe = 0

    def alpha_sigma(self, t: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t) as 0-dim tensors on the device of `like`, in fp32."""
        return self.schedule(torch.tensor(t, dtype=torch.float32, device=like.device))

    def predict(self, x_t: Tensor, t: float) -> Tensor:
        """x0_hat = denoiser(x_t, t), one network evaluation. (B, C, H, W)"""
        self.nfe += 1
        return self.denoiser(x_t, torch.full((1,), t, dtype=torch.float32, device=x_t.device).expand(len(x_t)))

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


Callback = Callable[[int, float, Tensor], "Tensor | None"]


def sample(sampler: Sampler, x_1: Tensor, times: Sequence[float], rng: Rng, callback: Callback | None = None) -> Tensor:
    """Walk x_1 (B, C, H, W) along `times` (first 1, last 0) and return x0.

    `callback(i, s, x_s)` is called after move i; a tensor that it returns replaces x_s. It must raise to stop.
    """
    x_t = x_1
    for i, (t, s) in enumerate(pairwise(times)):
        x_t = sampler.step(x_t, t, s, rng) if s < t else sampler.travel(x_t, t, s, rng)
        if callback is not None:
            changed = callback(i, s, x_t)
            x_t = x_t if changed is None else changed
    return x_t
