"""ΠGDM, pseudo-inverse guided diffusion, https://openreview.net/forum?id=9_gsMA8MRKQ (Algorithm 1).

For any (alpha_t, sigma_t). p(x0 | x_t) is taken as N(x0_hat, r² I), r² = sigma_t² / (alpha_t² + sigma_t²). Then r²
times the gradient of log p(y | x_t) is g = (∂x0_hat / ∂x_t)ᵀ r² Aᵀ (r² A Aᵀ + sigma_y²)⁻¹ (y - A x0_hat), and
x_s = alpha_s x0_hat + sigma_s (eta z + sqrt(1 - eta²) eps) + alpha_t g.
At sigma_y = 0 the vector in front of the Jacobian is A⁺(y - A x0_hat).
"""

from __future__ import annotations

import torch
from torch import Tensor

from coherent_ddrm.denoiser import Denoiser, eps_from_x0
from coherent_ddrm.operators import Observation, SpectralOperator
from coherent_ddrm.operators.base import inverse
from coherent_ddrm.samplers.ddim import renoise
from coherent_ddrm.samplers.loop import Restorer, Rng


class PiGDM(Restorer):
    """DDIM pulled towards the measurement by the gradient through the network, scaled by how sure x0_hat is."""

    needs = SpectralOperator
    knows_noise = True
    default_steps = 100

    def __init__(self, denoiser: Denoiser, observation: Observation, eta: float = 1.0):
        super().__init__(denoiser, observation)
        self.eta = eta
        self.S = self.operator.S.to(self.y.device)
        self.y_bar = inverse(self.S) * self.operator.Ut(self.y)

    def step(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        alpha_t, sigma_t = self.alpha_sigma(t, x_t)
        alpha_s, sigma_s = self.alpha_sigma(s, x_t)
        r2 = sigma_t**2 / (alpha_t**2 + sigma_t**2)
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            x0_hat = self.predict(x_t, t)
            gain = r2 * self.S**2 * inverse(r2 * self.S**2 + self.sigma_y**2)
            missing = self.operator.V(gain * (self.y_bar - self.operator.Vt(x0_hat.detach())))
            (g,) = torch.autograd.grad((missing * x0_hat).sum(), x_t)
        x_t, x0_hat = x_t.detach(), x0_hat.detach()
        eps = eps_from_x0(x_t, x0_hat, alpha_t, sigma_t)
        return renoise(x0_hat, eps, alpha_s, sigma_s, self.eta, rng) + alpha_t * g
