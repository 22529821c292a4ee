"""Losses and scores of stage one: pure functions of tensors, one value per sample.

Class-balanced cross-entropy: HED, https://arxiv.org/abs/1504.06375 (Equation 2); logit adjustment,
https://arxiv.org/abs/2007.07314; soft Dice: V-Net, https://arxiv.org/abs/1606.04797.

sigmoid and softmax of the logits serve as a posterior mean while sampling, so their losses have to be proper: lowest
when the number predicted is the true probability. Two things keep them so:

- Rare edges weigh more, by a fixed factor w, but the loss is taken at logit + log w. Its minimum is then at the true
  log odds: weighting alone would report w p / (w p + 1 - p) instead of p. The factor comes from a fixed share of
  edges, not from each picture's own as in HED, because a factor that depends on the answer cannot be taken out again.
- Dice is not proper (where the edge's place is uncertain it prefers 0 or 1), so its weight may differ per sample: pass
  0.5 alpha_t. At t = 1, where the mean plan is made, there is then cross-entropy only; near t = 0, where little is
  uncertain, Dice sharpens thin lines.

No further weighting over t is needed. Cross-entropy has no factor that blows up at either end of time. It falls by
itself, from the entropy of the plan given the picture at t = 1 to about zero at t = 0 (for soft edges, to a constant),
so each time counts by what is left to learn there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255  # segmentation id of a pixel without a label
EDGE_THRESHOLD = 0.1  # for scores: a mean plan spreads an edge over where it may be, so its peaks are low
EDGE_SHARE = 0.1  # mean of soft edge maps of 64-pixel photographs


def region_weight(hole: Tensor, known_weight: float = 0.1) -> Tensor:
    """1 in the hole, `known_weight` elsewhere. hole: (B, 1, H, W) -> (B, 1, H, W) float."""
    hole = hole.float()
    return hole + known_weight * (1 - hole)


def weighted_mean(value: Tensor, weight: Tensor) -> Tensor:
    """sum(weight value) / sum(weight) per sample, 0 where a sample has no weight. (B, ...) and (B, ...) -> (B,)"""
    total = weight.flatten(1).sum(dim=1)
    return (weight * value).flatten(1).sum(dim=1) / total.clamp(min=1e-8)


def edge_cross_entropy(edge_logit: Tensor, edges01: Tensor, weight: Tensor, edge_share: float = EDGE_SHARE) -> Tensor:
    """Balanced binary cross-entropy, (B,). Edges weigh 1 / (2 share), the rest 1 / (2 (1 - share)).

    Lowest at logit = log odds of the edge (or of the soft edge's mean); log 2 for a network that always says
    `edge_share` on pictures with that share. edge_logit, edges01 in [0, 1], weight: (B, 1, H, W).
    """
    _same_shape(edge_logit=edge_logit, edges01=edges01, weight=weight)
    edges01 = edges01.float()
    positive, negative = 0.5 / edge_share, 0.5 / (1 - edge_share)
    logit = edge_logit.float() + math.log(positive / negative)
    loss = positive * edges01 * F.softplus(-logit) + negative * (1 - edges01) * F.softplus(logit)
    return weighted_mean(loss, weight)


def edge_dice(edge_logit: Tensor, edges01: Tensor, weight: Tensor) -> Tensor:
    """Soft Dice loss 1 - (2 sum p e + 1) / (sum p² + sum e² + 1), (B,) in [0, 1); zero only at p = e, also for soft e.

    Sums are weighted, shapes as in `edge_cross_entropy`. The added 1, one pixel, keeps pictures without edges defined.
    """
    _same_shape(edge_logit=edge_logit, edges01=edges01, weight=weight)
    edges01, p = edges01.float(), edge_logit.float().sigmoid()
    overlap = (weight * p * edges01).flatten(1).sum(dim=1)
    size = (weight * (p.square() + edges01.square())).flatten(1).sum(dim=1)
    return 1 - (2 * overlap + 1) / (size + 1)


def edge_loss(
    edge_logit: Tensor,
    edges01: Tensor,
    weight: Tensor,
    dice_weight: Tensor | float = 0.5,
    edge_share: float = EDGE_SHARE,
) -> Tensor:
    """edge_cross_entropy + dice_weight edge_dice, (B,). dice_weight: a number or (B,), best 0.5 alpha_t."""
    dice = edge_dice(edge_logit, edges01, weight)
    return edge_cross_entropy(edge_logit, edges01, weight, edge_share) + dice_weight * dice


def segmentation_loss(logits: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy in nats per labelled pixel, (B,); 0 for a sample without any label.

    Args:
        logits: (B, L, H, W).
        ids: (B, H, W) integers, 255 = ignore.
        weight: (B, 1, H, W).
    """
    _same_shape(ids=ids[:, None], weight=weight, logits=logits[:, :1])
    loss = F.cross_entropy(logits.float(), ids.long(), ignore_index=IGNORE, reduction="none")  # (B, H, W)
    return weighted_mean(loss, weight[:, 0] * (ids != IGNORE))


def edge_counts(
    pred01: Tensor, true01: Tensor, where: Tensor, threshold: float, true_threshold: float = 0.25, tolerance: int = 1
) -> Tensor:
    """(B, 4) long: predicted edge pixels with a true one nearby, predicted; true ones with a predicted nearby, true.

    Only pixels in `where` are counted, but they may match any pixel. Add up the counts of many pictures, then use `f1`.

    Args:
        pred01, true01: (B, 1, H, W) in [0, 1]; an edge is above its threshold. where: (B, 1, H, W), 1 = counted.
        tolerance: "nearby" in pixels, along rows, columns and diagonals.
    """
    _same_shape(pred01=pred01, true01=true01, where=where)
    pred, true, where = (pred01 > threshold).float(), (true01 > true_threshold).float(), where > 0
    near = lambda x: F.max_pool2d(x, 2 * tolerance + 1, stride=1, padding=tolerance)  # noqa: E731
    counted = [pred * near(true), pred, true * near(pred), true]
    return torch.stack([(x * where).flatten(1).sum(dim=1).long() for x in counted], dim=1)


def f1(counts: Tensor) -> Tensor:
    """2 P R / (P + R) from (..., 4) edge counts; 1 where there was nothing to find and nothing was found."""
    hit, predicted, found, true = counts.double().unbind(dim=-1)
    precision, recall = hit / predicted.clamp(min=1), found / true.clamp(min=1)
    score = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return torch.where((predicted == 0) & (true == 0), torch.ones_like(score), score)


def edge_f1(
    pred01: Tensor, true01: Tensor, threshold: float, tolerance: int = 1, where: Tensor | None = None
) -> Tensor:
    """F1 of each picture's edges, (B,). For a data set prefer f1(sum of `edge_counts`): a small hole has few edges."""
    where = torch.ones_like(true01) if where is None else where
    return f1(edge_counts(pred01, true01, where, threshold, tolerance=tolerance))


def segmentation_counts(pred_ids: Tensor, true_ids: Tensor, num_labels: int, where: Tensor) -> Tensor:
    """(B, 2, L) long: pixels in both, pixels in either, for each label. Add up over pictures, then take `iou`.

    pred_ids, true_ids: (B, H, W), pixels whose true id is 255 are left out; where: (B, 1, H, W), 1 = counted.
    """
    _same_shape(pred_ids=pred_ids[:, None], true_ids=true_ids[:, None], where=where)
    counted = (where[:, 0] > 0) & (true_ids != IGNORE)  # (B, H, W)
    labels = torch.arange(num_labels, device=true_ids.device)[:, None, None]
    pred = (pred_ids[:, None] == labels) & counted[:, None]  # (B, L, H, W)
    true = (true_ids[:, None] == labels) & counted[:, None]
    return torch.stack([(pred & true).sum(dim=(2, 3)), (pred | true).sum(dim=(2, 3))], dim=1)


def iou(counts: Tensor) -> Tensor:
    """Intersection over union per label from (..., 2, L) counts -> (..., L); nan for a label that does not occur."""
    both, either = counts.double().unbind(dim=-2)
    return both / either


def segmentation_iou(pred_ids: Tensor, true_ids: Tensor, num_labels: int, where: Tensor) -> Tensor:
    """Mean over the labels that occur in a picture (true or predicted), (B,); nan if none does. For a data set prefer
    iou(sum of `segmentation_counts`).nanmean()."""
    return iou(segmentation_counts(pred_ids, true_ids, num_labels, where)).nanmean(dim=-1)


def _same_shape(**tensors: Tensor) -> None:
    """ValueError unless all have one shape: a missing channel axis would broadcast samples against each other."""
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes differ: {', '.join(f'{name} {shape}' for name, shape in shapes.items())}")
