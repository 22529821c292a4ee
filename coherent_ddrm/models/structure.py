"""Stage one: a light transformer that plans edges and segmentation, an x0-denoiser over structure maps.

SegFormer https://arxiv.org/abs/2105.15203 (all-MLP decoder); PVTv2 https://arxiv.org/abs/2106.13797 (encoder, from
timm); SGDM: p(structure | masked picture, hole), then p(picture | structure).

A structure map, or plan, has 1 + num_labels channels in [-1, 1]: 2 edge - 1, then 2 one-hot - 1. It is noised as
pictures are, s_t = alpha_t s0 + sigma_t z. One step from t = 1 gives the posterior mean given the picture, which is the
same for every seed; N steps give one plausible plan per seed.

The noisy map enters as *evidence*. If a channel is 1 or -1, with spread v around either, then a pixel of s_t adds
2 alpha_t s_t / (v alpha_t² + sigma_t²) to its logit (Bayes' rule with two Gaussians). The network reads this number and
gets it added to its logits; with alpha_t - alpha_1 in the numerator it is exactly zero at t = 1, whatever the noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from coherent_ddrm.denoiser import Bound
from coherent_ddrm.models.fill import pull_push
from coherent_ddrm.models.layers import TimeEmbedding
from coherent_ddrm.rng import normal
from coherent_ddrm.samplers import DDIM, sample
from coherent_ddrm.schedule import Schedule, expand, make_schedule, time_grid

IGNORE = 255  # segmentation id of a pixel without a label
SPREAD = 0.5  # v; keeps the evidence of a clean map, 2 s0 / v, moderate: soft edges are neither 1 nor -1
MAP_CHANNELS = 11  # the map is reduced to so many; with picture, known and time 16, a count that convolutions like


def upsample(x: Tensor, like: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W) of `like`, bilinear."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class TimedConv(nn.Module):
    """3x3 convolution, layer norm over the channels of each pixel, scale and shift from the time, SiLU.

    No statistics over the batch, so pictures stay independent; group norm would do too, but its backward pass on a CPU
    took a quarter of a training step. The bias comes before the norm: a faint signal stays faint beside it.
    """

    def __init__(self, in_channels: int, out_channels: int, time_dim: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = nn.Linear(time_dim, 2 * out_channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: (B, C, H, W); time: (B, time_dim) -> (B, out, H, W)"""
        x = self.conv(x).permute(0, 2, 3, 1)  # (B, H, W, out): no copy, memory is channels-last
        scale, shift = self.scale_shift(time)[:, None, None].chunk(2, dim=-1)  # (B, 1, 1, out) each
        x = F.layer_norm(x, x.shape[-1:]).to(scale.dtype)
        return F.silu(torch.addcmul(shift, x, 1 + scale)).permute(0, 3, 1, 2)


