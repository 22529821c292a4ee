"""The forms of pictures that restoration takes and returns: PIL, uint8 numpy, torch; sizes brought to the prior's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coherent_ddrm.errors import UserError
from coherent_ddrm.images import fit


def read_pictures(image: Any, side: int | None) -> Tensor:
    """(B, C, H, W) in [-1, 1] of pictures brought to `side` (None = left as they are), or a tensor as it is."""
    if isinstance(image, Tensor):
        if not image.is_floating_point() or not bool(image.isfinite().all()):
            raise UserError("a tensor must hold finite floats, a measurement on the [-1, 1] scale")
        return image.float()
    arrays = [_array(one) for one in (image if isinstance(image, list | tuple) else [image])]
    arrays = [fit(array, side) for array in arrays] if side else arrays
    if not arrays or len({array.shape for array in arrays}) > 1:
        raise UserError(f"{len(arrays)} pictures of sizes {sorted({a.shape for a in arrays})}; give one size at a time")
    pixels = torch.from_numpy(np.stack(arrays))
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def read_masks(mask_image: Any, pictures: int, side: int | None) -> Tensor:
    """(pictures, 1, H, W), 1 = white, of one mask each or one for all, brought to `side` as the pictures are."""
    masks = mask_image if isinstance(mask_image, list | tuple) else [mask_image]
    masks = [_array(mask, grey=True) for mask in masks]
    masks = [fit(mask, side, labels=True) for mask in masks] if side else masks
    if len(masks) not in (1, pictures) or len({mask.shape for mask in masks}) > 1:
        raise UserError(f"{len(masks)} masks for {pictures} pictures; give one mask each, of one size, or one for all")
    return torch.from_numpy(np.stack(masks) >= 128)[:, None].float().expand(pictures, -1, -1, -1)


def _array(one: Any, grey: bool = False) -> np.ndarray:
    """uint8 (H, W, 3), or (H, W) for a grey picture."""
    if isinstance(one, Image.Image):
        return np.asarray(one.convert("L" if grey or one.mode in ("L", "1") else "RGB"))
    if isinstance(one, np.ndarray) and one.dtype == bool:
        one = one.astype(np.uint8) * 255
    if not isinstance(one, np.ndarray) or one.dtype != np.uint8 or one.ndim not in (2, 3):
        raise UserError(
            f"a picture is a {type(one).__name__}; give PIL, uint8 numpy (H, W[, 3]), or a torch measurement"
        )
    return one


def write_pictures(x0: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
    """x0 (N, C, H, W) in [-1, 1] as PIL pictures, or as floats in [0, 1]: "np" (N, H, W, C), "pt" (N, C, H, W)."""
    unit = (x0.float().cpu().clamp(-1, 1) + 1) / 2
    if output_type == "pt":
        return unit
    pixels = unit.permute(0, 2, 3, 1).numpy()
    if output_type == "np":
        return pixels
    levels = (255 * pixels).round().astype(np.uint8)
    return [Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture) for picture in levels]
