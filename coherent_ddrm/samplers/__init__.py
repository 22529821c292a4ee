"""Samplers: one method per file, `step` in the letters of its paper; `loop.sample` walks the times."""

from coherent_ddrm.samplers.coherent import Coherent
from coherent_ddrm.samplers.ddim import DDIM
from coherent_ddrm.samplers.ddnm import DDNM
from coherent_ddrm.samplers.loop import Restorer, Sampler, sample

__all__ = ["DDIM", "DDNM", "Coherent", "Restorer", "Sampler", "sample"]
