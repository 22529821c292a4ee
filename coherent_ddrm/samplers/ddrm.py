"""DDRM, https://arxiv.org/abs/2201.11793 (Equations 7 and 8), for any (alpha_t, sigma_t).

The paper's variance-exploding x̄ and σ are Vᵀ x_s / alpha_s and sigma_s / alpha_s; here all is multiplied by alpha_s,
so that nothing is divided by it. ȳ = S⁺ Uᵀ y. For each singular value S_i, with x̄0 = Vᵀ x0_hat, z standard normal:

S_i = 0:                          alpha_s x̄0 + sigma_s (sqrt(1 - eta²) eps + eta z)
sigma_s S_i <  alpha_s sigma_y:   alpha_s x̄0 + sigma_s (sqrt(1 - eta²) S_i (ȳ - x̄0) / sigma_y + eta z)
sigma_s S_i >= alpha_s sigma_y:   alpha_s ((1 - eta_b) x̄0 + eta_b ȳ) + sqrt(sigma_s² - (alpha_s eta_b sigma_y / S_i)²) z

>= where the authors' code has >: at sigma_y = 0 the last step, sigma_s = 0, must return y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coherent_ddrm.denoiser import Denoiser, eps_from_x0
from coherent_ddrm.operators import Observation, SpectralOperator
from coherent_ddrm.operators.base import inverse
from coherent_ddrm.rng import normal
from coherent_ddrm.samplers.loop import Restorer, Rng


class DDRM(Restorer):
    """Zero-shot restoration by variational posterior sampling in the spectral space of A.

    Args:
        eta: share of fresh noise where nothing, or too little, was measured.
        eta_b: weight of the measurement where it is better than x_s: 1 takes it as it is.
    """

    needs = SpectralOperator
    knows_noise = True
    default_steps = 20

    def __init__(self, denoiser: Denoiser, observation: Observation, eta: float = 0.85, eta_b: float = 1.0):
        super().__init__(denoiser, observation)
        self.eta, self.eta_b = eta, eta_b
        self.S = self.operator.S.to(self.y.device)
        self.y_bar = inverse(self.S) * self.operator.Ut(self.y)
        self.error = self.sigma_y * inverse(self.S)  # standard deviation of ȳ, 0 where nothing was measured

    def start(self, z: Tensor, t: float) -> Tensor:
        """x̄_1 ~ N(alpha ȳ, sigma² - alpha² sigma_y² / S²) where that is a variance, else N(0, sigma²)."""
        alpha_t, sigma_t = self.alpha_sigma(t, z)
        measured = (self.S * sigma_t > alpha_t * self.sigma_y) & (self.S > 0)
        spread = (sigma_t**2 - (alpha_t * self.error) ** 2).clamp(min=0).sqrt()
        informed = alpha_t * self.y_bar + spread * self.operator.Vt(z)
        return self.operator.replace(sigma_t * z, torch.where(measured, informed, sigma_t * self.operator.Vt(z)))

    def step(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        alpha_t, sigma_t = self.alpha_sigma(t, x_t)
        alpha_s, sigma_s = self.alpha_sigma(s, x_t)
        carried = (1 - self.eta**2) ** 0.5
        x0_hat, z = self.predict(x_t, t), normal(x_t, rng)
        eps = eps_from_x0(x_t, x0_hat, alpha_t, sigma_t)
        free = alpha_s * x0_hat + sigma_s * (carried * eps + self.eta * z)
        x0_bar, z_bar = self.operator.Vt(x0_hat), self.operator.Vt(z)
        spread = (sigma_s**2 - (alpha_s * self.eta_b * self.error) ** 2).clamp(min=0).sqrt()
        precise = alpha_s * ((1 - self.eta_b) * x0_bar + self.eta_b * self.y_bar) + spread * z_bar
        if self.sigma_y == 0:
            return self.operator.replace(free, precise)
        residual = self.S * (self.y_bar - x0_bar) / self.sigma_y
        rough = alpha_s * x0_bar + sigma_s * (carried * residual + self.eta * z_bar)
        return self.operator.replace(free, torch.where(sigma_s * self.S >= alpha_s * self.sigma_y, precise, rough))
