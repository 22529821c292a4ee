"""Self-consistency: inpaint again from parts of the result, and see whether the same comes out. Needs no truth.

If a fill belongs to its picture, the picture follows from the fill as the fill does from the picture.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from coherent_ddrm.metrics.pixels import l1

Inpaint = Callable[[Tensor, Tensor], Tensor]  # uint8 (B, 3, H, W), hole (B, 1, H, W) bool -> uint8 (B, 3, H, W)
Distance = Callable[[Tensor, Tensor, Tensor], Tensor]  # two uint8 pictures, where (B, 1, H, W) -> (B,)


def known_band(hole: Tensor, width: int) -> Tensor:
    """Known pixels at most `width` rows and columns away from the hole. (B, 1, H, W) -> bool alike"""
    grown = F.max_pool2d(hole.float(), 2 * width + 1, stride=1, padding=width) > 0
    return grown & ~hole.bool()


def checkerboard(hole: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The hole as two parts that share nothing: black and white squares of a board. (B, 1, H, W) -> bool alike"""
    rows, columns = (torch.arange(n, device=hole.device) // side for n in hole.shape[-2:])
    black = (rows[:, None] + columns) % 2 == 0
    return hole.bool() & black, hole.bool() & ~black


def reinpaint_known(result: Tensor, hole: Tensor, inpaint: Inpaint, distance: Distance | None = None) -> Tensor:
    """Distance to the known pixels around the hole, when they are inpainted from the fill and what lies beyond; (B,).

    The band is an eighth of the longer side wide. Its pixels are real, so this is an error, not only a change.
    result: uint8 (B, 3, H, W), composited; hole: (B, 1, H, W). distance: L1 on [0, 1] unless given.
    """
    band = known_band(hole, max(1, max(result.shape[-2:]) // 8))
    return (distance or _l1)(_fill(inpaint, result, band), result, band)


def reinpaint_invented(result: Tensor, hole: Tensor, inpaint: Inpaint, distance: Distance | None = None) -> Tensor:
    """Distance between the fill and itself inpainted again, (B,): squares of it, from the other squares and the rest.

    Squares of a quarter of the longer side, in two passes, so that each pixel of the hole is hidden once. Arguments as
    `reinpaint_known`.
    """
    black, white = checkerboard(hole, max(1, max(result.shape[-2:]) // 4))
    again = _fill(inpaint, result, black)
    again = torch.where(white, _fill(inpaint, result, white), again)
    return (distance or _l1)(again, result, hole)


def _fill(inpaint: Inpaint, result: Tensor, hidden: Tensor) -> Tensor:
    """The result with hidden pixels inpainted; what is hidden is blackened first, so that nobody can peek."""
    again = inpaint(result.masked_fill(hidden, 0), hidden)
    if again.shape != result.shape or again.dtype != torch.uint8:
        raise ValueError(f"inpaint() gave {again.dtype} {tuple(again.shape)}, not uint8 {tuple(result.shape)}")
    return torch.where(hidden, again, result)


def _l1(x: Tensor, truth: Tensor, where: Tensor) -> Tensor:
    return l1(x.float() / 255, truth.float() / 255, where)
