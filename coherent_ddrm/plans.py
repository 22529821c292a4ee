"""Structure plans as people handle them: predicted, looked at as pictures, edited, handed back.

A plan is (1 + L, R, R) in [-1, 1]: edges, then one channel per label. As pictures it is an edge map (mode L, white = edge)
and a segmentation (mode P, the pixel value is the label).
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coherent_ddrm.crop import Window, area_resize, cut
from coherent_ddrm.errors import UserError
from coherent_ddrm.models.structure import decode_structure, encode_structure


@dataclass
class Structure:
    """The plans of N results. `edges` and `segmentation` are previews; edit one and hand it back as `structure=`."""

    plan: Tensor  # (N, 1 + L, R, R) in [-1, 1]
    edges: list[Image.Image]
    segmentation: list[Image.Image]


Given = Tensor | Image.Image | tuple[Image.Image, Image.Image] | None  # one picture's plan, edges, (edges, segmentation)


def describe(plan: Tensor) -> Structure:
    """The plan tensor with its pictures."""
    edges, segmentation = (maps.cpu().numpy() for maps in decode_structure(plan))
    return Structure(plan, [Image.fromarray(e) for e in edges], [paletted(s) for s in segmentation])


def paletted(ids: np.ndarray) -> Image.Image:
    """Label ids uint8 (H, W) as a palette picture with one clear colour per id."""
    picture = Image.fromarray(ids, mode="L").convert("P") if ids.dtype != np.uint8 else Image.fromarray(ids)
    picture.putpalette(label_colours().reshape(-1).tolist())
    return picture


def label_colours() -> np.ndarray:
    """uint8 (256, 3): 0 is dark grey (background), 255 white (no label), the others are spread around the hue circle."""
    spread = [colorsys.hsv_to_rgb(i * 0.618 % 1, 0.45 + 0.35 * (i % 2), 0.95 - 0.25 * (i // 2 % 2)) for i in range(256)]
    colours = np.round(np.array(spread) * 255).astype(np.uint8)
    colours[0], colours[255] = 60, 255
    return colours


def per_picture(structure: object, count: int) -> list[Given] | Tensor:
    """What was given as `structure=`, one entry per picture; a tensor with more rows than pictures passes as it is."""
    if isinstance(structure, Structure):
        structure = structure.plan
    if structure is None:
        return [None] * count
    if isinstance(structure, Tensor):
        structure = structure[None] if structure.ndim == 3 else structure
        return list(structure) if len(structure) == count else structure
    if isinstance(structure, list):
        if len(structure) != count:
            raise UserError(f"structure has {len(structure)} entries for {count} pictures; give one each, None to predict")
        return structure
    if count != 1:
        raise UserError(f"one structure for {count} pictures; give a list with one entry each, None to predict")
    return [structure]


def apply(given: Given, predicted: Tensor | None, window: Window, size: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """One picture's plan: as given, or the prediction with its edges (and segmentation) replaced.

    Args:
        predicted: (1 + L, R, R), or None when there is no predictor.
        window, size: where the model looks, and the picture's (H, W): an edge map may be as large as the picture.
        shape: what the plan's shape must be, (1 + L, R, R).
    """
    if isinstance(given, Tensor):
        if given.shape != shape or not bool(torch.isfinite(given).all()):
            raise UserError(f"structure is {tuple(given.shape)}; a plan has shape {shape} and finite values in [-1, 1]")
        return given.float()
    edges, segmentation = given if isinstance(given, tuple) else (given, None)
    if not isinstance(edges, Image.Image) or not isinstance(segmentation, Image.Image | None):
        raise UserError(f"structure is a {type(edges).__name__}; give a plan tensor, a PIL edge map, or (edges, segmentation)")
    if predicted is None and segmentation is None:
        raise UserError("this checkpoint has no structure predictor: give a segmentation with the edges, or a plan tensor")
    resolution, labels = shape[-1], shape[0] - 1
    edge_map = _edges(edges, window, size, resolution)
    ids = np.zeros_like(edge_map) if segmentation is None else _ids(segmentation, window, size, resolution)
    worst = max([0, *(int(i) for i in np.unique(ids) if i != 255)])
    if worst >= labels:
        raise UserError(f"the segmentation holds label {worst}; this checkpoint has labels 0 to {labels - 1}")
    plan = encode_structure(torch.from_numpy(edge_map)[None], torch.from_numpy(ids)[None], labels)[0]
    if segmentation is None:
        plan[1:] = predicted[1:].to(plan)
    return plan


def _edges(picture: Image.Image, window: Window, size: tuple[int, int], resolution: int) -> np.ndarray:
    """uint8 (R, R). A line one pixel wide covers only a part of a larger pixel: reduced, it keeps its strength."""
    edges = _at_window(np.asarray(picture.convert("L")), window, size, resolution, "edge map")
    reduced = area_resize(edges, resolution) * max(1.0, len(edges) / resolution)
    return reduced.round().clip(0, 255).astype(np.uint8)


def _ids(picture: Image.Image, window: Window, size: tuple[int, int], resolution: int) -> np.ndarray:
    """uint8 (R, R); labels are taken from the nearest pixel, never mixed."""
    if picture.mode not in ("L", "P"):
        raise UserError(f"the segmentation has mode {picture.mode}; its pixels must be label ids, mode P or L")
    ids = _at_window(np.array(picture), window, size, resolution, "segmentation")
    nearest = (np.arange(resolution) * 2 + 1) * len(ids) // (2 * resolution)
    return np.ascontiguousarray(ids[nearest][:, nearest])


def _at_window(array: np.ndarray, window: Window, size: tuple[int, int], resolution: int, what: str) -> np.ndarray:
    if array.shape == (resolution, resolution):
        return array
    if array.shape == size:
        return cut(array, window)
    raise UserError(
        f"the {what} is {array.shape[1]} x {array.shape[0]}; it must be {resolution} x {resolution}, "
        f"or the picture's {size[1]} x {size[0]}"
    )
