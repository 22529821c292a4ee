"""Scores of coherence, structure and diversity, on pictures made by hand."""

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from coherent_ddrm.metrics import (
    METRICS,
    diversity,
    edge_f1,
    edge_maps,
    foreground_iou,
    foregrounds,
    mirror_agreement,
    reinpaint_invented,
    reinpaint_known,
    score_pairs,
    segmentation_iou,
    surround_agreement,
)
from coherent_ddrm.metrics.reinpainting import checkerboard, known_band

WALL, BLUE, RED = (225, 220, 210), (40, 60, 150), (180, 30, 40)


def shirt(right_sleeve: tuple[int, int, int] = BLUE, shift: int = 0, trousers: bool = False) -> Tensor:
    """A blue shirt before a wall, (1, 3, 64, 64) uint8; the trousers below are red."""
    image = np.empty((64, 64, 3), np.uint8)
    image[:] = WALL
    image[12:48, 22 + shift : 42 + shift] = BLUE
    image[14:40, 10 + shift : 20 + shift] = BLUE
    image[14:40, 44 + shift : 54 + shift] = right_sleeve
    if trousers:
        image[50:64, 22 + shift : 42 + shift] = RED
    return torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()


def right_half() -> Tensor:
    hole = torch.zeros(1, 1, 64, 64)
    hole[..., 32:] = 1
    return hole


def test_a_mirrored_sleeve_of_another_colour_lowers_coherence():
    hole = right_half()
    assert float(mirror_agreement(shirt(), hole)) > 0.99
    assert float(surround_agreement(shirt(), hole)) > 0.99
    assert float(mirror_agreement(shirt(RED), hole)) < 0.85
    assert float(surround_agreement(shirt(RED), hole)) < 0.9
    # Red is known here, from the trousers: only the mirror sees that it is in the wrong place.
    assert float(surround_agreement(shirt(RED, trousers=True), hole)) > 0.99
    assert float(mirror_agreement(shirt(RED, trousers=True), hole)) < 0.85
    worse = [float(mirror_agreement(shirt(c), hole)) for c in (BLUE, (60, 90, 170), RED)]
    assert worse == sorted(worse, reverse=True)


def test_two_invented_sleeves_are_compared_with_each_other():
    hole = torch.zeros(1, 1, 64, 64)
    hole[..., 14:40, :] = 1
    assert float(mirror_agreement(shirt(RED), hole)) < 0.8 < 0.99 < float(mirror_agreement(shirt(), hole))


def test_the_axis_is_the_foregrounds():
    moved, hole = shirt(shift=6), right_half()
    foreground = (moved != torch.tensor(WALL, dtype=torch.uint8)[:, None, None]).any(dim=1, keepdim=True)
    assert float(mirror_agreement(moved, hole)) < 0.85
    assert float(mirror_agreement(moved, hole, foreground)) > 0.95
    assert mirror_agreement(moved, hole, torch.zeros_like(foreground)).isnan().all()


def test_colour_agreement_by_hand():
    """A grey fill of Lab lightness L beside white: exp(-(100 - L) / 20)."""
    image = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    image[..., 32:] = 119  # L = 50.03
    lightness = 116 * ((((119 / 255 + 0.055) / 1.055) ** 2.4) ** (1 / 3)) - 16
    expected = float(np.exp(-(100 - lightness) / 20))
    assert float(surround_agreement(image, right_half())) == pytest.approx(expected, rel=0.01)
    assert surround_agreement(image, torch.ones(1, 1, 64, 64)).isnan().all()
    # Four columns of cells beside the axis would find grey or white of their own side among their neighbours.
    assert float(mirror_agreement(image, right_half())) == pytest.approx(expected, rel=0.01)


def test_more_agreement_than_the_truths_is_no_better():
    """Bare wall agrees with its surroundings better than the red sleeve that the picture has there."""
    truth, hole = shirt(RED), right_half()
    wall = torch.where(hole.bool(), torch.tensor(WALL, dtype=torch.uint8)[:, None, None], truth)
    own, empty = (score_pairs(x, truth, hole) for x in (truth, wall))
    assert float(own["surround_agreement"]) < 0.9 < 0.99 < float(empty["surround_agreement"])
    assert {METRICS[name].better for name in ("surround_agreement", "mirror_agreement")} == {"truth"}


def telea(image: Tensor, hole: Tensor) -> Tensor:
    filled = [
        cv2.inpaint(np.ascontiguousarray(x.permute(1, 2, 0)), h[0].byte().numpy(), 3, cv2.INPAINT_TELEA)
        for x, h in zip(image, hole, strict=True)
    ]
    return torch.from_numpy(np.stack(filled)).permute(0, 3, 1, 2)


def test_a_fill_that_belongs_is_found_again():
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    truth = torch.stack([90 + x, 60 + 1.5 * y, 120 + 0.5 * (x + y)]).byte()[None]
    hole = torch.zeros(1, 1, 64, 64)
    hole[..., 16:48, 16:48] = 1
    planted = truth.clone()
    planted[..., 16:48, 16:48] = 255 - planted[..., 16:48, 16:48]  # a seam all around
    patched = truth.clone()
    patched[..., 32:48, 32:48] = 0  # one square that does not go with the others
    known = [float(reinpaint_known(r, hole, telea)) for r in (truth, planted)]
    assert known[0] < 0.03 and known[1] > 3 * known[0]
    invented = [float(reinpaint_invented(r, hole, telea)) for r in (truth, planted, patched)]
    assert invented[0] < 0.03 and min(invented[1:]) > 3 * invented[0]


