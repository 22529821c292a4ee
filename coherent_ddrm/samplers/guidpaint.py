"""GuidPaint, https://arxiv.org/abs/2507.21627: a guided stochastic stage, then a deterministic one for what is chosen.

t > switch:   x0_hat = project(guided(x_t, t), y);  x_s = alpha_s x0_hat + sigma_s z           stochastic, guided
t <= switch:  x0_hat = project(plain(x_t, t), y);   x_s = alpha_s x0_hat + sigma_s eps         DDIM, eta = 0

with eps = (x_t - alpha_t x0_hat) / sigma_t. What the picture shows is decided in the first stage, so candidates can be
looked at, and chosen from, at the switch:

    draft = candidates_at_switch(GuidPaint(guided, observation, plain), z, times, rng)      # draft.previews
    x0 = refine(GuidPaint(guided_2, observation_2, plain_2), draft.choose([1, 3]))          # of rows 1 and 3

The authors walk 250 steps and switch at step 100. They fit x_t to y by CoPaint's descent; x0_hat is projected here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coherent_ddrm.denoiser import Denoiser, evaluations
from coherent_ddrm.operators import Inpainting, Observation
from coherent_ddrm.rng import normal
from coherent_ddrm.samplers.heun import ode_step
from coherent_ddrm.samplers.loop import Callback, Restorer, Rng, sample


class GuidPaint(Restorer):
    """Guided while the picture is decided, plain while it is worked out.

    Args:
        denoiser: guided, for the first stage.
        plain: for the second stage; `denoiser` unless given.
        switch: the time at which the second stage begins.
        clean: known pixels are kept at time 0, as denoisers want it that are conditioned on them (see Coherent).
    """

    internal = frozenset({"plain"})
    default_steps = 250

    def __init__(
        self,
        denoiser: Denoiser,
        observation: Observation,
        plain: Denoiser | None = None,
        switch: float = 0.4,
        clean: bool = False,
    ):
        super().__init__(denoiser, observation)
        if clean and not isinstance(self.operator, Inpainting):
            raise ValueError(f"clean=True keeps known pixels, but {type(self.operator).__name__} has none")
        self.plain = denoiser if plain is None else plain
        self.switch, self.clean = switch, clean

    def start(self, z: Tensor, t: float) -> Tensor:
        return self._keep(z)

    def step(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        levels = (*self.alpha_sigma(t, x_t), *self.alpha_sigma(s, x_t))
        x0_hat = self.operator.project(self.predict(x_t, t), self.y)
        if t <= self.switch:
            return self._keep(ode_step(x_t, x0_hat, *levels))
        *_, alpha_s, sigma_s = levels
        return self._keep(alpha_s * x0_hat + sigma_s * normal(x_t, rng))

    def travel(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        return self._keep(super().travel(x_t, t, s, rng))

    def predict(self, x_t: Tensor, t: float) -> Tensor:
        """x0_hat of the guided denoiser before the switch, of the plain one from there on."""
        denoiser = self.denoiser if t > self.switch else self.plain
        self.nfe += evaluations(denoiser)
        return denoiser(x_t, torch.full((1,), t, dtype=torch.float32, device=x_t.device).expand(len(x_t))).float()

    def _keep(self, x: Tensor) -> Tensor:
        return self.operator.project(x, self.y) if self.clean else x


@dataclass
class Candidates:
    """Pictures on their way, at the switch."""

    x_t: Tensor  # (K, C, H, W) at times[0]
    previews: Tensor  # (K, C, H, W), x0_hat of the plain denoiser
    times: list[float]  # still to be walked

    def choose(self, rows: Sequence[int]) -> Candidates:
        """Those candidates alone."""
        rows = list(rows)
        return Candidates(self.x_t[rows], self.previews[rows], self.times)


def candidates_at_switch(
    sampler: GuidPaint, z: Tensor, times: Sequence[float], rng: Rng, callback: Callback | None = None
) -> Candidates:
    """The first stage from noise z (K, C, H, W), a candidate per row, with one evaluation more for the previews.

    `times` is the whole grid; the first of them that is not above `sampler.switch` is where the candidates stay.
    """
    first = next(i for i, t in enumerate(times) if t <= sampler.switch)
    x_t = sample(sampler, z, times[: first + 1], rng, callback)
    left = list(times[first:])
    previews = sampler.operator.project(sampler.predict(x_t, left[0]), sampler.y) if left[0] > 0 else x_t
    return Candidates(x_t, previews, left)


def refine(sampler: GuidPaint, candidates: Candidates, callback: Callback | None = None) -> Tensor:
    """The second stage, deterministic, of candidates -> x0. All of them, refined, are what `sample` makes.

    `sampler` is made for the rows that were chosen: its observation, and denoisers that hold anything per row.
    """
    return sample(sampler, candidates.x_t, candidates.times, (), callback)
