"""DPM-Solver++(2M), https://arxiv.org/abs/2211.01095 (Algorithm 2), for any (alpha_t, sigma_t).

With lambda_t = log(alpha_t / sigma_t), h = lambda_s - lambda_t and r = h_previous / h:
D = (1 + 1 / (2 r)) x0_hat - 1 / (2 r) x0_previous
x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) D
The first step, and the last one to sigma_s = 0, are of first order. One evaluation a step.
"""

from __future__ import annotations

from torch import Tensor

from coherent_ddrm.denoiser import Denoiser
from coherent_ddrm.samplers.heun import ode_step
from coherent_ddrm.samplers.loop import Rng, Sampler


class DPMPP(Sampler):
    """Deterministic, second order, keeps the previous prediction."""

    default_steps = 20

    def __init__(self, denoiser: Denoiser):
        super().__init__(denoiser)
        self.previous: tuple[Tensor, Tensor] | None = None  # x0_hat and lambda of the step before

    def start(self, z: Tensor, t: float) -> Tensor:
        self.previous = None
        return super().start(z, t)

    def step(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        alpha_t, sigma_t = self.alpha_sigma(t, x_t)
        alpha_s, sigma_s = self.alpha_sigma(s, x_t)
        lambda_t, lambda_s = (alpha_t / sigma_t).log(), (alpha_s / sigma_s).log()
        x0_hat = D = self.predict(x_t, t)
        if self.previous is not None and s > 0:
            x0_previous, lambda_previous = self.previous
            inverse_r = (lambda_s - lambda_t) / (lambda_t - lambda_previous)  # 0 after a step from pure noise
            D = x0_hat + inverse_r / 2 * (x0_hat - x0_previous)
        self.previous = (x0_hat, lambda_t)
        return ode_step(x_t, D, alpha_t, sigma_t, alpha_s, sigma_s)

    def travel(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        self.previous = None
        return super().travel(x_t, t, s, rng)
