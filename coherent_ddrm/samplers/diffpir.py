"""DiffPIR, https://arxiv.org/abs/2305.08995 (Algorithm 1), for any (alpha_t, sigma_t).

x̂0 = argmin_x |y - A x|² + rho |x - x0_hat|²,  rho = strength sigma_y² alpha_t² / sigma_t²;  in the coordinates of V
x̂0 = x0_hat + V (S² / (S² + rho)) (ȳ - Vᵀ x0_hat).  Then eps from x̂0, and
x_s = alpha_s x̂0 + sigma_s (sqrt(1 - zeta) eps + sqrt(zeta) z).
"""

from __future__ import annotations

from torch import Tensor

from coherent_ddrm.denoiser import Denoiser, eps_from_x0
from coherent_ddrm.operators import Observation, SpectralOperator
from coherent_ddrm.operators.base import inverse
from coherent_ddrm.samplers.ddim import renoise
from coherent_ddrm.samplers.loop import Restorer, Rng


class DiffPIR(Restorer):
    """Half-quadratic splitting: a proximal step on the data, then noise again.

    Args:
        strength: the paper's lambda, weight of the prior against the data.
        zeta: share of fresh noise in the variance.
    """

    needs = SpectralOperator
    knows_noise = True
    default_steps = 100

    def __init__(self, denoiser: Denoiser, observation: Observation, strength: float = 7.0, zeta: float = 0.3):
        super().__init__(denoiser, observation)
        self.strength, self.zeta = strength, zeta
        self.S = self.operator.S.to(self.y.device)
        self.y_bar = inverse(self.S) * self.operator.Ut(self.y)

    def step(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        alpha_t, sigma_t = self.alpha_sigma(t, x_t)
        alpha_s, sigma_s = self.alpha_sigma(s, x_t)
        x0_t = self.predict(x_t, t)
        if self.sigma_y == 0:
            x0_hat = self.operator.project(x0_t, self.y)
        else:
            rho = self.strength * (self.sigma_y * alpha_t / sigma_t) ** 2
            gain = self.S**2 / (self.S**2 + rho).clamp(min=1e-12)
            x0_hat = x0_t + self.operator.V(gain * (self.y_bar - self.operator.Vt(x0_t)))
        eps = eps_from_x0(x_t, x0_hat, alpha_t, sigma_t)
        return renoise(x0_hat, eps, alpha_s, sigma_s, self.zeta**0.5, rng)
