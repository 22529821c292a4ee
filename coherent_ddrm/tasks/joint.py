"""Both stages together: stage two reads stage one's one-step plan, and its loss flows back into stage one.

SGDM's joint training, https://arxiv.org/abs/2211.10437: the plan is then one that helps to render, not only
one that is likely. Stage one keeps its own loss, else its plan would drift into a code that nobody can read or edit.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from coherent_ddrm.config import ConfigError, JointRun, optimizer_options
from coherent_ddrm.data import DecodedCache, ShardDataset
from coherent_ddrm.examples import Examples
from coherent_ddrm.launch import start_from
from coherent_ddrm.learner import Learner
from coherent_ddrm.models.dit import DiT
from coherent_ddrm.models.structure import StructurePredictor, encode_structure
from coherent_ddrm.rng import normal
from coherent_ddrm.schedule import add_noise
from coherent_ddrm.tasks import diffusion, structure
from coherent_ddrm.validation import FixedSet


class Planner(nn.Module):
    """Stage one with its own loss, and the mean plan, which keeps its gradient."""

    def __init__(self, objective: structure.Objective):
        super().__init__()
        self.objective = objective

    def forward(
        self, s_t: Tensor, t: Tensor, picture: Tensor, hole: Tensor, edges: Tensor, labels: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(loss (B,), plans (R, 1 + L, H, W) of the samples `rows` (R,)); the rest as structure.Objective."""
        loss = self.objective(s_t, t, picture, hole, edges, labels)
        noise = torch.zeros_like(s_t[rows])  # not read at t = 1
        return loss, self.objective.net(noise, torch.ones_like(t[rows]), picture[rows], hole[rows])


class JointTask(diffusion.DiffusionTask):
    """The transformer and the structure predictor, learning together."""

    def __init__(self, run: JointRun, source: ShardDataset | DecodedCache, accelerator: Accelerator):
        if run.objective.predictor is not None:
            raise ConfigError("objective.predictor: a joint run trains its own predictor; see structure_init")
        if not run.objective.structure:
            raise ConfigError("objective.structure: a joint run is about plans; train/diffusion.py does without")
        super().__init__(run, source, accelerator)
        net = StructurePredictor(num_labels=source.num_labels, **asdict(run.structure_model)).to(accelerator.device)
        learner = Learner(start_from(net, run.structure_init), **optimizer_options(run))
        weights = run.structure
        own = structure.Objective(net, weights.edges, weights.segmentation, weights.known_weight)
        self.learners["structure"] = learner
        self.objectives.append(Planner(own))
        self.pure_noise, self.structure_weight = weights.pure_noise, run.structure_weight

    def show(self, examples: Examples) -> diffusion.Pass:
        """As for stage two alone, but the predicted plans are those of the network that learns, with their gradient."""
        shown = super().show(examples)  # self.predictor is None: true plans
        rows = diffusion.sees_predicted(examples, self.objective.predicted, shown.none).nonzero()[:, 0]
        t = structure.structure_time(examples.u[:, 0], examples.pure[:, 0], self.pure_noise)
        s0 = encode_structure(examples.edges, examples.segmentation, self.num_labels)
        s_t = add_noise(self.learners["structure"].net.schedule, s0, t, normal(s0, examples.rng))
        with self.accelerator.autocast():
            loss, plans = self.objectives[-1](
                s_t, t, examples.x0, examples.hole, examples.edges, examples.segmentation, rows
            )
        shown.plan = shown.plan.index_copy(0, rows, plans.to(shown.plan.dtype))
        shown.beside = {"structure": self.structure_weight * loss.mean()}
        return shown

    def export(self, folder: Path) -> None:
        super().export(folder)
        self.learners["structure"].averaged().save_pretrained(folder / "export-structure")


class Validation:
    """Stage two's scores and sheet with the plan that stage one has by now, and stage one's scores."""

    best = "val_loss"

    def __init__(self, data: FixedSet, task: JointTask):
        self.data, self.task = data, task
        self.stage_one = structure.Validation(data, task.num_labels)

    def _stage_two(self) -> diffusion.Validation:
        planner = self.task.learners["structure"].averaged()
        return diffusion.Validation(self.data, self.task.num_labels, planner)

    def scores(self, net: DiT) -> dict[str, float]:
        """Those of both stages."""
        return self._stage_two().scores(net) | self.stage_one.scores(self.task.learners["structure"].averaged())

    def sheet(self, net: DiT) -> np.ndarray:
        return self._stage_two().sheet(net)
