"""Structure of a picture: soft edges and segmentation ids, the targets of stage one.

Edges are Canny's (1986) at several scales, on each colour channel, weighted by the step they mark: a silhouette
against a wall is strong, a fold weak, and two colours of one brightness still meet in an edge.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = 255  # segmentation id of a pixel without a label
SIGMAS = (1.0, 2.0)  # pixels at twice the map's resolution
LOW, HIGH = 0.18, 0.45  # hysteresis thresholds on kornia's Sobel magnitude (a unit step reaches about 2.6)
FULL_STEP = 1.6  # a magnitude from here on counts as full strength


def edges(images: np.ndarray) -> np.ndarray:
    """Soft edges of pictures given at twice the wanted resolution.

    images: (B, 2H, 2W, 3) uint8. Returns (B, H, W) uint8, 0 = none, 255 = strong at every scale.
    """
    import torch  # late: the shard tools print their help without it

    if (
        images.ndim != 4
        or images.shape[3] != 3
        or images.dtype != np.uint8
        or images.shape[1] % 2
        or images.shape[2] % 2
    ):
        raise ValueError(f"edges() takes uint8 (B, 2H, 2W, 3) pictures, got {images.dtype} {images.shape}.")
    planes = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return soft_edges(planes)[:, 0].mul(255).round().byte().numpy()


def soft_edges(images: Tensor) -> Tensor:
    """The same of uint8 (B, 3, 2H, 2W) on any device, (B, 1, H, W) in [0, 1], not rounded.

    Canny runs at double resolution because its one-pixel lines, reduced, stay thin and lose their staircase.
    """
    import torch
    from kornia.filters import canny
    from torch.nn.functional import avg_pool2d

    batch, _, height, width = images.shape
    channels = images.reshape(-1, 1, height, width).float() / 255  # (3B, 1, 2H, 2W)
    strength = torch.zeros_like(channels)
    for sigma in SIGMAS:
        side = 2 * round(3 * sigma) + 1
        magnitude, levels = canny(channels, LOW / sigma, HIGH / sigma, (side, side), (sigma, sigma), hysteresis=False)
        lines = torch.from_numpy(np.stack([connected(level) for level in levels[:, 0].cpu().numpy()]))[:, None]
        # A wider blur flattens the same step about in proportion: sigma makes scales comparable.
        strength += lines.to(images.device) * (magnitude * sigma / FULL_STEP).clamp(max=1)
    strength = strength.reshape(batch, 3, height, width).amax(1, keepdim=True) / len(SIGMAS)  # (B,1,2H,2W)
    return (2 * avg_pool2d(strength, 2)).clamp(max=1)  # a line crossing a 2x2 block covers half of it


def connected(levels: np.ndarray) -> np.ndarray:
    """Hysteresis: weak pixels (0.5) that touch a strong one (1) through weak ones. (H, W) float -> (H, W) bool.

    The same answer as kornia's own, which dilates until nothing changes and takes most of Canny's time.
    """
    count, label = cv2.connectedComponents((levels > 0).astype(np.uint8), connectivity=8)
    strong = np.zeros(count, bool)
    strong[label[levels == 1]] = True
    strong[0] = False  # the background is no line
    return strong[label]


class SegmentationModel:
    """A Hugging Face semantic segmentation model, by name or folder. Needs transformers; loads no pickles."""

    def __init__(self, name: str) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

        cards = torch.cuda.device_count()
        self.device = (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % cards) if cards else torch.device("cpu")
        )
        self.processor = AutoImageProcessor.from_pretrained(name)
        self.model = AutoModelForSemanticSegmentation.from_pretrained(name, use_safetensors=True).to(self.device).eval()

    @staticmethod
    def label_names(name: str) -> list[str]:
        """The names of its classes, by id, from its config alone. Raises ImportError or OSError, readable."""
        try:
            from transformers import AutoConfig
        except ImportError as error:
            raise ImportError("this needs the package transformers: pip install coherent-ddrm[segment]") from error
        names = {int(i): label for i, label in AutoConfig.from_pretrained(name).id2label.items()}
        return [names.get(i, f"label {i}") for i in range(max(names) + 1)]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) -> uint8 (H, W) class ids."""
        import torch

        inputs = self.processor(images=image.copy(), return_tensors="pt").to(self.device)
        with torch.inference_mode():
            outputs = self.model(**inputs)
        sizes = [image.shape[:2]]
        ids = self.processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)[0]
        return ids.cpu().numpy().astype(np.uint8)
