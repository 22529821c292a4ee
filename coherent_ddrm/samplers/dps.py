"""DPS, diffusion posterior sampling, https://arxiv.org/abs/2209.14687 (Algorithm 1), for any (alpha_t, sigma_t).

x' ~ q(x_s | x_t, x0_hat);  x_s = x' - scale ∇_{x_t} |y - A(x0_hat(x_t))|.  The gradient of the norm is the paper's
step zeta / |y - A x0_hat| on the gradient of the square. A need not be linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coherent_ddrm.denoiser import Denoiser
from coherent_ddrm.operators import Observation, Operator
from coherent_ddrm.samplers.ddpm import posterior
from coherent_ddrm.samplers.loop import Restorer, Rng


class DPS(Restorer):
    """Ancestral sampling pulled towards the measurement by the gradient through the network.

    Args:
        scale: step along the gradient; the paper takes 0.3 to 1 with 1,000 steps.
    """

    needs = Operator
    default_steps = 1000

    def __init__(self, denoiser: Denoiser, observation: Observation, scale: float = 1.0):
        super().__init__(denoiser, observation)
        self.scale = scale

    def step(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            x0_hat = self.predict(x_t, t)
            distance = (self.y - self.operator.A(x0_hat)).flatten(1).norm(dim=1)  # (B,)
            (gradient,) = torch.autograd.grad(distance.sum(), x_t)
        x_t, x0_hat = x_t.detach(), x0_hat.detach()
        x_s = posterior(x_t, x0_hat, *self.alpha_sigma(t, x_t), *self.alpha_sigma(s, x_t), rng)
        return x_s - self.scale * gradient
