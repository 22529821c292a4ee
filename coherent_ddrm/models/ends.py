"""Where pixels become tokens and tokens pixels: patches and MAT's convolutional head and tail.

MAT, https://arxiv.org/abs/2203.15270, section 3.1.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coherent_ddrm.models.attention import Ragged


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

    Outside the picture, and at the features of tokens that do not run, is zero. A token's output depends on two more
    pixels on each side (`halo`), so tokens can be rendered one by one from their windows.
    """

    halo = 2

    def __init__(self, feature_channels: int, pixel_channels: int, width: int, out_channels: int, patch: int):
        super().__init__()
        self.feature_channels, self.patch = feature_channels, patch
        self.conv1 = nn.Conv2d(feature_channels + pixel_channels, width, 3)
        self.conv2 = nn.Conv2d(width, out_channels, 3)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, features: Tensor, pixels: Tensor, static: Tensor) -> Tensor:
        """Whole pictures: (B, N, features patch patch), then what changes with t and what does not, (B, .., H, W)."""
        raw = unpatchify(features, self.patch, *pixels.shape[-2:])
        return self._convolve(self._pad(torch.cat([raw, pixels, static], dim=1)))

    def windows(self, x: Tensor, tokens: Ragged) -> Tensor:
        """Pixels of M tokens and their halo: (B, C, H, W) -> (M, C, patch + 4, patch + 4)."""
        return self._take(self._pad(x), tokens)

    def at(self, tokens: Ragged, features: Tensor, pixels: Tensor, static: Tensor) -> Tensor:
        """Only `tokens`: (.., features patch patch) packed, (B, .., H, W) and `windows` of the static pixels ->
        (M, out patch patch)."""
        B, C, H, W = pixels.shape
        patch, halo, count = self.patch, self.halo, self.feature_channels
        canvas = features.new_zeros(B, count + C, H + 2 * halo, W + 2 * halo)
        inside = canvas[:, :, halo:-halo, halo:-halo]
        inside[:, count:] = pixels
        grid = inside[:, :count].unflatten(2, (-1, patch)).unflatten(4, (-1, patch)).permute(0, 2, 4, 1, 3, 5)
        row, column = tokens.position // (W // patch), tokens.position % (W // patch)
        grid[tokens.sample, row, column] = tokens.rows(features).unflatten(1, (count, patch, patch))
        return self._convolve(torch.cat([self._take(canvas, tokens), static], dim=1)).flatten(1)

    def _convolve(self, x: Tensor) -> Tensor:
        """(B, C, H + 4, W + 4) -> (B, out, H, W)"""
        return self.conv2(F.silu(self.conv1(x)))

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, (self.halo,) * 4)

    def _take(self, canvas: Tensor, tokens: Ragged) -> Tensor:
        side, across = self.patch + 2 * self.halo, (canvas.shape[-1] - 2 * self.halo) // self.patch
        windows = canvas.unfold(2, side, self.patch).unfold(3, side, self.patch)  # (B, C, h, w, side, side), a view
        row, column = tokens.position // across, tokens.position % across
        return windows.permute(0, 2, 3, 1, 4, 5)[tokens.sample, row, column]
