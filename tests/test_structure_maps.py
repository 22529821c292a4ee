"""Soft edges and label-free foregrounds on pictures whose answer is known."""

import numpy as np
import pytest
import torch
from kornia.filters import canny

from coherent_ddrm.saliency import WORKING_SIZE, foreground
from coherent_ddrm.structure_maps import connected, edges


def halves(left: tuple[int, int, int], right: tuple[int, int, int], side: int = 64) -> np.ndarray:
    picture = np.empty((1, side, side, 3), np.uint8)
    picture[:, :, : side // 2], picture[:, :, side // 2 :] = left, right
    return picture


def test_a_step_gives_one_thin_strong_line_in_place():
    found = edges(halves((20, 20, 20), (230, 230, 230)))
    assert found.shape == (1, 32, 32) and found.dtype == np.uint8
    columns = found[0, 4:-4].max(0)
    assert columns[15:17].max() > 200
    assert columns[:14].max() == 0 and columns[18:].max() == 0


def test_strength_follows_the_step():
    strong, weak, none = (edges(halves((100,) * 3, (c,) * 3))[0, 8:-8].max() for c in (240, 155, 102))
    assert strong > weak > none == 0


def test_two_colours_of_one_brightness_meet_in_an_edge():
    grey_equal = edges(halves((200, 60, 60), (60, 132, 60)))  # both about 0.4 in luminance
    assert grey_equal[0, 8:-8, 14:18].max() > 100


def test_a_flat_picture_has_no_edges_and_batches_do_not_mix():
    flat, step = halves((90,) * 3, (90,) * 3), halves((0,) * 3, (255,) * 3)
    both = edges(np.concatenate([flat, step]))
    assert both[0].max() == 0 and np.array_equal(both[1], edges(step)[0])


def test_our_hysteresis_is_kornias():
    generator = torch.Generator().manual_seed(3)
    picture = torch.rand(1, 1, 48, 48, generator=generator)
    picture = torch.nn.functional.avg_pool2d(picture, 5, 1, 2)
    thresholds = {"low_threshold": 0.2, "high_threshold": 0.5}
    levels = canny(picture, **thresholds, hysteresis=False)[1]
    assert np.array_equal(connected(levels[0, 0].numpy()), canny(picture, **thresholds)[1][0, 0].numpy() == 1)
    assert 0 < connected(levels[0, 0].numpy()).mean() < (levels > 0).float().mean()  # the test can fail


@pytest.mark.parametrize("shape", [(1, 63, 64, 3), (64, 64, 3), (1, 64, 64)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="uint8"):
        edges(np.zeros(shape, np.uint8))


def scene(mask: np.ndarray, inside: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """A noisy wall with a noisy object."""
    rng = np.random.default_rng(seed)
    picture = np.where(mask[..., None], np.array(inside), np.array((205, 195, 180)))
    return np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)


def disc(radius: float, cx: float = 0.5, cy: float = 0.5) -> np.ndarray:
    y, x = np.mgrid[:WORKING_SIZE, :WORKING_SIZE] / WORKING_SIZE
    return np.hypot(x - cx, y - cy) < radius


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("inside", [(150, 30, 40), (30, 30, 35), (235, 225, 120)])
def test_a_plain_object_is_found(inside):
    cut = foreground(scene(disc(0.3), inside))
    assert cut.kept and overlap(cut.mask, disc(0.3)) > 0.93


def test_an_object_that_leaves_the_picture_is_found():
    trousers = np.zeros((WORKING_SIZE, WORKING_SIZE), bool)
    trousers[:, WORKING_SIZE // 4 : 3 * WORKING_SIZE // 4] = True  # touches the top and the bottom border
    cut = foreground(scene(trousers, (40, 60, 120)))
    assert cut.kept and overlap(cut.mask, trousers) > 0.9


def test_two_objects_stay_two_and_the_floor_between_them_is_floor():
    shoes = disc(0.17, 0.27) | disc(0.17, 0.73)
    cut = foreground(scene(shoes, (120, 40, 120)))
    assert cut.kept and overlap(cut.mask, shoes) > 0.9


def test_a_striped_object_is_one_object():
    stripes = scene(disc(0.33), (40, 40, 160))
    columns = np.arange(WORKING_SIZE) // 3 % 2 == 0
    stripes[disc(0.33) & columns[None, :]] = (230, 240, 60)
    assert overlap(foreground(stripes).mask, disc(0.33)) > 0.75


def test_a_picture_without_an_object_is_refused():
    assert not foreground(np.full((WORKING_SIZE, WORKING_SIZE, 3), 128, np.uint8)).kept
    assert not foreground(scene(disc(0.0), (0, 0, 0), seed=4)).kept


def test_the_answer_does_not_depend_on_the_picture_before():
    picture = scene(disc(0.3, 0.45), (90, 120, 60))
    first = foreground(picture)
    foreground(scene(disc(0.2), (10, 200, 10), seed=9))
    again = foreground(picture)
    assert np.array_equal(first.mask, again.mask) and first.score == again.score
