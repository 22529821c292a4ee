"""What a picture shows: any timm classifier behind the [-1, 1] border, with a time of its own if wanted.

classifier = Classifier.from_pretrained("runs/clothing_64_classifier/export")
classifier.log_prob(x0_hat, classifier.label("Dress"))      # what coherent_ddrm.guidance climbs
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from coherent_ddrm.schedule import expand
from coherent_ddrm.weights import load_or_pretrained

NETWORKS: dict[str, dict[str, Any]] = {  # sizes of ours; group norm, so that a picture does not depend on its batch
    "small": dict(network="resnet18", options=dict(channels=[32, 64, 128, 224], norm_layer="groupnorm1")),  # 9 MiB
    "tiny": dict(network="resnet10t", options=dict(channels=[8, 16, 16, 32], stem_width=8, norm_layer="groupnorm1")),
}


class Classifier(ModelMixin, ConfigMixin):
    """(x, t) -> logits of the classes.

    Args:
        num_classes: number of classes.
        network: name of a timm model; built without pretrained weights (no download, see `pretrained`).
        options: what else `timm.create_model` is given.
        class_names: their names, for `label`.
        timed: the network is told t, in a fourth channel that holds 2 t - 1; x is then a noisy picture x_t.
        mean, std: what the network expects of pictures in [0, 1]; one half each leaves [-1, 1] as it is.
        size: side that pictures are scaled to first, for networks of one size (ViT); None = as they come.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 20,
        network: str = "resnet18",
        options: dict[str, Any] | None = None,
        class_names: list[str] | None = None,
        timed: bool = False,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        size: int | None = None,
    ):
        super().__init__()
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"{len(class_names)} class names for {num_classes} classes")
        options = options or {}
        in_channels = 4 if timed else 3
        self.net = timm.create_model(
            network, pretrained=False, num_classes=num_classes, in_chans=in_channels, **options
        )

    @classmethod
    def pretrained(cls, network: str, class_names: list[str] | None = None, size: int | None = None) -> Classifier:
        """A timm model with its own weights and classes (ImageNet's, most often), downloaded by timm."""
        net = timm.create_model(network, pretrained=True)
        settings = net.pretrained_cfg
        classifier = cls(
            settings["num_classes"], network, None, class_names, False, settings["mean"], settings["std"], size
        )
        classifier.net = net
        return classifier.eval()

    @property
    def timed(self) -> bool:
        """Whether the network wants to know t."""
        return self.config.timed

    def label(self, name: str) -> int:
        """The class called `name`, or of that number; ValueError names the known ones."""
        names, count = self.config.class_names or [], self.config.num_classes
        if name in names:
            return names.index(name)
        if name.isdecimal() and int(name) < count:
            return int(name)
        raise ValueError(f"unknown class {name!r}: choose one of {', '.join([*names, f'0 to {count - 1}'])}")

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """Logits. x: (B, 3, H, W) in [-1, 1]; t: (B,) if `timed`, not read otherwise -> (B, num_classes) fp32."""
        return self.net(self.prepared(x, t)).float()

    def prepared(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """The network's own input: its range and size, and its channel for t if `timed`. Arguments as `forward`."""
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (self.config.mean, self.config.std))
        x = x * (0.5 / std) + (0.5 - mean) / std
        if self.config.size is not None:
            side = self.config.size
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        if self.timed:
            if t is None:
                raise ValueError("this classifier was trained on noisy pictures: it needs t, (B,); 0 = no noise")
            x = torch.cat([x, expand(2 * t - 1, x).expand_as(x[:, :1])], dim=1)
        return x

    def log_prob(self, x: Tensor, labels: int | Tensor, t: Tensor | None = None) -> Tensor:
        """log p(label | x), (B,). labels: one for all, or (B,) integers."""
        labels = torch.as_tensor(labels, device=x.device).expand(len(x))
        return -F.cross_entropy(self(x, t), labels, reduction="none")


def make_classifier(network: str, num_classes: int, **options: Any) -> Classifier:
    """A network of `NETWORKS`, or a timm model by name; `options` go to Classifier. ValueError for an unknown name."""
    if network not in NETWORKS and not timm.is_model(network):
        raise ValueError(f"unknown network {network!r}: choose one of {', '.join(NETWORKS)}, or a model of timm")
    return Classifier(num_classes, **{**NETWORKS.get(network, dict(network=network)), **options})


def load_classifier(source: str | os.PathLike[str], device: str | torch.device = "cpu") -> Classifier:
    """The classifier in a folder, or a timm model with its own weights by name, ready to guide.

    Raises CheckpointError, one line that says what is wrong and what to do.
    """
    classifier = load_or_pretrained(Classifier, source, Classifier.pretrained, "train/classifier.py")
    torch.nn.Module.to(classifier, device, torch.float32)  # files may hold half precision; diffusers' own `to` warns
    return classifier.eval().requires_grad_(False)
