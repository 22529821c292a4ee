"""An independent forward pass of the ADM U-Net, from its description (https://arxiv.org/abs/2105.05233, appendix A).

Functional over a state dict in the names of guided-diffusion. A weight that is missing is drawn, so that a first call
on an empty dict makes the checkpoint, with exactly the names and shapes that this reading of the description has.
"""

import math

import torch
import torch.nn.functional as F


class Weights(dict):
    """Name -> tensor; draws what is missing."""

    def __init__(self, seed):
        self.rng = torch.Generator().manual_seed(seed)

    def __call__(self, name, *shape):
        if name not in self:
            fan = math.prod(shape[1:]) if len(shape) > 1 else 25  # biases and norms: 0.2
            self[name] = torch.randn(shape, generator=self.rng) / fan**0.5
        assert self[name].shape == shape, name
        return self[name]


def conv(w, name, x, out, kernel=3, stride=1):
    weight, bias = w(f"{name}.weight", out, x.shape[1], kernel, kernel), w(f"{name}.bias", out)
    return F.conv2d(x, weight, bias, stride=stride, padding=kernel // 2)


def linear(w, name, x, out):
    return x @ w(f"{name}.weight", out, x.shape[-1]).T + w(f"{name}.bias", out)


def norm(w, name, x):
    """GroupNorm, 32 groups."""
    B, C = x.shape[:2]
    groups = x.reshape(B, 32, -1)
    groups = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    ones = [1] * (x.ndim - 2)
    return groups.reshape(x.shape) * w(f"{name}.weight", C).reshape(C, *ones) + w(f"{name}.bias", C).reshape(C, *ones)


def silu(x):
    return x / (1 + torch.exp(-x))


def half(x):
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def double(x):
    return x.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)


def residual(w, name, x, emb, out, film, resize=lambda x: x):
    h = conv(w, f"{name}.in_layers.2", resize(silu(norm(w, f"{name}.in_layers.0", x))), out)
    e = linear(w, f"{name}.emb_layers.1", silu(emb), 2 * out if film else out)[:, :, None, None]
    if film:
        h = norm(w, f"{name}.out_layers.0", h) * (1 + e[:, :out]) + e[:, out:]
    else:
        h = norm(w, f"{name}.out_layers.0", h + e)
    h = conv(w, f"{name}.out_layers.3", silu(h), out)
    x = resize(x)
    return h + (x if x.shape[1] == out else conv(w, f"{name}.skip_connection", x, out, kernel=1))


def attention(w, name, x, heads, new_order):
    B, C, H, W = x.shape
    size = C // heads
    flat = norm(w, f"{name}.norm", x).reshape(B, C, H * W)
    qkv = torch.einsum("oc,bcl->bol", w(f"{name}.qkv.weight", 3 * C, C, 1)[..., 0], flat)
    qkv = qkv + w(f"{name}.qkv.bias", 3 * C)[:, None]
    mixed = []
    for h in range(heads):
        if new_order:  # all q, all k, all v
            q, k, v = (qkv[:, part * C + h * size : part * C + (h + 1) * size] for part in range(3))
        else:  # q, k, v of head 0, of head 1, ...
            q, k, v = (qkv[:, (3 * h + part) * size : (3 * h + part + 1) * size] for part in range(3))
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / size**0.5, dim=-1)
        mixed.append(torch.einsum("bts,bcs->bct", weight, v))
    out = torch.einsum("oc,bcl->bol", w(f"{name}.proj_out.weight", C, C, 1)[..., 0], torch.cat(mixed, dim=1))
    return x + (out + w(f"{name}.proj_out.bias", C)[:, None]).reshape(x.shape)


def adm(w, flags, x, timestep, label=None):
    """x (B, 3, S, S), timestep (B,), label (B,) or None -> (B, 3 or 6, S, S). flags: plain values by name."""
    base, blocks, mult = flags["num_channels"], flags["num_res_blocks"], flags["channel_mult"]
    film, updown = flags["use_scale_shift_norm"], flags["resblock_updown"]
    sides = flags["attention_resolutions"]
    frequency = torch.exp(-math.log(10000) * torch.arange(base // 2) / (base // 2))
    angle = timestep.float()[:, None] * frequency
    emb = linear(w, "time_embed.0", torch.cat([angle.cos(), angle.sin()], dim=1), 4 * base)
    emb = linear(w, "time_embed.2", silu(emb), 4 * base)
    if label is not None:
        emb = emb + w("label_emb.weight", flags["num_classes"], 4 * base)[label]

    def attend(name, h):
        size = flags.get("num_head_channels", -1)
        heads = h.shape[1] // size if size > 0 else flags["num_heads"]
        return attention(w, name, h, heads, flags.get("use_new_attention_order", False))

    h = conv(w, "input_blocks.0.0", x, base)
    stack, n = [h], 1
    for level, m in enumerate(mult):
        for _ in range(blocks):
            h = residual(w, f"input_blocks.{n}.0", h, emb, base * m, film)
            h = attend(f"input_blocks.{n}.1", h) if h.shape[-1] in sides else h
            stack, n = [*stack, h], n + 1
        if level < len(mult) - 1:
            if updown:
                h = residual(w, f"input_blocks.{n}.0", h, emb, h.shape[1], film, half)
            else:
                h = conv(w, f"input_blocks.{n}.0.op", h, h.shape[1], stride=2)
            stack, n = [*stack, h], n + 1
    h = residual(w, "middle_block.0", h, emb, h.shape[1], film)
    h = residual(w, "middle_block.2", attend("middle_block.1", h), emb, h.shape[1], film)
    n = 0
    for level, m in reversed(list(enumerate(mult))):
        for i in range(blocks + 1):
            h = residual(w, f"output_blocks.{n}.0", torch.cat([h, stack.pop()], dim=1), emb, base * m, film)
            place = 1
            if h.shape[-1] in sides:
                h, place = attend(f"output_blocks.{n}.1", h), 2
            if level and i == blocks:
                if updown:
                    h = residual(w, f"output_blocks.{n}.{place}", h, emb, h.shape[1], film, double)
                else:
                    h = conv(w, f"output_blocks.{n}.{place}.conv", double(h), h.shape[1])
            n += 1
    return conv(w, "out.2", silu(norm(w, "out.0", h)), 6 if flags["learn_sigma"] else 3)
