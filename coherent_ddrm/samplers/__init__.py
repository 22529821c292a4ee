"""Samplers: one method per file, `step` in the letters of its paper; `loop.sample` walks the times."""

from coherent_ddrm.samplers.coherent import Coherent
from coherent_ddrm.samplers.copaint import CoPaint, CoPaintTT
from coherent_ddrm.samplers.ddim import DDIM
from coherent_ddrm.samplers.ddnm import DDNM
from coherent_ddrm.samplers.ddnm_plus import DDNMPlus
from coherent_ddrm.samplers.ddpm import DDPM
from coherent_ddrm.samplers.ddrm import DDRM
from coherent_ddrm.samplers.diffpir import DiffPIR
from coherent_ddrm.samplers.dpmpp import DPMPP
from coherent_ddrm.samplers.dps import DPS
from coherent_ddrm.samplers.guidpaint import GuidPaint
from coherent_ddrm.samplers.heun import Heun
from coherent_ddrm.samplers.hybrid import Hybrid
from coherent_ddrm.samplers.ilvr import ILVR
from coherent_ddrm.samplers.loop import Restorer, Sampler, sample
from coherent_ddrm.samplers.pigdm import PiGDM
from coherent_ddrm.samplers.rad import RAD
from coherent_ddrm.samplers.repaint import RePaint

PLAIN: dict[str, type[Sampler]] = {"ddim": DDIM, "ddpm": DDPM, "heun": Heun, "dpmpp": DPMPP}
RESTORERS: dict[str, type[Restorer]] = {
    "coherent": Coherent,
    "ddrm": DDRM,
    "ddnm": DDNM,
    "ddnm_plus": DDNMPlus,
    "repaint": RePaint,
    "hybrid": Hybrid,
    "copaint": CoPaint,
    "copaint_tt": CoPaintTT,
    "rad": RAD,
    "guidpaint": GuidPaint,
    "dps": DPS,
    "pigdm": PiGDM,
    "diffpir": DiffPIR,
    "ilvr": ILVR,
}

__all__ = [
    "DDIM",
    "DDNM",
    "DDPM",
    "DDRM",
    "DPMPP",
    "DPS",
    "ILVR",
    "PLAIN",
    "RAD",
    "RESTORERS",
    "CoPaint",
    "CoPaintTT",
    "Coherent",
    "DDNMPlus",
    "DiffPIR",
    "GuidPaint",
    "Heun",
    "Hybrid",
    "PiGDM",
    "RePaint",
    "Restorer",
    "Sampler",
    "sample",
]
