"""Fixed validation pictures: the same pictures, holes and noise at every call, so that curves are comparable."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coherent_ddrm.data import open_dataset
from coherent_ddrm.images import to_tensor
from coherent_ddrm.masks import make_holes
from coherent_ddrm.rng import keyed_generator, normal

HOLES = ("half", "lama-thick", "box")  # in turn


@dataclass
class FixedSet:
    """V pictures on the device that the network is on."""

    x0: Tensor  # (V, 3, H, W) in [-1, 1]
    hole: Tensor  # (V, 1, H, W)
    z: Tensor  # (V, 3, H, W), standard normal
    edges: Tensor  # (V, H, W) uint8
    segmentation: Tensor  # (V, H, W) uint8

    def __len__(self) -> int:
        return len(self.x0)

    def slices(self, size: int = 32) -> list[slice]:
        """The set in parts that fit the memory of a training step."""
        return [slice(first, first + size) for first in range(0, len(self), size)]


def fixed_set(folder: str, device: torch.device, count: int = 120) -> FixedSet:
    """At most `count` pictures, evenly chosen from the shards in `folder`."""
    source = open_dataset(folder)
    count = min(count, len(source))
    batch = source.batch(np.linspace(0, len(source) - 1, count).astype(int))
    height, width = batch["image"].shape[1:3]
    holes = [make_holes(HOLES[i % len(HOLES)], 1, height, width, seed=(1, i))[0] for i in range(count)]
    x0 = to_tensor(batch["image"])
    return FixedSet(
        x0=x0.to(device),
        hole=torch.from_numpy(np.stack(holes)).float().to(device),
        z=normal(x0, [keyed_generator(1, i) for i in range(count)]).to(device),
        edges=torch.from_numpy(batch["edges"]).to(device),
        segmentation=torch.from_numpy(batch["segmentation"]).to(device),
    )
