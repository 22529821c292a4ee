"""Stage one: the structure predictor learns to plan edges and segmentation behind the hole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from coherent_ddrm.config import StructureRun, optimizer_options
from coherent_ddrm.data import DecodedCache, ShardDataset
from coherent_ddrm.examples import example_settings, make_examples
from coherent_ddrm.images import to_uint8
from coherent_ddrm.launch import as_it_is, start_from
from coherent_ddrm.learner import Learner
from coherent_ddrm.models.structure import StructurePredictor, decode_structure, encode_structure, predict_plan
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.schedule import add_noise
from coherent_ddrm.sheets import contact_sheet, plan_preview
from coherent_ddrm.structure_losses import (
    EDGE_THRESHOLD,
    IGNORE,
    edge_counts,
    edge_loss,
    f1,
    iou,
    region_weight,
    segmentation_counts,
    segmentation_loss,
)
from coherent_ddrm.training import Task
from coherent_ddrm.validation import FixedSet


class Objective(nn.Module):
    """One training step's loss, per sample: edges and segmentation, hidden pixels at weight 1, known ones lightly."""

    def __init__(self, net: StructurePredictor, edges: float, segmentation: float, known_weight: float):
        super().__init__()
        self.net, self.edges, self.segmentation, self.known_weight = net, edges, segmentation, known_weight

    def forward(self, s_t: Tensor, t: Tensor, picture: Tensor, hole: Tensor, edges: Tensor, labels: Tensor) -> Tensor:
        """s_t: (B, 1 + L, H, W); edges, labels: (B, H, W) uint8 -> (B,)"""
        edge_logit, segmentation_logits = self.net.logits(s_t, t, picture, hole)
        weight = region_weight(hole, self.known_weight)
        alpha_t, _ = self.net.schedule(t)
        loss = self.edges * edge_loss(edge_logit, edges[:, None].float() / 255, weight, dice_weight=0.5 * alpha_t)
        return loss + self.segmentation * segmentation_loss(segmentation_logits, labels, weight)


def structure_time(u: Tensor, coin: Tensor, pure_noise: float) -> Tensor:
    """Times, (B,): t = 1 for a share `pure_noise`, where the mean plan is read off; else sqrt(u), which favours noise
    because one label map of many pixels is recognisable until late."""
    return torch.where(coin < pure_noise, torch.ones_like(u), u.sqrt())


class Validation:
    """The mean plan against the truth on hidden pixels of fixed pictures."""

    best = "-val_edge_f1"

    def __init__(self, data: FixedSet, num_labels: int):
        self.data, self.num_labels = data, num_labels

    def plans(self, net: StructurePredictor, rows: slice, steps: int = 1) -> Tensor:
        picture, hole = self.data.x0[rows], self.data.hole[rows]
        rng = [keyed_generator(2, rows.start + i) for i in range(len(picture))]
        return predict_plan(net, picture, hole, steps=steps, rng=rng)

    @torch.no_grad()
    def scores(self, net: StructurePredictor) -> dict[str, float]:
        """Edge F1, mean IoU over labels, and IoU of foreground (any label but 0), of the mean plan on hidden pixels."""
        data = self.data
        edges, labels = decode_structure(torch.cat([self.plans(net, rows) for rows in data.slices()]))
        strength, truth = (x[:, None].float() / 255 for x in (edges, data.edges))
        foreground = [torch.where(x == IGNORE, x, (x > 0).to(x.dtype)) for x in (labels, data.segmentation)]
        per_label = iou(segmentation_counts(labels, data.segmentation, self.num_labels, data.hole).sum(dim=0))
        return {
            "val_edge_f1": float(f1(edge_counts(strength, truth, data.hole, threshold=EDGE_THRESHOLD).sum(dim=0))),
            "val_iou": float(per_label.nanmean()),
            "val_foreground_iou": float(iou(segmentation_counts(*foreground, 2, data.hole).sum(dim=0))[1]),
        }

    @torch.no_grad()
    def sheet(self, net: StructurePredictor, count: int = 12) -> np.ndarray:
        """Input, mean plan, a sampled plan, true plan, truth; uint8 picture."""
        data, rows = self.data, slice(0, min(count, len(self.data)))
        true_plan = encode_structure(data.edges[rows], data.segmentation[rows], self.num_labels)
        plans = [self.plans(net, rows), self.plans(net, rows, steps=10), true_plan]
        previews = [plan_preview(*(x.cpu().numpy() for x in decode_structure(plan))) for plan in plans]
        columns = [to_uint8(data.x0[rows] * (1 - data.hole[rows])), *previews, to_uint8(data.x0[rows])]
        titles = ["input", "mean plan", "plan, 10 steps", "true plan", "truth"]
        return contact_sheet([list(row) for row in zip(*columns, strict=True)], titles)


class StructureTask(Task):
    """Stage one: the predictor learns to denoise plans, given the picture around the hole.

    Args:
        adapt: makes of the network, its first weights loaded, what learns: `lora.add_adapter`, or all of it.
    """

    def __init__(
        self,
        run: StructureRun,
        source: ShardDataset | DecodedCache,
        accelerator: Accelerator,
        adapt: Callable[[nn.Module], nn.Module] = as_it_is,
    ):
        net = StructurePredictor(num_labels=source.num_labels, **asdict(run.model)).to(accelerator.device)
        learner, weights = Learner(adapt(start_from(net, run.init)), **optimizer_options(run)), run.objective
        objective = Objective(net, weights.edges, weights.segmentation, weights.known_weight)
        super().__init__({"structure": learner}, [objective], accelerator)
        self.num_labels, self.pure_noise = source.num_labels, run.objective.pure_noise
        self.settings = example_settings(run)

    def loss_of(self, part: dict, step: int, places: Sequence[int]) -> Tensor:
        examples = make_examples(part, step=step, places=places, **self.settings).to(self.accelerator.device)
        t = structure_time(examples.u[:, 0], examples.pure[:, 0], self.pure_noise)
        s0 = encode_structure(examples.edges, examples.segmentation, self.num_labels)
        s_t = add_noise(self.main.net.schedule, s0, t, normal(s0, examples.rng))
        with self.accelerator.autocast():
            loss = self.objectives[0](s_t, t, examples.x0, examples.hole, examples.edges, examples.segmentation)
        return loss.mean()
