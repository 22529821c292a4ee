"""Structure of a result against the truth's: edges, and what is foreground. Label maps: `segmentation_iou`."""

from __future__ import annotations

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coherent_ddrm import saliency, structure_losses, structure_maps

EDGE = 0.25  # strength from which a soft edge counts, in both pictures
AT_ONCE = {"cpu": 2**14, "cuda": 2**20}  # pixels whose edges are found together: more leave a CPU's cache, and take
# 1.6 KiB each, which is much on a GPU


def edge_maps(images: Tensor) -> Tensor:
    """Soft edges of uint8 (B, 3, H, W), (B, 1, H, W) in [0, 1]: stage one's targets, from the picture at twice its
    size (bicubic)."""
    pixels = AT_ONCE.get(images.device.type, AT_ONCE["cpu"])
    return torch.cat([_edges(part) for part in images.split(max(1, pixels // (images.shape[-2] * images.shape[-1])))])


def _edges(images: Tensor) -> Tensor:
    double = F.interpolate(images.float(), scale_factor=2, mode="bicubic", align_corners=False)
    return structure_maps.soft_edges(double.round().clamp(0, 255).byte())


def edge_f1(ours: Tensor, theirs: Tensor, where: Tensor | None = None) -> Tensor:
    """F1 of the result's `edge_maps` against the truth's, matched within a pixel, (B,).

    Only edges in `where` (B, 1, H, W) count; 1 where neither picture has one.
    """
    where = None if where is None else where.to(ours.dtype)
    return structure_losses.edge_f1(ours, theirs, EDGE, where=where).float()


def foregrounds(images: Tensor) -> tuple[Tensor, Tensor]:
    """What GrabCut takes for the foreground of square uint8 (B, 3, S, S): (B, 1, S, S) bool, and (B,) whether the cut
    was good enough to be kept."""
    side = images.shape[-1]
    masks, kept = [], []
    for image in images.permute(0, 2, 3, 1).cpu().numpy():
        how = cv2.INTER_AREA if side > saliency.WORKING_SIZE else cv2.INTER_CUBIC
        working = cv2.resize(np.ascontiguousarray(image), (saliency.WORKING_SIZE,) * 2, interpolation=how)
        cut = saliency.foreground(working)
        mask = cv2.resize(cut.mask.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA) >= 0.5
        masks.append(torch.from_numpy(mask))
        kept.append(cut.kept)
    return torch.stack(masks)[:, None].to(images.device), torch.tensor(kept, device=images.device)


def foreground_iou(ours: Tensor, theirs: Tensor, kept: Tensor, where: Tensor | None = None) -> Tensor:
    """Overlap of the result's and the truth's `foregrounds` over `where`, (B,): pixels in both over pixels in either.

    nan where the truth's foreground is unsure (not `kept`, (B,)), or neither has any. (B, 1, S, S) each.
    """
    if where is not None:
        ours, theirs = ours & where.bool(), theirs & where.bool()
    value = (ours & theirs).flatten(1).sum(dim=1) / (ours | theirs).flatten(1).sum(dim=1)
    return value.masked_fill(~kept, float("nan"))
