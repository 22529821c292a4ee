"""Picture files as they are: their own mode, transparency and colour profile, with new pixels in the hole only.

A result keeps its input's size, mode (grey, alpha, 16 bit) and profile; known pixels are the input's own. Alpha is kept
as it is; only a hole that was erased to full transparency becomes opaque, or nobody would see the fill. EXIF rotation
is applied. Of an animation the first frame is used. 48-bit colour is read with 8 bits per channel: Pillow has no more.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from coherent_ddrm.errors import UserError
from coherent_ddrm.images import FORMATS, read_image

# The modes that a format can hold; what is not listed cannot be written.
MODES = {
    "PNG": ("L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": ("L", "LA", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("L", "RGB", "RGBA"),
    "PPM": ("L", "RGB"),
    "JPEG": ("L", "RGB"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "WEBP": {"lossless": True, "exact": True},
    "JPEG": {"quality": 95, "subsampling": 0},
}
WIDER = {"L": "RGB", "LA": "RGBA"}


def read_original(path: Path) -> Image.Image:
    """A picture in the mode that its result will have: L, LA, RGB, RGBA or I;16, turned as EXIF says."""
    read_image(path)  # raises ImageError, in words, for all that cannot be read
    with Image.open(path, formats=FORMATS) as opened:
        frames = getattr(opened, "n_frames", 1)
        opened.seek(0)
        picture = ImageOps.exif_transpose(opened)
    converted = picture.mode in ("CMYK", "YCbCr", "LAB", "HSV")  # such a profile would not fit the RGB result
    profile = None if converted else picture.info.get("icc_profile")
    transparent = "transparency" in picture.info or picture.mode in ("PA", "La", "RGBa")
    if picture.mode.startswith("I"):
        levels = np.asarray(picture)
        picture = Image.fromarray(levels.astype(np.uint16))
    elif transparent or picture.mode not in ("L", "LA", "RGB", "RGBA"):
        grey = picture.mode in ("1", "L", "La")
        picture = picture.convert({(0, 0): "RGB", (0, 1): "RGBA", (1, 0): "L", (1, 1): "LA"}[(grey, transparent)])
    picture.info = {"frames": frames, **({} if profile is None else {"icc_profile": profile})}
    return picture


def result_format(path: Path) -> str:
    """The format that the suffix of `path` names. UserError for one that cannot hold a result."""
    format = Image.registered_extensions().get(path.suffix.lower())
    if format not in MODES:
        reason = (
            "GIF holds 256 colours only" if format == "GIF" else f"its suffix {path.suffix!r} names no usable format"
        )
        raise UserError(f"{path}: {reason}; name the result .png, .webp, .tiff or .jpg")
    return format


def writable_mode(mode: str, format: str, path: Path) -> str:
    """The mode in which `format` stores a picture of `mode` without loss. UserError if there is none."""
    for candidate in (mode, WIDER.get(mode)):
        if candidate in MODES[format]:
            return candidate
    lost = "transparency" if mode in ("LA", "RGBA") else "16-bit levels"
    raise UserError(f"{path}: {format} cannot keep the picture's {lost}; name the result .png")


def paste(original: Image.Image, filled: np.ndarray, hole: np.ndarray) -> Image.Image:
    """`original`, in its own mode, with its hole pixels taken from `filled`, uint8 (H, W, 3)."""
    pixels = np.array(original)
    fill = Image.fromarray(filled)
    if original.mode == "I;16":
        pixels[hole] = np.asarray(fill.convert("L"), dtype=np.uint16)[hole] * 257
    elif original.mode == "L":
        pixels[hole] = np.asarray(fill.convert("L"))[hole]
    elif original.mode == "RGB":
        pixels[hole] = filled[hole]
    else:
        colours = np.asarray(fill.convert("L"))[..., None] if original.mode == "LA" else filled
        pixels[hole, :-1] = colours[hole]
        if not pixels[hole, -1].any():  # erased: keep nothing hidden
            pixels[hole, -1] = 255
    result = Image.fromarray(pixels)
    result.info = dict(original.info)
    return result


def encode(picture: Image.Image, format: str, path: Path) -> bytes:
    """The bytes of the result's file; lossless except JPEG."""
    mode = writable_mode(picture.mode, format, path)
    stored = picture if mode == picture.mode else picture.convert(mode)
    profile = picture.info.get("icc_profile")
    buffer = io.BytesIO()
    stored.save(buffer, format, **OPTIONS.get(format, {}), **({} if profile is None else {"icc_profile": profile}))
    return buffer.getvalue()
