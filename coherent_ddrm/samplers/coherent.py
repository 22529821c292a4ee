"""Coherent sampling, this project's method: known pixels live at t = 0, only the hole is walked through time.

On the hole:   x0_hat = project(denoiser(x_t, t), y);  x_s = alpha_s x0_hat + sigma_s (eta z + sqrt(1 - eta²) eps)
On the known:  x_s = y, at every s.

The denoiser knows that known pixels are clean (per-token time, as RAD, https://arxiv.org/abs/2412.09191), so it
conditions on them instead of being corrected by them, and its known tokens can be computed once (context cache).
"""

from __future__ import annotations

from torch import Tensor

from coherent_ddrm.denoiser import Denoiser, eps_from_x0
from coherent_ddrm.operators import Inpainting, Observation
from coherent_ddrm.samplers.ddim import renoise
from coherent_ddrm.samplers.loop import Restorer, Rng


class Coherent(Restorer):
    """Inpainting with a denoiser that takes clean known pixels.

    Args:
        denoiser: conditioned on the hole (and the plan) beforehand.
        observation: the picture and Inpainting(hole); hole pixels of y are not read.
        eta: 1 draws all noise anew at each step, so that what an earlier step got wrong is forgotten; 0 draws none,
            which spreads candidates more and carries the network's errors along.
    """

    needs = Inpainting
    network = "our network, which is told what is known"
    default_steps = 20

    def __init__(self, denoiser: Denoiser, observation: Observation, eta: float = 1.0):
        super().__init__(denoiser, observation)
        self.eta = eta

    def start(self, z: Tensor, t: float) -> Tensor:
        return self.operator.project(z, self.y)

    def step(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        alpha_t, sigma_t = self.alpha_sigma(t, x_t)
        alpha_s, sigma_s = self.alpha_sigma(s, x_t)
        x0_hat = self.operator.project(self.predict(x_t, t), self.y)
        eps = eps_from_x0(x_t, x0_hat, alpha_t, sigma_t)
        return self.operator.project(renoise(x0_hat, eps, alpha_s, sigma_s, self.eta, rng), self.y)

    def travel(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        return self.operator.project(super().travel(x_t, t, s, rng), self.y)
