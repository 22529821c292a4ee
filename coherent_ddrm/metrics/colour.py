"""Whether the colours of a fill fit the picture, without the truth: against its surroundings, and across the axis.

Colours are compared as ΔE, the distance in CIE Lab, and reported as an agreement exp(-ΔE / 20): 1 where they are equal,
0.6 for another shade (ΔE 10), 0.05 for another colour (ΔE 60). The truth itself does not reach 1: compare with its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_lab
from torch import Tensor

SCALE = 20.0  # of ΔE
SURROUND_CELLS, MIRROR_CELLS = 32, 16  # of the longer side


def surround_agreement(result: Tensor, hole: Tensor) -> Tensor:
    """Mean over the hole of the agreement with the nearest colour among the known pixels, (B,).

    Low for colours that occur nowhere else in the picture. Colours are means of cells, a 32nd of the longer side.
    result: uint8 (B, 3, H, W); hole: (B, 1, H, W). nan for a picture that is all hole or has none.
    """
    hole = hole.float()
    inside, inside_share = _cell_colours(result, hole, SURROUND_CELLS)
    outside, outside_share = _cell_colours(result, 1 - hole, SURROUND_CELLS)
    values = []
    for ours, share, theirs, there in zip(inside, inside_share, outside, outside_share, strict=True):
        ours, theirs = ours[:, share > 0].T, theirs[:, there > 0].T  # (n, 3), (m, 3)
        if not len(ours) or not len(theirs):
            values.append(result.new_full((), torch.nan, dtype=torch.float32))
            continue
        nearest = torch.cdist(ours, theirs).amin(dim=1)
        values.append((share[share > 0] * agreement(nearest)).sum() / share.sum())
    return torch.stack(values)


def mirror_agreement(result: Tensor, hole: Tensor, foreground: Tensor | None = None) -> Tensor:
    """Mean over the hole of the agreement with the colour at the mirrored place, (B,): for things that are symmetric.

    Low for a sleeve of another colour than its twin, whether that one is known or invented too. The axis is the middle
    of the picture, or of the foreground (B, 1, H, W), which then alone counts. Colours are means of cells, a 16th of
    the longer side; the best of the 3 x 3 cells around the mirrored place counts, and cells that would find themselves
    there do not. result: uint8 (B, 3, H, W); hole: (B, 1, H, W). nan for a picture without such a cell.
    """
    counted = hole.float() if foreground is None else hole.float() * foreground.float()
    colours, _ = _cell_colours(result, torch.ones_like(counted), MIRROR_CELLS)  # (B, 3, h, w)
    weight = F.adaptive_avg_pool2d(counted, colours.shape[-2:])[:, 0]  # (B, h, w)
    width = colours.shape[-1]
    here = torch.arange(width, device=result.device)
    there = torch.round(2 * _axis(foreground, result) * width - 1).long()[:, None] - here  # (B, w)
    inside = (there >= 0) & (there < width) & ((there - here).abs() > 1)
    at = there.clamp(0, width - 1)[:, None, None].expand_as(colours)
    nearest = torch.full_like(weight, torch.inf)
    padded = F.pad(colours, (1, 1, 1, 1), mode="replicate")
    for row in range(3):
        for column in range(3):
            neighbour = padded[..., row : row + colours.shape[-2], column : column + width].gather(-1, at)
            nearest = torch.minimum(nearest, (neighbour - colours).norm(dim=1))
    weight = weight * inside[:, None]
    return (weight * agreement(nearest)).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))


def agreement(difference: Tensor) -> Tensor:
    """exp(-ΔE / 20), any shape."""
    return torch.exp(-difference / SCALE)


def _cell_colours(images: Tensor, where: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Mean Lab colour of the pixels in `where` (B, 1, H, W) of each cell, (B, 3, h, w), and their share (B, h, w)."""
    height, width = images.shape[-2:]
    scale = min(1.0, cells / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    lab = rgb_to_lab(images.float() / 255)
    share = F.adaptive_avg_pool2d(where, size)
    colour = F.adaptive_avg_pool2d(lab * where, size) / share.clamp(min=1e-6)
    return colour, share[:, 0]


def _axis(foreground: Tensor | None, images: Tensor) -> Tensor:
    """Column of the axis as a share of the width, (B,): the mean of the foreground's columns."""
    if foreground is None:
        return torch.full((len(images),), 0.5, device=images.device)
    width = foreground.shape[-1]
    columns = (torch.arange(width, device=images.device) + 0.5) / width
    mass = foreground.float().sum(dim=(1, 2))  # (B, W)
    return torch.where(mass.sum(dim=1) > 0, (mass * columns).sum(dim=1) / mass.sum(dim=1).clamp(min=1), 0.5)
