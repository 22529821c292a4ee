"""DDIM, https://arxiv.org/abs/2010.02502, in the letters x_t = alpha_t x0 + sigma_t z.

x_s = alpha_s x0_hat + sigma_s (eta z + sqrt(1 - eta²) eps). eta = 0 is the deterministic sampler (for flow matching,
the Euler step); eta = 1 replaces all noise. This is DDNM's form of the noise split, not Equation 16's eta.
"""

from __future__ import annotations

from torch import Tensor

from coherent_ddrm.denoiser import Denoiser, eps_from_x0
from coherent_ddrm.rng import normal
from coherent_ddrm.samplers.loop import Rng, Sampler


def renoise(x0_hat: Tensor, eps: Tensor, alpha_s: Tensor, sigma_s: Tensor, eta: float, rng: Rng) -> Tensor:
    """alpha_s x0_hat + sigma_s (eta z + sqrt(1 - eta²) eps); no noise is drawn at eta = 0."""
    if eta == 0:
        return alpha_s * x0_hat + sigma_s * eps
    z = normal(x0_hat, rng)
    return alpha_s * x0_hat + sigma_s * (eta * z + (1 - eta**2) ** 0.5 * eps)


class DDIM(Sampler):
    """The unconditional sampler: x_1 ~ N(0, I) to a sample of the prior."""

    def __init__(self, denoiser: Denoiser, eta: float = 0.0):
        super().__init__(denoiser)
        self.eta = eta

    def step(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        alpha_t, sigma_t = self.alpha_sigma(t, x_t)
        alpha_s, sigma_s = self.alpha_sigma(s, x_t)
        x0_hat = self.predict(x_t, t)
        eps = eps_from_x0(x_t, x0_hat, alpha_t, sigma_t)
        return renoise(x0_hat, eps, alpha_s, sigma_s, self.eta, rng)
