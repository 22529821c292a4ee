"""The window around the hole, and known pixels on the way to the model's resolution and back."""

import numpy as np
import pytest
from tiny import make_hole

from coherent_ddrm.crop import BLANK, Window, area_resize, choose_window, cut, put_back, shrink, to_model
from coherent_ddrm.errors import UserError

CASES = [  # height, width, box of the hole as shares
    (64, 64, (0.2, 0.2, 0.8, 0.8)),
    (40, 28, (0.5, 0.5, 0.9, 0.9)),
    (500, 500, (0.4, 0.4, 0.5, 0.6)),
    (500, 500, (0.0, 0.0, 0.1, 0.1)),
    (300, 900, (0.1, 0.8, 0.9, 1.0)),
    (300, 900, (0.0, 0.1, 1.0, 0.9)),
    (900, 100, (0.02, 0.0, 0.98, 0.9)),
    (7, 500, (0.0, 0.4, 0.9, 0.6)),
]


@pytest.mark.parametrize("height, width, box", CASES)
def test_window_holds_the_hole(height, width, box):
    hole = make_hole(height, width, box)
    window = choose_window(hole, 64)
    rows, columns = np.nonzero(hole)
    assert window.top <= rows.min() and rows.max() < window.top + window.side
    assert window.left <= columns.min() and columns.max() < window.left + window.side
    assert window.side <= max(height, width)
    for start, size in ((window.top, height), (window.left, width)):
        inside = 0 <= start and start + window.side <= size
        assert inside or (window.side > size and start <= 0 and start + window.side >= size)


def test_window_keeps_context_and_resolution():
    hole = np.zeros((1000, 1000), bool)
    hole[500:600, 480:520] = True
    assert choose_window(hole, 64).side == 160  # 1.6 times the box
    hole[:] = False
    hole[500, 500] = True
    assert choose_window(hole, 64).side == 64  # never enlarged where the picture has pixels
    small = np.zeros((90, 70), bool)
    small[3, 3] = True
    assert choose_window(small, 64) == Window(0, -10, 90)  # taken whole


def test_mirror_beyond_the_border():
    array = np.arange(12).reshape(3, 4)
    assert (cut(array, Window(-2, 0, 4)) == array[[1, 0, 0, 1]]).all()
    assert cut(array[:1], Window(-3, 0, 4)).shape == (4, 4)  # a single row is mirrored into itself


@pytest.mark.parametrize("side", [20, 32, 64, 101])
def test_area_resize_is_the_mean_over_the_area(side):
    array = np.random.default_rng(0).random((side, side))
    fine = np.kron(array, np.ones((32, 32)))  # 32 times finer: each new pixel covers side x side of these
    exact = fine.reshape(32, side, 32, side).mean(axis=(1, 3))
    np.testing.assert_allclose(area_resize(array, 32), exact, atol=1e-5)


@pytest.mark.parametrize("side", [20, 32, 50, 64, 131])
def test_known_at_the_model_means_wholly_known(side):
    """A cell with any hole pixel is a hole, and what the network sees does not depend on hole pixels."""
    rng = np.random.default_rng(side)
    hole = rng.random((side, side)) < 0.02
    picture = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    small, small_hole = shrink(picture, hole, 32)
    for i in range(32):
        rows = slice(i * side // 32, -(-(i + 1) * side // 32))
        for j in range(32):
            columns = slice(j * side // 32, -(-(j + 1) * side // 32))
            assert small_hole[i, j] == hole[rows, columns].any()
    changed = np.where(hole[..., None], 255 - picture, picture)
    assert (shrink(changed, hole, 32)[0] == small).all()
    assert (small[small_hole] == BLANK).all()


def test_same_size_changes_nothing():
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    hole = make_hole(64, 64)
    window, small, small_hole = to_model(picture, hole, 64)
    assert (small_hole == hole).all() and (small[~hole] == picture[~hole]).all()
    assert (put_back(small, hole, picture, window) == picture).all()


@pytest.mark.parametrize("height, width, box", CASES)
def test_put_back_touches_the_hole_only(height, width, box):
    picture = np.random.default_rng(0).integers(0, 200, (height, width, 3), dtype=np.uint8)
    hole = make_hole(height, width, box)
    result = put_back(picture, hole, np.full((64, 64, 3), 255, np.uint8), choose_window(hole, 64))
    assert (result[~hole] == picture[~hole]).all() and (result[hole] == 255).all()


def test_fill_lands_where_it_belongs():
    """A smooth picture, shrunk and put back, is itself again in the hole."""
    ramp = np.linspace(0, 255, 600)
    picture = np.stack(np.broadcast_arrays(ramp[:400, None], ramp[None, :], 0 * ramp[None, :]), axis=-1).astype(
        np.uint8
    )
    hole = make_hole(400, 600, (0.3, 0.5, 0.6, 0.8))
    window = choose_window(hole, 64)
    fill = area_resize(cut(picture, window), 64).round().astype(np.uint8)
    assert np.abs(put_back(picture, hole, fill, window).astype(int) - picture).max() <= 2


def test_specks_that_leave_nothing_known():
    hole = np.zeros((640, 640), bool)
    hole[::4, ::4] = True
    with pytest.raises(UserError, match="64 x 64"):
        to_model(np.zeros((640, 640, 3), np.uint8), hole, 64)