class StructurePredictor(ModelMixin, ConfigMixin):
    """The denoiser of stage one: (s_t, t, picture, hole) -> s0_hat, the mean of the plan given all it sees.

    Any size: sides that are no multiple of the encoder's largest stride (32) are extended to one by repeating the
    border pixels, and the output is cropped back. Training should meet t = 1 often: the mean plan is made there.

    Args:
        num_labels: segmentation classes.
        encoder: name of a timm model with `features_only`; built without pretrained weights (no download).
        decoder_dim: channels of the decoder at the encoder's finest stride; three quarters of it at half size.
        schedule: name of the noise schedule.
    """

    @register_to_config
    def __init__(self, num_labels: int = 21, encoder: str = "pvt_v2_b0", decoder_dim: int = 64, schedule: str = "flow"):
        super().__init__()
        if decoder_dim % 32:
            raise ValueError(f"decoder_dim is {decoder_dim}; it must be a multiple of 32")
        self.schedule: Schedule = make_schedule(schedule)
        dim, fine = decoder_dim, decoder_dim * 3 // 4
        in_channels = 3 + 1 + 1 + MAP_CHANNELS  # filled picture, known, time, noisy map
        self.embed_map = nn.Conv2d(self.channels, MAP_CHANNELS, 1)
        self.backbone = _backbone(encoder, in_channels)
        self.time = TimeEmbedding(dim)
        self.laterals = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in self.backbone.feature_info.channels())
        self.mix = TimedConv(dim, dim, dim)
        self.detail = TimedConv(4 * in_channels, fine, dim)
        self.to_fine = nn.Conv2d(dim, fine, 1)
        self.merge = TimedConv(fine, fine, dim)
        self.head = nn.Conv2d(fine, 4 * self.channels, 1)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        nn.init.constant_(self.head.bias[:4], -2.0)  # edges are rare: start there, not at one half

    @property
    def channels(self) -> int:
        """Channels of a plan: edges, then one per label."""
        return 1 + self.config.num_labels

    def forward(self, s_t: Tensor, t: Tensor, picture: Tensor, hole: Tensor) -> Tensor:
        """s0_hat = E[s0 | s_t, picture], (B, 1 + L, H, W) in [-1, 1]. Arguments as in `logits`."""
        edge, segmentation = self.logits(s_t, t, picture, hole)
        return 2 * torch.cat([edge.sigmoid(), segmentation.softmax(dim=1)], dim=1) - 1

    def logits(self, s_t: Tensor, t: Tensor, picture: Tensor, hole: Tensor) -> tuple[Tensor, Tensor]:
        """What the losses take.

        Args:
            s_t: (B, 1 + L, H, W), the noisy plan; not read at t = 1.
            t: (B,) in [0, 1].
            picture: (B, 3, H, W) in [-1, 1]; hole pixels are not read.
            hole: (B, 1, H, W), 1 = missing.

        Returns:
            edge logit (B, 1, H, W) and segmentation logits (B, L, H, W), fp32.
        """
        self._check(s_t, picture, hole)
        known = 1 - hole.to(picture.dtype)
        evidence = self._evidence(s_t, t)  # (B, 1 + L, H, W)
        level = expand(2 * t - 1, picture).expand_as(known).to(picture.dtype)
        x = torch.cat([pull_push(picture, known), known, level, self.embed_map(evidence)], dim=1)
        logits = self._decode(x, F.silu(self.time(t))).float() + evidence
        edge, segmentation = logits.split([1, self.config.num_labels], dim=1)
        return edge, segmentation

    def _evidence(self, s_t: Tensor, t: Tensor) -> Tensor:
        """2 (alpha_t - alpha_1) s_t / (v alpha_t² + sigma_t²), in fp32: exactly zero at t = 1 under every schedule."""
        t = expand(t.float(), s_t)
        alpha_t, sigma_t = self.schedule(t)
        alpha_1, _ = self.schedule(torch.ones_like(t))
        return 2 * (alpha_t - alpha_1) / (SPREAD * alpha_t**2 + sigma_t**2) * s_t.float()

    def _decode(self, x: Tensor, time: Tensor) -> Tensor:
        """x: (B, 16, H, W), time: (B, dim) -> (B, 1 + L, H, W).

        SegFormer's decoder (adding projections is its "concatenate, then mix") ends at a quarter of the size, too
        coarse for edges. So a branch of 2x2 patches, where no pixel is lost, carries the detail at half size.
        """
        H, W = x.shape[-2:]
        x = self._pad(x).contiguous(memory_format=torch.channels_last)  # what CPU and tensor-core convolutions want
        features = [lateral(f) for lateral, f in zip(self.laterals, self.backbone(x), strict=True)]  # dim channels each
        coarse = features[0]  # (B, dim, H / 4, W / 4)
        for feature in features[1:]:
            coarse = coarse + upsample(feature, coarse)
        coarse = self.mix(coarse, time)
        detail = self.detail(F.pixel_unshuffle(x, 2), time)  # (B, fine, H / 2, W / 2)
        merged = self.merge(detail + upsample(self.to_fine(coarse), detail), time)
        return F.pixel_shuffle(self.head(merged), 2)[..., :H, :W]

    def _pad(self, x: Tensor) -> Tensor:
        stride = self.backbone.feature_info.reduction()[-1]
        bottom, right = -x.shape[-2] % stride, -x.shape[-1] % stride
        return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x

    def _check(self, s_t: Tensor, picture: Tensor, hole: Tensor) -> None:
        B, _, H, W = picture.shape
        for name, x, channels in [("s_t", s_t, self.channels), ("picture", picture, 3), ("hole", hole, 1)]:
            if x.shape != (B, channels, H, W):
                raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {(B, channels, H, W)}")


