"""Heun's second-order method on the probability-flow equation (EDM, https://arxiv.org/abs/2206.00364, Algorithm 1).

Written on the form in which x0_hat alone is integrated, which is finite at alpha_t = 0:
x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) x0_hat, then once more with the mean of
x0_hat(x_t, t) and x0_hat(x_s, s). The last step, to sigma_s = 0, is not corrected. 2 N - 1 evaluations for N steps.
"""

from __future__ import annotations

from torch import Tensor

from coherent_ddrm.samplers.loop import Rng, Sampler


def ode_step(x_t: Tensor, x0_hat: Tensor, alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    """The probability flow from t to s, exact for a constant x0_hat (DDIM with eta = 0)."""
    ratio = sigma_s / sigma_t
    return ratio * x_t + (alpha_s - alpha_t * ratio) * x0_hat


class Heun(Sampler):
    """Deterministic; the error falls with the square of the step."""

    default_steps = 20

    def step(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        levels = (*self.alpha_sigma(t, x_t), *self.alpha_sigma(s, x_t))
        x0_t = self.predict(x_t, t)
        x_s = ode_step(x_t, x0_t, *levels)
        if s == 0:
            return x_s
        x0_s = self.predict(x_s, s)
        return ode_step(x_t, (x0_t + x0_s) / 2, *levels)
