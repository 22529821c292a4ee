"""High-receptive-field features: a dilated residual network that sees the whole picture from every place.

LaMa, https://arxiv.org/abs/2109.07161, section 2.2: a network trained to segment, dilated instead of strided from an
eighth of the size on (https://arxiv.org/abs/1705.09914), compares pictures by what they show, not by their texture.

    net = load_perceptual("runs/clothing_64_perceptual/export")       # or "resnet50", or ("ade20k", weights=FILE)
    perceptual_loss(net, x0_hat, x0)                                  # coherent_ddrm.losses
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from coherent_ddrm.errors import CheckpointError
from coherent_ddrm.weights import CONVERT, load_or_pretrained, one_line

STRIDE = 8
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
NETWORKS: dict[str, dict[str, Any]] = {
    "small": dict(network="resnet18", options=dict(channels=[32, 64, 96, 128])),  # 1.1 M parameters, for 64 px on a CPU
    "tiny": dict(network="resnet10t", options=dict(channels=[8, 16, 16, 32], stem_width=8)),
    # The encoder of LaMa's own loss, MIT CSAIL's ade20k-resnet50dilated-ppm_deepsup: weights from a file alone
    "ade20k": dict(network="resnet50", options=dict(stem_width=64, stem_type="deep"), **IMAGENET),
}
# CSAIL's names of the stem -> timm's
CSAIL_STEM = dict(conv1="conv1.0", bn1="conv1.1", conv2="conv1.3", bn2="conv1.4", conv3="conv1.6", bn3="bn1")


class PerceptualNet(ModelMixin, ConfigMixin):
    """picture -> features of four stages, the last three at an eighth of its size.

    Batch norm, as LaMa's has, in eval mode once frozen: a fixed scale and shift per channel. So a picture does not
    depend on its batch, and a feature depends on what its convolutions reach and on nothing else. Group norm would
    divide by the picture's own contrast: a fill that is too pale would go unpunished, and pixels out of reach would
    change every feature. While it learns, batch statistics are worth their price: trained here on clothing, 300 steps
    of 32 ended at validation loss 1.36 with them, 1.62 with frozen ones from the start, 1.65 with group norm.

    Args:
        network: name of a timm model that takes `output_stride`; built without pretrained weights (no download).
        options: what else `timm.create_model` is given.
        num_labels, num_classes: outputs of the heads for segmentation and classes, used to train it only; 0 = none.
        mean, std: what the network expects of pictures in [0, 1]; one half each leaves [-1, 1] as it is.
    """

    @register_to_config
    def __init__(
        self,
        network: str = "resnet18",
        options: dict[str, Any] | None = None,
        num_labels: int = 0,
        num_classes: int = 0,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ):
        super().__init__()
        self.backbone = _backbone(network, **(options or {}))
        channels = self.backbone.feature_info.channels()[-1]
        self.segment = nn.Conv2d(channels, num_labels, 1) if num_labels else None
        self.classify = nn.Linear(channels, num_classes) if num_classes else None
        self.frozen = False

    @classmethod
    def pretrained(cls, network: str) -> PerceptualNet:
        """A timm model with its own weights (ImageNet's, most often), downloaded by timm."""
        backbone = _backbone(network, pretrained=True)
        net = cls(network, mean=backbone.pretrained_cfg["mean"], std=backbone.pretrained_cfg["std"])
        net.backbone = backbone
        return net

    def freeze(self) -> PerceptualNet:
        """No gradient to the weights, and eval mode for good."""
        self.frozen = True
        return self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> PerceptualNet:
        """A frozen network stays in eval mode, whatever the module that holds it does. (LaMa's does not: Lightning's
        own .train() puts its batch norm back to batch statistics.)"""
        return super().train(mode and not self.frozen)

    def features(self, x: Tensor) -> list[Tensor]:
        """x: (B, 3, H, W) in [-1, 1] -> [(B, C1, H / 4, W / 4), (B, C2, H / 8, W / 8), C3, C4 alike], fp32.

        In fp32 under autocast too: near the truth, bf16 would round the difference away that the loss is made of.
        """
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.config.mean, self.config.std))
        with torch.autocast(x.device.type, enabled=False):
            x = x.float() * (0.5 / std) + (0.5 - mean) / std
            return list(self.backbone(x.contiguous(memory_format=torch.channels_last)))

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """x: (B, 3, H, W) in [-1, 1] -> segmentation logits (B, L, H, W), class logits (B, K); None without a head."""
        last = self.features(x)[-1]  # (B, C, H / 8, W / 8)
        segmentation = classes = None
        if self.segment is not None:
            segmentation = F.interpolate(self.segment(last).float(), x.shape[-2:], mode="bilinear", align_corners=False)
        if self.classify is not None:
            classes = self.classify(last.mean(dim=(2, 3))).float()
        return segmentation, classes


