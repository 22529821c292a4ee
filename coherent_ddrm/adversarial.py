"""The adversarial game: losses of discriminator and network. Their weight beside diffusion: tasks/auxiliary.py.

LaMa, https://arxiv.org/abs/2109.07161, section 2.2.2 (mask-aware, non-saturating, R1, feature matching); hinge:
https://arxiv.org/abs/1802.05957; R1: https://arxiv.org/abs/1801.04406, Equation 9. One value per sample; `logits` are
one (B, 1, h, w) per scale, and the mean over scales is taken, so that their number changes no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["non_saturating", "hinge"]
REAL: dict[str, Callable[[Tensor], Tensor]] = {  # cost of a patch held to be real; of a fake one at minus the logit
    "non_saturating": lambda logits: F.softplus(-logits),
    "hinge": lambda logits: F.relu(1 - logits),
}
WANTED: dict[str, Callable[[Tensor], Tensor]] = {  # cost, for the network, of not being held to be real
    "non_saturating": REAL["non_saturating"],
    "hinge": torch.neg,
}


def fake_patches(hole: Tensor, size: Sequence[int]) -> Tensor:
    """1 where a patch touches the hole. hole: (B, 1, H, W) -> (B, 1, h, w).

    Max-pooled, as LaMa's paper has it: its code takes the nearest pixel, so thin strokes would count as real.
    """
    return F.adaptive_max_pool2d(hole.float(), tuple(size))


def discriminator_loss(
    real: Sequence[Tensor], fake: Sequence[Tensor], hole: Tensor, kind: Kind = "non_saturating"
) -> Tensor:
    """What the discriminator pays, (B,): patches of the truth are real; of the composite, only those off the hole are.

    Args:
        real, fake: logits of the truth and of the composite, whose gradient must not reach the network (detach it).
        hole: (B, 1, H, W), 1 = missing.
    """
    cost = _choose(REAL, kind)
    losses = []
    for truth, composite in zip(real, fake, strict=True):
        m = fake_patches(hole, composite.shape[-2:])
        truth, composite = truth.float(), composite.float()
        losses.append(_mean(cost(truth) + m * cost(-composite) + (1 - m) * cost(composite)))
    return torch.stack(losses).mean(dim=0)


def generator_loss(fake: Sequence[Tensor], kind: Kind = "non_saturating") -> Tensor:
    """What the network pays for the composite's logits, (B,): mean over all patches, as LaMa. Those off the hole see
    parts of it too, and a share of the picture that is small weighs little."""
    cost = _choose(WANTED, kind)
    return torch.stack([_mean(cost(logits.float())) for logits in fake]).mean(dim=0)


def r1_penalty(real: Sequence[Tensor], x: Tensor) -> Tensor:
    """|| d(sum of logits) / dx ||², (B,), at the truth. LaMa weighs it by 0.001, StyleGAN (one logit) by 5.

    Summed over patches and scales, as LaMa's code does. x: (B, 3, H, W), requires_grad set before the logits were made,
    outside autocast. Differentiable, so the discriminator can be taught by it.
    """
    if not x.requires_grad:
        raise ValueError("R1 needs the gradient at x; call x.requires_grad_() before the discriminator sees it")
    total = sum(logits.float().sum() for logits in real)
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    return gradient.float().square().flatten(1).sum(dim=1)


def feature_matching(fake: Sequence[Sequence[Tensor]], real: Sequence[Sequence[Tensor]]) -> Tensor:
    """Mean squared difference of the discriminator's features, a mean over each layer, then over layers; (B,).

    fake, real: the layers of each scale, (B, C, h, w); no gradient goes to `real`. LaMa weighs it by 100.
    """
    pairs = [pair for layers in zip(fake, real, strict=True) for pair in zip(*layers, strict=True)]
    return torch.stack([_mean((a.float() - b.detach().float()) ** 2) for a, b in pairs]).mean(dim=0)


def _mean(value: Tensor) -> Tensor:
    """(B, ...) -> (B,)"""
    return value.flatten(1).mean(dim=1)


def _choose(table: dict[str, Callable[[Tensor], Tensor]], kind: str) -> Callable[[Tensor], Tensor]:
    if kind not in table:
        raise ValueError(f"unknown adversarial loss {kind!r}: choose one of {', '.join(table)}")
    return table[kind]
