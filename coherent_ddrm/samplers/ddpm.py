"""DDPM's ancestral sampler, https://arxiv.org/abs/2006.11239 (Equation 7), for any (alpha_t, sigma_t).

x_s ~ q(x_s | x_t, x0_hat). With r = alpha_t / alpha_s and eps = (x_t - alpha_t x0_hat) / sigma_t:
x_s = alpha_s x0_hat + c eps + sqrt(sigma_s² - c²) z,  c = r sigma_s² / sigma_t.
"""

from __future__ import annotations

from torch import Tensor

from coherent_ddrm.denoiser import eps_from_x0
from coherent_ddrm.rng import normal
from coherent_ddrm.samplers.loop import Rng, Sampler


def posterior(
    x_t: Tensor, x0_hat: Tensor, alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor, rng: Rng
) -> Tensor:
    """A draw of q(x_s | x_t, x0_hat), variance sigma_s² (sigma_t² - r² sigma_s²) / sigma_t²."""
    carried = alpha_t * sigma_s**2 / (alpha_s * sigma_t)
    spread = (sigma_s**2 - carried**2).clamp(min=0).sqrt()
    eps = eps_from_x0(x_t, x0_hat, alpha_t, sigma_t)
    return alpha_s * x0_hat + carried * eps + spread * normal(x_t, rng)


class DDPM(Sampler):
    """The unconditional sampler with all of its noise."""

    default_steps = 250

    def step(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        x0_hat = self.predict(x_t, t)
        return posterior(x_t, x0_hat, *self.alpha_sigma(t, x_t), *self.alpha_sigma(s, x_t), rng)
