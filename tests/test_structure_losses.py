"""Losses and scores of stage one against numbers worked out by hand."""

import math

import pytest
import torch

from coherent_ddrm.structure_losses import (
    edge_counts,
    edge_cross_entropy,
    edge_dice,
    edge_f1,
    edge_loss,
    f1,
    iou,
    region_weight,
    segmentation_counts,
    segmentation_iou,
    segmentation_loss,
)


def maps(*rows: list[list[float]]) -> torch.Tensor:
    """(B, 1, H, W) from nested lists, one per picture."""
    return torch.tensor(rows, dtype=torch.float32)[:, None]


def test_region_weight_is_one_in_the_hole_and_light_elsewhere():
    assert torch.equal(region_weight(maps([[1, 0]]).byte(), 0.25), maps([[1, 0.25]]))


def test_cross_entropy_by_hand():
    # Share 0.2: edges weigh 2.5, the rest 0.625, logits are shifted by log 4. Logit -log 4 is then at zero: log 2 each.
    logit, edges = torch.full((1, 1, 1, 2), -math.log(4)), maps([[1, 0]])
    loss = edge_cross_entropy(logit, edges, maps([[3, 1]]), edge_share=0.2)
    assert loss.item() == pytest.approx((3 * 2.5 + 1 * 0.625) / 4 * math.log(2))


def test_always_saying_the_share_costs_log_2():
    edges = maps([[1] + [0] * 9])
    logit = torch.full_like(edges, math.log(0.1 / 0.9))
    assert edge_cross_entropy(logit, edges, torch.ones_like(edges), edge_share=0.1).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("probability", [0.02, 0.3, 0.9])
def test_balancing_keeps_the_probability(probability):
    """The best constant answer is the share of edges itself, although edges weigh nine times as much."""
    target = torch.full((1, 1, 1, 1), probability)  # a soft edge and a share of hard edges have the same expected loss
    logit = torch.linspace(-6, 6, 2401).reshape(-1, 1, 1, 1)
    loss = edge_cross_entropy(logit, target.expand_as(logit), torch.ones_like(logit), edge_share=0.1)
    assert logit[loss.argmin()].sigmoid().item() == pytest.approx(probability, abs=2e-3)


def test_dice_by_hand():
    half = torch.zeros(1, 1, 1, 2)  # p = 1/2
    loss = edge_dice(half, maps([[1, 0]]), maps([[1, 1]]))
    assert loss.item() == pytest.approx(1 - (2 * 0.5 + 1) / (0.5 + 1 + 1))
    assert edge_dice(torch.logit(maps([[0.3, 0.8]])), maps([[0.3, 0.8]]), maps([[1, 1]])).item() == pytest.approx(0)
    nothing = edge_dice(torch.full((1, 1, 4, 4), -30.0), torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4))
    assert nothing.item() == pytest.approx(0)


