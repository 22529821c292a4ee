"""Networks that scores are measured with. Each takes uint8 pictures (B, 3, H, W) and says what it is (`identity`).

`layers(images)` and `maps(ours, theirs)` of two pictures' layers: distances per layer and place (perceptual.py);
`features(images)`: one vector per picture, for the distances of two sets of pictures (frechet.py, kernel.py,
discriminative.py).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence

import lpips
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coherent_ddrm.classifier import Classifier
from coherent_ddrm.models.perceptual import PerceptualNet


class Lpips(nn.Module):
    """LPIPS 0.1 with the linear heads of the package; its backbone's weights are given, under torchvision's names.

    Args:
        backbone: alex or vgg.
        weights: torchvision's state of alexnet or vgg16; what is no part of the features (its classifier) is not read.
    """

    def __init__(self, backbone: str, weights: Mapping[str, Tensor], identity: str = "") -> None:
        super().__init__()
        with warnings.catch_warnings():  # the package asks torchvision for its networks in an old way
            warnings.simplefilter("ignore", UserWarning)
            self.net = lpips.LPIPS(net=backbone, pnet_rand=True, verbose=False)
        trunk = self.net.net
        own = {name: "features." + name.partition(".")[2] for name in trunk.state_dict()}  # slice1.0.weight
        trunk.load_state_dict({name: weights[theirs] for name, theirs in own.items()}, strict=True)
        self.identity = identity
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def layers(self, images: Tensor) -> list[Tensor]:
        """Unit feature vectors, five layers of (B, C, h, w)."""
        return [lpips.normalize_tensor(layer) for layer in self.net.net(self.net.scaling_layer(_to_unit(images)))]

    @torch.no_grad()
    def maps(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[Tensor]:
        """Weighted squared differences of unit feature vectors, (B, 1, h, w) each."""
        return [head((a - b) ** 2) for head, a, b in zip(self.net.lins, ours, theirs, strict=True)]


class Inception(nn.Module):
    """The Inception of published FIDs (torch-fidelity's inception-v3-compat), its 2048 pooled features."""

    def __init__(self, weights: Mapping[str, Tensor], identity: str = "") -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        super().__init__()
        state = io.BytesIO()  # its constructor reads a pickle; this one was written here
        torch.save(dict(weights), state)
        state.seek(0)
        self.net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=state)
        self.identity = identity

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, 2048); pictures of any size are brought to 299 x 299 the way the published FIDs did."""
        return self.net(images)[0]


class OwnNetwork(nn.Module):
    """A network trained here: a classifier, or the perceptual network. Both scores; no number of it is comparable with
    one of another network."""

    def __init__(self, net: Classifier | PerceptualNet, identity: str = "") -> None:
        super().__init__()
        self.net, self.identity = net, identity
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, d): what the classifier's last layer reads; the mean over places of the perceptual network's last."""
        x = _to_unit(images)
        if isinstance(self.net, PerceptualNet):
            return self.net.features(x)[-1].mean(dim=(2, 3))
        net = self.net.net
        return net.forward_head(net.forward_features(self.net.prepared(x, _clean(x))), pre_logits=True).float()

    @torch.no_grad()
    def layers(self, images: Tensor) -> list[Tensor]:
        """Unit feature vectors, (B, C, h, w) each; the zero vector where no feature fires."""
        x = _to_unit(images)
        if isinstance(self.net, PerceptualNet):
            found = self.net.features(x)
        else:
            found = self.net.net.forward_intermediates(self.net.prepared(x, _clean(x)), intermediates_only=True)
        return [F.normalize(layer) for layer in found]

    @torch.no_grad()
    def maps(self, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[Tensor]:
        """Half the squared difference of unit feature vectors (1 - their cosine) over the number of layers.

        (B, 1, h, w) each; their sum is in [0, 2].
        """
        pairs = zip(ours, theirs, strict=True)
        return [(a - b).square().sum(dim=1, keepdim=True) / (2 * len(ours)) for a, b in pairs]


def _to_unit(images: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    if images.dtype != torch.uint8:
        raise ValueError(f"scores are measured on uint8 pictures (B, 3, H, W), got {images.dtype}")
    return images.float() / 127.5 - 1


def _clean(x: Tensor) -> Tensor:
    """The time of a clean picture, (B,)."""
    return torch.zeros(len(x), device=x.device)
