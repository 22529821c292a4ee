"""Degradations that are not linear: they can only be applied, y = A(x), for methods that need no more than A.

They act on pictures on the [-1, 1] scale, with one parameter for all samples or one per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coherent_ddrm.operators.base import Operator


class JPEG(Operator):
    """JPEG with halved colour planes, as kornia approximates it differentiably. (B, 3, H, W) -> (B, 3, H, W)

    Rounding is softened by a cubic (https://arxiv.org/abs/2309.06978), so y is near a codec's picture, not equal to it.

    Args:
        quality: 1 to 100, a number or (B,).
    """

    SAMPLED = ("quality",)

    def __init__(self, quality: float | Tensor):
        self.quality = torch.as_tensor(quality, dtype=torch.float32).reshape(-1)
        _check("quality", self.quality, 1, 100)

    def A(self, x: Tensor) -> Tensor:
        from kornia.enhance import jpeg_codec_differentiable

        return jpeg_codec_differentiable((x + 1) / 2, self.quality) * 2 - 1


class Clipping(Operator):
    """Over-exposure: A(x) = clamp(gain x, -1, 1); its gradient is 0 where it clips. Shapes stay.

    Args:
        gain: above 0, a number or (B,).
    """

    SAMPLED = ("gain",)

    def __init__(self, gain: float | Tensor):
        self.gain = torch.as_tensor(gain, dtype=torch.float32).reshape(-1, 1, 1, 1)
        _check("gain", self.gain, torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)

    def A(self, x: Tensor) -> Tensor:
        return (self.gain.to(x.device) * x).clamp(-1, 1)


class Quantisation(Operator):
    """A(x) = the nearest of `levels` values spread evenly from -1 to 1. Shapes stay.

    Its gradient is that of clamp(x, -1, 1), as if nothing were rounded (straight-through,
    https://arxiv.org/abs/1308.3432).

    Args:
        levels: 2 or more, a whole number or (B,); 256 is what a picture file holds.
    """

    SAMPLED = ("levels",)

    def __init__(self, levels: int | Tensor):
        self.levels = torch.as_tensor(levels, dtype=torch.float32).reshape(-1, 1, 1, 1)
        _check("levels", self.levels, 2, 2**16)
        if not bool((self.levels == self.levels.round()).all()):
            raise ValueError(f"levels is {levels}; a whole number is needed")

    def A(self, x: Tensor) -> Tensor:
        x = x.clamp(-1, 1)
        steps = (self.levels.to(x.device) - 1) / 2  # per unit of x
        rounded = ((x + 1) * steps).round() / steps - 1
        return rounded.detach() + (x - x.detach())


def _check(name: str, value: Tensor, low: float, high: float) -> None:
    """ValueError unless every number is in [low, high]."""
    if not bool(((value >= low) & (value <= high)).all()):
        raise ValueError(f"{name} is {value.flatten().tolist()}; numbers from {low:g} to {high:g} are needed")


class Chain(Operator):
    """Degradations in turn, the first applied first, where one is not linear: blur, reduction, JPEG."""

    def __init__(self, *parts: Operator):
        self.parts = parts

    def A(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part.A(x)
        return x

    def repeat(self, count: int) -> Chain:
        return Chain(*(part.repeat(count) for part in self.parts))

    def to(self, device: torch.device | str) -> Chain:
        for part in self.parts:
            part.to(device)
        return self
