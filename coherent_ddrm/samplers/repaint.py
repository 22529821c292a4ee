"""RePaint, https://arxiv.org/abs/2201.09865 (Algorithm 1), for any (alpha_t, sigma_t).

On the known: x_s = alpha_s y + sigma_s z.  On the hole: x_s ~ q(x_s | x_t, x0_hat), DDPM's step.
Resampling: time runs along a fixed path that jumps back `jump_length` single steps, so that the two halves meet again.
"""

from __future__ import annotations

from torch import Tensor

from coherent_ddrm.denoiser import Denoiser
from coherent_ddrm.operators import Inpainting, Observation
from coherent_ddrm.rng import normal
from coherent_ddrm.samplers.ddpm import posterior
from coherent_ddrm.samplers.loop import Restorer, Rng
from coherent_ddrm.schedule import time_grid


def repaint_levels(steps: int, jump_length: int, jump_samples: int) -> list[int]:
    """The levels visited, from `steps` (noise) down to 0 (data), each pair one apart (appendix of the paper).

    At every `jump_length`-th level, go up that many, `jump_samples` - 1 times. 250 steps, 10, 10: 4,570 moves, of which
    the 2,410 downward ones cost an evaluation.
    """
    if min(jump_length, jump_samples) < 1:
        raise ValueError(f"jump_length {jump_length} and jump_samples {jump_samples} must be at least 1")
    jumps = dict.fromkeys(range(0, steps - jump_length, jump_length), jump_samples - 1)
    t, path = steps, []
    while t >= 1:
        t -= 1
        path.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(jump_length):
                t += 1
                path.append(t)
    return [level + 1 for level in path] + [0]


class RePaint(Restorer):
    """Inpainting with an unconditional prior and much resampling.

    Args:
        jump_length, jump_samples: see `repaint_levels`.
        clip: x0_hat is clipped to [-1, 1], as the authors do.
    """

    needs = Inpainting
    default_steps = 250

    def __init__(
        self,
        denoiser: Denoiser,
        observation: Observation,
        jump_length: int = 10,
        jump_samples: int = 10,
        clip: bool = True,
    ):
        super().__init__(denoiser, observation)
        self.jump_length, self.jump_samples, self.clip = jump_length, jump_samples, clip

    def times(self, steps: int, shift: float = 1.0) -> list[float]:
        grid = time_grid(steps, shift)[::-1]
        return [grid[level] for level in repaint_levels(steps, self.jump_length, self.jump_samples)]

    def step(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        alpha_s, sigma_s = self.alpha_sigma(s, x_t)
        x0_hat = self.predict(x_t, t)
        x0_hat = x0_hat.clamp(-1, 1) if self.clip else x0_hat
        hole = posterior(x_t, x0_hat, *self.alpha_sigma(t, x_t), alpha_s, sigma_s, rng)
        known = alpha_s * self.y + sigma_s * normal(x_t, rng)
        return self.operator.project(hole, known)
