"""Mask-shift: pictures larger than the prior, window by window (DDNM, https://arxiv.org/abs/2212.00490, section 3.4).

Square windows in raster order, overlapping by half, the last ones flush with the edge. In each, at every step, what
earlier windows have made is part of the measurement: x0_hat takes it, then the degradation's projection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coherent_ddrm.operators import Inpainting, LinearOperator, Observation
from coherent_ddrm.rng import normal
from coherent_ddrm.samplers.loop import Restorer, Rng, sample


def window_starts(length: int, side: int, stride: int) -> list[int]:
    """Where windows begin on one axis: every `stride`, the last flush with the end."""
    if length < side:
        raise ValueError(f"the picture's side, {length}, is smaller than the window's, {side}")
    return [*range(0, length - side, stride), length - side]


class Overlapped(LinearOperator):
    """A window's operator together with what is already made in it: the projection keeps both."""

    def __init__(self, operator: LinearOperator, done: Tensor, made: Tensor):
        self.operator, self.done, self.made = operator, done, made  # done (1, 1, R, R) bool, made (B, C, R, R)

    def A(self, x: Tensor) -> Tensor:
        return self.operator.A(x)

    def pinv(self, y: Tensor) -> Tensor:
        return self.operator.pinv(y)

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        return self.operator.project(torch.where(self.done, self.made, x), y)


def overlapped(observation: Observation, done: Tensor, made: Tensor) -> Observation:
    """`observation` of a window, given what is made there. A hole just shrinks: every inpainting method can go on."""
    operator, y = observation.operator, observation.y
    if isinstance(operator, Inpainting):
        hole = operator.hole & ~done
        y = torch.where(operator.hole & done, made, y)
        return Observation(y, Inpainting(hole.float()), observation.sigma_y)
    if bool(done.any()):
        operator = Overlapped(operator, done, made)
    return Observation(y, operator, observation.sigma_y)


def mask_shift(
    method: Callable[[Observation], Restorer],
    observation: Observation,
    shape: Sequence[int],
    side: int,
    times: Callable[[Restorer], Sequence[float]],
    rng: Rng,
    stride: int | None = None,
) -> tuple[Tensor, int]:
    """Restore pictures of `shape` (B, C, H, W) with a prior of `side` -> the pictures, and evaluations in all.

    Args:
        method: makes the sampler of one window's observation. For other operators than inpainting it must work by
            `operator.project` alone, as DDNM and Hybrid do.
        times: the sampler's times.
        stride: half a window unless given.

    Raises ValueError where the operator has no windows.
    """
    result = torch.zeros(*shape, device=observation.y.device)
    done = torch.zeros(1, 1, *shape[-2:], dtype=torch.bool, device=result.device)
    stride, nfe = stride or side // 2, 0
    for top in window_starts(shape[-2], side, stride):
        for left in window_starts(shape[-1], side, stride):
            here = (..., slice(top, top + side), slice(left, left + side))
            operator, y = observation.operator.window(observation.y, top, left, side)
            part = overlapped(Observation(y, operator, observation.sigma_y), done[here], result[here])
            if isinstance(part.operator, Inpainting) and not bool(part.operator.hole.any()):
                result[here], done[here] = part.y, True  # nothing is missing here
                continue
            sampler = method(part)
            x0 = sample(sampler, normal(result[here], rng), times(sampler), rng)
            result[here] = torch.where(done[here], result[here], x0)
            done[here] = True
            nfe += sampler.nfe
    return result, nfe
