"""The one border between picture files and tensors.

Outside: files, uint8 (H, W, 3) RGB arrays, masks whose white is the hole. Inside: float (B, 3, H, W) in [-1, 1] and
boolean holes. Pixel values are taken as sRGB; colour profiles are not applied, so that what was known stays equal
byte for byte.
"""

import io
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

Source = str | os.PathLike[str] | bytes
Policy = Literal["crop", "stretch", "pad"]

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # never EPS and the like, which run programs
Image.init()  # registers every reader, so that FORMATS can name them
MAX_PIXELS = 89_478_485  # Pillow's own threshold for a decompression bomb: 256 MB of RGB
PAD_VALUE = 255  # white around a padded picture; the ignored label around a padded label map


class ImageError(ValueError):
    """A picture cannot be used; the one-line message names the file and the rule it breaks."""


def read_image(
    source: Source, name: str | None = None, max_pixels: int = MAX_PIXELS, at_least: int | None = None
) -> np.ndarray:
    """A picture file (path or bytes) as uint8 (H, W, 3) RGB.

    Turned as EXIF says; grey, palette, CMYK and 16-bit pictures are converted; transparency is composited on white;
    of an animation the first frame counts. `at_least`: a JPEG may be decoded at 1/2, 1/4 or 1/8 size, both sides
    staying at or above this many pixels. Raises ImageError for an unreadable, truncated or too large file.
    """
    name = name or _name(source)
    with _open(source, name, max_pixels) as picture:
        if at_least and picture.format in ("JPEG", "MPO"):
            picture.draft(None, (at_least, at_least))
        rgb = _to_rgb(_decode(picture, name), name)
    return np.asarray(rgb)


def read_size(source: Source, name: str | None = None, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) after EXIF rotation, from the file's header alone. Raises ImageError."""
    name = name or _name(source)
    with _open(source, name, max_pixels) as picture:
        try:
            turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        except Exception:  # a damaged EXIF block: read_image() does not turn such a picture either
            turned = False
        width, height = picture.size
    return (width, height) if turned else (height, width)


def read_hole(source: Source, name: str | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A mask picture as bool (H, W): True (white, 128 and above) is the hole. Raises ImageError."""
    rgb = read_image(source, name, max_pixels)
    return np.asarray(Image.fromarray(rgb).convert("L")) >= 128


def read_labels(source: Source, name: str | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A label map, grey or palette PNG, as uint8 (H, W) of class ids. Raises ImageError for colour or ids above 255."""
    name = name or _name(source)
    with _open(source, name, max_pixels) as picture:
        if picture.mode not in ("1", "L", "P", "I;16", "I"):
            raise ImageError(f"{name}: a label map holds one class id per pixel, but its mode is {picture.mode}.")
        binary = picture.mode == "1"
        ids = np.asarray(_decode(picture, name))
    if ids.size and int(ids.max()) > 255:
        raise ImageError(f"{name}: class ids go to 255, but this label map holds {int(ids.max())}.")
    return ids.astype(np.uint8) if not binary else ids.astype(bool).astype(np.uint8)


def write_image(path: str | os.PathLike[str], image: np.ndarray, format: str | None = None, quality: int = 95) -> None:
    """Write uint8 (H, W, 3) or (H, W) beside `path`, then rename: a reader never meets half a file.

    The format follows the suffix unless named. WebP is written lossless; `quality` counts for JPEG only.
    """
    path = Path(path)
    format = format or Image.registered_extensions().get(path.suffix.lower())
    if format is None:
        raise ImageError(f"{path}: the suffix names no picture format; use .png, .webp or .jpg.")
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        temporary.write_bytes(encode(image, format, quality))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def encode(image: np.ndarray, format: str, quality: int = 95) -> bytes:
    """uint8 (H, W, 3) or (H, W) as the bytes of a PNG, WEBP (lossless) or JPEG file. Same pixels, same bytes."""
    options = {
        "PNG": {"compress_level": 6},
        "WEBP": {"lossless": True, "quality": 60, "method": 4, "exact": True},
        "JPEG": {"quality": quality, "subsampling": 0},
    }
    buffer = io.BytesIO()
    Image.fromarray(_checked(image)).save(buffer, format, **options.get(format.upper(), {}))
    return buffer.getvalue()


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) or (H, W) to (height, width): antialiased Lanczos when any side shrinks, bicubic otherwise."""
    old_height, old_width = _checked(image).shape[:2]
    if (old_height, old_width) == (height, width):
        return image
    shrinks = height < old_height or width < old_width
    how = Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize((width, height), how))


def resize_labels(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (H, W) class ids to (height, width) by the nearest pixel: ids are never mixed."""
    return np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))


