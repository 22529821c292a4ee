"""`coherent-ddrm demo`: shipped photographs with holes, filled by the shipped checkpoint, on one labelled sheet."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from coherent_ddrm.crop import check_hole
from coherent_ddrm.errors import UserError
from coherent_ddrm.images import read_hole, read_image, write_image
from coherent_ddrm.sheets import contact_sheet, plan_preview

if TYPE_CHECKING:
    from coherent_ddrm.pipeline import CoherentInpaintPipeline, InpaintOutput

GREY = 128
CELL = 192  # pixels on the sheet per picture


def find_pairs(folder: Path | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pictures uint8 (H, W, 3) with holes bool (H, W): name.jpg or name.png beside name.hole.png.

    `folder` is docs/demo of the repository unless given. UserError when it holds no pair or sizes differ.
    """
    folder = folder or Path(__file__).resolve().parent.parent / "docs" / "demo"
    holes = sorted(folder.glob("*.hole.png"))
    if not holes:
        raise UserError(f"{folder}: no name.hole.png here; demo pictures are name.jpg with name.hole.png")
    pairs = []
    for path in holes:
        name = path.name.removesuffix(".hole.png")
        picture = next((p for p in (folder / f"{name}{suffix}" for suffix in (".jpg", ".png")) if p.is_file()), None)
        if picture is None:
            raise UserError(f"{path}: no {name}.jpg or {name}.png beside it")
        pixels, hole = read_image(picture), read_hole(path)
        check_hole(hole, pixels.shape[:2], str(path))
        pairs.append((pixels, hole))
    return pairs


def write_sheet(
    pairs: list[tuple[np.ndarray, np.ndarray]], pipe: CoherentInpaintPipeline, args: Namespace, path: Path
) -> InpaintOutput:
    """Inpaint all pairs in one batch and write the sheet: input, plan, result, truth, one row per picture."""
    output = pipe(
        image=[Image.fromarray(pixels) for pixels, _ in pairs],
        mask_image=[hole for _, hole in pairs],
        num_inference_steps=args.steps,
        generator=args.seed,
        sampler=args.sampler,
    )
    titles = ["input", "plan", "result", "truth"]
    plans = None
    if output.structure is None:
        titles.remove("plan")
    else:
        maps = (output.structure.edges, output.structure.segmentation)
        plans = plan_preview(*(np.stack([np.asarray(one) for one in kind]) for kind in maps))
    rows = []
    for i, (pixels, hole) in enumerate(pairs):
        given = np.where(hole[..., None], np.uint8(GREY), pixels)
        rows.append([given, *([] if plans is None else [plans[i]]), np.asarray(output.images[i]), pixels])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, contact_sheet(rows, titles, CELL))
    return output
