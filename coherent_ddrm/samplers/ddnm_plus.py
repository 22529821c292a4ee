"""DDNM+, for a noisy measurement, https://arxiv.org/abs/2212.00490 (section 3.3, appendix I), any (alpha_t, sigma_t).

In the coordinates of V, with ȳ = S⁺ Uᵀ y, a measurement that is better than x_s is taken whole, a worse one in part:
x̂0 = x0_hat - V Lambda (Vᵀ x0_hat - ȳ),  Lambda_i = 1 if sigma_s S_i >= alpha_s sigma_y,
                                           else sigma_s S_i sqrt(1 - eta²) / (alpha_s sigma_y)
x_s = alpha_s x̂0 + noise;  noise_i = sqrt(sigma_s² - (alpha_s sigma_y / S_i)²) z in the first case, eta sigma_s z in the
second, sigma_s (eta z + sqrt(1 - eta²) eps) in the null space: with the noise of y, sigma_s² in all.

Time travel draws x_s anew by the forward chain from x_t, or ("marginal") from the last projected x̂0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coherent_ddrm.denoiser import Denoiser, eps_from_x0
from coherent_ddrm.operators import Observation, SpectralOperator
from coherent_ddrm.operators.base import inverse
from coherent_ddrm.rng import normal
from coherent_ddrm.samplers.loop import Restorer, Rng
from coherent_ddrm.schedule import time_grid, travel_path


class DDNMPlus(Restorer):
    """Zero-shot restoration that knows how noisy each coordinate of the measurement is.

    Args:
        eta: share of fresh noise.
        length, repeats: every `length` steps go back as many, `repeats` passes in all.
        renoise: "chain" or "marginal", see above.
    """

    needs = SpectralOperator
    knows_noise = True
    default_steps = 100

    def __init__(
        self,
        denoiser: Denoiser,
        observation: Observation,
        eta: float = 0.85,
        length: int = 10,
        repeats: int = 1,
        renoise: str = "chain",
    ):
        super().__init__(denoiser, observation)
        if renoise not in ("chain", "marginal"):
            raise ValueError(f"renoise is {renoise!r}: choose chain or marginal")
        self.eta, self.length, self.repeats, self.renoise = eta, length, repeats, renoise
        self.S = self.operator.S.to(self.y.device)
        self.y_bar = inverse(self.S) * self.operator.Ut(self.y)
        self.error = self.sigma_y * inverse(self.S)  # standard deviation of ȳ, 0 where nothing was measured
        self.x0_hat: Tensor | None = None

    def times(self, steps: int, shift: float = 1.0) -> list[float]:
        return travel_path(time_grid(steps, shift), self.length, self.repeats, window=(0, 1))

    def step(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        alpha_t, sigma_t = self.alpha_sigma(t, x_t)
        alpha_s, sigma_s = self.alpha_sigma(s, x_t)
        V, Vt, carried = self.operator.V, self.operator.Vt, (1 - self.eta**2) ** 0.5
        x0_t, z = self.predict(x_t, t), normal(x_t, rng)
        eps = eps_from_x0(x_t, x0_t, alpha_t, sigma_t)
        if self.sigma_y == 0:
            self.x0_hat, level = self.operator.project(x0_t, self.y), sigma_s
        else:
            precise = sigma_s * self.S >= alpha_s * self.sigma_y
            share = sigma_s * self.S * carried / (alpha_s * self.sigma_y)
            trust = torch.where(precise, torch.ones_like(share), share)
            self.x0_hat = x0_t - V(trust * (Vt(x0_t) - self.y_bar))
            spread = (sigma_s**2 - (alpha_s * self.error) ** 2).clamp(min=0).sqrt()
            level = torch.where(precise, spread, self.eta * sigma_s)
        free = sigma_s * (self.eta * z + carried * eps)
        return alpha_s * self.x0_hat + self.operator.replace(free, level * Vt(z))

    def travel(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        if self.renoise == "chain":
            return super().travel(x_t, t, s, rng)
        alpha_s, sigma_s = self.alpha_sigma(s, x_t)
        return alpha_s * self.x0_hat + sigma_s * normal(x_t, rng)
