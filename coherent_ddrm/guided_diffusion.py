"""OpenAI's guided-diffusion (ADM) U-Nets as diffusers' UNet2DModel: flags -> config, state dict -> state dict.

ADM: https://arxiv.org/abs/2105.05233 ; flags and layout: https://github.com/openai/guided-diffusion . The two networks
compute the same function; only names, and the layout of attention, differ. N counts blocks from the input on:

    ADM                                              UNet2DModel
    time_embed.0, .2                                 time_embedding.linear_1, .linear_2
    label_emb                                        class_embedding
    input_blocks.0.0                                 conv_in
    input_blocks.N.0                                 down_blocks.L.resnets.I
    input_blocks.N.1                                 down_blocks.L.attentions.I      (where the level has attention)
    input_blocks.N.0 at the end of a level           down_blocks.L.downsamplers.0    (.op -> .conv, or a residual block)
    middle_block.0, .1, .2                           mid_block.resnets.0, .attentions.0, .resnets.1
    output_blocks.N.0, .1                            up_blocks.L.resnets.I, .attentions.I
    output_blocks.N.1 or .2 at the end of a level    up_blocks.L.upsamplers.0        (.conv, or a residual block)
    out.0, .2                                        conv_norm_out, conv_out

    residual block: in_layers.0, .2; emb_layers.1; out_layers.0, .3; skip_connection
                 -> norm1, conv1; time_emb_proj; norm2, conv2; conv_shortcut
    attention:      norm; qkv (3 C, C, 1); proj_out (C, C, 1)
                 -> group_norm; to_q, to_k, to_v (C, C) each; to_out.0 (C, C)

The rows of qkv are [q k v] of head 0, then of head 1, ... ; with use_new_attention_order all q, all k, all v. The time
embedding is [cos, sin] at frequencies 10000^(-i / half): flip_sin_to_cos, freq_shift 0. GroupNorm has 32 groups and
eps 1e-5. UNet2DModel has one width of the time embedding and one head size for the whole network: where the flags ask
for more (the 512 px models, whose first level is narrower; num_heads over several widths), they are refused.

A checkpoint comes as a torch pickle, which this library never loads. Where you trust it, once:

    import torch; from safetensors.torch import save_file
    save_file(torch.load("256x256_diffusion_uncond.pt", weights_only=True), "256x256_diffusion_uncond.safetensors")

and beside it 256x256_diffusion_uncond.json with the MODEL_FLAGS and DIFFUSION_FLAGS of its command line. Then
`load_prior("256x256_diffusion_uncond.safetensors")`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from coherent_ddrm.errors import CheckpointError

CHANNEL_MULT = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}  # by image_size, where the flag is ""
# flags of training and of the original sampler; they change no prediction
IDLE = ("dropout", "use_checkpoint", "use_fp16", "use_kl", "rescale_learned_sigmas", "timestep_respacing")


@dataclass(frozen=True)
class Flags:
    """The flags of guided-diffusion that decide what a checkpoint computes, with that repository's defaults."""

    image_size: int = 64
    num_channels: int = 128
    num_res_blocks: int = 2
    channel_mult: tuple[int, ...] = ()  # () = CHANNEL_MULT
    num_heads: int = 4
    num_heads_upsample: int = -1
    num_head_channels: int = -1
    attention_resolutions: tuple[int, ...] = (16, 8)
    class_cond: bool = False
    num_classes: int = 1000  # fixed there, not a flag
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    learn_sigma: bool = False
    predict_xstart: bool = False
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    rescale_timesteps: bool = False

    @property
    def multipliers(self) -> tuple[float, ...]:
        return self.channel_mult or CHANNEL_MULT[self.image_size]

    @property
    def channels(self) -> list[int]:
        """Of each level, highest resolution first."""
        return [self.num_channels * m for m in self.multipliers]

    @property
    def attended(self) -> list[bool]:
        """Which levels have attention. The lowest one's middle block has it in any case."""
        factors = [self.image_size // side for side in self.attention_resolutions]
        return [2**level in factors for level in range(len(self.multipliers))]


def read_flags(values: Mapping[str, Any], source: str = "flags") -> Flags:
    """Flags from JSON: numbers, booleans, lists; "32,16,8" as on the command line. CheckpointError names a bad one."""
    kinds = {f.name: type(f.default) for f in fields(Flags)}
    read = {}
    for name, value in values.items():
        if name in IDLE:
            continue
        if name not in kinds:
            raise CheckpointError(f"{source}: unknown flag {name!r}; it takes {', '.join(kinds)}")
        if kinds[name] is tuple:
            value = _whole_numbers(name, value, source)
        elif type(value) is not kinds[name]:
            raise CheckpointError(f"{source}: {name} is {value!r}; it must be of type {kinds[name].__name__}")
        read[name] = value
    flags = Flags(**read)
    _check(flags, source)
    return flags


def _whole_numbers(name: str, value: Any, source: str) -> tuple[int, ...]:
    """Numbers from a list, or from text such as 1,2,4."""
    try:
        numbers = [float(part) for part in (value.split(",") if isinstance(value, str) else value) if part != ""]
        if all(number >= 1 and number.is_integer() for number in numbers):
            return tuple(map(int, numbers))
    except (TypeError, ValueError):
        pass
    raise CheckpointError(f"{source}: {name} is {value!r}; it must be whole numbers such as '1,2,4'")


def _check(flags: Flags, source: str) -> None:
    """CheckpointError for what UNet2DModel cannot express, or ADM itself does not know."""

    def refuse(name: str, reason: str) -> None:
        raise CheckpointError(f"{source}: {name} is {getattr(flags, name)!r}; {reason}")

    if not flags.channel_mult and flags.image_size not in CHANNEL_MULT:
        refuse("image_size", f"without channel_mult it must be one of {', '.join(map(str, CHANNEL_MULT))}")
    if flags.multipliers[0] != 1:
        start = flags.multipliers[0]
        refuse("channel_mult", f"starting with {start}: UNet2DModel embeds time at the width of its first level, so 1")
    for name in ("image_size", "num_channels", "num_res_blocks", "num_classes", "diffusion_steps"):
        if getattr(flags, name) < 1:
            refuse(name, "it must be a whole number from 1")
    if flags.num_channels % 32:
        refuse("num_channels", "it must be a multiple of the 32 groups of GroupNorm")
    if flags.image_size % 2 ** (len(flags.multipliers) - 1):
        refuse("image_size", f"it must halve {len(flags.multipliers) - 1} times, once per level")
    if flags.noise_schedule not in ("linear", "cosine"):
        refuse("noise_schedule", "it must be linear or cosine")
    if flags.noise_schedule == "linear" and flags.diffusion_steps <= 20:
        refuse("diffusion_steps", "linear betas, 0.1 ... 20 over the steps, are below 1 from 21 steps on")
    widths = {c for c, attended in zip(flags.channels, flags.attended, strict=True) if attended} | {flags.channels[-1]}
    if flags.num_head_channels > 0:
        if any(width % flags.num_head_channels for width in widths):
            refuse("num_head_channels", f"it must divide the channels with attention, {sorted(widths)}")
        return
    if flags.num_head_channels != -1:
        refuse("num_head_channels", "it must be above 0, or -1 for num_heads")
    if flags.num_heads_upsample not in (-1, flags.num_heads):
        refuse("num_heads_upsample", f"UNet2DModel has one head size for both ways: it must be -1 or {flags.num_heads}")
    if flags.num_heads < 1 or flags.channels[-1] % flags.num_heads:
        refuse("num_heads", f"it must divide {flags.channels[-1]} channels")
    if len(widths) > 1:
        refuse("num_heads", f"over {sorted(widths)} channels its heads differ in size; UNet2DModel cannot express that")


def unet_config(flags: Flags) -> dict[str, Any]:
    """The arguments of the UNet2DModel that computes the same function."""
    resized = "resnet" if flags.resblock_updown else "conv"
    down, up = "DownBlock2D", "UpBlock2D"
    if flags.resblock_updown:
        down, up = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    head = flags.num_head_channels if flags.num_head_channels > 0 else flags.channels[-1] // flags.num_heads
    return dict(
        sample_size=flags.image_size,
        in_channels=3,
        out_channels=6 if flags.learn_sigma else 3,
        block_out_channels=tuple(flags.channels),
        layers_per_block=flags.num_res_blocks,
        down_block_types=tuple("AttnDownBlock2D" if a else down for a in flags.attended),
        up_block_types=tuple("AttnUpBlock2D" if a else up for a in reversed(flags.attended)),
        downsample_type=resized,
        upsample_type=resized,
        downsample_padding=1,
        attention_head_dim=head,
        norm_num_groups=32,
        attn_norm_num_groups=32,
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift" if flags.use_scale_shift_norm else "default",
        flip_sin_to_cos=True,
        freq_shift=0,
        num_class_embeds=flags.num_classes if flags.class_cond else None,
    )


def alphas_cumprod(flags: Flags) -> Tensor:
    """(T,) fp64. linear: DDPM's betas, scaled so that T steps span the same noise; cosine: arXiv 2102.09672, Eq. 17."""
    steps = flags.diffusion_steps
    if flags.noise_schedule == "linear":
        betas = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    else:
        level = torch.arange(steps + 1, dtype=torch.float64) / steps
        kept = torch.cos((level + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0)


def convert(state: Mapping[str, Tensor], flags: Flags, source: str = "state dict") -> dict[str, Tensor]:
    """ADM's state dict as UNet2DModel's. CheckpointError names the first weight that is missing or has no place."""
    left, converted = dict(state), {}

    def take(name: str) -> Tensor:
        if name not in left:
            raise CheckpointError(f"{source}: no weight {name!r}, which the flags ask for; check them")
        return left.pop(name)

    for theirs, ours, kind in _modules(flags):
        for end in ("weight",) if kind == "embedding" else ("weight", "bias"):
            value = take(f"{theirs}.{end}")
            if kind == "qkv":
                for part, rows in zip("qkv", _split(value, theirs, flags, source), strict=True):
                    converted[f"{ours}.to_{part}.{end}"] = rows
            else:  # a convolution over one pixel (C, C, 1) is a linear layer (C, C)
                converted[f"{ours}.{end}"] = value.flatten(1) if kind == "pixel" and value.ndim > 1 else value
    if left:
        raise CheckpointError(f"{source}: weight {min(left)!r} has no place ({len(left)} such); check the flags")
    return converted


def _split(qkv: Tensor, name: str, flags: Flags, source: str) -> tuple[Tensor, ...]:
    """(3 C, C, 1) or (3 C,) -> q, k, v of (C, C) or (C,), heads in order."""
    rows = qkv.flatten(1) if qkv.ndim > 1 else qkv
    channels = len(rows) // 3
    heads = channels // flags.num_head_channels if flags.num_head_channels > 0 else flags.num_heads
    if heads < 1 or len(rows) % (3 * heads):
        raise CheckpointError(
            f"{source}: {name} has {len(rows)} rows, not 3 x {heads} heads of one size; check the flags"
        )
    if flags.use_new_attention_order:
        return tuple(part.contiguous() for part in rows.chunk(3))
    by_head = rows.reshape(heads, 3, channels // heads, *rows.shape[1:])
    return tuple(by_head[:, i].reshape(channels, *rows.shape[1:]) for i in range(3))


def _modules(flags: Flags) -> Iterator[tuple[str, str, str]]:
    """(ADM's name, UNet2DModel's name, kind) of every module with weights; kind: same, embedding, pixel or qkv."""
    yield "time_embed.0", "time_embedding.linear_1", "same"
    yield "time_embed.2", "time_embedding.linear_2", "same"
    if flags.class_cond:
        yield "label_emb", "class_embedding", "embedding"
    yield "input_blocks.0.0", "conv_in", "same"
    widths, attended, last = flags.channels, flags.attended, len(flags.channels) - 1
    width, skips, n = widths[0], [widths[0]], 1
    for level in range(last + 1):
        for i in range(flags.num_res_blocks):
            yield from _residual(f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{i}", width != widths[level])
            if attended[level]:
                yield from _attention(f"input_blocks.{n}.1", f"down_blocks.{level}.attentions.{i}")
            width, n = widths[level], n + 1
            skips.append(width)
        if level < last:
            yield from _resize(f"input_blocks.{n}.0", f"down_blocks.{level}.downsamplers.0", "op", flags)
            skips.append(width)
            n += 1
    yield from _residual("middle_block.0", "mid_block.resnets.0", False)
    yield from _attention("middle_block.1", "mid_block.attentions.0")
    yield from _residual("middle_block.2", "mid_block.resnets.1", False)
    n = 0
    for up, level in enumerate(range(last, -1, -1)):
        for i in range(flags.num_res_blocks + 1):
            wider = width + skips.pop() != widths[level]
            yield from _residual(f"output_blocks.{n}.0", f"up_blocks.{up}.resnets.{i}", wider)
            if attended[level]:
                yield from _attention(f"output_blocks.{n}.1", f"up_blocks.{up}.attentions.{i}")
            width, n = widths[level], n + 1
        if level:
            place = f"output_blocks.{n - 1}.{2 if attended[level] else 1}"
            yield from _resize(place, f"up_blocks.{up}.upsamplers.0", "conv", flags)
    yield "out.0", "conv_norm_out", "same"
    yield "out.2", "conv_out", "same"


def _residual(theirs: str, ours: str, widens: bool) -> Iterator[tuple[str, str, str]]:
    names = [("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj")]
    names += [("out_layers.0", "norm2"), ("out_layers.3", "conv2")]
    names += [("skip_connection", "conv_shortcut")] if widens else []
    yield from ((f"{theirs}.{a}", f"{ours}.{b}", "same") for a, b in names)


def _attention(theirs: str, ours: str) -> Iterator[tuple[str, str, str]]:
    yield f"{theirs}.norm", f"{ours}.group_norm", "same"
    yield f"{theirs}.qkv", ours, "qkv"
    yield f"{theirs}.proj_out", f"{ours}.to_out.0", "pixel"


def _resize(theirs: str, ours: str, name: str, flags: Flags) -> Iterator[tuple[str, str, str]]:
    """A residual block that resizes, or a convolution called `name` in ADM."""
    if flags.resblock_updown:
        yield from _residual(theirs, ours, False)
    else:
        yield f"{theirs}.{name}", f"{ours}.conv", "same"
