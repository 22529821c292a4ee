"""The border between files and tensors: every kind of picture, typed errors, exact round trips."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from coherent_ddrm.images import (
    ImageError,
    encode,
    fit,
    read_hole,
    read_image,
    read_labels,
    read_size,
    resize,
    to_tensor,
    to_uint8,
    write_image,
)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def file_bytes(picture: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "PPM"])
def test_lossless_files_give_their_pixels(format):
    pixels = noise(20, 31, 3)
    assert np.array_equal(read_image(file_bytes(Image.fromarray(pixels), format)), pixels)


def test_lossless_webp_and_jpeg():
    pixels = noise(20, 31, 3)
    assert np.array_equal(read_image(encode(pixels, "WEBP")), pixels)
    flat = np.full((20, 31, 3), (200, 30, 90), np.uint8)
    assert np.abs(read_image(encode(flat, "JPEG")).astype(int) - flat).max() <= 3


def test_grey_and_palette_and_bilevel():
    grey = noise(9, 11)
    assert np.array_equal(read_image(file_bytes(Image.fromarray(grey), "PNG")), np.repeat(grey[..., None], 3, 2))
    flat = Image.new("RGB", (8, 8), (10, 200, 30)).quantize(4)
    assert read_image(file_bytes(flat, "PNG"))[0, 0].tolist() == [10, 200, 30]
    bilevel = Image.fromarray(grey >= 128)
    assert set(np.unique(read_image(file_bytes(bilevel, "PNG")))) == {0, 255}


def test_cmyk_jpeg_and_tiff():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    assert read_image(file_bytes(cmyk, "TIFF"))[3, 3].tolist() == [255, 0, 0]
    red = read_image(file_bytes(cmyk, "JPEG", quality=100))[3, 3]
    assert red[0] > 245 and red[1] < 10 and red[2] < 10


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format):
    levels = np.array([[0, 257, 32768, 65535]], np.uint16)
    assert read_image(file_bytes(Image.fromarray(levels), format))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floating_point_pixels_are_refused():
    with pytest.raises(ImageError, match="floating-point"):
        read_image(file_bytes(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode):
    if mode == "P":
        picture = Image.new("P", (6, 6), 1)
        picture.putpalette([0, 0, 0, 9, 9, 9])
        data = file_bytes(picture, "PNG", transparency=1)
    else:
        data = file_bytes(Image.new(mode, (6, 6), (0,) * len(mode)), "PNG")
    assert (read_image(data) == 255).all()


def test_half_transparency_is_composited():
    data = file_bytes(Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG")
    assert abs(int(read_image(data)[0, 0, 0]) - 127) <= 1


def test_exif_rotation_is_applied():
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:5] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees
    data = file_bytes(Image.fromarray(pixels), "PNG", exif=exif)
    shown = read_image(data)
    assert shown.shape == (20, 10, 3) and read_size(data) == (20, 10)
    assert shown[:, 5:].min() == 255 and shown[:, :5].max() == 0


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = file_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_image(data)[0, 0].tolist() == [255, 0, 0]


def test_a_large_jpeg_may_be_decoded_smaller_but_not_below_the_wish():
    data = encode(np.repeat(np.repeat(noise(50, 60, 3), 8, 0), 8, 1), "JPEG")  # 400 x 480
    assert read_image(data).shape == (400, 480, 3)
    assert read_image(data, at_least=90).shape == (100, 120, 3)
    assert read_image(data, at_least=300).shape == (400, 480, 3)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_truncated_files_are_refused_by_name(format, tmp_path):
    path = tmp_path / "cut.picture"
    data = encode(noise(64, 64, 3), format)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"cut\.picture"):
        read_image(path)


@pytest.mark.parametrize(
    "data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + bytes(30), b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(ImageError) as caught:
        read_image(data, name="odd.png")
    assert str(caught.value).startswith("odd.png: ") and "\n" not in str(caught.value)


def test_a_missing_file_is_an_image_error(tmp_path):
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "absent.png")


def test_too_many_pixels_are_refused_before_decoding():
    bomb = file_bytes(Image.new("1", (6000, 5000)), "PNG")
    with pytest.raises(ImageError, match="6000 x 5000 is more pixels than the limit of 1,000,000"):
        read_image(bomb, max_pixels=1_000_000)


def test_pillows_own_bomb_limit_is_an_image_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="more pixels"):
        read_image(file_bytes(Image.new("L", (100, 100)), "PNG"))


def test_white_is_the_hole():
    mask = np.array([[0, 127, 128, 255]], np.uint8)
    assert read_hole(encode(mask, "PNG")).tolist() == [[False, False, True, True]]


def test_label_maps_keep_ids():
    ids = np.array([[0, 3, 255]], np.uint8)
    assert np.array_equal(read_labels(encode(ids, "PNG")), ids)
    palette = Image.fromarray(ids)
    palette = palette.convert("P")
    palette.putdata([0, 3, 7])
    assert read_labels(file_bytes(palette, "PNG")).tolist() == [[0, 3, 7]]
    with pytest.raises(ImageError, match="one class id per pixel"):
        read_labels(encode(noise(4, 4, 3), "PNG"))
    with pytest.raises(ImageError, match="holds 300"):
        read_labels(file_bytes(Image.fromarray(np.full((2, 2), 300, np.uint16)), "PNG"))


def test_written_pictures_are_whole_and_leave_nothing_behind(tmp_path):
    pixels = noise(12, 10, 3)
    for name in ("a.png", "a.webp"):
        write_image(tmp_path / name, pixels)
        assert np.array_equal(read_image(tmp_path / name), pixels)
    with pytest.raises(ImageError, match="suffix"):
        write_image(tmp_path / "a.xyz", pixels)
    with pytest.raises(ValueError, match="float"):
        write_image(tmp_path / "b.png", pixels.astype(np.float32))
    assert sorted(os.listdir(tmp_path)) == ["a.png", "a.webp"]


def test_uint8_tensor_uint8_is_the_identity():
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    tensor = to_tensor(every)
    assert tensor.shape == (1, 3, 16, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(to_uint8(tensor), every)


def test_tensor_border_cases():
    assert to_tensor(noise(5, 7, 3)).shape == (1, 3, 5, 7)
    assert to_uint8(torch.full((1, 3, 1, 1), 1.7)).max() == 255  # clipped, not wrapped
    assert to_uint8(torch.full((1, 3, 1, 1), -9.0)).min() == 0
    with pytest.raises(ValueError, match="uint8"):
        to_tensor(noise(2, 3, 4, 5))
    with pytest.raises(ValueError, match="float"):
        to_uint8(torch.zeros(1, 1, 4, 4))


def test_resize_down_is_antialiased_and_up_keeps_flat_colour():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize(stripes, 16, 16)[2:-2, 2:-2].astype(int) - 127).max() < 16
    assert (resize(np.full((4, 4, 3), 77, np.uint8), 9, 13) == 77).all()


def test_fit_policies():
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = 200  # the middle third
    assert (fit(picture, 10, "crop") == 200).all()
    assert fit(picture, 10, "stretch").shape == (10, 10, 3)
    padded = fit(picture, 30, "pad")
    assert (padded[:9] == 255).all() and (padded[21:] == 255).all() and padded[15, 15].tolist() == [200] * 3
    with pytest.raises(ValueError, match="'crop', 'stretch' or 'pad'"):
        fit(picture, 10, "squash")


def test_fit_keeps_label_maps_on_their_picture_without_new_ids():
    ids = np.zeros((30, 50), np.uint8)
    ids[:, 25:] = 9
    for policy in ("crop", "stretch", "pad"):
        small = fit(ids, 16, policy, labels=True)
        assert small.shape == (16, 16) and set(np.unique(small)) <= {0, 9, 255}
    picture = np.repeat(ids[..., None], 3, 2) * 20
    assert np.array_equal(fit(picture, 30, "crop")[..., 0] > 90, fit(ids, 30, "crop", labels=True) == 9)
