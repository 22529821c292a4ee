"""Stage two: a pixel-space diffusion transformer whose tokens have their own time.

DiT https://arxiv.org/abs/2212.09748 (adaLN-Zero); RAD https://arxiv.org/abs/2412.09191 (time per region);
MAT https://arxiv.org/abs/2203.15270 (masked attention, convolutional head and tail); EDM https://arxiv.org/abs/2206.00364
(preconditioning, here centred on a smooth fill of the hole).

A token is *known* when all its pixels are; its time is 0. Every other token is a hole token at time t. With one-way
attention a known token depends neither on noise nor on t, so `context` computes known tokens once per picture and
`denoise` then runs hole tokens only, with the same result as running all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coherent_ddrm.models.attention import EveryToken, Ragged, all_see, hole_sees, known_sees, token_levels
from coherent_ddrm.models.block import Block, Plan, Rotary, modulate
from coherent_ddrm.models.ends import Head, Tail, patchify, unpatchify
from coherent_ddrm.models.fill import pull_push
from coherent_ddrm.models.layers import TimeEmbedding, rotary_table
from coherent_ddrm.models.preconditioning import precondition
from coherent_ddrm.schedule import Schedule, make_schedule

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


@dataclass
class Context:
    """What `denoise` needs of a batch of pictures beside x_t and t."""

    fill: Tensor  # (B, C, H, W), the centre of the preconditioning
    known: Tensor  # (B, 1, H, W)
    tokens: Ragged | EveryToken  # the tokens that run: hole tokens, or all
    still: Tensor | None  # (B, N, 1) bool, those of them at time 0; None = none
    still_modulation: list[Tensor]  # per block, adaLN at time 0, (1, 6 dim)
    tail_static: Tensor | None  # what the tail sees at any time, fill and known: (B, C + 1, H, W), or tokens' windows
    embedding: Tensor  # packed (.., dim)
    rotary: Rotary
    past: list[tuple[Tensor, Tensor]] | None  # per block, keys and values of the known tokens, if they ran before
    allowed: list[Tensor | None]  # per block, who may look at whom; None = everybody at everybody
    plans: list[Plan | None] | None  # per block; None = made of `plan_tokens` when needed
    plan_tokens: Tensor | None = None  # (B, N, structure_dim)
    everywhere: Rotary | None = None  # positions of plan_tokens


class DiT(ModelMixin, ConfigMixin):
    """The denoiser of stage two: (x_t, t, hole, structure) -> x0_hat.

    Args:
        patch, dim, depth, heads: see `SIZES`.
        structure_channels: channels of the plan, 0 for none; `structure_adaln`, `structure_cross`: its two ways in.
        cross_every: a block in so many has cross-attention.
        one_way: known tokens ignore hole tokens (needed for the context cache).
        reach: tokens per block by which MAT's mask update spreads; 0 = hole tokens may be read from the first block on.
        fill: centre the preconditioning on a pull-push fill of the known pixels, else on mid grey.
        head, tail: MAT's convolutional ends; tail = width of its convolution, 0 for a linear layer.
        data_std: spread of the data around the centre, s in the preconditioning.
    """

    per_pixel_time = True
    _supports_gradient_checkpointing = True  # enable_gradient_checkpointing(): blocks keep their input alone

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
        self.gradient_checkpointing = False
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
        self.conv_tail = Tail(tail_features, 2 * in_channels + 1, tail, in_channels, patch) if tail else None
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

    # -- use -----------------------------------------------------------------------------------------------------------

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
            t: (B,) in [0, 1]; or (B, 1, H, W), a time per pixel, 0 exactly on known pixels. A token takes the latest
                time of its pixels. Training knows two times only, 0 and one more; others are the caller's venture.
            hole: (B, 1, H, W), 1 = missing; None = where t > 0: all (the unconditional prior) if t is (B,).
            structure: (B, structure_channels, H, W) in [-1, 1]; None = no plan.
            drop_structure: (B,) bool, samples whose plan is to be ignored.

        Returns:
            (B, C, H, W); known pixels equal x_t up to rounding.
        """
        if hole is None and t.ndim == 4:
            hole = (t > 0).to(x_t.dtype)
        return self.denoise(x_t, t, self.context(x_t, hole, structure, drop_structure, cached=False))

    @apply_forward_hook
    def context(
        self,
        x: Tensor,
        hole: Tensor | None = None,
        structure: Tensor | None = None,
        drop_structure: Tensor | None = None,
        draws: int = 1,
        cached: bool = True,
    ) -> Context:
        """All that does not change with t, once per picture.

        Args:
            x: (B, C, H, W) with clean known pixels; hole pixels are not read.
            hole, structure, drop_structure: as in `forward`.
            draws: how many noisy versions of each picture `denoise` will take at once: its batch is then B draws,
                picture by picture, and the known tokens are shared.
            cached: run known tokens here, so that `denoise` runs hole tokens only; else `denoise` runs all tokens.
        """
        if cached and not self.config.one_way:
            raise ValueError(
                "the context cache needs one-way attention; use cached=False, or a network with one_way=True"
            )
        hole = torch.ones_like(x[:, :1]) if hole is None else hole
        self._check(x, hole)
        known = (hole < 0.5).to(x.dtype)
        fill = pull_push(x, known) if self.config.fill else torch.zeros_like(x)
        embedding = self._embed_static(fill if self.config.fill else x * known, known)
        plan_tokens = self._structure_tokens(structure, drop_structure, x)
        known_map = F.avg_pool2d(known, self.config.patch)[:, 0] == 1  # (B, h, w)
        still = known_map.flatten(1)  # (B, N): known tokens
        time_0 = F.silu(self.time(torch.zeros(1, device=x.device)))  # (1, dim)
        modulation_0 = [block.modulation(time_0) for block in self.blocks]  # (1, 6 dim) each
        past = self._known_pass(x, fill, known, embedding, still, plan_tokens, modulation_0) if cached else None
        if draws > 1:
            repeat = lambda v: v.repeat_interleave(draws, dim=0)  # noqa: E731
            fill, known, embedding, still, known_map = map(repeat, (fill, known, embedding, still, known_map))
            plan_tokens = None if plan_tokens is None else repeat(plan_tokens)
            past = None if past is None else [(repeat(k), repeat(v)) for k, v in past]
        tokens = Ragged(~still) if cached else EveryToken()
        rotary, everywhere = self._rotary(x, tokens if cached else None), self._rotary(x)
        return Context(
            fill=fill,
            known=known,
            tokens=tokens,
            still=None if cached else still[..., None],
            still_modulation=modulation_0,
            tail_static=self._tail_static(fill, known, tokens),
            embedding=tokens.pack(embedding),
            rotary=rotary,
            past=past,
            allowed=self._allowed(still, known_map, cached),
            plans=None
            if self._recomputes
            else [self._plan(block, plan_tokens, tokens, everywhere) for block in self.blocks],
            plan_tokens=plan_tokens,
            everywhere=everywhere,
        )

    @apply_forward_hook
    def denoise(self, x_t: Tensor, t: Tensor, context: Context) -> Tensor:
        """x0_hat of x_t (B, C, H, W) at t (B,) or (B, 1, H, W), for pictures whose `context` is at hand. (B, C, H, W)

        Of all tokens, or, where the context holds the known tokens' keys and values, of hole tokens only.
        """
        tokens, still, patch = context.tokens, context.still, self.config.patch
        centred, base, scale = precondition(
            self.schedule, x_t, t, context.fill, context.known, self.config.data_std
        )  # (B, C, H, W) each, scale (B, 1, H, W)
        x = context.embedding + self.embed_noisy(tokens.pack(patchify(centred, patch)))
        time_t, rows = self._time_rows(t, tokens)
        for i in range(len(self.blocks)):
            x = self._run(self._block, i, x, time_t, rows, context)
        shift, gain = rows(self.final_modulation(time_t)).chunk(2, dim=-1)
        features = self.final(modulate(x, shift, gain))
        features = features if still is None else features.masked_fill(still, 0)
        return base + scale * self._pixels(features, centred, context).float()

    @property
    def last_layer(self) -> nn.Parameter:
        """The last weight before the picture."""
        return self.final.weight if self.conv_tail is None else self.conv_tail.conv2.weight

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _check(self, x: Tensor, hole: Tensor) -> None:
        patch = self.config.patch
        if x.shape[-2] % patch or x.shape[-1] % patch:
            raise ValueError(
                f"picture is {x.shape[-1]} x {x.shape[-2]}; both sides must be multiples of the patch, {patch}"
            )
        if hole.shape != x[:, :1].shape:
            raise ValueError(f"hole has shape {tuple(hole.shape)}; it must be {tuple(x[:, :1].shape)}, one per sample")

    @property
    def _recomputes(self) -> bool:
        """Whether the backward pass computes each block again, instead of keeping what happened in it."""
        return self.gradient_checkpointing and torch.is_grad_enabled()

    def _run(self, function: Callable, *inputs: object) -> object:
        if not self._recomputes:
            return function(*inputs)
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing random in there

    def _block(self, i: int, x: Tensor, time_t: Tensor, rows: Callable, context: Context) -> Tensor:
        """Block i, with all that is made for it alone."""
        block, tokens = self.blocks[i], context.tokens
        modulation = rows(block.modulation(time_t))
        if context.still is not None:
            modulation = torch.where(context.still, context.still_modulation[i], modulation)
        if context.plans is not None:
            plan = context.plans[i]
        else:
            plan = self._plan(block, context.plan_tokens, tokens, context.everywhere)
        past = None if context.past is None else context.past[i]
        return block(x, modulation, tokens, context.rotary, plan, past, context.allowed[i])[0]

    def _plan(self, block: Block, plan_tokens: Tensor | None, tokens: object, everywhere: Rotary) -> Plan | None:
        return None if plan_tokens is None else block.plan(plan_tokens, tokens, everywhere)

    def _time_rows(self, t: Tensor, tokens: Ragged | EveryToken) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The time embedding that modulations are computed from, and how to lay these out for the packed rows.

        One row per sample, never per token, where a sample has one time; one row in all where a batch has: that of a
        number expanded to a batch.
        """
        if t.ndim == 4:
            latest = F.max_pool2d(t, self.config.patch).flatten(1)  # (B, N)
            return tokens.pack(F.silu(self.time(latest.flatten())).unflatten(0, latest.shape)), lambda x: x
        return F.silu(self.time(t[:1] if t.stride(0) == 0 else t)), tokens.per_sample  # (B or 1, dim)

    def _embed_static(self, seen: Tensor, known: Tensor) -> Tensor:
        """What a token knows at any time: filled pixels, which of them are known, the head's view. (B, N, dim)"""
        static = torch.cat([seen, known], dim=1)  # (B, C + 1, H, W)
        embedding = self.embed_static(patchify(static, self.config.patch))
        return embedding if self.conv_head is None else embedding + self.conv_head(static)

    def _tail_static(self, fill: Tensor, known: Tensor, tokens: Ragged | EveryToken) -> Tensor | None:
        if self.conv_tail is None:
            return None
        static = torch.cat([fill, known], dim=1)
        return static if isinstance(tokens, EveryToken) else self.conv_tail.windows(static, tokens)

    def _known_pass(
        self,
        x: Tensor,
        fill: Tensor,
        known: Tensor,
        embedding: Tensor,
        still: Tensor,
        plan_tokens: Tensor | None,
        modulation_0: list[Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the known tokens in every block, (B, heads, Lk, head_dim) each."""
        tokens, zero = Ragged(still), torch.zeros(len(x), device=x.device)
        rotary, everywhere = self._rotary(x, tokens), self._rotary(x)
        centred, _, _ = precondition(self.schedule, x, zero, fill, known, self.config.data_std)
        h = tokens.pack(embedding) + self.embed_noisy(tokens.pack(patchify(centred, self.config.patch)))
        allowed, past = known_sees(tokens), []

        def known_block(
            block: Block, h: Tensor, modulation: Tensor, last: bool
        ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            plan = self._plan(block, plan_tokens, tokens, everywhere)
            return block(h, modulation, tokens, rotary, plan, allowed=allowed, keys_only=last)

        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1  # nothing reads what known tokens become after the last block
            h, own = self._run(known_block, block, h, modulation_0[i], last)
            past.append(own)
        return past

    def _allowed(self, still: Tensor, known_map: Tensor, cached: bool) -> list[Tensor | None]:
        """Who may look at whom, per block; None = everybody at everybody.

        Every token is readable from half the depth on, however far from known ones: the centre of a large hole must
        not stay blind.
        """
        one_way, blocks = self.config.one_way, range(len(self.blocks))
        last = len(self.blocks) // 2  # from this block on nothing changes any more
        level = token_levels(known_map, self.config.reach).clamp(max=last)  # (B, N)
        if not cached:
            hidden = one_way or self.config.reach
            allowed = [all_see(still, level, i, one_way) if hidden else None for i in range(last + 1)]
            return [allowed[min(i, last)] for i in blocks]
        known, holes = Ragged(still), Ragged(~still)
        level = holes.padded(level)  # (B, Lh)
        deepest = int(level.max()) if level.numel() else 0
        ragged = not (known.uniform and holes.uniform)
        allowed = [hole_sees(known, holes, level, i) if ragged or deepest > i else None for i in range(last + 1)]
        return [allowed[min(i, last)] for i in blocks]

    def _rotary(self, x: Tensor, tokens: Ragged | None = None) -> Rotary:
        """Positions of `tokens`, or of the whole grid."""
        patch, head_dim = self.config.patch, self.config.dim // self.config.heads
        angle = rotary_table(x.shape[-2] // patch, x.shape[-1] // patch, head_dim, x.device)[
            None
        ]  # (1, N, head_dim / 2)
        if tokens is not None:
            angle = tokens.pad(tokens.pack(angle.expand(len(tokens.member), -1, -1)))
        cos, sin = angle[:, None].cos(), angle[:, None].sin()  # (B or 1, 1, L, head_dim / 2)
        return Rotary(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))

    def _structure_tokens(self, structure: Tensor | None, drop: Tensor | None, x: Tensor) -> Tensor | None:
        """The plan as tokens (B, N, structure_dim), the learned null where there is none; None if no plan is taken."""
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

    def _pixels(self, features: Tensor, centred: Tensor, context: Context) -> Tensor:
        """The raw output (B, C, H, W) from the final features of the tokens that ran; 0 where no token ran."""
        H, W, patch, tokens = *centred.shape[-2:], self.config.patch, context.tokens
        centred = centred.to(features.dtype)
        if self.conv_tail is not None and isinstance(tokens, EveryToken):
            return self.conv_tail(features, centred, context.tail_static)
        if self.conv_tail is not None:
            features = self.conv_tail.at(tokens, features, centred, context.tail_static)
        return unpatchify(tokens.scatter(features, (H // patch) * (W // patch)), patch, H, W)


@dataclass
class InContext:
    """The denoiser (x_t, t) -> x0_hat of pictures whose context is at hand, as samplers take it."""

    net: DiT
    context: Context

    @property
    def schedule(self) -> Schedule:
        return self.net.schedule

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.net.denoise(x_t, t, self.context)


def _xavier(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)


def make_dit(size: str, **options: object) -> DiT:
    """A network of a named size; `options` go to DiT. ValueError names the known sizes."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}: choose one of {', '.join(SIZES)}")
    return DiT(**{**SIZES[size], **options})
