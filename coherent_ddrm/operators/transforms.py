"""Orthonormal transforms that diagonalise A Aᵀ, each O(n log n): Hartley, cosine (DCT-II), Walsh-Hadamard."""

from __future__ import annotations

import torch
from torch import Tensor


def hartley(x: Tensor) -> Tensor:
    """Re F x - Im F x over the last two axes: symmetric, and its own inverse. (..., H, W) -> (..., H, W)

    It diagonalises symmetric circulant matrices, as the Fourier transform does, in real numbers
    (https://doi.org/10.1364/JOSA.73.001832).
    """
    spectrum = torch.fft.fft2(x, norm="ortho")
    return spectrum.real - spectrum.imag


def mirror(x: Tensor) -> Tensor:
    """x followed by its mirror image along the last axis. (..., n) -> (..., 2 n)"""
    return torch.cat([x, x.flip(-1)], -1)


def dct(x: Tensor) -> Tensor:
    """Cosine transform (DCT-II) along the last axis: the Fourier transform of `mirror(x)`. (..., n) -> (..., n)

    It diagonalises what is symmetric circulant on the mirrored signal (https://doi.org/10.1137/S0036144598336745).
    """
    n = x.shape[-1]
    return (torch.fft.rfft(mirror(x))[..., :n] * _twiddle(n, x)).real


def idct(c: Tensor) -> Tensor:
    """The inverse and the transpose of `dct`. (..., n) -> (..., n)"""
    n = c.shape[-1]
    return torch.fft.irfft(c / _twiddle(n, c), n=2 * n)[..., :n]


def _twiddle(n: int, like: Tensor) -> Tensor:
    """exp(-i pi k / 2 n) / sqrt(2 n), k = 0 .. n - 1, and 1 / sqrt(4 n) at k = 0. (n,) complex"""
    phase = torch.arange(n, device=like.device, dtype=like.dtype) * (-torch.pi / (2 * n))
    size = torch.full_like(phase, (2 * n) ** -0.5)
    size[0] = (4 * n) ** -0.5
    return torch.polar(size, phase)


def walsh_hadamard(x: Tensor) -> Tensor:
    """Walsh-Hadamard transform along the last axis, natural order: symmetric, and its own inverse.

    (..., n) -> (..., n) with n a power of two: log2(n) butterflies (a, b) -> (a + b, a - b).
    """
    n, half = x.shape[-1], 1
    shape = x.shape
    while half < n:
        a, b = x.reshape(*shape[:-1], n // (2 * half), 2, half).unbind(-2)
        x = torch.stack([a + b, a - b], -2)
        half *= 2
    return x.reshape(shape) * n**-0.5
