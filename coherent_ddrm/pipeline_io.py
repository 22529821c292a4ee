"""What callers hand to the pipeline and get back, in the three forms of diffusers: PIL, numpy, torch.

Inside there is one form: uint8 (H, W, 3) and a bool hole (H, W). Floats are in [0, 1], as diffusers has it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from coherent_ddrm.crop import check_hole
from coherent_ddrm.errors import UserError

OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass
class Picture:
    """One picture to fill. `exact` keeps float input, so that known pixels come back without rounding."""

    pixels: np.ndarray  # uint8 (H, W, 3)
    hole: np.ndarray  # bool (H, W)
    exact: np.ndarray | None = None  # float32 (H, W, 3) in [0, 1]


def read_inputs(image: object, mask_image: object) -> list[Picture]:
    """Pictures with their holes. One mask serves all pictures; else there is one mask per picture.

    Raises UserError for sizes that differ, a mask that is empty or all hole, and values out of range.
    """
    images, masks = split_batch(image, "image", 3), split_batch(mask_image, "mask_image", 2)
    if len(masks) == 1:
        masks = masks * len(images)
    if not images or len(images) != len(masks):
        raise UserError(f"{len(images)} pictures and {len(masks)} masks; give one mask each, or one for all")
    pictures = []
    for i, (one, mask) in enumerate(zip(images, masks, strict=True)):
        (pixels, exact), hole = _pixels(one), to_hole(mask)
        check_hole(hole, pixels.shape[:2], f"mask_image {i}" if len(images) > 1 else "mask_image")
        pictures.append(Picture(pixels, hole, exact))
    return pictures


def split_batch(value: object, name: str, dims: int) -> list[object]:
    """A batch as a list of single items; `dims` is the number of axes of one array item without a batch axis."""
    if isinstance(value, list | tuple):
        return [item for part in value for item in split_batch(part, name, dims)]
    if isinstance(value, Image.Image):
        return [value]
    if isinstance(value, np.ndarray | torch.Tensor):
        if value.ndim == dims:
            return [value]
        if value.ndim in (3, 4):
            return list(value)
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    raise UserError(f"{name} is a {type(value).__name__}{shape}; give PIL images, numpy (H, W, 3) or torch (3, H, W)")


def _pixels(item: object) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 (H, W, 3), and the float original if there was one."""
    if isinstance(item, Image.Image):
        return np.asarray(item.convert("RGB")), None
    array = item.detach().cpu().permute(1, 2, 0).numpy() if isinstance(item, torch.Tensor) else item
    if array.ndim != 3 or array.shape[2] != 3:
        raise UserError(f"image has shape {tuple(item.shape)}; numpy pictures are (H, W, 3), torch pictures (3, H, W)")
    if array.dtype == np.uint8:
        return array, None
    exact = array.astype(np.float32)
    if not (exact.size and 0 <= exact.min() and exact.max() <= 1):
        raise UserError(f"image has values from {exact.min():.3g} to {exact.max():.3g}; floats must be in [0, 1]")
    return np.round(exact * 255).astype(np.uint8), exact


def to_hole(item: object) -> np.ndarray:
    """bool (H, W), True from mid grey upwards."""
    if isinstance(item, Image.Image):
        return np.asarray(item.convert("L")) >= 128
    array = item.detach().float().cpu().numpy() if isinstance(item, torch.Tensor) and item.is_floating_point() else item
    array = np.asarray(array).squeeze()
    if array.ndim != 2:
        raise UserError(f"mask_image has shape {tuple(item.shape)}; a mask is (H, W) or (1, H, W), one per picture")
    return array >= {"u": 128, "i": 128, "f": 0.5, "b": 0.5}[array.dtype.kind]


def check_output_type(output_type: str, pictures: Sequence[Picture]) -> None:
    """UserError for an unknown type, or for arrays of pictures that cannot be stacked."""
    if output_type not in OUTPUT_TYPES:
        raise UserError(f"unknown output_type {output_type!r}; choose one of {', '.join(OUTPUT_TYPES)}")
    if output_type != "pil" and len({picture.hole.shape for picture in pictures}) > 1:
        raise UserError(f"output_type {output_type!r} stacks the results, so all pictures need one size; use 'pil'")


def write_outputs(
    pictures: Sequence[Picture], results: Sequence[np.ndarray], output_type: str
) -> list[Image.Image] | np.ndarray | torch.Tensor:
    """Results uint8 (H, W, 3), one picture each, as PIL images, or floats (N, H, W, 3) or (N, 3, H, W) on the CPU."""
    if output_type == "pil":
        return [Image.fromarray(result) for result in results]
    floats = []
    for picture, result in zip(pictures, results, strict=True):
        value = result.astype(np.float32) / 255
        floats.append(value if picture.exact is None else np.where(picture.hole[..., None], value, picture.exact))
    stacked = np.stack(floats)
    return stacked if output_type == "np" else torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous()


def seed_keys(generator: object, pictures: int, candidates: int) -> list[tuple[int, int]]:
    """(seed, candidate) of every result, picture by picture: all that its random numbers depend on.

    An int is the seed of every picture. A torch generator gives one number per picture, in turn; a list has one entry
    per picture, or one per result. None takes a fresh seed.
    """
    if generator is None:
        generator = secrets.randbits(31)
    if not isinstance(generator, list | tuple):
        generator = [generator] * pictures
    if len(generator) == pictures * candidates and candidates > 1:
        return [(_seed(g), 0) for g in generator]
    if len(generator) != pictures:
        raise UserError(f"{len(generator)} generators for {pictures} pictures; give one, or one per picture")
    return [(seed, k) for seed in map(_seed, generator) for k in range(candidates)]


def _seed(generator: object) -> int:
    if isinstance(generator, torch.Generator):
        return int(torch.randint(2**63 - 1, (1,), generator=generator, device=generator.device))
    if isinstance(generator, int | np.integer) and not isinstance(generator, bool) and generator >= 0:
        return int(generator)
    raise UserError(f"generator is {generator!r}; give a torch.Generator or a seed, an integer from 0")
