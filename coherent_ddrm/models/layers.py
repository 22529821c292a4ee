"""Small parts of the transformer: time embedding, rotary positions, the convolutional head and tail."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    """t in [0, 1], (B,) -> (B, dim): sinusoids of 1000 t, then a small MLP (DiT, https://arxiv.org/abs/2212.09748)."""

    def __init__(self, dim: int, frequencies: int = 128):
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        octave = torch.arange(self.frequencies, device=t.device, dtype=torch.float32) / self.frequencies
        angle = 1000 * t.float()[:, None] * torch.exp(-math.log(10000) * octave)  # (B, frequencies)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


def rotary_table(height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """Angles of 2-D rotary positions (https://arxiv.org/abs/2104.09864, one half of the channels per axis).

    Returns (height width, head_dim / 2). Computed from the size, so that size and aspect ratio may change.
    """
    quarter = head_dim // 4
    frequency = 100.0 ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    row, column = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )  # (h, w) each
    return torch.cat([row.reshape(-1, 1) * frequency, column.reshape(-1, 1) * frequency], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + d/2) of x (B, heads, L, d) by their angles; cos, sin: (B or 1, 1, L, d / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C patch patch), tokens in row order."""
    return F.pixel_unshuffle(x, patch).flatten(2).transpose(1, 2)


def unpatchify(x: Tensor, patch: int, height: int, width: int) -> Tensor:
    """The inverse of `patchify`: (B, N, C patch patch) -> (B, C, height, width)."""
    x = x.transpose(1, 2).unflatten(2, (height // patch, width // patch))
    return F.pixel_shuffle(x, patch)


class Head(nn.Module):
    """MAT's convolutional head: [filled picture, known] -> one feature per token, (B, C, H, W) -> (B, N, dim).

    Overlapping strided 3x3 convolutions. It sees known pixels only, so it is the same at every time.
    """

    def __init__(self, in_channels: int, dim: int, patch: int, width: int = 32):
        super().__init__()
        halvings = int(math.log2(patch))
        widths = [in_channels] + [min(dim, width * 2**i) for i in range(halvings)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.out = nn.Linear(widths[-1], dim)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.silu(conv(x))
        return self.out(x.flatten(2).transpose(1, 2))


class Tail(nn.Module):
    """MAT's convolutional tail: two 3x3 convolutions over [token features, pixel inputs] give the output pixels.

    No padding inside: the caller pads by `halo`, so a window around a token gives the same pixels as the whole picture.
    """

    halo = 2

    def __init__(self, feature_channels: int, pixel_channels: int, width: int, out_channels: int):
        super().__init__()
        self.feature_channels = feature_channels
        self.conv1 = nn.Conv2d(feature_channels + pixel_channels, width, 3)
        self.conv2 = nn.Conv2d(width, out_channels, 3)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H + 4, W + 4) -> (B, out, H, W)"""
        return self.conv2(F.silu(self.conv1(x)))


def token_windows(x: Tensor, patch: int, halo: int) -> Tensor:
    """A view of every token's window: (B, C, H + 2 halo, W + 2 halo) -> (B, h, w, C, k, k), k = patch + 2 halo."""
    side = patch + 2 * halo
    return x.unfold(2, side, patch).unfold(3, side, patch).permute(0, 2, 3, 1, 4, 5)
