"""Who says whether a patch is a photograph's: patch discriminators at several scales, told the structure plan.

pix2pixHD, https://arxiv.org/abs/1711.11585, section 3.2. There each scale judges what the plan (its label map) and the
picture show together; so does this one: "does this texture fit this plan".
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

PLAN_WIDTH = 8  # the plan is reduced to so many channels, so that its many labels do not outweigh the picture's three
SLOPE = 0.2


class Judgement(NamedTuple):
    """What one scale says."""

    logits: Tensor  # (B, 1, h, w), above 0 = a photograph's
    features: list[Tensor]  # of each layer before, (B, C, .., ..)


class PatchScale(nn.Module):
    """One scale: `halvings` strided 4x4 convolutions, then two of 3x3, the second to the logits.

    No norm. One over the batch would tie samples together, one over the picture would tell each patch what the others
    look like, and then a patch's label (fake only at the hole) would not be its own. R1 keeps the network tame.
    """

    def __init__(self, in_channels: int, width: int, halvings: int):
        super().__init__()
        widths = [in_channels] + [min(4 * width, width * 2**i) for i in range(halvings)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(widths))
        self.convs.append(nn.Conv2d(widths[-1], widths[-1], 3, padding=1))
        self.out = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, a=SLOPE)
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Judgement:
        """x: (B, C, H, W) -> logits (B, 1, H / 2^halvings, W / 2^halvings), rounded down"""
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), SLOPE)
            features.append(x)
        return Judgement(self.out(x), features)


class Discriminator(ModelMixin, ConfigMixin):
    """(picture, plan) -> one `Judgement` per scale: the picture as it is, at half its size, and so on.

    Args:
        plan_channels: channels of the plan (models.structure: 1 + labels); 0 = judge pictures alone.
        width: channels of the first layer; doubled at each halving, to four times at most.
        halvings: a logit stands for a square of 2^halvings pixels and sees some 26 of them at 2, 54 at 3. Two suit
            64 px, where 54 would be the whole picture; three 128 to 256.
        scales: how many sizes are judged.
    """

    @register_to_config
    def __init__(self, plan_channels: int = 0, width: int = 64, halvings: int = 2, scales: int = 2):
        super().__init__()
        for name, value in (("width", width), ("halvings", halvings), ("scales", scales)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.embed_plan = nn.Conv2d(plan_channels, PLAN_WIDTH, 1) if plan_channels else None
        in_channels = 3 + (PLAN_WIDTH if plan_channels else 0)
        self.judges = nn.ModuleList(PatchScale(in_channels, width, halvings) for _ in range(scales))

    def forward(self, x: Tensor, plan: Tensor | None = None) -> list[Judgement]:
        """x: (B, 3, H, W) in [-1, 1]; plan: (B, plan_channels, H, W), None without one"""
        self._check(x, plan)
        if self.embed_plan is not None:
            x = torch.cat([x, self.embed_plan(plan)], dim=1)
        judged = []
        for i, scale in enumerate(self.judges):
            if i:  # 3x3 means as in pix2pixHD, which divide by the pixels that are there
                x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
            judged.append(scale(x.contiguous(memory_format=torch.channels_last)))
        return judged

    def _check(self, x: Tensor, plan: Tensor | None) -> None:
        B, C, H, W = x.shape
        wanted = self.config.plan_channels
        least = 2 ** (self.config.halvings + self.config.scales - 1)
        if C != 3 or min(H, W) < least:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, 3, H, W) with sides of {least} px or more")
        if wanted and (plan is None or plan.shape != (B, wanted, H, W)):
            got = None if plan is None else tuple(plan.shape)
            raise ValueError(f"plan has shape {got}; this discriminator was made for {(B, wanted, H, W)}")
        if not wanted and plan is not None:
            raise ValueError("this discriminator was made for no plan (plan_channels 0); call it without one")
