"""Operators by name: "bicubic:4", "blur:motion:9:45"; "blur:gaussian:2+super_resolution:4" is applied left to right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from coherent_ddrm.operators import kernels
from coherent_ddrm.operators.average_pooling import AveragePooling, check_sides
from coherent_ddrm.operators.base import LinearOperator, Operator
from coherent_ddrm.operators.bicubic import Bicubic
from coherent_ddrm.operators.blur import Blur
from coherent_ddrm.operators.colour import Colourisation
from coherent_ddrm.operators.composition import Composition
from coherent_ddrm.operators.compressed_sensing import CompressedSensing
from coherent_ddrm.operators.denoising import Denoising
from coherent_ddrm.operators.inpainting import Inpainting
from coherent_ddrm.operators.nonlinear import JPEG, Chain, Clipping, Quantisation


@dataclass(frozen=True)
class Setting:
    """What an operator is made for, beside its own arguments."""

    size: tuple[int, int]  # (H, W) of its input
    hole: Tensor | None  # (B, 1, H, W)
    seed: int


@dataclass(frozen=True)
class Entry:
    """One operator of the table: a line of help, its arguments with their defaults, and its maker."""

    help: str
    make: Callable[..., Operator]  # (Setting, **arguments) -> Operator
    arguments: dict[str, int | float] = field(default_factory=dict)  # in the order of the spec; an int must be whole


def _blur(kernel: Callable[..., Tensor]) -> Callable[..., Operator]:
    return lambda at, **arguments: Blur(kernel(**arguments), at.size)


def _gaussian(sigma: float, size: int) -> Tensor:
    return kernels.gaussian(sigma, size or None)


def _anisotropic(sigma_x: float, sigma_y: float, angle: float, size: int) -> Tensor:
    return kernels.anisotropic(sigma_x, sigma_y, angle, size or None)


def _inpainting(at: Setting) -> Operator:
    if at.hole is None:
        raise ValueError("inpainting needs a hole (B, 1, H, W), 1 where pixels are missing; none was given")
    if tuple(at.hole.shape[-2:]) != at.size:
        raise ValueError(f"the hole is {_by(at.hole.shape[-2:])}, the picture that it is cut from {_by(at.size)}")
    return Inpainting(at.hole)


OPERATORS: dict[str, Entry] = {
    "inpainting": Entry("a hole; needs its mask", _inpainting),
    "super_resolution": Entry(
        "mean of factor x factor blocks (DDRM, https://arxiv.org/abs/2201.11793)",
        lambda at, factor: AveragePooling(factor),
        {"factor": 4},
    ),
    "bicubic": Entry(
        "bicubic reduction (DDRM, appendix; Keys, https://doi.org/10.1109/TASSP.1981.1163711)",
        lambda at, factor: Bicubic(factor, at.size),
        {"factor": 4},
    ),
    "colourisation": Entry("mean of the channels (DDRM)", lambda at: Colourisation()),
    "blur:gaussian": Entry(
        "Gaussian blur (DDRM); size 0: 3 sigma each way", _blur(_gaussian), {"sigma": 3.0, "size": 0}
    ),
    "blur:anisotropic": Entry(
        "Gaussian blur, wider along an angle (degrees); size 0: 3 sigma each way",
        _blur(_anisotropic),
        {"sigma_x": 20.0, "sigma_y": 1.0, "angle": 0.0, "size": 0},
    ),
    "blur:motion": Entry("motion along an angle (degrees)", _blur(kernels.motion), {"length": 9.0, "angle": 0.0}),
    "blur:uniform": Entry("mean of a size x size square, size odd", _blur(kernels.uniform), {"size": 9}),
    "compressed_sensing": Entry(
        "one in `ratio` random Walsh-Hadamard measurements (DDNM, appendix); H W must be a power of two",
        lambda at, ratio: CompressedSensing(ratio, at.size, at.seed),
        {"ratio": 4.0},
    ),
    "denoising": Entry("nothing but noise", lambda at: Denoising()),
    "jpeg": Entry(
        "JPEG compression, not linear (differentiable, https://arxiv.org/abs/2309.06978)",
        lambda at, quality: JPEG(quality),
        {"quality": 10.0},
    ),
    "clipping": Entry("over-exposure, not linear", lambda at, gain: Clipping(gain), {"gain": 2.0}),
    "quantisation": Entry("few grey levels, not linear", lambda at, levels: Quantisation(levels), {"levels": 8}),
}


def make_operator(spec: str, size: tuple[int, int], *, hole: Tensor | None = None, seed: int = 0) -> Operator:
    """The operator that `spec` names, for pictures of `size` (H, W).

    A spec is NAME[:ARGUMENT...], a name and arguments of OPERATORS, those left out at their defaults; A+B+C is their
    Composition, A applied first, or their Chain if one is not linear. `hole` (B, 1, H, W) is for "inpainting", on the
    grid that its part sees; `seed` for "compressed_sensing".

    Raises:
        ValueError: for an unknown name, a bad argument, a size that the operator cannot have, a missing or useless
            hole. The message names the value and the rule.
    """
    parts, size = [], tuple(size)
    names = [name for name, _ in parse(spec)]
    if hole is not None and "inpainting" not in names:
        raise ValueError(f"a hole was given, but {spec!r} has no use for it; add inpainting, or leave the hole out")
    if "compressed_sensing" in names[:-1]:
        raise ValueError(f"in {spec!r} something follows compressed_sensing, whose y is no picture; put it last")
    for name, arguments in parse(spec):
        parts.append(OPERATORS[name].make(Setting(size, hole, seed), **arguments))
        factor = arguments.get("factor", 1)
        check_sides(size, factor)
        size = (size[0] // factor, size[1] // factor)
    if len(parts) == 1:
        return parts[0]
    linear = all(isinstance(part, LinearOperator) for part in parts)
    return Composition(*reversed(parts)) if linear else Chain(*parts)


def size_from_y(spec: str, y_shape: Sequence[int]) -> tuple[int, int]:
    """(H, W) of the picture when only y (..., h, w) is known.

    Raises:
        ValueError: where y is no picture (compressed sensing), and as `make_operator` does for a bad spec.
    """
    height, width = y_shape[-2:]
    for name, arguments in parse(spec):
        if name == "compressed_sensing":
            raise ValueError(f"y of {spec!r} is no picture, so its size says nothing of the picture's; give the size")
        height, width = height * arguments.get("factor", 1), width * arguments.get("factor", 1)
    return height, width


def channels_of_y(spec: str, channels: int) -> int:
    """Channels of y for pictures of so many."""
    return 1 if "colourisation" in [name for name, _ in parse(spec)] else channels


def hole_grid(spec: str, size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the hole that "inpainting" needs in a spec, for pictures of `size` (H, W)."""
    height, width = size
    for name, arguments in parse(spec):
        if name == "inpainting":
            break
        height, width = height // arguments.get("factor", 1), width // arguments.get("factor", 1)
    return height, width


def parse(spec: str) -> list[tuple[str, dict[str, int | float]]]:
    """The (name, arguments) of each part, in the order of application. ValueError names what cannot be read."""
    return [_part(part.strip()) for part in spec.split("+")]


def _part(spec: str) -> tuple[str, dict[str, int | float]]:
    name, *values = spec.split(":")
    if name == "blur" and values:
        name = f"blur:{values.pop(0)}"
    if name not in OPERATORS:
        raise ValueError(f"unknown operator {name!r}: choose one of {', '.join(OPERATORS)}")
    arguments = dict(OPERATORS[name].arguments)
    if len(values) > len(arguments):
        known = ":".join([name, *(argument.upper() for argument in arguments)])
        raise ValueError(f"operator {spec!r} has {len(values)} arguments; {known} is all that there is")
    for (argument, default), value in zip(list(arguments.items()), values, strict=False):
        arguments[argument] = _number(value, type(default), f"{argument} of {name}")
    return name, arguments


def _number(text: str, kind: type, what: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{what} is {text!r}; a {'whole ' if kind is int else ''}number is needed") from None


def _by(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"
