"""Small random pipelines and pictures for the tests of the pipeline and the command line."""

import numpy as np
import torch
from PIL import Image

from coherent_ddrm.models.dit import make_dit
from coherent_ddrm.models.structure import StructurePredictor
from coherent_ddrm.pipeline import CoherentInpaintPipeline

LABELS, RESOLUTION = 3, 32


def make_pipeline(planner: bool = True, **options) -> CoherentInpaintPipeline:
    """Seeded random weights, none zero, so that every input has an effect on the result."""
    torch.manual_seed(0)
    net = make_dit("tiny", **{"structure_channels": 1 + LABELS, "reach": 0, **options})
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.08 * torch.randn_like(weight))
    predictor = StructurePredictor(num_labels=LABELS, decoder_dim=32) if planner else None
    pipe = CoherentInpaintPipeline(net.eval(), predictor and predictor.eval(), RESOLUTION, ["a", "b", "c"], steps=3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_picture(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Random pixels: a known pixel that moved would not go unseen."""
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    return Image.fromarray(pixels, mode=None)


def make_hole(height: int, width: int, box: tuple[float, float, float, float] = (0.2, 0.3, 0.7, 0.8)) -> np.ndarray:
    """bool (H, W); box = top, left, bottom, right as shares of the picture."""
    hole = np.zeros((height, width), bool)
    top, bottom = (round(share * height) for share in box[::2])
    left, right = (round(share * width) for share in box[1::2])
    hole[top:bottom, left:right] = True
    return hole


def make_mask(hole: np.ndarray) -> Image.Image:
    """White = fill."""
    return Image.fromarray(hole.astype(np.uint8) * 255)


def difference(a, b) -> np.ndarray:
    """int (H, W): the largest difference over the channels."""
    gap = np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))
    return gap if gap.ndim == 2 else gap.max(axis=-1)
