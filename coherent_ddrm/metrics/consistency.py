"""Whether a result keeps what was measured."""

from __future__ import annotations

import torch
from torch import Tensor

from coherent_ddrm.operators import Operator


@torch.no_grad()
def measurement_error(result: Tensor, y: Tensor, operator: Operator) -> Tensor:
    """max |A x - y| per picture, (B,), on the [-1, 1] scale of y. Rounding alone may give 1 / 255 where A picks pixels.

    result: uint8 (B, 3, H, W).
    """
    x = result.to(y.dtype) / 127.5 - 1
    return (operator.A(x) - y).abs().flatten(1).amax(dim=1)


def changed(result: Tensor, given: Tensor, hole: Tensor) -> Tensor:
    """How many 8-bit values (three per pixel) of known pixels differ from the given picture, (B,) long.

    result, given: uint8 (B, 3, H, W); hole: (B, 1, H, W).
    """
    return ((result != given) & ~hole.bool()).flatten(1).sum(dim=1)
