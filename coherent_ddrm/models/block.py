"""The transformer block: adaLN-Zero self-attention, cross-attention to the plan, SwiGLU.

DiT https://arxiv.org/abs/2212.09748 (adaLN-Zero), RMSNorm, QK-norm and SwiGLU as in current DiTs. Rows may be packed
(attention.Ragged): linear layers never see padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coherent_ddrm.models.attention import EveryToken, Ragged, attend, split_heads
from coherent_ddrm.models.layers import rotate


def rms_norm(x: Tensor) -> Tensor:
    """x over its root mean square along the last axis."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """RMS-normalise the last axis, then scale and shift."""
    return rms_norm(x) * (1 + scale) + shift


def norm_rotate(x: Tensor, scale: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """QK-norm and rotary positions. x: (B, heads, L, d); cos, sin: (B or 1, 1, L, d)."""
    return rotate(rms_norm(x) * scale.to(x.dtype), cos.to(x.dtype), sin.to(x.dtype))


def swiglu(x: Tensor) -> Tensor:
    """(.., 2 hidden) -> (.., hidden)"""
    up, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def add_gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y"""
    return x + gate * y


@dataclass
class Rotary:
    """cos and sin of the tokens in use as `rotate` takes them, (B or 1, 1, L, head_dim)."""

    cos: Tensor
    sin: Tensor


class Attention(nn.Module):
    """Multi-head attention with QK-norm and rotary positions; keys and values from x itself or another source."""

    def __init__(self, dim: int, heads: int, source_dim: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(source_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.q_scale = nn.Parameter(torch.ones(dim // heads))
        self.k_scale = nn.Parameter(torch.ones(dim // heads))

    def keys_values(self, source: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """(B, L, source_dim) -> k, v, each (B, heads, L, head_dim)."""
        k, v = (split_heads(part, self.heads) for part in self.kv(source).chunk(2, dim=-1))
        return norm_rotate(k, self.k_scale, rotary.cos, rotary.sin), v

    def queries(self, x: Tensor, rotary: Rotary) -> Tensor:
        """(B, L, dim) -> (B, heads, L, head_dim)"""
        return norm_rotate(split_heads(x, self.heads), self.q_scale, rotary.cos, rotary.sin)

    def read(
        self,
        h: Tensor,
        keys_values: tuple[Tensor, Tensor],
        tokens: Ragged | EveryToken,
        rotary: Rotary,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """What the packed tokens h (.., dim) find at keys and values, (B, heads, L, head_dim) each; (.., dim)."""
        q = self.queries(tokens.pad(self.q(h)), rotary)
        return self.proj(tokens.unpad(attend(q, *keys_values, allowed)))


@dataclass
class Plan:
    """The structure plan as one block reads it."""

    shift_scale: tuple[Tensor, Tensor] | None  # packed, (.., dim) each: adaLN at the same place
    keys_values: tuple[Tensor, Tensor] | None  # (B, heads, N, head_dim) each: cross-attention over the whole plan


class Block(nn.Module):
    """x += gate attention(mod(x)); x += cross(x, plan); x += gate swiglu(mod(x)). All gates start at zero."""

    def __init__(self, dim: int, heads: int, hidden: int, structure_dim: int, adaln: bool, cross: bool):
        super().__init__()
        self.attention = Attention(dim, heads, dim)
        self.gate_up = nn.Linear(dim, 2 * hidden)
        self.down = nn.Linear(hidden, dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.structure_modulation = nn.Linear(structure_dim, 2 * dim) if adaln else None
        self.cross = Attention(dim, heads, structure_dim) if cross else None

    def plan(self, structure: Tensor, tokens: Ragged | EveryToken, everywhere: Rotary) -> Plan:
        """What this block needs of the plan tokens (B, N, structure_dim) at the packed `tokens`."""
        shift_scale = keys_values = None
        if self.structure_modulation is not None:
            shift_scale = self.structure_modulation(tokens.pack(structure)).chunk(2, dim=-1)
        if self.cross is not None:
            keys_values = self.cross.keys_values(structure, everywhere)
        return Plan(shift_scale, keys_values)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        tokens: Ragged | EveryToken,
        rotary: Rotary,
        plan: Plan | None,
        past: tuple[Tensor, Tensor] | None = None,
        allowed: Tensor | None = None,
        keys_only: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x: packed (.., dim); modulation: (.., 6 dim), broadcastable; past: keys and values to read before one's own.

        Returns x and this block's own (k, v), (B, heads, L, head_dim) each. keys_only skips all that only x needs.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        if plan is not None and plan.shift_scale is not None:
            shift1, scale1 = shift1 + plan.shift_scale[0], scale1 + plan.shift_scale[1]
        h = modulate(x, shift1, scale1)
        k, v = own = self.attention.keys_values(tokens.pad(h), rotary)
        if keys_only:
            return x, own
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        x = add_gated(x, gate1, self.attention.read(h, (k, v), tokens, rotary, allowed))
        if plan is not None and plan.keys_values is not None:
            x = x + self.cross.read(rms_norm(x), plan.keys_values, tokens, rotary)
        return add_gated(x, gate2, self.down(swiglu(self.gate_up(modulate(x, shift2, scale2))))), own
