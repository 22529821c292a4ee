"""A picture of any size, worked on at the model's: cut a square around the hole, shrink, fill, enlarge, put back.

The square is `CONTEXT` times the hole's bounding box (one box around all holes), never smaller than the model's
resolution, and slides to stay inside the picture. A picture hardly larger than the model's resolution is taken whole.
Where the square has to be larger than the picture (a hole nearly as tall as a wide picture, or the whole of a picture
that is not square) pixels and hole are mirrored at the border: proportions stay, no colour is invented, and what is
filled there is thrown away.

Arrays: pictures uint8 (H, W, 3), holes bool (H, W).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from coherent_ddrm.errors import UserError
from coherent_ddrm.images import resize

CONTEXT = 1.6  # side of the square over side of the hole's box
TIGHT = 1.25  # so much context must do before mirrored pixels are used instead
WHOLE = 1.5  # a picture up to so many times the model's resolution is taken whole
BLANK = 128  # what a hole pixel is set to: its own colour must not reach the network


@dataclass(frozen=True)
class Window:
    """A square of `side` pixels with its corner at (top, left); beyond the border the picture is mirrored."""

    top: int
    left: int
    side: int


def check_hole(hole: np.ndarray, size: tuple[int, int], name: str) -> None:
    """UserError unless the hole has the picture's (H, W), a missing and a known pixel."""
    if hole.shape != size:
        raise UserError(
            f"{name} is {hole.shape[1]} x {hole.shape[0]} but its picture is {size[1]} x {size[0]}; "
            "they must have the same size"
        )
    if not hole.any():
        raise UserError(f"{name} has no white pixel: there is nothing to fill; white marks the hole")
    if hole.all():
        raise UserError(f"{name} is white everywhere: no pixel is known; white marks the hole, black what to keep")


def choose_window(hole: np.ndarray, resolution: int) -> Window:
    """The square to work on, for a hole (H, W) with at least one pixel and a model of `resolution` pixels."""
    height, width = hole.shape
    rows, columns = np.flatnonzero(hole.any(axis=1)), np.flatnonzero(hole.any(axis=0))
    short, long = sorted((height, width))
    box = max(np.ptp(rows), np.ptp(columns)) + 1
    wanted = max(math.ceil(CONTEXT * box), resolution)
    if long <= WHOLE * resolution:
        side = long
    else:
        side = min(wanted, short if TIGHT * box <= short else long)
    return Window(_start(rows, height, side), _start(columns, width, side), side)


def _start(extent: np.ndarray, size: int, side: int) -> int:
    """Where the square begins on one axis: around the middle of `extent`, inside the picture, or centred over it."""
    if side >= size:
        return -((side - size) // 2)
    return min(max((int(extent[0]) + int(extent[-1]) + 1 - side) // 2, 0), size - side)


def cut(array: np.ndarray, window: Window) -> np.ndarray:
    """(H, W, ...) -> (side, side, ...), mirrored beyond the border."""
    offsets = np.arange(window.side)
    rows, columns = _mirror(window.top + offsets, array.shape[0]), _mirror(window.left + offsets, array.shape[1])
    return array[rows][:, columns]


def _mirror(index: np.ndarray, size: int) -> np.ndarray:
    index = index % (2 * size)
    return np.minimum(index, 2 * size - 1 - index)


def area_resize(array: np.ndarray, size: int) -> np.ndarray:
    """(side, side) or (side, side, C) -> float (size, size[, C]): the mean over the area that each new pixel covers."""
    side = len(array)
    if side == size:
        return array.astype(np.float32)
    border = np.arange(size + 1) * side / size
    low, high = np.maximum(border[:-1, None], np.arange(side)), np.minimum(border[1:, None], np.arange(side) + 1)
    weights = ((high - low).clip(min=0) * size / side).astype(np.float32)  # (size, side)
    if array.ndim == 2:
        return weights @ array.astype(np.float32) @ weights.T
    return np.stack([area_resize(array[..., c], size) for c in range(array.shape[-1])], axis=-1)


def shrink(picture: np.ndarray, hole: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture (side, side, 3) and hole (side, side) -> both at `size`.

    A new pixel is a hole if any part of a hole pixel falls into it, and hole pixels are blanked before and after:
    what the network sees as known is made of known pixels only.
    """
    small_hole = area_resize(hole, size) > 0
    small = area_resize(np.where(hole[..., None], np.uint8(BLANK), picture), size)
    small[small_hole] = BLANK
    return small.round().astype(np.uint8), small_hole


def to_model(
    picture: np.ndarray, hole: np.ndarray, size: int, name: str = "mask_image"
) -> tuple[Window, np.ndarray, np.ndarray]:
    """The window, and picture (size, size, 3) and hole (size, size) in it. UserError if no pixel is known there."""
    window = choose_window(hole, size)
    small, small_hole = shrink(cut(picture, window), cut(hole, window), size)
    if small_hole.all():
        raise UserError(
            f"{name} leaves no pixel whole at the model's {size} x {size}: its specks are too fine for "
            f"{window.side} x {window.side} pixels; fill parts of the picture one by one"
        )
    return window, small, small_hole


def put_back(picture: np.ndarray, hole: np.ndarray, fill: np.ndarray, window: Window) -> np.ndarray:
    """A copy of `picture` with its hole pixels taken from `fill` (size, size, 3), enlarged to the window (bicubic)."""
    height, width = hole.shape
    top, left = max(window.top, 0), max(window.left, 0)
    bottom, right = min(window.top + window.side, height), min(window.left + window.side, width)
    filled = resize(fill, window.side, window.side)
    filled = filled[top - window.top : bottom - window.top, left - window.left : right - window.left]
    result = picture.copy()
    result[top:bottom, left:right][hole[top:bottom, left:right]] = filled[hole[top:bottom, left:right]]
    return result
