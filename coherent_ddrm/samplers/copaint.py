"""CoPaint, https://arxiv.org/abs/2304.03322 (Algorithm 1; CoPaint-TT: Algorithm 2), for any (alpha_t, sigma_t).

Before each DDIM step (eta = 0), `gradient_steps` descents of x_t, each picture by itself, on
f(x) = |y - A(x0_hat(x))|² + weight |x - x_t|².  The rate, 0.02 alpha_t 1.012^i, and the weight, 1e-4 1.01^i, grow with
i = 250 (1 - t), the step the authors would be at. A step that does not lower f is tried again with 0.8 of its rate, at
most `tries` times, and not taken if it never does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coherent_ddrm.denoiser import Denoiser
from coherent_ddrm.operators import Observation, Operator
from coherent_ddrm.samplers.heun import ode_step
from coherent_ddrm.samplers.loop import Restorer, Rng
from coherent_ddrm.schedule import expand, time_grid, travel_path


class CoPaint(Restorer):
    """Coherent inpainting by optimisation through one-step predictions; any differentiable A.

    Args:
        gradient_steps, rate, weight, shrink, tries: see above.
        length, repeats: time travel over the whole way, CoPaint-TT with 10 and 2.
    """

    needs = Operator
    default_steps = 250

    def __init__(
        self,
        denoiser: Denoiser,
        observation: Observation,
        gradient_steps: int = 2,
        rate: float = 0.02,
        weight: float = 1e-4,
        shrink: float = 0.8,
        tries: int = 10,
        length: int = 10,
        repeats: int = 1,
    ):
        super().__init__(denoiser, observation)
        self.gradient_steps, self.rate, self.weight = gradient_steps, rate, weight
        self.shrink, self.tries, self.length, self.repeats = shrink, tries, length, repeats

    def times(self, steps: int, shift: float = 1.0) -> list[float]:
        return travel_path(time_grid(steps, shift), self.length, self.repeats, window=(0, 1))

    def step(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        i = 250 * (1 - t)
        alpha_t, sigma_t = self.alpha_sigma(t, x_t)
        x, weight = x_t, self.weight * 1.01**i
        rate = torch.ones(len(x_t), device=x_t.device) * self.rate * 1.012**i * alpha_t  # (B,)
        for _ in range(self.gradient_steps):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                objective, _ = self._objective(x, t, x_t, weight)
                (gradient,) = torch.autograd.grad(objective.sum(), x)
            x, rate = self._descend(x.detach(), gradient, objective.detach(), rate, t, x_t, weight)
        return ode_step(x, self.predict(x, t), alpha_t, sigma_t, *self.alpha_sigma(s, x_t))

    def _objective(self, x: Tensor, t: float, x_t: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        """f, (B,), and x0_hat."""
        x0_hat = self.predict(x, t)
        misfit = (self.y - self.operator.A(x0_hat)).square().flatten(1).sum(dim=1)
        return misfit + weight * (x - x_t).square().flatten(1).sum(dim=1), x0_hat

    def _descend(
        self, x: Tensor, gradient: Tensor, before: Tensor, rate: Tensor, t: float, x_t: Tensor, weight: float
    ) -> tuple[Tensor, Tensor]:
        """Backtracking line search, per sample: the first trial that is no worse -> x, rate."""
        settled, result = torch.zeros_like(rate, dtype=torch.bool), x
        for _ in range(self.tries):
            trial = x - expand(rate, x) * gradient
            after, _ = self._objective(trial, t, x_t, weight)
            better = (after <= before) & ~settled
            result = torch.where(expand(better, x), trial, result)
            settled = settled | better
            rate = torch.where(settled, rate, self.shrink * rate)
            if bool(settled.all()):
                break
        return result, rate


class CoPaintTT(CoPaint):
    """CoPaint with time travel: every 10 steps go back 10, two passes."""

    def __init__(self, denoiser: Denoiser, observation: Observation, repeats: int = 2, **options: float):
        super().__init__(denoiser, observation, repeats=repeats, **options)
