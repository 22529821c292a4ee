"""Who may look at whom: known and hole tokens, MAT's layer-wise mask update, and packing of ragged token sets.

MAT, https://arxiv.org/abs/2203.15270, section 3.3: attention trusts valid tokens, and a token next to valid ones
becomes valid from layer to layer. Here tokens are all in one window, so "next to" is a dilation by `reach` tokens per
block. On top, known tokens never attend to hole tokens (one-way), which makes them independent of noise and time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def token_levels(known: Tensor, reach: int) -> Tensor:
    """The block from which each token may be read: 0 for known ones, then one more for each `reach` tokens of distance.

    Args:
        known: (B, h, w) bool, token map of known tokens.
        reach: tokens that validity spreads per block (Chebyshev distance); 0 = no mask update, every token is readable.

    Returns:
        (B, h w) long. All 0 for a picture without known tokens: there the whole picture is the hole.
    """
    B, h, w = known.shape
    if reach == 0:
        return torch.zeros(B, h * w, dtype=torch.long, device=known.device)
    valid = known[:, None].float()
    level = torch.zeros(B, h * w, dtype=torch.long, device=known.device)
    for _ in range(-(-max(h, w) // reach)):
        level += (valid.flatten(1) == 0).long()
        valid = F.max_pool2d(valid, 2 * reach + 1, stride=1, padding=reach)
    nothing_known = ~known.flatten(1).any(dim=1, keepdim=True)
    return level.masked_fill(nothing_known, 0)


class Ragged:
    """A subset of tokens for each sample, packed into rows without padding.

    Packed means (M, C) with M tokens in all; when every sample has the same number L it means (B, L, C), which needs no
    gather and no mask. Linear layers run on packed rows; only attention sees padded (B, L, C).

    Args:
        member: (B, N) bool.
    """

    def __init__(self, member: Tensor):
        self.member = member
        self.sample, self.position = member.nonzero(as_tuple=True)  # (M,) each, ordered by sample
        count = member.sum(dim=1)  # (B,)
        self.width = int(count.max()) if len(count) else 0
        self.uniform = bool((count == self.width).all())
        slot = torch.arange(self.width, device=member.device)
        self.valid = slot < count[:, None]  # (B, L): which padded slots hold a token
        first = count.cumsum(0) - count
        self.row = self.sample * self.width + torch.arange(len(self.sample), device=member.device) - first[self.sample]

    def __len__(self) -> int:
        return len(self.sample)

    def pack(self, x: Tensor) -> Tensor:
        """(B, N, C) -> packed."""
        if self.uniform:
            return (
                x
                if self.width == x.shape[1]
                else x[self.sample, self.position].reshape(len(x), self.width, x.shape[-1])
            )
        return x[self.sample, self.position]

    def per_sample(self, x: Tensor) -> Tensor:
        """(B, C), one row per sample, or (1, C), one for all -> broadcastable against packed rows."""
        if len(x) == 1:
            return x
        return x[:, None] if self.uniform else x[self.sample]

    def pad(self, x: Tensor) -> Tensor:
        """packed -> (B, L, C), zeros in empty slots."""
        if self.uniform:
            return x
        padded = x.new_zeros(self.valid.numel(), x.shape[-1]).index_copy(0, self.row, x)
        return padded.reshape(*self.valid.shape, -1)

    def unpad(self, x: Tensor) -> Tensor:
        """(B, L, C) -> packed."""
        return x if self.uniform else x.flatten(0, 1)[self.row]

    def padded(self, x: Tensor) -> Tensor:
        """(B, N) values per token -> (B, L) in slot order, zeros in empty slots."""
        return self.pad(self.pack(x[..., None]))[..., 0]

    def rows(self, x: Tensor) -> Tensor:
        """packed -> (M, C), one row per token."""
        return x.reshape(-1, x.shape[-1])

    def scatter(self, x: Tensor, grid: int) -> Tensor:
        """packed, or (M, C) -> (B, grid, C), zeros where no token is."""
        if self.uniform and self.width == grid:
            return x.reshape(len(self.member), grid, x.shape[-1])
        blank = x.new_zeros(len(self.member), grid, x.shape[-1])
        return blank.index_put((self.sample, self.position), self.rows(x))


class EveryToken:
    """The same interface for the case that all tokens of all samples take part: nothing to pack, nothing to look up."""

    def pack(self, x: Tensor) -> Tensor:
        """(B, N, C) as it is."""
        return x

    pad = unpad = pack

    def scatter(self, x: Tensor, grid: int) -> Tensor:
        """(B, N, C) as it is."""
        return x

    def per_sample(self, x: Tensor) -> Tensor:
        """(B or 1, C) -> (B or 1, 1, C)"""
        return x[:, None]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, C) -> (B, heads, L, C / heads)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v, heads merged again.

    torch's fused kernel, except in bf16 on a CPU: there two plain matrix products take a third of its time, forward and
    backward, at 64 and 256 tokens. In fp32 the fused kernel is the faster one there, too.

    Args:
        q: (B, heads, Lq, d);  k, v: (B, heads, Lk, d).
        allowed: (B, Lq, Lk) bool, True = may look; None = all. Every row needs one True.

    Returns:
        (B, Lq, heads d)
    """
    bias = None if allowed is None else allowed[:, None]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        score = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        score = score if bias is None else score.masked_fill(~bias, float("-inf"))
        out = score.softmax(dim=-1).to(v.dtype) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return out.transpose(1, 2).flatten(2)


def all_see(known: Tensor, level: Tensor, block: int, one_way: bool) -> Tensor:
    """Who may look at whom in block number `block` when all tokens run together.

    Args:
        known: (B, N) bool;  level: (B, N) from `token_levels`.

    Returns:
        (B, N, N) bool. A token always sees itself.
    """
    B, N = known.shape
    allowed = (level <= block)[:, None, :].expand(B, N, N)
    if one_way:
        allowed = allowed & ~(known[:, :, None] & ~known[:, None, :])
    return allowed | torch.eye(N, dtype=torch.bool, device=known.device)


def known_sees(tokens: Ragged) -> Tensor | None:
    """Known tokens among themselves, (B, L, L) or None. A sample without known tokens sees its empty slots: no row is
    fully hidden, which would be not a number."""
    if tokens.uniform:
        return None
    keys = tokens.valid | ~tokens.valid.any(dim=1, keepdim=True)  # (B, L)
    return keys[:, None, :].expand(-1, tokens.width, -1)


def hole_sees(known: Ragged, hole: Ragged, level: Tensor, block: int) -> Tensor:
    """Hole tokens (rows) over [known tokens, hole tokens] (columns), (B, Lh, Lk + Lh).

    Args:
        level: (B, Lh), level of each hole token in slot order.
    """
    self_only = torch.eye(hole.width, dtype=torch.bool, device=level.device)
    among_holes = ((level <= block) & hole.valid)[:, None, :] | self_only  # (B, Lh, Lh)
    over_known = known.valid[:, None, :].expand(-1, hole.width, -1)  # (B, Lh, Lk)
    return torch.cat([over_known, among_holes], dim=-1)
