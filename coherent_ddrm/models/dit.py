"""Stage two: a pixel-space diffusion transformer whose tokens have their own time.

DiT https://arxiv.org/abs/2212.09748 (adaLN-Zero); RAD https://arxiv.org/abs/2412.09191 (time per region);
MAT https://arxiv.org/abs/2203.15270 (masked attention, convolutional head and tail); EDM https://arxiv.org/abs/2206.00364
(preconditioning, here centred on a smooth fill of the hole).

A token is *known* when all its pixels are; its time is 0. Every other token is a hole token at time t. With one-way
attention a known token depends neither on noise nor on t, so `context` computes known tokens once per picture and
`denoise` then runs hole tokens only, with the same result as `forward`, which runs all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from coherent_ddrm.models.attention import (
    EveryToken,
    Ragged,
    attend,
    full_mask,
    hole_mask,
    known_mask,
    split_heads,
    token_levels,
)
from coherent_ddrm.models.fill import pull_push
from coherent_ddrm.models.layers import (
    Head,
    Tail,
    TimeEmbedding,
    patchify,
    rotary_table,
    rotate,
    token_windows,
    unpatchify,
)
from coherent_ddrm.schedule import make_schedule

SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(dim=64, depth=2, heads=2, patch=8),
    "demo": dict(dim=256, depth=6, heads=4, patch=8),
    **{
        f"{name}/{patch}": dict(dim=dim, depth=depth, heads=heads, patch=patch)
        for name, dim, depth, heads in [
            ("S", 384, 12, 6),
            ("B", 768, 12, 12),
            ("L", 1024, 24, 16),
            ("XL", 1152, 28, 16),
        ]
        for patch in (4, 8, 16)
    },
}


def rms_norm(x: Tensor) -> Tensor:
    """x over its root mean square along the last axis, computed in fp32, in the dtype of x."""
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """RMS-normalise the last axis, then scale and shift."""
    return rms_norm(x) * (1 + scale) + shift


def norm_rotate(x: Tensor, scale: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """QK-norm and rotary positions. x: (B, heads, L, d); cos, sin: (B or 1, 1, L, d / 2)."""
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
    """cos and sin of the tokens in use, (B or 1, 1, L, head_dim / 2)."""

    cos: Tensor
    sin: Tensor


class Attention(nn.Module):
    """Multi-head attention with QK-norm and rotary positions; queries from x, keys and values from x or another source."""

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
        q = self.attention.queries(tokens.pad(self.attention.q(h)), rotary)
        x = add_gated(x, gate1, self.attention.proj(tokens.unpad(attend(q, k, v, allowed))))
        if plan is not None and plan.keys_values is not None:
            q = self.cross.queries(tokens.pad(self.cross.q(rms_norm(x))), rotary)
            x = x + self.cross.proj(tokens.unpad(attend(q, *plan.keys_values)))
        return add_gated(x, gate2, self.down(swiglu(self.gate_up(modulate(x, shift2, scale2))))), own


@dataclass
class Picture:
    """What the network knows of a picture at any time: fill and known (B, C or 1, H, W), token sets, static embedding."""

    fill: Tensor
    known: Tensor
    known_tokens: Tensor  # (B, N) bool
    level: Tensor  # (B, N)
    embedding: Tensor  # (B, N, dim)


@dataclass
class Context:
    """The known tokens of a batch, computed once, and all else that hole tokens need at every time."""

    picture: Picture
    hole: Ragged
    embedding: Tensor  # packed (.., dim): static embedding of the hole tokens
    rotary: Rotary
    keys_values: list[tuple[Tensor, Tensor]]  # per block, of the known tokens, (B, heads, Lk, head_dim) each
    masks: list[Tensor | None]  # per block
    plans: list[Plan | None]  # per block


class DiT(ModelMixin, ConfigMixin):
    """The denoiser of stage two: (x_t, t, hole, structure) -> x0_hat.

    Args:
        patch, dim, depth, heads: see `SIZES`.
        structure_channels: channels of the plan, 0 for none; `structure_adaln` and `structure_cross` switch its two ways in.
        cross_every: a block in so many has cross-attention.
        one_way: known tokens ignore hole tokens (needed for the context cache).
        reach: tokens per block by which MAT's mask update spreads; 0 = hole tokens may be read from the first block on.
        fill: centre the preconditioning on a pull-push fill of the known pixels, else on mid grey.
        head, tail: MAT's convolutional ends; tail = width of its convolution, 0 for a linear layer.
        data_std: spread of the data around the centre, s in the preconditioning.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        patch: int = 8,
        dim: int = 256,
        depth: int = 6,
        heads: int = 4,
        structure_channels: int = 0,
        structure_dim: int = 64,
        structure_adaln: bool = True,
        structure_cross: bool = True,
        cross_every: int = 2,
        one_way: bool = True,
        reach: int = 2,
        fill: bool = True,
        head: bool = True,
        tail: int = 32,
        tail_features: int = 16,
        data_std: float = 0.45,
        schedule: str = "flow",
    ):
        super().__init__()
        if patch & (patch - 1):
            raise ValueError(f"patch is {patch}; it must be a power of two")
        if dim % heads or (dim // heads) % 4:
            raise ValueError(f"dim {dim} over {heads} heads: the head size must be a multiple of 4")
        self.schedule = make_schedule(schedule)
        hidden = 64 * round(dim * 8 / 3 / 64)  # SwiGLU: as many weights as an MLP of ratio 4
        pixels = patch * patch
        planned = structure_channels > 0
        self.time = TimeEmbedding(dim)
        self.embed_noisy = nn.Linear(in_channels * pixels, dim)
        self.embed_static = nn.Linear((in_channels + 1) * pixels, dim)
        self.conv_head = Head(in_channels + 1, dim, patch) if head else None
        if planned:
            self.embed_structure = nn.Linear(structure_channels * pixels, structure_dim)
            self.null_structure = nn.Parameter(torch.zeros(structure_dim))
        self.blocks = nn.ModuleList(
            Block(
                dim,
                heads,
                hidden,
                structure_dim,
                adaln=planned and structure_adaln,
                cross=planned and structure_cross and i % cross_every == cross_every - 1,
            )
            for i in range(depth)
        )
        self.final_modulation = nn.Linear(dim, 2 * dim)
        out = tail_features if tail else in_channels
        self.final = nn.Linear(dim, out * pixels)
        self.conv_tail = Tail(tail_features, 2 * in_channels + 1, tail, in_channels) if tail else None
        self.apply(_xavier)
        self._start_as_identity()

    def _start_as_identity(self) -> None:
        zero = [self.final_modulation] + [block.modulation for block in self.blocks]
        zero += [block.structure_modulation for block in self.blocks if block.structure_modulation is not None]
        zero += [block.cross.proj for block in self.blocks if block.cross is not None]
        zero += [self.final] if self.conv_tail is None else [self.conv_tail.conv2]
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    # -- the three ways in ---------------------------------------------------------------------------------------------

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        hole: Tensor | None = None,
        structure: Tensor | None = None,
        drop_structure: Tensor | None = None,
    ) -> Tensor:
        """x0_hat from all tokens at once.

        Args:
            x_t: (B, C, H, W); known pixels are clean, hole pixels at time t.
            t: (B,) in [0, 1].
            hole: (B, 1, H, W), 1 = missing; None = all (the unconditional prior).
            structure: (B, structure_channels, H, W) in [-1, 1]; None = no plan.
            drop_structure: (B,) bool, samples whose plan is to be ignored.

        Returns:
            (B, C, H, W); known pixels equal x_t up to rounding.
        """
        hole = torch.ones_like(x_t[:, :1]) if hole is None else hole
        picture = self._picture(x_t, hole)
        known = picture.known_tokens
        tokens = EveryToken()
        rotary = self._rotary(x_t)
        plan_tokens = self._structure_tokens(structure, drop_structure, x_t)
        x = picture.embedding + self.embed_noisy(self._noisy_patches(x_t, t, picture))
        times = F.silu(self.time(torch.cat([torch.zeros_like(t), t])).unflatten(0, (2, -1)))  # (2, B, dim): at 0, at t
        pick = known[..., None]  # (B, N, 1)
        one_way, reach = self.config.one_way, self.config.reach
        for i, block in enumerate(self.blocks):
            at_0, at_t = block.modulation(times)[:, :, None]  # (B, 1, 6 dim) each: twice per sample, never per token
            plan = None if plan_tokens is None else block.plan(plan_tokens, tokens, rotary)
            allowed = full_mask(known, picture.level, i, one_way) if one_way or reach else None
            x, _ = block(x, torch.where(pick, at_0, at_t), tokens, rotary, plan, allowed=allowed)
        features = self._finish(x, times[1], tokens).masked_fill(pick, 0)
        return self._compose(self._pixels(features, x_t, t, picture, None), x_t, t, picture)

    def context(
        self,
        x: Tensor,
        hole: Tensor,
        structure: Tensor | None = None,
        drop_structure: Tensor | None = None,
        draws: int = 1,
    ) -> Context:
        """Known tokens, once per picture.

        Args:
            x: (B, C, H, W) with clean known pixels; hole pixels are not read.
            draws: how many noisy versions of each picture `denoise` will take at once: its batch is then B draws,
                picture by picture, and the known tokens are shared.
        """
        if not self.config.one_way:
            raise ValueError("the context cache needs one-way attention (one_way=True); call forward instead")
        picture = self._picture(x, hole)
        known = Ragged(picture.known_tokens)
        plan_tokens = self._structure_tokens(structure, drop_structure, x)
        rotary, everywhere = self._rotary(x, known), self._rotary(x)
        zero = torch.zeros(len(x), device=x.device)
        h = known.pack(picture.embedding) + self.embed_noisy(known.pack(self._noisy_patches(x, zero, picture)))
        time_0 = F.silu(self.time(zero[:1]))  # (1, dim)
        allowed, keys_values = known_mask(known), []
        for i, block in enumerate(self.blocks):
            plan = None if plan_tokens is None else block.plan(plan_tokens, known, everywhere)
            modulation = known.per_sample(block.modulation(time_0).expand(len(x), -1))
            last = i == len(self.blocks) - 1  # nothing reads what known tokens become after the last block
            h, own = block(h, modulation, known, rotary, plan, allowed=allowed, keys_only=last)
            keys_values.append(own)
        return self._hole_side(picture, plan_tokens, keys_values, draws)

    def denoise(self, x_t: Tensor, t: Tensor, context: Context) -> Tensor:
        """x0_hat from hole tokens only; equals `forward`. x_t: (B, C, H, W), t: (B,)."""
        picture, holes = context.picture, context.hole
        x = context.embedding + self.embed_noisy(holes.pack(self._noisy_patches(x_t, t, picture)))
        time_t = F.silu(self.time(t))  # (B, dim)
        for i, block in enumerate(self.blocks):
            modulation = holes.per_sample(block.modulation(time_t))
            x, _ = block(
                x, modulation, holes, context.rotary, context.plans[i], context.keys_values[i], context.masks[i]
            )
        features = self._finish(x, time_t, holes)
        return self._compose(self._pixels(features, x_t, t, picture, holes), x_t, t, picture)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _picture(self, x: Tensor, hole: Tensor) -> Picture:
        patch = self.config.patch
        if x.shape[-2] % patch or x.shape[-1] % patch:
            raise ValueError(
                f"picture is {x.shape[-1]} x {x.shape[-2]}; both sides must be multiples of the patch, {patch}"
            )
        if hole.shape != x[:, :1].shape:
            raise ValueError(f"hole has shape {tuple(hole.shape)}; it must be {tuple(x[:, :1].shape)}, one per sample")
        known = (hole < 0.5).to(x.dtype)
        fill = pull_push(x, known) if self.config.fill else torch.zeros_like(x)
        known_map = F.avg_pool2d(known, patch)[:, 0] == 1  # (B, h, w)
        seen = torch.cat([fill if self.config.fill else x * known, known], dim=1)  # (B, C + 1, H, W)
        embedding = self.embed_static(patchify(seen, patch))
        if self.conv_head is not None:
            embedding = embedding + self.conv_head(seen)
        return Picture(fill, known, known_map.flatten(1), token_levels(known_map, self.config.reach), embedding)

    def _alpha_sigma(self, t: Tensor, picture: Picture) -> tuple[Tensor, Tensor]:
        """Per-pixel (alpha, sigma), (B, 1, H, W): time t in the hole, 0 on known pixels."""
        return self.schedule(t[:, None, None, None].float() * (1 - picture.known))

    def _noisy_patches(self, x_t: Tensor, t: Tensor, picture: Picture) -> Tensor:
        """Patches of (x_t - alpha_t f) / sqrt(alpha_t² s² + sigma_t²), unit variance at every t. (B, N, C patch patch)"""
        return patchify(self._centred(x_t, t, picture), self.config.patch)

    def _centred(self, x_t: Tensor, t: Tensor, picture: Picture) -> Tensor:
        alpha_t, sigma_t = self._alpha_sigma(t, picture)
        s = self.config.data_std
        return (x_t - alpha_t * picture.fill) / torch.sqrt(alpha_t**2 * s**2 + sigma_t**2)

    def _rotary(self, x: Tensor, tokens: Ragged | None = None) -> Rotary:
        """Positions of `tokens`, or of the whole grid."""
        patch, head_dim = self.config.patch, self.config.dim // self.config.heads
        angle = rotary_table(x.shape[-2] // patch, x.shape[-1] // patch, head_dim, x.device)  # (N, head_dim / 2)
        angle = angle[None] if tokens is None else tokens.pad(tokens.pack(angle.expand(len(x), -1, -1)))
        angle = angle[:, None]  # (B or 1, 1, L, head_dim / 2)
        return Rotary(angle.cos(), angle.sin())

    def _structure_tokens(self, structure: Tensor | None, drop: Tensor | None, x: Tensor) -> Tensor | None:
        """The plan as tokens (B, N, structure_dim), the learned null where there is none; None if the net takes no plan."""
        channels = self.config.structure_channels
        if not channels:
            if structure is not None:
                raise ValueError("this network was built without a plan (structure_channels=0); leave structure out")
            return None
        patch = self.config.patch
        null = self.null_structure.expand(len(x), (x.shape[-2] // patch) * (x.shape[-1] // patch), -1)
        if structure is None:
            return null
        expected = (len(x), channels, *x.shape[-2:])
        if structure.shape != expected:
            raise ValueError(f"structure has shape {tuple(structure.shape)}; it must be {expected}")
        tokens = self.embed_structure(patchify(structure, patch))
        return tokens if drop is None else torch.where(drop[:, None, None], null.to(tokens.dtype), tokens)

    def _hole_side(
        self, picture: Picture, plan_tokens: Tensor | None, keys_values: list[tuple[Tensor, Tensor]], draws: int
    ) -> Context:
        """Everything that hole tokens read and that does not change with t, for `draws` noisy versions per picture."""
        if draws > 1:
            repeat = lambda x: x.repeat_interleave(draws, dim=0)  # noqa: E731
            picture = Picture(*(repeat(getattr(picture, field.name)) for field in fields(Picture)))
            plan_tokens = None if plan_tokens is None else repeat(plan_tokens)
            keys_values = [(repeat(k), repeat(v)) for k, v in keys_values]
        known, holes = Ragged(picture.known_tokens), Ragged(~picture.known_tokens)
        rotary, everywhere = self._rotary(picture.fill, holes), self._rotary(picture.fill)
        level = holes.padded(picture.level)
        deepest = int(level.max()) if level.numel() else 0
        ragged = not (known.uniform and holes.uniform)
        masks = [hole_mask(known, holes, level, i) if ragged or deepest > i else None for i in range(len(self.blocks))]
        plans = [None if plan_tokens is None else block.plan(plan_tokens, holes, everywhere) for block in self.blocks]
        return Context(picture, holes, holes.pack(picture.embedding), rotary, keys_values, masks, plans)

    def _finish(self, x: Tensor, time_t: Tensor, tokens: Ragged | EveryToken) -> Tensor:
        shift, scale = tokens.per_sample(self.final_modulation(time_t)).chunk(2, dim=-1)
        return self.final(modulate(x, shift, scale))

    def _pixels(self, features: Tensor, x_t: Tensor, t: Tensor, picture: Picture, holes: Ragged | None) -> Tensor:
        """F, the network's raw output (B, C, H, W), from final token features: of all tokens, or of `holes` only."""
        B, _, H, W = x_t.shape
        patch = self.config.patch
        if holes is not None:
            blank = features.new_zeros(B, (H // patch) * (W // patch), features.shape[-1])
            features = holes.scatter(features, blank)
        raw = unpatchify(features, patch, H, W)
        if self.conv_tail is None:
            return raw
        pixels = torch.cat([self._centred(x_t, t, picture), picture.fill, picture.known], dim=1)
        canvas = F.pad(torch.cat([raw, pixels.to(raw.dtype)], dim=1), (self.conv_tail.halo,) * 4)
        side = patch + 2 * self.conv_tail.halo
        if holes is None or len(holes) * side**2 >= canvas[:, 0].numel():
            return self.conv_tail(canvas)
        windows = token_windows(canvas, patch, self.conv_tail.halo)  # (B, h, w, C, side, side), a view
        row, column = holes.position // (W // patch), holes.position % (W // patch)
        patches = self.conv_tail(windows[holes.sample, row, column])  # (M, C, patch, patch)
        blank = patches.new_zeros(B, (H // patch) * (W // patch), patches[0].numel())
        return unpatchify(blank.index_put((holes.sample, holes.position), patches.flatten(1)), patch, H, W)

    def _compose(self, raw: Tensor, x_t: Tensor, t: Tensor, picture: Picture) -> Tensor:
        """x0_hat = f + gain (x_t - alpha_t f) + s sigma_t / sqrt(alpha_t² s² + sigma_t²) F (EDM, Equation 7, around f)."""
        alpha_t, sigma_t = self._alpha_sigma(t, picture)
        s = self.config.data_std
        variance = alpha_t**2 * s**2 + sigma_t**2
        base = picture.fill + alpha_t * s**2 / variance * (x_t - alpha_t * picture.fill)
        return base + s * sigma_t / variance.sqrt() * raw.float()


def _xavier(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)


def make_dit(size: str, **options: object) -> DiT:
    """A network of a named size; `options` go to DiT. ValueError names the known sizes."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}: choose one of {', '.join(SIZES)}")
    return DiT(**{**SIZES[size], **options})