def _backbone(name: str, in_channels: int) -> nn.Module:
    """The hierarchical encoder, random weights. ValueError if it normalises over the batch."""
    net = timm.create_model(name, features_only=True, pretrained=False, in_chans=in_channels)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"encoder {name!r} uses batch norm; take one with layer norm, such as pvt_v2_b0")
        if hasattr(module, "fused_attn"):
            # Two matrix products: PVT's keys are few, and on a CPU in bf16 a training step with torch's fused kernel
            # took 6 times as long.
            module.fused_attn = False
    return net


def encode_structure(edges: Tensor, segmentation: Tensor, num_labels: int) -> Tensor:
    """uint8 maps -> plan.

    Args:
        edges: (B, H, W) uint8, soft, 255 = strong.
        segmentation: (B, H, W) ids; where it is 255 (no label) all segmentation channels are 0, the edge channel stays.

    Returns:
        (B, 1 + num_labels, H, W) float in [-1, 1].
    """
    ids = segmentation.long()
    labelled = ids != IGNORE
    worst = int(ids.masked_fill(~labelled, 0).max())
    if worst >= num_labels:
        raise ValueError(f"segmentation holds id {worst}; ids must be below num_labels = {num_labels}, or {IGNORE}")
    one_hot = F.one_hot(ids.masked_fill(~labelled, 0), num_labels).permute(0, 3, 1, 2).float()  # (B, L, H, W)
    classes = (2 * one_hot - 1) * labelled[:, None]
    return torch.cat([2 * edges[:, None].float() / 255 - 1, classes], dim=1)


def decode_structure(plan: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse: plan (B, 1 + L, H, W) -> edges, segmentation, both (B, H, W) uint8.

    Segmentation is the likeliest label, or 255 where all labels are exactly 0.
    """
    edges = ((plan[:, 0].float() + 1) * 127.5).round().clamp(0, 255).byte()
    classes = plan[:, 1:]
    segmentation = classes.argmax(dim=1).masked_fill((classes == 0).all(dim=1), IGNORE)
    return edges, segmentation.byte()


@torch.no_grad()
def predict_plan(
    net: StructurePredictor,
    picture: Tensor,
    hole: Tensor,
    steps: int = 1,
    rng: Sequence[torch.Generator] | None = None,
    eta: float = 0.0,
) -> Tensor:
    """A plan (B, 1 + L, H, W) in [-1, 1] for picture (B, 3, H, W) and hole (B, 1, H, W).

    steps = 1 is the mean plan: at t = 1 the network does not see the noise, so `rng` is not needed and a seed has no
    effect. steps = N is DDIM from noise, one plausible plan per seed; rng holds one generator per picture.
    """
    s_1 = torch.zeros(len(picture), net.channels, *picture.shape[-2:], device=picture.device)
    if rng is not None:
        s_1 = normal(s_1, rng)
    elif steps > 1 or eta:
        raise ValueError(
            f"{steps} steps with eta {eta} need rng, one generator per picture; only steps=1, eta=0 does not"
        )
    return sample(DDIM(Bound(net, {"picture": picture, "hole": hole}), eta), s_1, time_grid(steps), rng or ())
