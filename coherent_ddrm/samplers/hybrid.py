"""DDNM, https://arxiv.org/abs/2212.00490 , with a few of RePaint's jumps back, https://arxiv.org/abs/2201.09865 .

A step is DDNM's. The jumps are in the middle of the way, 0.3 to 0.7 of the steps: early nothing is decided yet,
late nothing can be mended any more.
"""

from __future__ import annotations

from coherent_ddrm.denoiser import Denoiser
from coherent_ddrm.operators import Observation
from coherent_ddrm.samplers.ddnm import DDNM
from coherent_ddrm.schedule import time_grid, travel_path


class Hybrid(DDNM):
    """DDNM that comes back to the middle of its way.

    Args:
        eta: share of fresh noise.
        length, repeats: at every `length`-th step of the window go back as many, `repeats` passes in all.
    """

    default_steps = 100

    def __init__(
        self, denoiser: Denoiser, observation: Observation, eta: float = 0.85, length: int = 10, repeats: int = 2
    ):
        super().__init__(denoiser, observation, eta)
        self.length, self.repeats = length, repeats

    def times(self, steps: int, shift: float = 1.0) -> list[float]:
        return travel_path(time_grid(steps, shift), self.length, self.repeats, window=(0.3, 0.7))
