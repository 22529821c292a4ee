"""From a uint8 batch to what a training step sees: floats, flips, holes, times, noise.

Every random number is keyed by (seed, step, place in the global batch), so that a resumed run, or one on another number
of processes, sees the same examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coherent_ddrm.masks import make_hole
from coherent_ddrm.rng import keyed_generator


@dataclass
class Examples:
    """One rank's share of a step."""

    x0: Tensor  # (B, 3, H, W) in [-1, 1]
    edges: Tensor  # (B, H, W) uint8
    segmentation: Tensor  # (B, H, W) uint8, 255 = no label
    hole: Tensor  # (B, 1, H, W), 1 = missing
    u: Tensor  # (B, draws) in [0, 1), stratified over the batch and a picture's draws: quantile of the time
    choice: Tensor  # (B, 3) in [0, 1): coins for prior, dropped plan, predicted plan
    pure: Tensor  # (B, draws) in [0, 1): coins for pure noise
    rng: list[torch.Generator]  # one per picture, for noise

    def noise(self, draws: int = 1) -> Tensor:
        """(B draws, 3, H, W) standard normal, picture by picture."""
        rows = [torch.randn(draws, *x.shape, generator=g) for x, g in zip(self.x0, self.rng, strict=True)]
        return torch.cat(rows).to(self.x0.device)

    def to(self, device: torch.device) -> Examples:
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Examples(**{**vars(self), **moved})


def example_settings(run: Any) -> dict[str, Any]:
    """What a run's config says of its examples, as keywords of `make_examples`."""
    return dict(holes=run.data.holes, seed=run.seed, global_batch=run.optim.batch, flip=run.data.flip)


def make_examples(
    batch: dict,
    holes: str,
    seed: int,
    step: int,
    places: Sequence[int],
    global_batch: int,
    flip: bool = True,
    prior: float = 0.0,
    draws: int = 1,
) -> Examples:
    """Turn a uint8 batch (`data.py`) into examples.

    Args:
        holes: maker name of masks.MAKERS.
        places: places of these samples in the global batch.
        prior: share of samples whose whole picture is the hole.
        draws: times per picture.
    """
    generators = [keyed_generator(seed, step, place) for place in places]
    coins = torch.stack([torch.rand(4 + 2 * draws, generator=g) for g in generators])  # (B, 4 + 2 draws)
    mirrored = (coins[:, 3] < 0.5).numpy() if flip else np.zeros(len(places), bool)
    image, edges, segmentation = (_mirror(batch[k], mirrored) for k in ("image", "edges", "segmentation"))
    height, width = image.shape[1:3]
    hole = np.stack([make_hole(holes, height, width, (seed, step, place)) for place in places])
    hole = torch.from_numpy(hole)[:, None].float()
    hole[coins[:, 0] < prior] = 1
    where = torch.tensor(places, dtype=torch.float32)[:, None]
    return Examples(
        x0=torch.from_numpy(image).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous(),
        edges=torch.from_numpy(edges),
        segmentation=torch.from_numpy(segmentation),
        hole=hole,
        u=((where + coins[:, 4 : 4 + draws]) / global_batch + torch.arange(draws) / draws) % 1,
        choice=coins[:, :3],
        pure=coins[:, 4 + draws :],
        rng=generators,
    )


def _mirror(x: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Flip rows b with mirrored[b] left to right. x: (B, H, W[, C])"""
    x = np.array(x)
    x[mirrored] = x[mirrored, :, ::-1]
    return x


def draw_times(examples: Examples, logit: tuple[float, float] | None, pure_noise: float) -> Tensor:
    """Times (B draws,), picture by picture: 1 for a share `pure_noise`; the rest logit-normal with `logit`, mean and
    deviation, or uniform for None."""
    t = examples.u if logit is None else logit_normal_time(examples.u, *logit)  # (B, draws)
    return torch.where(examples.pure < pure_noise, torch.ones_like(t), t).flatten()


def logit_normal_time(u: Tensor, mean: float, std: float) -> Tensor:
    """Quantile u of sigmoid(mean + std n): t in (0, 1) (https://arxiv.org/abs/2403.03206, Equation 19)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
