"""Structure plans as people handle them: predicted, looked at as pictures, edited, handed back.

A plan is (1 + L, R, R) in [-1, 1]: edges, then one channel per label. As pictures it is an edge map (mode L, white =
edge) and a segmentation (mode P, the pixel value is the label).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coherent_ddrm.crop import Window, area_resize, cut
from coherent_ddrm.errors import UserError
from coherent_ddrm.models.structure import IGNORE, decode_structure, encode_structure
from coherent_ddrm.sheets import palette


@dataclass
class Structure:
    """The plans of N results. `edges` and `segmentation` are previews; edit one and hand it back as `structure=`."""

    plan: Tensor  # (N, 1 + L, R, R) in [-1, 1]
    edges: list[Image.Image]
    segmentation: list[Image.Image]


Given = (
    Tensor | Image.Image | tuple[Image.Image, Image.Image] | None
)  # one picture's plan, edges, (edges, segmentation)


def describe(plan: Tensor) -> Structure:
    """The plan tensor with its pictures."""
    edges, segmentation = (maps.cpu().numpy() for maps in decode_structure(plan))
    return Structure(plan, [Image.fromarray(e) for e in edges], [paletted(s) for s in segmentation])


def paletted(ids: np.ndarray) -> Image.Image:
    """Label ids uint8 (H, W) as a palette picture with one clear colour per id."""
    picture = Image.fromarray(ids)
    picture.putpalette(palette().reshape(-1).tolist())
    return picture


@dataclass
class Place:
    """Where a plan belongs: the model's window in the picture, the picture's (H, W), the plan's (1 + L, R, R)."""

    window: Window
    size: tuple[int, int]
    shape: tuple[int, int, int]


def per_picture(structure: object, pictures: int, results: int) -> list[Given]:
    """What was given as `structure=`, one entry per picture, or one per result where a tensor has so many rows."""
    structure = structure.plan if isinstance(structure, Structure) else structure
    if structure is None:
        return [None] * pictures
    if isinstance(structure, Tensor):
        structure = list(structure if structure.ndim == 4 else structure[None])
        if len(structure) == results:
            return structure
    given = structure if isinstance(structure, list) else [structure]
    if len(given) != pictures:
        raise UserError(f"structure has {len(given)} entries for {pictures} pictures; give one each, None to predict")
    return given


def combine(given: list[Given], predicted: Tensor | None, places: list[Place]) -> Tensor:
    """Plans as given, or predicted, or predicted with edges replaced: (rows, 1 + L, R, R).

    Args:
        given: one entry per picture, or one plan per result.
        predicted: (B, 1 + L, R, R), a row per picture or per result, or None when there is no predictor.
        places: one per picture.
    """
    rows = max(len(given), 0 if predicted is None else len(predicted))
    result = []
    for row in range(rows):
        one = given[row * len(given) // rows]
        own = None if predicted is None else predicted[row * len(predicted) // rows]
        result.append(own if one is None and own is not None else _one(one, own, places[row * len(places) // rows]))
    return torch.stack([plan.cpu() for plan in result])


def _one(given: Given, predicted: Tensor | None, place: Place) -> Tensor:
    if isinstance(given, Tensor):
        if given.shape != place.shape or not bool(torch.isfinite(given).all()):
            raise UserError(f"structure has shape {tuple(given.shape)}; a plan is {place.shape}, finite, in [-1, 1]")
        return given.float()
    edges, segmentation = given if isinstance(given, tuple) else (given, None)
    if not isinstance(edges, Image.Image) or not isinstance(segmentation, Image.Image | None):
        raise UserError(
            f"structure is a {type(edges).__name__}; give a plan tensor, a PIL edge map, or (edges, segmentation)"
        )
    if predicted is None and segmentation is None:
        raise UserError(
            "this checkpoint has no structure predictor: give a segmentation with the edges, or a plan tensor"
        )
    edge_map = _edges(edges, place)
    ids = np.zeros_like(edge_map) if segmentation is None else _ids(segmentation, place)
    worst, labels = max([0, *(int(i) for i in np.unique(ids) if i != IGNORE)]), place.shape[0] - 1
    if worst >= labels:
        raise UserError(f"the segmentation holds label {worst}; this checkpoint has labels 0 to {labels - 1}")
    plan = encode_structure(torch.from_numpy(edge_map)[None], torch.from_numpy(ids)[None], labels)[0]
    if predicted is not None:  # labels that agree with the prediction keep its soft values: unedited means unchanged
        predicted = predicted.to(plan)
        agree = torch.from_numpy(ids).long() == predicted[1:].argmax(dim=0) if segmentation is not None else True
        plan[1:] = torch.where(torch.as_tensor(agree), predicted[1:], plan[1:])
    return plan


def _edges(picture: Image.Image, place: Place) -> np.ndarray:
    """uint8 (R, R). A line one pixel wide covers only a part of a larger pixel: reduced, it keeps its strength."""
    edges = _at_window(np.asarray(picture.convert("L")), place, "edge map")
    resolution = place.shape[-1]
    reduced = area_resize(edges, resolution) * max(1.0, len(edges) / resolution)
    return reduced.round().clip(0, 255).astype(np.uint8)


def _ids(picture: Image.Image, place: Place) -> np.ndarray:
    """uint8 (R, R); labels are taken from the nearest pixel, never mixed."""
    if picture.mode not in ("L", "P"):
        raise UserError(f"the segmentation has mode {picture.mode}; its pixels must be label ids, mode P or L")
    ids = _at_window(np.array(picture), place, "segmentation")
    resolution = place.shape[-1]
    nearest = (np.arange(resolution) * 2 + 1) * len(ids) // (2 * resolution)
    return np.ascontiguousarray(ids[nearest][:, nearest])


def _at_window(array: np.ndarray, place: Place, what: str) -> np.ndarray:
    resolution = place.shape[-1]
    if array.shape == (resolution, resolution):
        return array
    if array.shape == place.size:
        return cut(array, place.window)
    raise UserError(
        f"the {what} is {array.shape[1]} x {array.shape[0]}; it must be {resolution} x {resolution}, "
        f"or the picture's {place.size[1]} x {place.size[0]}"
    )
