"""A = A_1 A_2 ... with its true pseudo-inverse, by conjugate gradients on the normal equations (CGLS).

The product of the parts' pseudo-inverses is not one: (A_1 A_2)⁺ = A_2⁺ A_1⁺ needs more than the parts offer
(https://doi.org/10.1137/1008107). Started from 0, CGLS stays in the range of Aᵀ and so ends at the smallest of all
least-squares solutions, whatever the rank (https://doi.org/10.6028/jres.049.044).
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from coherent_ddrm.operators.base import LinearOperator, Operator

Linear = Callable[[Tensor], Tensor]
LOOK = 8  # iterations between two looks at whether all samples are done: each look waits for the device


class Composition(LinearOperator):
    """A x = A_1(A_2(... x)): the last part is applied first. It has no spectral form, only A, At and pinv.

    Args:
        parts: linear operators, the outermost first.
        tolerance: a sample is done when |Aᵀ(y - A x)| <= tolerance |Aᵀ y|.
        iterations: the most that are made; each costs one A and one At. Parts that fit badly (a strong blur, then a
            hole) stop here, with |A x - y| at some 1e-3 for a y that has an exact x; more iterations come closer.

    Raises:
        ValueError: when a part is not linear, or there is none.
    """

    def __init__(self, *parts: Operator, tolerance: float = 1e-6, iterations: int = 200):
        if not parts:
            raise ValueError("a composition has no parts; at least one operator is needed")
        for part in parts:
            if not isinstance(part, LinearOperator):
                raise ValueError(
                    f"{type(part).__name__} is not linear, so such a composition has no pseudo-inverse; Chain takes it"
                )
        self.parts, self.tolerance, self.iterations = parts, tolerance, iterations

    def A(self, x: Tensor) -> Tensor:
        for part in reversed(self.parts):
            x = part.A(x)
        return x

    def At(self, y: Tensor) -> Tensor:
        for part in self.parts:
            y = part.At(y)
        return y

    def pinv(self, y: Tensor) -> Tensor:
        """Differentiable: the derivative of A⁺ is (Aᵀ)⁺, found in the same way with A and At exchanged."""
        return _Pinv.apply(self.A, self.At, y, self.tolerance, self.iterations)

    def repeat(self, count: int) -> Composition:
        parts = (part.repeat(count) for part in self.parts)
        return Composition(*parts, tolerance=self.tolerance, iterations=self.iterations)

    def to(self, device: torch.device | str) -> Composition:
        for part in self.parts:
            part.to(device)
        return self


class _Pinv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, A: Linear, At: Linear, y: Tensor, tolerance: float, iterations: int) -> Tensor:
        ctx.settings = A, At, tolerance, iterations
        return least_squares(A, At, y, tolerance, iterations)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        A, At, tolerance, iterations = ctx.settings
        return None, None, _Pinv.apply(At, A, gradient, tolerance, iterations), None, None


def least_squares(A: Linear, At: Linear, y: Tensor, tolerance: float, iterations: int) -> Tensor:
    """The smallest x with the least |A x - y|, for each sample on its own: none depends on its batch. (B, ...)"""
    r, s = y, At(y)
    p, x = s, torch.zeros_like(s)
    gamma = _square(s)
    goal = tolerance**2 * gamma
    for i in range(iterations):
        going = ~(gamma <= goal)  # so that NaN goes on, and shows
        if i % LOOK == 0 and not bool(going.any()):
            break
        q = A(p)
        step = torch.where(going, gamma / _square(q), 0)
        x = x + _over(step, x) * p
        r = r - _over(step, r) * q
        s = At(r)
        before, gamma = gamma, torch.where(going, _square(s), gamma)
        p = torch.where(_over(going, p), s + _over(gamma / before, p) * p, p)
    return x


def _square(x: Tensor) -> Tensor:
    """|x|² of each sample. (B, ...) -> (B,)"""
    return x.reshape(len(x), prod(x.shape[1:])).square().sum(1)


def _over(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ...), to broadcast over `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