def _backbone(network: str, **options: Any) -> nn.Module:
    """timm's network as its last four stages, strides 4, 8, 8, 8. ValueError for one that cannot be dilated."""
    if not timm.is_model(network):
        raise ValueError(f"unknown network {network!r}: choose one of {', '.join(NETWORKS)}, or a model of timm")
    settings = dict(features_only=True, out_indices=(-4, -3, -2, -1), output_stride=STRIDE)
    try:
        return timm.create_model(network, **settings, **options)
    except (TypeError, AssertionError, IndexError) as error:  # no such argument, not this stride, fewer stages
        raise ValueError(
            f"network {network!r} cannot be dilated to stride {STRIDE} ({one_line(error)}); take a residual one, such "
            "as resnet18 or resnet50"
        ) from error


def make_perceptual(network: str, **options: Any) -> PerceptualNet:
    """A network of `NETWORKS`, or a timm model by name; `options` go to PerceptualNet. ValueError for an unknown name,
    or one that cannot be dilated."""
    if network in NETWORKS:
        return PerceptualNet(**{**NETWORKS[network], **options})
    known = timm.get_pretrained_cfg(network) if timm.is_model(network) else None
    border = dict(mean=known.mean, std=known.std) if known else {}
    return PerceptualNet(**{"network": network, **border, **options})


def load_perceptual(
    source: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    weights: str | os.PathLike[str] | None = None,
) -> PerceptualNet:
    """A frozen network: from a folder (train/perceptual.py's export/), a timm model with its own weights by name, or a
    network by name (timm's or of `NETWORKS`) with the weights in a .safetensors file.

    Raises CheckpointError, one line that says what is wrong and what to do.
    """
    if weights is not None:
        net = _from_file(str(source), Path(weights))
    elif str(source) in NETWORKS and not timm.is_model(str(source)):
        raise CheckpointError(f"{source}: has no weights of its own; train it (train/perceptual.py), or name a file")
    else:
        net = load_or_pretrained(PerceptualNet, source, PerceptualNet.pretrained, "train/perceptual.py")
    nn.Module.to(net, device, torch.float32)  # files may hold half precision; diffusers' own `to` warns
    return net.freeze()


def _from_file(network: str, file: Path) -> PerceptualNet:
    """`network` with weights under timm's names, or CSAIL's. What is no part of the features (a head) is not read."""
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file}: weights are read from .safetensors alone; {CONVERT}")
    try:
        net, state = make_perceptual(network), load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be loaded ({one_line(error)})") from error
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if "conv3.weight" in state:  # CSAIL's stem; timm has none outside the blocks
        stem = {name: name.partition(".") for name in state}
        state = {CSAIL_STEM.get(head, head) + dot + rest: state[name] for name, (head, dot, rest) in stem.items()}
    state = {
        name.replace(".", "_"): weight for name, weight in state.items()
    }  # timm's wrapper writes stem_0 for stem.0
    found = {}
    for name, own in net.backbone.state_dict().items():
        weight = own if name.endswith("num_batches_tracked") else state.get(name.replace(".", "_"))
        if weight is None or weight.shape != own.shape:
            shape = "is missing" if weight is None else f"has shape {tuple(weight.shape)}, not {tuple(own.shape)}"
            raise CheckpointError(f"{file}: weight {name!r} {shape}; it holds no {network}, name the network it holds")
        found[name] = weight
    net.backbone.load_state_dict(found, strict=True)
    return net