def test_what_is_hidden_cannot_be_seen_and_all_of_the_fill_is_hidden_once():
    image = torch.randint(1, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    hole = right_half().expand(2, 1, 64, 64)
    asked = []

    def grey(seen: Tensor, hidden: Tensor) -> Tensor:
        assert not (seen * hidden).any() and torch.equal(seen * ~hidden, image * ~hidden)
        asked.append(hidden)
        return torch.full_like(seen, 100)

    expected = (image[..., 32:].float() - 100).abs().flatten(1).mean(dim=1) / 255
    torch.testing.assert_close(reinpaint_invented(image, hole, grey), expected)
    assert torch.equal(sum(h.int() for h in asked), hole.int())
    expected = (image[..., 24:32].float() - 100).abs().flatten(1).mean(dim=1) / 255
    torch.testing.assert_close(reinpaint_known(image, hole, grey), expected)
    assert torch.equal(asked[-1], known_band(hole, 8)) and asked[-1][0, 0, 0].nonzero().flatten().tolist() == [
        *range(24, 32)
    ]
    total = lambda x, truth, where: where.flatten(1).sum(dim=1).float()  # noqa: E731
    assert reinpaint_known(image, hole, grey, total).tolist() == [8 * 64] * 2
    black, white = checkerboard(hole, 16)
    assert black[0, 0, 0, 32] and white[0, 0, 0, 48] and white[0, 0, 16, 32]


def agreeing(result: Tensor, truth: Tensor, hole: Tensor) -> Tensor:
    return edge_f1(edge_maps(result), edge_maps(truth), hole)


def test_edges_within_a_pixel_count():
    moved = lambda n: torch.roll(shirt(), n, dims=3)  # noqa: E731
    hole = right_half()
    assert float(agreeing(shirt(), shirt(), hole)) == 1
    assert float(agreeing(moved(1), shirt(), hole)) > 0.95
    assert float(agreeing(moved(4), shirt(), hole)) < 0.5
    flat = torch.full_like(shirt(), 128)
    assert float(agreeing(flat, shirt(), hole)) == 0 and float(agreeing(flat, flat, hole)) == 1
    half_wrong = torch.cat([shirt()[..., :32], flat[..., 32:]], dim=3)
    assert float(agreeing(half_wrong, shirt(), 1 - hole)) > 0.85 > 0.2 > float(agreeing(half_wrong, shirt(), hole))


def disc(column: int) -> tuple[Tensor, Tensor]:
    """A red disc of radius 16 before a noisy wall, (1, 3, 64, 64) uint8, and its mask."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    mask = (x - column) ** 2 + (y - 32) ** 2 <= 16**2
    image = torch.where(mask, torch.tensor(RED)[:, None, None], torch.tensor(WALL)[:, None, None])
    noise = torch.randint(-6, 7, image.shape, generator=torch.Generator().manual_seed(0))
    return (image + noise).clamp(0, 255).byte()[None], mask[None, None]


def overlaps(result: Tensor, truth: Tensor, where: Tensor | None = None) -> Tensor:
    return foreground_iou(foregrounds(result)[0], *foregrounds(truth), where)


def test_foreground_iou_of_moved_discs():
    (here, mask), (there, moved) = disc(28), disc(38)
    found, kept = foregrounds(torch.cat([here, there]))
    assert kept.all()
    overlap = lambda a, b: float((a & b).sum() / (a | b).sum())  # noqa: E731
    assert overlap(found[:1], mask) > 0.93 and overlap(found[1:], moved) > 0.93
    assert float(overlaps(there, here)) == pytest.approx(overlap(mask, moved), abs=0.05)
    assert float(overlaps(here, here)) == 1
    left = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    left[..., :26] = True  # little of the second disc
    expected = overlap(mask & left, moved & left)
    assert expected < 0.6 * overlap(mask, moved)
    assert float(overlaps(there, here, left)) == pytest.approx(expected, abs=0.05)
    flat = torch.full_like(here, 128)
    assert overlaps(here, flat).isnan().all()


def test_segmentation_iou_by_hand():
    truth = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255]])[None]
    guess = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]])[None]
    where = torch.ones(1, 1, 2, 4)
    assert float(segmentation_iou(guess, truth, 3, where)) == pytest.approx((3 / 4 + 3 / 4) / 2)


def test_diversity_is_the_mean_over_pairs():
    candidates = torch.tensor([0, 51, 255], dtype=torch.uint8)[:, None, None, None, None].repeat(1, 2, 3, 8, 8)
    candidates[:, 1] = 7
    torch.testing.assert_close(diversity(candidates), torch.tensor([2 / 3, 0]))
    hole = torch.zeros(2, 1, 8, 8)
    hole[..., :4] = 1
    candidates[..., :4] = 0
    assert not diversity(candidates, hole).any() and diversity(candidates)[0] > 0.3

    class Brightness:
        def layers(self, images: Tensor) -> list[Tensor]:
            return [images.float()]

        def maps(self, ours: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
            return [(ours[0] - theirs[0]).abs().mean(dim=1, keepdim=True)[..., ::2, ::2]]

    torch.testing.assert_close(diversity(candidates, network=Brightness())[0], torch.tensor(255 / 3.0))
    with pytest.raises(ValueError, match="2 candidates"):
        diversity(candidates[:1])
