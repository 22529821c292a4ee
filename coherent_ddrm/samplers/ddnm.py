"""DDNM, https://arxiv.org/abs/2212.00490, Algorithm 1: project every prediction onto A x = y.

x0_hat = x0|t - pinv(A x0|t - y);  x_s = alpha_s x0_hat + sigma_s (eta z + sqrt(1 - eta²) eps), eta = 0.85, where eps
comes from the unprojected x0|t. The last step (sigma_s = 0) returns x0_hat, so A x = y holds, up to rounding.
"""

from __future__ import annotations

from torch import Tensor

from coherent_ddrm.denoiser import Denoiser, eps_from_x0
from coherent_ddrm.operators import Observation
from coherent_ddrm.samplers.ddim import renoise
from coherent_ddrm.samplers.loop import Restorer, Rng


class DDNM(Restorer):
    """Zero-shot restoration with an unconditional prior and any pair (A, pinv); takes y as free of noise."""

    default_steps = 100

    def __init__(self, denoiser: Denoiser, observation: Observation, eta: float = 0.85):
        super().__init__(denoiser, observation)
        self.eta = eta

    def step(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        alpha_t, sigma_t = self.alpha_sigma(t, x_t)
        alpha_s, sigma_s = self.alpha_sigma(s, x_t)
        x0_t = self.predict(x_t, t)
        eps = eps_from_x0(x_t, x0_t, alpha_t, sigma_t)
        x0_hat = self.operator.project(x0_t, self.y)
        return renoise(x0_hat, eps, alpha_s, sigma_s, self.eta, rng)
