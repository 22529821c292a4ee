"""Hole makers: keys, polarity, geometry, published areas, scaling, errors."""

import ast
from pathlib import Path

import numpy as np
import pytest

from coherent_ddrm import masks
from coherent_ddrm.masks import COHERENT_TRAIN, EVALUATION_SETS, MAKERS, make_hole, make_holes
from coherent_ddrm.masks.perlin import perlin_noise

FIXED = {"repaint-every-second-line", "repaint-super-resolve", "repaint-expand", "repaint-half", "center-box"}
MAY_BE_FULL = {"perlin", "coherent-train"}
RANDOM = sorted(set(MAKERS) - FIXED)


def shares(name: str, count: int, side: int, seed: int = 0) -> np.ndarray:
    """Hole shares of `count` draws, (count,)."""
    return make_holes(name, count, side, side, seed).mean(axis=(1, 2, 3))


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_same_key_same_bytes(name):
    first, again = (make_holes(name, 4, 48, 64, seed=(3, 11)) for _ in range(2))
    assert first.dtype == bool and first.shape == (4, 1, 48, 64)
    assert first.tobytes() == again.tobytes()


@pytest.mark.parametrize("name", RANDOM)
def test_samples_and_seeds_differ(name):
    holes = make_holes(name, 12, 64, 64, seed=0)
    other = make_holes(name, 12, 64, 64, seed=1)
    distinct = 4 if name == "half" else 10
    assert len({hole.tobytes() for hole in holes}) >= min(distinct, 12)
    assert (holes != other).any()


@pytest.mark.parametrize("name", ["lama-thick", "mat-large", "perlin", "coherent-train"])
def test_a_sample_does_not_depend_on_its_batch(name):
    many = make_holes(name, 8, 64, 64, seed=(5, 2))
    for i in (0, 1, 7):
        one = make_holes(name, i + 1, 64, 64, seed=(5, 2))
        assert (one[i] == many[i]).all()
        assert (make_hole(name, 64, 64, seed=(5, 2, i)) == many[i, 0]).all()
    keyed = make_holes(name, 2, 64, 64, seeds=[(5, 2, 7), (5, 2, 1)])
    assert (keyed == many[[7, 1]]).all()


def test_ambient_random_state_is_not_used():
    np.random.seed(0)  # noqa: NPY002
    first = make_holes("coherent-train", 8, 64, 64, seed=1)
    np.random.seed(1)  # noqa: NPY002
    assert (first == make_holes("coherent-train", 8, 64, 64, seed=1)).all()


# --- polarity and geometry --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (40, 96), (97, 33)])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_something_is_missing_and_something_is_known(name, size):
    for seed in range(8):
        hole = make_hole(name, *size, seed)
        assert hole.shape == size and hole.dtype == bool
        assert hole.any()
        assert name in MAY_BE_FULL or not hole.all()


def test_every_second_line():
    hole = make_hole("repaint-every-second-line", 10, 8, 0)
    assert not hole[::2].any() and hole[1::2].all()


def test_super_resolve():
    hole = make_hole("repaint-super-resolve", 12, 8, 0)
    assert not hole[::2, ::2].any()
    assert (~hole).sum() == 6 * 4


@pytest.mark.parametrize("height,width", [(256, 256), (64, 128)])
def test_expand_knows_only_the_centre_quarter(height, width):
    expected = np.ones((height, width), bool)
    expected[3 * height // 8 : 5 * height // 8, 3 * width // 8 : 5 * width // 8] = False
    assert (make_hole("repaint-expand", height, width, 0) == expected).all()


def test_repaint_half_knows_the_left():
    hole = make_hole("repaint-half", 16, 24, 0)
    assert not hole[:, :12].any() and hole[:, 12:].all()


def test_half_gives_all_four_halves_equally_often():
    top = np.zeros((16, 24), bool)
    top[:8] = True
    left = np.zeros((16, 24), bool)
    left[:, :12] = True
    halves = [half.tobytes() for half in (top, ~top, left, ~left)]
    drawn = [hole.tobytes() for hole in make_holes("half", 200, 16, 24)]
    assert set(drawn) == set(halves)
    assert all(30 <= drawn.count(half) <= 70 for half in halves)


def test_center_box():
    expected = np.zeros((64, 32), bool)
    expected[16:48, 8:24] = True
    assert (make_hole("center-box", 64, 32, 0) == expected).all()


@pytest.mark.parametrize("name,low,high,missing", [("box", 0.3, 0.6, True), ("outpaint", 0.4, 0.8, False)])
def test_box_and_outpaint_are_one_window_of_the_stated_sides(name, low, high, missing):
    sides = []
    for hole in make_holes(name, 200, 100, 200)[:, 0]:
        inside = hole if missing else ~hole
        h, w = inside.any(1).sum(), inside.any(0).sum()
        assert inside.sum() == h * w
        sides.append((h / 100, w / 200))
    sides = np.array(sides)
    assert sides.min() >= low - 0.005 and sides.max() <= high + 0.005
    assert (sides.min(0) < low + 0.02).all() and (sides.max(0) > high - 0.02).all()


def test_perlin_area_is_uniform():
    share = np.sort(shares("perlin", 400, 32))
    assert np.abs(share - np.linspace(0, 1, 400)).max() < 0.08  # Kolmogorov-Smirnov: 0.08 is p = 0.01


def test_perlin_noise_is_zero_on_its_lattice_and_continuous_across_it():
    at = np.arange(5, dtype=np.float32)
    assert np.abs(perlin_noise(at, at, np.random.default_rng(0))).max() == 0
    fine = np.linspace(0, 4.5, 901, dtype=np.float32)
    noise = perlin_noise(fine, fine, np.random.default_rng(0))
    assert noise.dtype == np.float32 and noise.std() > 0.1
    assert max(np.abs(np.diff(noise, axis=axis)).max() for axis in (0, 1)) < 0.02  # a step of 1/200 of a cell


# --- published numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,side,published",
    [
        ("lama-thick", 256, 0.29),
        ("lama-medium", 256, 0.23),
        ("lama-thick", 512, 0.26),
        ("mat-large", 256, 0.39),
        ("mat-large", 512, 0.40),
        ("mat-small", 512, 0.22),
    ],
)
def test_mean_area_of_the_official_generators(name, side, published):
    """Both are means of 400 draws, standard error 0.008 each. Planted faults: counts one higher give 0.49 (large) and
    0.32 (small), half the brush width 0.32 (large), no area limit 0.41 (thick), boxes 1 : 1 with strokes 0.17 (medium).
    """
    assert shares(name, 400, side).mean() == pytest.approx(published, abs=0.03)


