"""Degradations y = A(x) + n, one per file: linear ones with pseudo-inverse and spectral form, and some that are not."""

from coherent_ddrm.operators import kernels
from coherent_ddrm.operators.average_pooling import AveragePooling
from coherent_ddrm.operators.base import LinearOperator, Observation, Operator, SpectralOperator
from coherent_ddrm.operators.bicubic import Bicubic
from coherent_ddrm.operators.blur import Blur
from coherent_ddrm.operators.colour import Colourisation
from coherent_ddrm.operators.composition import Composition
from coherent_ddrm.operators.compressed_sensing import CompressedSensing
from coherent_ddrm.operators.denoising import Denoising
from coherent_ddrm.operators.inpainting import Inpainting
from coherent_ddrm.operators.nonlinear import JPEG, Chain, Clipping, Quantisation
from coherent_ddrm.operators.registry import OPERATORS, channels_of_y, hole_grid, make_operator, size_from_y

__all__ = [
    "JPEG",
    "OPERATORS",
    "AveragePooling",
    "Bicubic",
    "Blur",
    "Chain",
    "Clipping",
    "Colourisation",
    "Composition",
    "CompressedSensing",
    "Denoising",
    "Inpainting",
    "LinearOperator",
    "Observation",
    "Operator",
    "Quantisation",
    "SpectralOperator",
    "channels_of_y",
    "hole_grid",
    "kernels",
    "make_operator",
    "size_from_y",
]
