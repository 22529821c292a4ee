"""Linear degradations y = A x + n, one per file, each with its pseudo-inverse and spectral form."""

from coherent_ddrm.operators.base import LinearOperator, Observation, Operator, SpectralOperator
from coherent_ddrm.operators.inpainting import Inpainting

__all__ = ["Inpainting", "LinearOperator", "Observation", "Operator", "SpectralOperator"]
