"""Every score of a result beside its truth, picture by picture."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from coherent_ddrm.metrics.colour import mirror_agreement, surround_agreement
from coherent_ddrm.metrics.consistency import changed
from coherent_ddrm.metrics.gradients import seam, sharpness
from coherent_ddrm.metrics.perceptual import hole_distance, whole_distance
from coherent_ddrm.metrics.pixels import l1, psnr, ssim
from coherent_ddrm.metrics.structure import edge_f1, edge_maps, foregrounds


class Truth:
    """Pictures that results are scored against. What is found in them alone is found once, however many results come.

    Args:
        pictures: uint8 (B, 3, H, W).
        networks: as `available` gave them; those that compare pictures add lpips_alex, lpips_vgg, pd-NAME.
    """

    def __init__(self, pictures: Tensor, networks: Mapping[str, nn.Module] | None = None):
        self.pictures = pictures
        self.networks = {name: net for name, net in (networks or {}).items() if hasattr(net, "maps")}

    @cached_property
    def edges(self) -> Tensor:
        """(B, 1, H, W)"""
        return edge_maps(self.pictures)

    @cached_property
    def foregrounds(self) -> tuple[Tensor, Tensor]:
        """(B, 1, H, W) bool, and (B,) whether it is sure"""
        return foregrounds(self.pictures)

    @cached_property
    def layers(self) -> dict[str, list[Tensor]]:
        """What each network sees in them."""
        return {name: net.layers(self.pictures) for name, net in self.networks.items()}

    @property
    def nbytes(self) -> int:
        """Of what was found by now."""
        layers = [layer for of in vars(self).get("layers", {}).values() for layer in of]
        found = [self.pictures, *layers, *vars(self).get("foregrounds", ())]
        return sum(tensor.nbytes for tensor in (*found, vars(self).get("edges", self.pictures[:0])))

    @torch.no_grad()
    def score(self, result: Tensor, hole: Tensor) -> dict[str, Tensor]:
        """Scores by name, (B,) float each, of composited 8-bit pictures; nan where one has no meaning (an empty hole).

        Args:
            result: uint8 (B, 3, H, W).
            hole: (B, 1, H, W), 1 = missing.
        """
        truth = self.pictures
        _check(result, truth, hole)
        hole = hole.to(device=result.device, dtype=torch.float32)
        x, x0 = result.float() / 255, truth.float() / 255
        scores = {}
        for name, metric in dict(psnr=psnr, ssim=ssim, l1=l1).items():
            scores[name], scores[name + "_hole"] = metric(x, x0), metric(x, x0, hole)
        for network, net in self.networks.items():
            name = network if network.startswith("lpips_") else f"pd-{network}"
            maps = net.maps(net.layers(result), self.layers[network])
            scores[name], scores[name + "_hole"] = whole_distance(maps), hole_distance(maps, hole)
        scores["seam"] = seam(x, x0, hole)
        scores["sharpness"] = sharpness(x, x0, hole)
        scores["edge_f1"] = edge_f1(edge_maps(result), self.edges, hole)
        scores["changed"] = changed(result, truth, hole).float()
        return scores | by_itself(result, hole)


def by_itself(result: Tensor, hole: Tensor) -> dict[str, Tensor]:
    """The scores that need no truth, so that the truth has a value of its own."""
    return {
        "surround_agreement": surround_agreement(result, hole),
        "mirror_agreement": mirror_agreement(result, hole),
    }


def score_pairs(
    result: Tensor, truth: Tensor, hole: Tensor, networks: Mapping[str, nn.Module] | None = None
) -> dict[str, Tensor]:
    """One result per picture against its truth: `Truth.score`."""
    return Truth(truth, networks).score(result, hole)


def _check(result: Tensor, truth: Tensor, hole: Tensor) -> None:
    batch, _, height, width = shape = tuple(result.shape)
    if result.dtype != torch.uint8 or truth.dtype != torch.uint8 or shape != tuple(truth.shape) or shape[1] != 3:
        raise ValueError(
            f"score_pairs() takes uint8 (B, 3, H, W) twice, got {result.dtype} {shape}, "
            f"{truth.dtype} {tuple(truth.shape)}"
        )
    if tuple(hole.shape) != (batch, 1, height, width):
        raise ValueError(f"the hole is {(batch, 1, height, width)} beside such pictures, got {tuple(hole.shape)}")
