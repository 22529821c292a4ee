"""What an operator is: the linear degradation y = A x + sigma_y n, and how a measurement is kept together with it.

The singular value decomposition is A = U diag(S) Vᵀ with as many coordinates as y has numbers (the thin form): U is
orthogonal, V has orthonormal columns, and whatever is orthogonal to V is the null space. Every operator here has an
A Aᵀ that a fast orthogonal U diagonalises, so that it states A, At, S, U and Ut, and the rest follows:
V = At U S⁺, Vᵀ = S⁺ Uᵀ A, A⁺ = V S⁺ Uᵀ.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor


class Operator:
    """A degradation that can only be applied: y = A(x), differentiable almost everywhere."""

    def A(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the measurement y."""
        raise TypeError(f"{type(self).__name__} does not define A(x)")

    def window(self, y: Tensor, top: int, left: int, side: int) -> tuple[Operator, Tensor]:
        """The operator and the measurement of a square of the picture alone.

        Raises ValueError where a pixel of y depends on pixels from far away.
        """
        raise ValueError(f"{type(self).__name__} mixes pixels across the picture, so it has no windows")

    SAMPLED: tuple[str, ...] = ()  # its tensors that may have a row per sample

    def repeat(self, count: int) -> Operator:
        """The operator for a batch in which every sample stands `count` times in a row."""
        repeated = copy.copy(self)
        for name in self.SAMPLED:
            value = getattr(self, name)
            if value.ndim != 2 and len(value) > 1:  # (H, W) and one row serve all samples
                setattr(repeated, name, value.repeat_interleave(count, dim=0))
        return repeated

    def to(self, device: torch.device | str) -> Operator:
        """Move the operator's tensors, in place. Without it they are copied to the input's device at every call."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self


class LinearOperator(Operator):
    """A linear A with its adjoint and its pseudo-inverse."""

    def At(self, y: Tensor) -> Tensor:
        """The adjoint: <A x, y> = <x, At y>. y -> (B, C, H, W)"""
        raise TypeError(f"{type(self).__name__} does not define At(y)")

    def pinv(self, y: Tensor) -> Tensor:
        """The pseudo-inverse: the smallest x with the least |A x - y|. y -> (B, C, H, W)"""
        raise TypeError(f"{type(self).__name__} does not define pinv(y)")

    def project(self, x: Tensor, y: Tensor) -> Tensor:
        """x + pinv(y - A x), the null-space projection (https://arxiv.org/abs/2212.00490, Equation 7)."""
        return x + self.pinv(y - self.A(x))


class SpectralOperator(LinearOperator):
    """A linear operator with its singular values at hand.

    S broadcasts over the coordinates, which are shaped like y unless the operator says otherwise. Coordinates with
    S = 0 belong to the null space: V maps them to 0.
    """

    S: Tensor

    def U(self, c: Tensor) -> Tensor:
        """Coordinates -> y; the identity unless overridden."""
        return c

    def Ut(self, y: Tensor) -> Tensor:
        """y -> coordinates; the inverse of U."""
        return y

    def V(self, c: Tensor) -> Tensor:
        """Coordinates -> (B, C, H, W)."""
        return self.At(self.U(inverse(self.S.to(c.device)) * c))

    def Vt(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> coordinates; 0 where S = 0."""
        return inverse(self.S.to(x.device)) * self.Ut(self.A(x))

    def replace(self, x: Tensor, c: Tensor) -> Tensor:
        """The null space of x (B, C, H, W) with the coordinates c: x - V Vᵀ x + V c."""
        return x - self.V(self.Vt(x)) + self.V(c)

    def pinv(self, y: Tensor) -> Tensor:
        return self.At(self.U(inverse(self.S.to(y.device)) ** 2 * self.Ut(y)))


def inverse(S: Tensor) -> Tensor:
    """1 / S, and 0 where S = 0."""
    return torch.where(S > 0, 1 / S.clamp(min=torch.finfo(S.dtype).tiny), torch.zeros_like(S))


def require_size(x: Tensor, size: tuple[int, int]) -> None:
    """ValueError unless x (..., H, W) has the size that its operator was made for."""
    if tuple(x.shape[-2:]) != tuple(size):
        raise ValueError(
            f"the picture is {x.shape[-2]} x {x.shape[-1]}, its operator was made for {size[0]} x {size[1]}; "
            f"make one for this size"
        )


@dataclass
class Observation:
    """What is known: y = A x + sigma_y n."""

    y: Tensor  # shaped as operator.A(x) is, pictures on the [-1, 1] scale, fp32
    operator: Operator
    sigma_y: float = 0.0  # standard deviation of the noise on the [-1, 1] scale: twice that of pictures in [0, 1]

    def __post_init__(self) -> None:
        if not self.sigma_y >= 0:
            raise ValueError(f"sigma_y is {self.sigma_y}; it is a standard deviation on the [-1, 1] scale, 0 or more")
