"""RAD, region-aware diffusion, https://arxiv.org/abs/2412.09191: every pixel has its own time.

m in [0, 1] says how far a pixel is to be noised in phase 1 (1 in a hole, 0 on known pixels); phase 2 noises the rest.
With ā = alpha² / (alpha² + sigma²) of the schedule at u, and 1 - nu = ā at 1:
phase 1:  ā(m, u) = (1 - nu m)^(log ā_u / log(1 - nu))
phase 2:  ā(m, u) = (1 - nu m) ((1 - nu) / (1 - nu m))^(log ā_u / log(1 - nu))
A pixel's time is the one at which the schedule has this ā. Steps are DDIM's (eta = 0), pixel by pixel. Restoring walks
phase 1 only: known pixels stay clean, the hole goes from noise to data. Both phases make a picture from noise alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coherent_ddrm.denoiser import Denoiser, takes_pixel_times
from coherent_ddrm.operators import Inpainting, Observation
from coherent_ddrm.samplers.loop import Restorer, Rng
from coherent_ddrm.schedule import Schedule

FLOOR = 1e-5  # of ā, so that its logarithm is finite for schedules that end in pure noise


def log_signal(schedule: Schedule, t: Tensor) -> Tensor:
    """log ā at t, any shape."""
    alpha_t, sigma_t = schedule(t)
    return (alpha_t**2 / (alpha_t**2 + sigma_t**2)).clamp(min=FLOOR).log()


def pixel_time(schedule: Schedule, m: Tensor, u: float, phase: int = 1) -> Tensor:
    """Each pixel's time in [0, 1]. m: (B, 1, H, W) in [0, 1]; u: the phase's own time in [0, 1] -> like m."""
    grid = torch.linspace(0, 1, 2001, device=m.device)
    table = log_signal(schedule, grid)  # falls from 0
    last = table[-1]
    progress = log_signal(schedule, torch.tensor(u, device=m.device)) / last  # 0 ... 1
    end = torch.log1p(m * torch.expm1(last))  # log(1 - nu m), where phase 1 ends and phase 2 begins
    target = end * progress if phase == 1 else end + (last - end) * progress
    right = torch.searchsorted(-table, -target.contiguous()).clamp(1, len(grid) - 1)
    share = (table[right - 1] - target) / (table[right - 1] - table[right]).clamp(min=1e-12)
    time = (grid[right - 1] + share.clamp(0, 1) / (len(grid) - 1)).clamp(0, 1)
    time = torch.where(target <= last, torch.ones_like(time), time)
    whole, none = (u, 0.0) if phase == 1 else (1.0, u)  # exactly so for m = 1 and m = 0
    return torch.where(m >= 1, torch.full_like(m, whole), torch.where(m <= 0, torch.full_like(m, none), time))


class RAD(Restorer):
    """Inpainting with a network that takes a time per pixel.

    Args:
        denoiser: (x_t, t) -> x0_hat with t (B, 1, H, W); says so by `per_pixel_time = True`.
        amount: m, (B, 1, H, W) in [0, 1]; the hole unless given.
        phases: 1 restores; 2 makes everything from noise, known pixels first, without looking at y.
    """

    needs = Inpainting
    network = "a network that takes a time per pixel, as ours does"
    internal = frozenset({"amount", "phases"})
    default_steps = 100

    def __init__(self, denoiser: Denoiser, observation: Observation, amount: Tensor | None = None, phases: int = 1):
        super().__init__(denoiser, observation)
        if not takes_pixel_times(denoiser):
            raise ValueError(
                f"RAD gives every pixel its own time, but {type(denoiser).__name__} takes one time per picture; use a "
                f"network with per_pixel_time, such as DiT"
            )
        if phases not in (1, 2):
            raise ValueError(f"phases is {phases}: choose 1 (restore) or 2 (make everything from noise)")
        self.amount = self.operator.hole.float() if amount is None else amount
        self.phases = phases

    def start(self, z: Tensor, t: float) -> Tensor:
        if self.phases == 2:
            return z
        alpha_t, sigma_t = self.schedule(self._time(t))
        return self._keep(alpha_t * self.y + sigma_t * z)

    def step(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        time_t, time_s = self._time(t), self._time(s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.schedule(time_t), self.schedule(time_s)  # (B, 1, H, W) each
        self.nfe += 1
        x0_hat = self._keep(self.denoiser(x_t, time_t).float())
        eps = torch.where(sigma_t > 0, (x_t - alpha_t * x0_hat) / sigma_t.clamp(min=1e-8), torch.zeros_like(x_t))
        return self._keep(alpha_s * x0_hat + sigma_s * eps)

    def travel(self, x_t: Tensor, t: float, s: float, rng: Rng) -> Tensor:
        raise ValueError("RAD walks its times once; leave time travel out")

    def _time(self, t: float) -> Tensor:
        """(B, 1, H, W); with two phases the first half of [0, 1] is phase 1."""
        if self.phases == 1:
            return pixel_time(self.schedule, self.amount, t)
        phase = 1 if t <= 0.5 else 2
        return pixel_time(self.schedule, self.amount, 2 * t - (phase - 1), phase)

    def _keep(self, x: Tensor) -> Tensor:
        """x with the clean pixels of y where nothing is repainted."""
        return torch.where(self.amount > 0, x, self.y) if self.phases == 1 else x
