"""Blur by any kernel, circular: A = F⁻¹ diag(k̂) F. A Aᵀ = F⁻¹ diag(|k̂|²) F is symmetric circulant, so U is the Hartley
transform and S = |k̂|. Deblurring as in DDRM, https://arxiv.org/abs/2201.11793 .
"""

from __future__ import annotations

import torch
from torch import Tensor

from coherent_ddrm.operators.base import SpectralOperator, require_size
from coherent_ddrm.operators.transforms import hartley


class Blur(SpectralOperator):
    """A x = k * x, the convolution that wraps round the edges, in every channel; y is shaped like x.

    Frequencies that the kernel all but removes carry no usable information: where |k̂| < cutoff max |k̂| it is set to 0
    in A ITSELF, so that A is exactly what its spectral form says, V maps those frequencies to 0, and a y made by the
    full kernel has whatever it holds there ignored. A x is then off the full convolution by at most that share of x.

    Args:
        kernel: (kh, kw), or (B, 1, kh, kw) for one kernel per sample; its centre is pixel (kh // 2, kw // 2). One that
            is larger than the picture is wrapped round.
        size: (H, W) of x.
        cutoff: DDRM's 3e-2. 0 keeps everything, and then A⁺ amplifies rounding without bound.

    Raises:
        ValueError: for a kernel of another shape, not finite or all 0, a cutoff outside [0, 1), and from A and At for
            a picture of another size.
    """

    SAMPLED = ("k_hat", "S")

    def __init__(self, kernel: Tensor, size: tuple[int, int], cutoff: float = 3e-2):
        if kernel.ndim != 2 and not (kernel.ndim == 4 and kernel.shape[1] == 1):
            raise ValueError(f"the kernel's shape is {tuple(kernel.shape)}; (kh, kw) or (B, 1, kh, kw) is needed")
        if not 0 <= cutoff < 1:
            raise ValueError(f"cutoff is {cutoff}; a share of the largest singular value in [0, 1) is needed")
        self.size = tuple(size)
        k_hat = torch.fft.fft2(_wrap(kernel.double(), size))  # (..., H, W)
        largest = k_hat.abs().amax((-2, -1), keepdim=True)
        if not bool(((largest > 0) & largest.isfinite()).all()):
            raise ValueError("the kernel is all 0 or not finite; numbers that sum to 1 are needed")
        k_hat = torch.where(k_hat.abs() < cutoff * largest, 0, k_hat)
        self.k_hat = k_hat[..., : size[1] // 2 + 1].to(torch.complex64)  # (..., H, W // 2 + 1), for real pictures
        self.S = k_hat.abs().float()  # (H, W) or (B, 1, H, W)

    def A(self, x: Tensor) -> Tensor:
        return self._filter(x, self.k_hat)

    def At(self, y: Tensor) -> Tensor:
        return self._filter(y, self.k_hat.conj())

    def U(self, c: Tensor) -> Tensor:
        return hartley(c)

    Ut = U

    def _filter(self, x: Tensor, k_hat: Tensor) -> Tensor:
        require_size(x, self.size)
        return torch.fft.irfft2(torch.fft.rfft2(x) * k_hat.to(x.device), s=self.size)


def _wrap(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """The kernel on the picture's grid, its centre at pixel (0, 0), what sticks out coming in on the other side."""
    for axis, n in zip((-2, -1), size, strict=True):
        k = kernel.shape[axis]
        place = (torch.arange(k, device=kernel.device) - k // 2) % n
        shape = list(kernel.shape)
        shape[axis] = n
        kernel = kernel.new_zeros(shape).index_add(axis, place, kernel)
    return kernel
