"""Small parts of the transformer: time embedding and rotary positions."""

from __future__ import annotations

import math

import torch
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
    """Turn channel pairs (i, i + d/2) of x (B, heads, L, d) by their angles.

    cos: (B or 1, 1, L, d), both halves alike; sin likewise, the first half negated.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)
