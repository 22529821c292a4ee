"""From what a person has, pictures, masks and an operator's name, to an observation that is sure to fit the prior.

Pictures are PIL, uint8 numpy, lists of these, or a torch tensor on the [-1, 1] scale, which is taken as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from coherent_ddrm.errors import UserError
from coherent_ddrm.images import fit
from coherent_ddrm.operators import (
    Chain,
    Composition,
    Inpainting,
    LinearOperator,
    Observation,
    Operator,
    channels_of_y,
    hole_grid,
    make_operator,
    size_from_y,
)
from coherent_ddrm.pipeline_io import split_batch, to_hole
from coherent_ddrm.priors import Prior
from coherent_ddrm.rng import keyed_generator, normal

Pictures = list[np.ndarray] | Tensor  # uint8 (H, W, 3) each, of one size, or (B, ...)
Size = tuple[int, int]  # (H, W)


def read_pictures(image: Any) -> Pictures:
    """UserError for what is no picture, and for pictures of several sizes."""
    if isinstance(image, Tensor):
        if not image.is_floating_point() or not bool(image.isfinite().all()):
            raise UserError("a tensor must hold finite floats, a measurement on the [-1, 1] scale")
        return image.float()
    pictures = [_to_rgb(one) for one in (image if isinstance(image, list | tuple) else [image])]
    sizes = sorted({f"{p.shape[1]} x {p.shape[0]}" for p in pictures})
    if len(sizes) != 1:
        raise UserError(f"{len(pictures)} pictures of sizes {', '.join(sizes) or '(none)'}; give one size at a time")
    return pictures


def measure(
    pictures: Pictures,
    operator: str | Operator,
    mask_image: Any,
    sigma_y: float,
    degrade: bool,
    prior: Prior,
    keys: Sequence[tuple[int, int]],
    device: torch.device,
) -> tuple[Observation, Size]:
    """What is known of the pictures, a row each, and the size of the pictures that are to be restored.

    With `degrade` the pictures are clean: they are brought to the prior's size and measured here, noise keyed by
    `keys`, one per picture; without, they are y.

    Raises:
        UserError: pictures, masks, operator and prior do not fit each other.
        ValueError: as `make_operator` does.
    """
    hole = None
    if mask_image is not None:
        hole = read_region(mask_image, pictures, prior.resolution if degrade else None).to(device)
    if degrade:
        x = to_model(pictures, prior.channels, prior.resolution, grey=prior.channels == 1).to(device)
        size = tuple(x.shape[-2:])
        if hole is not None and isinstance(operator, str) and (grid := hole_grid(operator, size)) != size:
            hole = F.interpolate(hole, grid, mode="nearest-exact")
    else:
        channels = channels_of_y(operator, prior.channels) if isinstance(operator, str) else prior.channels
        x = to_model(pictures, channels, None, grey=False).to(device)
        size = _size_from(operator, x)
    if hole is not None and not bool(hole.flatten(1).any(dim=1).all()):
        raise UserError("a mask hides nothing (of the part of the picture that is kept); white = missing")
    if isinstance(operator, str):
        operator = make_operator(operator, size, hole=hole)
    operator = operator.to(device)
    if isinstance(operator, Inpainting) and len(operator.hole) == 1:
        operator = Inpainting(operator.hole.float().expand(len(x), -1, -1, -1))
    if not degrade:
        y = _hide(operator, x)
        _check_shape(operator, y, prior.channels, size)
        return Observation(y, operator, sigma_y), size
    if x.shape[1] != prior.channels:
        raise UserError(f"the pictures have {x.shape[1]} channels, the prior {prior.channels}")
    y = operator.A(x)
    if sigma_y:
        n = normal(y, [keyed_generator(*key, 2) for key in keys])  # 2: apart from the sampler's noise
        y = _hide(operator, y + sigma_y * n)
    return Observation(y, operator, sigma_y), size


def to_model(pictures: Pictures, channels: int, side: int | None, grey: bool) -> Tensor:
    """(B, channels, H, W) in [-1, 1], brought to `side` unless None; a tensor as it is.

    grey: colour may be given up where one channel is wanted.
    """
    if isinstance(pictures, Tensor):
        return pictures
    arrays = [fit(picture, side) if side else picture for picture in pictures]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    if channels == 1:
        if not grey and not bool((pixels == pixels[:, :1]).all()):
            raise UserError("this measurement has one channel, but the picture is in colour; is it the clean one?")
        pixels = pixels.float().mean(dim=1, keepdim=True)
    return pixels.float() / 127.5 - 1


def read_region(mask_image: Any, pictures: Pictures, side: int | None) -> Tensor:
    """(B, 1, H, W), 1 = white: a mask for each picture, or one for all, of the pictures' size and brought to `side`."""
    masks = [to_hole(mask) for mask in split_batch(mask_image, "mask_image", 2)]
    given = tuple(pictures.shape[-2:]) if isinstance(pictures, Tensor) else pictures[0].shape[:2]
    if len(masks) not in (1, len(pictures)):
        raise UserError(f"{len(masks)} masks for {len(pictures)} pictures; give one mask each, or one for all")
    for mask in masks:
        if mask.shape != given:
            raise UserError(
                f"a mask is {mask.shape[1]} x {mask.shape[0]}, the picture {given[1]} x {given[0]}; they must be alike"
            )
    if side and not isinstance(pictures, Tensor):
        masks = [fit(mask.astype(np.uint8), side, labels=True) for mask in masks]
    region = torch.from_numpy(np.stack(masks).astype(np.float32))[:, None]
    return region.expand(len(pictures), -1, -1, -1)


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


def _to_rgb(one: Any) -> np.ndarray:
    """uint8 (H, W, 3)."""
    if isinstance(one, np.ndarray) and one.dtype == np.uint8 and (one.ndim == 2 or one.shape[2:] in ((3,), (4,))):
        one = Image.fromarray(one)
    if not isinstance(one, Image.Image):
        what = f" of {one.dtype}, shape {one.shape}" if isinstance(one, np.ndarray) else ""
        raise UserError(
            f"a picture is a {type(one).__name__}{what}; give PIL, uint8 numpy (H, W[, 3]), or a torch measurement"
        )
    return np.asarray(one.convert("RGB"))


def _size_from(operator: str | Operator, y: Tensor) -> Size:
    """(H, W) of the picture that y was made from."""
    if isinstance(operator, str):
        return size_from_y(operator, y.shape)
    return tuple((operator.pinv(y) if isinstance(operator, LinearOperator) else y).shape[-2:])


def _hide(operator: Operator, y: Tensor) -> Tensor:
    """y with nothing where its operator measures nothing: files hold some pixel under every hole."""
    last = operator
    if isinstance(operator, Composition | Chain):
        last = operator.parts[0 if isinstance(operator, Composition) else -1]
    return last.A(y) if isinstance(last, Inpainting) else y


def _check_shape(operator: Operator, y: Tensor, channels: int, size: Size) -> None:
    """UserError unless y is shaped as the operator would make it of the prior's pictures."""
    expected = tuple(operator.A(torch.zeros(1, channels, *size, device=y.device)).shape[1:])
    if tuple(y.shape[1:]) != expected:
        raise UserError(
            f"y has shape {tuple(y.shape[1:])}, but of pictures with {channels} channels and {size[1]} x {size[0]} "
            f"pixels this operator makes {expected}; is the picture the clean one?"
        )