def test_edge_loss_adds_dice_with_a_weight_per_sample():
    g = torch.Generator().manual_seed(0)
    logit, edges = torch.randn(2, 1, 5, 4, generator=g), torch.rand(2, 1, 5, 4, generator=g)
    weight = torch.rand(2, 1, 5, 4, generator=g)
    entropy, dice = edge_cross_entropy(logit, edges, weight), edge_dice(logit, edges, weight)
    loss = edge_loss(logit, edges, weight, dice_weight=torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(loss, entropy + torch.tensor([0.0, 0.5]) * dice)
    torch.testing.assert_close(edge_loss(logit, edges, weight), entropy + 0.5 * dice)


def test_segmentation_loss_by_hand_and_without_ignored_pixels():
    logits = torch.zeros(2, 3, 1, 2)
    logits[0, 1, 0, 0] = math.log(2)  # probabilities 1/4, 1/2, 1/4
    logits[0, :, 0, 1] = torch.tensor([9.0, -9.0, 0.0])
    ids = torch.tensor([[[1, 255]], [[255, 255]]], dtype=torch.uint8)
    loss = segmentation_loss(logits, ids, torch.ones(2, 1, 1, 2))
    torch.testing.assert_close(loss, torch.tensor([math.log(2), 0.0]))
    weighted = segmentation_loss(
        torch.tensor([[[[0.0, math.log(3)]], [[0.0, 0.0]]]]), torch.zeros(1, 1, 2), maps([[1, 3]])
    )
    assert weighted.item() == pytest.approx((math.log(2) + 3 * math.log(4 / 3)) / 4)


def test_ignored_pixels_and_unweighted_pixels_get_no_gradient():
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids, weight = torch.tensor([[[0, 255], [1, 2]]]), maps([[1, 1], [0, 1]])
    segmentation_loss(logits, ids, weight).sum().backward()
    assert torch.equal(logits.grad.abs().sum(dim=1)[0] > 0, torch.tensor([[True, False], [False, True]]))


def test_samples_do_not_mix():
    g = torch.Generator().manual_seed(1)
    logit, edges, weight = (torch.rand(3, 1, 6, 6, generator=g) for _ in range(3))
    logits, ids = torch.randn(3, 4, 6, 6, generator=g), torch.randint(0, 4, (3, 6, 6), generator=g)
    for b in range(3):
        one = slice(b, b + 1)
        torch.testing.assert_close(edge_loss(logit[one], edges[one], weight[one]), edge_loss(logit, edges, weight)[one])
        alone = segmentation_loss(logits[one], ids[one], weight[one])
        torch.testing.assert_close(alone, segmentation_loss(logits, ids, weight)[one])


def test_a_missing_channel_axis_is_an_error():
    logit = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"edges01 \(2, 4, 4\)"):
        edge_loss(logit, torch.zeros(2, 4, 4), torch.ones_like(logit))
    with pytest.raises(ValueError, match="shapes differ"):
        segmentation_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4), torch.ones_like(logit))


def test_edges_match_within_one_pixel():
    true, pred = torch.zeros(2, 1, 9, 9), torch.zeros(2, 1, 9, 9)
    true[0, 0, :, 4] = 1
    pred[0, 0, :, 5] = 1  # one beside it: all match
    true[1, 0, :, 4] = 1
    pred[1, 0, :3, 4], pred[1, 0, 6:, 7] = 1, 1  # three on it, which also reach row 3, and three far off
    counts = edge_counts(pred, true, torch.ones_like(true), threshold=0.5)
    assert counts.tolist() == [[9, 9, 9, 9], [3, 6, 4, 9]]
    precision, recall = 3 / 6, 4 / 9
    expected = torch.tensor([1.0, 2 * precision * recall / (precision + recall)], dtype=torch.float64)
    torch.testing.assert_close(edge_f1(pred, true, 0.5), expected)
    assert edge_f1(pred, true, 0.5, tolerance=0)[0] == 0


def test_edges_are_counted_in_the_hole_but_may_match_outside():
    true, pred, where = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    where[..., 4:] = 1
    true[..., 3], pred[..., 4] = 1, 1
    assert edge_counts(pred, true, where, 0.5).tolist() == [[8, 8, 0, 0]]


def test_f1_of_nothing():
    assert f1(torch.tensor([[0, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 5]])).tolist() == [1, 0, 0]


def test_iou_by_hand():
    true = torch.tensor([[[0, 0, 1], [1, 255, 1]], [[2, 2, 2], [2, 2, 2]]])
    pred = torch.tensor([[[0, 1, 1], [1, 0, 1]], [[2, 2, 2], [2, 2, 0]]])
    where = torch.ones(2, 1, 2, 3)
    where[1, 0, 1, 2] = 0  # the one wrong pixel of the second picture is not counted
    counts = segmentation_counts(pred, true, 4, where)
    assert counts[0].tolist() == [[1, 3, 0, 0], [2, 4, 0, 0]]
    torch.testing.assert_close(
        segmentation_iou(pred, true, 4, where), torch.tensor([(1 / 2 + 3 / 4) / 2, 1.0], dtype=torch.float64)
    )
    together = iou(counts.sum(dim=0))
    assert together[:3].tolist() == [0.5, 0.75, 1.0] and together[3].isnan()