@pytest.mark.parametrize("name", EVALUATION_SETS["lama"])
def test_lama_evaluation_sets_miss_at_most_half(name):
    assert shares(name, 200, 64).max() <= 0.5


def test_lama_training_holes_may_miss_more_than_half():
    assert 0.1 < (shares("lama-train", 200, 64) > 0.5).mean() < 0.4


def test_coherent_train_mixture():
    assert sum(COHERENT_TRAIN.values()) == pytest.approx(1)
    assert set(COHERENT_TRAIN) <= set(MAKERS)
    share = shares("coherent-train", 2000, 64)
    assert share.mean() == pytest.approx(0.45, abs=0.02)
    assert (share >= 0.5).mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    "name", sorted({"lama-train", "lama-thin", "lama-medium", "lama-thick", "mat-large", "mat-small"})
)
def test_the_same_key_gives_the_same_hole_at_64_128_and_256(name):
    small, middle, large = (make_holes(name, 50, side, side, seed=4) for side in (64, 128, 256))
    assert small.mean() == pytest.approx(large.mean(), abs=0.01)
    assert middle.mean() == pytest.approx(large.mean(), abs=0.01)
    assert (small == large[..., 2::4, 2::4]).mean() > 0.9


@pytest.mark.parametrize("name", ["lama-train", "lama-thin", "lama-thick", "mat-large", "mat-small", "box", "outpaint"])
def test_512_sets_have_nearly_the_mean_area_of_the_256_sets(name):
    assert shares(name, 150, 512).mean() == pytest.approx(shares(name, 400, 256).mean(), abs=0.05)


# --- area, names, errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low,high", [(0.1, 0.2), (0.4, 0.6), (0.75, 1.0)])
def test_area_is_honoured_per_sample(low, high):
    holes = make_holes("coherent-train", 16, 64, 64, seed=2, area=(low, high))
    share = holes.mean(axis=(1, 2, 3))
    assert low <= share.min() and share.max() <= high
    assert (holes[5, 0] == make_hole("coherent-train", 64, 64, (2, 5), area=(low, high))).all()


def test_a_draw_already_in_the_area_is_kept():
    assert (make_hole("box", 64, 64, 0, area=(0, 1)) == make_hole("box", 64, 64, 0)).all()


def test_area_out_of_reach_names_maker_range_and_best():
    with pytest.raises(ValueError, match=r"'center-box' .*\[0.3, 0.4\].* 0\.2500"):
        make_hole("center-box", 64, 64, 0, area=(0.3, 0.4))
    with pytest.raises(ValueError, match=r"0\.[34]\d+\. Widen"):  # the largest box misses 0.6 * 0.6
        make_hole("box", 64, 64, 0, area=(0.5, 0.6))


def test_unknown_name_lists_names_and_guesses():
    with pytest.raises(ValueError, match=r"'lama-thik'.*Did you mean 'lama-thick'\?.*repaint-expand"):
        make_holes("lama-thik", 1, 64, 64)


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"area": (0.5, 0.2)}, "0.5, 0.2"),
        ({"seed": -1}, "-1"),
        ({"seed": ()}, "seed"),
        ({"seed": 1.5}, "1.5"),
        ({"height": 4}, "4x64"),
        ({"seeds": [1, 2]}, "2 for a batch of 3"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_holes(**({"name": "box", "batch": 3, "height": 64, "width": 64} | kwargs))


def test_evaluation_sets_and_docstring_name_real_makers():
    assert len(EVALUATION_SETS["repaint-6"]) == 6
    assert {name for names in EVALUATION_SETS.values() for name in names} <= set(MAKERS)
    table = masks.__doc__.replace("-thin, -medium, -thick", "-thin lama-medium lama-thick").replace(
        "-thin, -thick", "-thin repaint-thick"
    )
    assert [name for name in MAKERS if name not in table] == []


@pytest.mark.parametrize("path", sorted(Path(masks.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_imports_neither_torch_nor_siblings(path):
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = {name for name in names if name != "coherent_ddrm.masks" and not name.startswith("coherent_ddrm.masks.")}
    assert not any(name.startswith(("torch", "coherent_ddrm", ".")) for name in outside)
