"""Contact sheets: rows of small pictures under titles, enlarged so that a person sees them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP, TITLE, LABEL = 4, 18, (90, 240)  # pixels; least and most of a label


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], cell: int = 128, labels: Sequence[str] = ()
) -> np.ndarray:
    """Pictures (h, w, 3) uint8, one list per row, each drawn into a cell of `cell` pixels -> one uint8 picture.

    `titles` stand above the columns, `labels` beside the rows.
    """
    font = ImageFont.load_default(size=12)
    widest = max((round(font.getlength(label)) + 2 * GAP for label in labels), default=0)
    columns, left = max(len(row) for row in rows), min(max(widest, LABEL[0]), LABEL[1]) if labels else 0
    sheet = Image.new("RGB", (left + columns * (cell + GAP) + GAP, TITLE + len(rows) * (cell + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for j, title in enumerate(titles):
        draw.text((left + GAP + j * (cell + GAP), 2), title, fill="black", font=font)
    for i, label in enumerate(labels):
        draw.text((GAP, TITLE + GAP + i * (cell + GAP) + cell // 2 - 6), label, fill="black", font=font)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            place = (left + GAP + j * (cell + GAP), TITLE + GAP + i * (cell + GAP))
            sheet.paste(_into_cell(picture, cell), place)
    return np.asarray(sheet)


def _into_cell(picture: np.ndarray, cell: int) -> Image.Image:
    """Fit into a square, centred on white; whole-number enlargement stays sharp."""
    scale = cell / max(picture.shape[:2])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    drawn = Image.fromarray(picture).resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (cell, cell), "white")
    square.paste(drawn, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return square


def palette(labels: int = 256) -> np.ndarray:
    """(labels, 3) uint8 colours far apart; 0 (background) is black."""
    colours = [colorsys.hsv_to_rgb((i * 0.618) % 1, 0.6, 0.95) for i in range(labels)]
    table = (np.array(colours) * 255).astype(np.uint8)
    table[0] = 0
    return table


def plan_preview(edges: np.ndarray, segmentation: np.ndarray) -> np.ndarray:
    """A plan as a person reads it: white edges over label colours. (B, H, W) uint8 each -> (B, H, W, 3) uint8."""
    colours = palette()[np.asarray(segmentation)].astype(np.float32)
    strength = np.asarray(edges)[..., None].astype(np.float32) / 255
    return (0.6 * colours * (1 - strength) + 255 * strength).round().astype(np.uint8)