def fit(image: np.ndarray, size: int, policy: Policy = "crop", labels: bool = False) -> np.ndarray:
    """Bring a picture (H, W, 3) or, with `labels`, an id map (H, W) to a square of `size` pixels.

    crop: the short side becomes `size`, the middle is kept. stretch: the aspect ratio is given up. pad: the long side
    becomes `size`, the rest is white (id 255 in a label map). All of one picture's maps meet pixel on pixel.
    """
    height, width = image.shape[:2]
    scale_to = resize_labels if labels else resize
    if policy == "stretch":
        return scale_to(image, size, size)
    if policy == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return scale_to(np.ascontiguousarray(image[top : top + side, left : left + side]), size, size)
    if policy == "pad":
        scale = size / max(height, width)
        small = scale_to(image, max(1, round(height * scale)), max(1, round(width * scale)))
        top, left = (size - small.shape[0]) // 2, (size - small.shape[1]) // 2
        square = np.full((size, size, *image.shape[2:]), PAD_VALUE, np.uint8)
        square[top : top + small.shape[0], left : left + small.shape[1]] = small
        return square
    raise ValueError(f"fit policy {policy!r} is unknown; use 'crop', 'stretch' or 'pad'.")


def to_tensor(image: "np.ndarray | torch.Tensor") -> "torch.Tensor":
    """uint8 (B, H, W, 3) or (H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]; a tensor stays on its device."""
    import torch

    pixels = torch.as_tensor(image if isinstance(image, torch.Tensor) else np.ascontiguousarray(image))
    if pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3:
        raise ValueError(
            f"to_tensor() takes uint8 (B, H, W, 3) or (H, W, 3), got {pixels.dtype} {tuple(pixels.shape)}."
        )
    if pixels.ndim == 3:
        pixels = pixels[None]
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()


def to_uint8(tensor: "torch.Tensor") -> np.ndarray:
    """float (B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3), rounded and clipped; the inverse of to_tensor()."""
    if tensor.ndim != 4 or tensor.shape[1] != 3 or not tensor.is_floating_point():
        raise ValueError(f"to_uint8() takes float (B, 3, H, W), got {tensor.dtype} {tuple(tensor.shape)}.")
    levels = tensor.detach().float().add(1.0).mul(127.5).round().clamp(0, 255)
    return levels.byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _name(source: Source) -> str:
    return "<bytes>" if isinstance(source, bytes) else os.fspath(source)


def _checked(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise ValueError(f"A picture is uint8 (H, W, 3) or (H, W), got {image.dtype} {image.shape}.")
    return image


def _open(source: Source, name: str, max_pixels: int) -> Image.Image:
    """Read the header only; refuse unknown formats and too many pixels before any pixel is decoded."""
    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name}: more pixels than the limit of {max_pixels:,}; shrink it or raise the limit."
        ) from error
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file.") from error
    except (
        Exception
    ) as error:  # on a damaged header Pillow's readers raise all sorts: OSError, SyntaxError, struct.error
        raise ImageError(f"{name}: not a readable picture ({_reason(error)}).") from error
    width, height = picture.size
    if width * height > max_pixels:
        picture.close()
        raise ImageError(
            f"{name}: {width} x {height} is more pixels than the limit of {max_pixels:,}; shrink it or raise the limit."
        )
    return picture


def _decode(picture: Image.Image, name: str) -> Image.Image:
    """All pixels of the first frame, turned as EXIF says."""
    try:
        picture.load()
    except Exception as error:  # as above: a damaged body raises nearly anything
        raise ImageError(f"{name}: damaged or cut short ({_reason(error)}).") from error
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # unreadable EXIF: the pixels are sound, and there is no rotation to apply
        return picture


def _reason(error: Exception) -> str:
    """One line that says the same on every run: Pillow's own text for an unknown format holds a memory address."""
    if isinstance(error, UnidentifiedImageError):
        return "its format is none of " + ", ".join(FORMATS) + ", or its header is damaged"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        levels = np.asarray(picture).astype(np.int64)
        if levels.size and not (0 <= levels.min() and levels.max() <= 65535):
            raise ImageError(f"{name}: grey values outside 0..65535; save it with 8 or 16 bits per pixel.")
        picture = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if picture.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no known range; save it with 8 or 16 bits per pixel.")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        coloured = picture.convert("RGBA")
        white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, coloured)
    return picture.convert("RGB")
