"""Networks that scores are measured with. Each takes uint8 pictures (B, 3, H, W) and says what it is (`identity`).

`maps(x, truth)`: distances per layer and place (perceptual.py); `features(images)`: one vector per picture, for the
distances of two sets of pictures (frechet.py, kernel.py, discriminative.py).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping

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

    def maps(self, x: Tensor, truth: Tensor) -> list[Tensor]:
        """Weighted squared differences of unit feature vectors, five layers of (B, 1, h, w)."""
        ours, theirs = (self.net.net(self.net.scaling_layer(_to_unit(v))) for v in (x, truth))
        unit = lpips.normalize_tensor
        return [head((unit(a) - unit(b)) ** 2) for head, a, b in zip(self.net.lins, ours, theirs, strict=True)]


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
    def maps(self, x: Tensor, truth: Tensor) -> list[Tensor]:
        """Half the squared difference of unit feature vectors (1 - their cosine) over the number of layers.

        (B, 1, h, w) each; their sum is in [0, 2]. A place where no feature fires has the zero vector.
        """
        ours, theirs = self._layers(_to_unit(x)), self._layers(_to_unit(truth))
        pairs = zip(ours, theirs, strict=True)
        unit = F.normalize  # over channels
        return [(unit(a) - unit(b)).square().sum(dim=1, keepdim=True) / (2 * len(ours)) for a, b in pairs]

    def _layers(self, x: Tensor) -> list[Tensor]:
        if isinstance(self.net, PerceptualNet):
            return self.net.features(x)
        prepared = self.net.prepared(x, _clean(x))
        return self.net.net.forward_intermediates(prepared, intermediates_only=True)


def _to_unit(images: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    if images.dtype != torch.uint8:
        raise ValueError(f"scores are measured on uint8 pictures (B, 3, H, W), got {images.dtype}")
    return images.float() / 127.5 - 1


def _clean(x: Tensor) -> Tensor:
    """The time of a clean picture, (B,)."""
    return torch.zeros(len(x), device=x.device)
