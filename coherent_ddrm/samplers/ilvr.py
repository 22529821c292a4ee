"""ILVR, https://arxiv.org/abs/2108.02938 (Algorithm 1), for any linear A.

x' ~ q(x_s | x_t, x0_hat);  x_s = x' + A⁺(y_s - A x') with y_s = A q(x_s | y) = alpha_s y + sigma_s A z.
With average pooling A⁺ A is the paper's low-pass filter.
"""

from __future__ import annotations

from torch import Tensor

from coherent_ddrm.rng import normal
from coherent_ddrm.samplers.ddpm import posterior
from coherent_ddrm.samplers.loop import Restorer, Rng


class ILVR(Restorer):
    """The measurement is noised to the level of x_s and replaces what x_s has in its place."""

    default_steps = 250

    def step(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        alpha_s, sigma_s = self.alpha_sigma(s, x_t)
        x_s = posterior(x_t, self.predict(x_t, t), *self.alpha_sigma(t, x_t), alpha_s, sigma_s, rng)
        y_s = alpha_s * self.y + sigma_s * self.operator.A(normal(x_t, rng))
        return self.operator.project(x_s, y_s)
