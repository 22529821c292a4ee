"""Train stage two, the diffusion transformer.

    accelerate launch train/diffusion.py --config configs/clothing_64.yaml [--dry-run] [--any.key value]

The same command again resumes. In the run folder: config.yaml, log.jsonl, sheets/, tensorboard/, checkpoints/ and
export/ (the averaged weights, ready for the pipeline).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from coherent_ddrm.config import DiffusionRun, optimizer_options, parse_run
from coherent_ddrm.data import DecodedCache, ShardDataset, open_dataset
from coherent_ddrm.examples import Examples, draw_times, example_settings, make_examples
from coherent_ddrm.images import to_uint8
from coherent_ddrm.launch import check_run, make_accelerator, readable_errors, start_from
from coherent_ddrm.learner import Learner
from coherent_ddrm.losses import diffusion_loss, hole_mean, v_weight
from coherent_ddrm.models.dit import DiT, InContext, make_dit
from coherent_ddrm.models.structure import StructurePredictor, decode_structure, encode_structure, predict_plan
from coherent_ddrm.operators import Inpainting, Observation
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.samplers import Coherent, sample
from coherent_ddrm.schedule import add_noise, expand, time_grid
from coherent_ddrm.sheets import contact_sheet, plan_preview
from coherent_ddrm.training import Task, fit
from coherent_ddrm.validation import FixedSet, fixed_set

VALIDATION_TIMES = (0.2, 0.4, 0.6, 0.8, 1.0)


class Objective(nn.Module):
    """One training step's loss, so that data parallelism and compilation wrap the network and its loss together."""

    def __init__(self, net: DiT, draws: int):
        super().__init__()
        self.net, self.draws = net, draws

    def forward(
        self, x0: Tensor, hole: Tensor, t: Tensor, z: Tensor, structure: Tensor | None, drop: Tensor | None
    ) -> Tensor:
        """x0, hole: (B, ...); t: (B draws,), z: (B draws, C, H, W), picture by picture -> loss (B draws,)."""
        x0_all, hole_all = (v.repeat_interleave(self.draws, dim=0) for v in (x0, hole))
        x_t = add_noise(self.net.schedule, x0_all, expand(t, x0_all) * hole_all, z)
        if self.draws == 1:
            x0_hat = self.net(x_t, t, hole, structure, drop)
        else:
            cached = self.net.config.one_way
            context = self.net.context(x0, hole, structure, drop, draws=self.draws, cached=cached)
            x0_hat = self.net.denoise(x_t, t, context)
        _, sigma_t = self.net.schedule(t)
        return diffusion_loss(x0_hat, x0_all, hole_all, sigma_t)


def load_predictor(folder: str | None, device: torch.device) -> StructurePredictor | None:
    """The frozen predictor of stage one, or None."""
    if folder is None:
        return None
    return StructurePredictor.from_pretrained(folder).to(device).eval().requires_grad_(False)


@torch.no_grad()
def make_plan(
    examples: Examples, predictor: StructurePredictor | None, num_labels: int, predicted: float, drop: float
) -> tuple[Tensor | None, Tensor | None]:
    """The plan each sample sees, (B, 1 + L, H, W), and who sees none, (B,) bool. Prior samples never see one."""
    if not num_labels:
        return None, None
    plan = encode_structure(examples.edges, examples.segmentation, num_labels)
    all_hole = examples.hole.flatten(1).all(dim=1)
    none = (examples.choice[:, 1] < drop) | all_hole
    rows = ((examples.choice[:, 2] < predicted) & ~none).nonzero()[:, 0]  # nobody else's plan is worth predicting
    if predictor is not None and len(rows):
        plan[rows] = predict_plan(predictor, examples.x0[rows], examples.hole[rows], steps=1).to(plan.dtype)
    return plan, none


class Validation:
    """Scores and sheets on fixed pictures, with the predictor's plan where there is one, else the true one."""

    best = "val_loss"

    def __init__(self, data: FixedSet, num_labels: int, predictor: StructurePredictor | None):
        self.data, self.plan = data, None
        if num_labels:
            self.plan = encode_structure(data.edges, data.segmentation, num_labels)
        if num_labels and predictor is not None:
            plans = [predict_plan(predictor, data.x0[rows], data.hole[rows], steps=1) for rows in data.slices()]
            self.plan = torch.cat(plans)

    @torch.no_grad()
    def scores(self, net: DiT) -> dict[str, float]:
        """In the hole: v-weighted loss and squared error of x0_hat over the times; PSNR of one step from t = 1."""
        data = self.data
        error = torch.zeros(len(VALIDATION_TIMES), len(data))
        for i, t in enumerate(VALIDATION_TIMES):
            for rows in data.slices():
                x0, hole = data.x0[rows], data.hole[rows]
                x_t = add_noise(net.schedule, x0, t * hole, data.z[rows])
                plan = None if self.plan is None else self.plan[rows]
                x0_hat = net(x_t, torch.full((len(x0),), t, device=x0.device), hole, plan)
                error[i, rows] = hole_mean((x0_hat.float().clamp(-1, 1) - x0) ** 2, hole).cpu()
        weight = v_weight(net.schedule(torch.tensor(VALIDATION_TIMES))[1])[:, None]
        psnr = -10 * (error[-1] / 4).log10()
        values = {"val_loss": (weight * error).mean(), "val_mse": error.mean(), "val_psnr": psnr.mean()}
        return {name: float(value) for name, value in values.items()}

    @torch.no_grad()
    def sheet(self, net: DiT, steps: int = 25, count: int = 12) -> np.ndarray:
        """Input, plan, one step, result, truth; uint8 picture."""
        x0, hole, z = (v[:count] for v in (self.data.x0, self.data.hole, self.data.z))
        plan = None if self.plan is None else self.plan[:count]
        denoiser = InContext(net, net.context(x0, hole, plan, cached=net.config.one_way))
        rng = [keyed_generator(3, i) for i in range(len(x0))]
        result = sample(Coherent(denoiser, Observation(x0, Inpainting(hole))), normal(x0, rng), time_grid(steps), rng)
        one_step = denoiser(torch.where(hole > 0, z, x0), torch.ones(len(x0), device=x0.device))
        columns = [to_uint8(v.float().clamp(-1, 1)) for v in (x0 * (1 - hole), one_step, result, x0)]
        titles = ["input", "one step", f"{steps} steps", "truth"]
        if plan is not None:
            columns.insert(1, plan_preview(*(v.cpu().numpy() for v in decode_structure(plan))))
            titles.insert(1, "plan")
        return contact_sheet([list(row) for row in zip(*columns, strict=True)], titles)


def main(argv: Sequence[str] | None = None) -> None:
    run, invocation = parse_run(DiffusionRun, argv)
    with readable_errors():
        train(run, invocation.dry_run)


class DiffusionTask(Task):
    """Stage two: the transformer learns to denoise the hole, given the known pixels and a plan."""

    def __init__(self, run: DiffusionRun, source: ShardDataset | DecodedCache, accelerator: Accelerator):
        self.num_labels = source.num_labels if run.objective.structure else 0
        self.predictor = load_predictor(run.objective.predictor if self.num_labels else None, accelerator.device)
        check_run(run, source, self.predictor)
        channels = 1 + self.num_labels if self.num_labels else 0
        net = make_dit(**asdict(run.model), structure_channels=channels).to(accelerator.device)
        learner = Learner(start_from(net, run.init), **optimizer_options(run))
        super().__init__({"transformer": learner}, [Objective(net, run.objective.draws)], accelerator)
        self.objective = run.objective
        self.settings = example_settings(run) | dict(prior=run.objective.prior, draws=run.objective.draws)

    def loss_of(self, part: dict, step: int, places: Sequence[int]) -> Tensor:
        wanted = self.objective
        examples = make_examples(part, step=step, places=places, **self.settings).to(self.accelerator.device)
        t = draw_times(examples, wanted.time_mean, wanted.time_std, wanted.pure_noise)
        z = examples.noise(wanted.draws)
        with self.accelerator.autocast():
            plan, none = make_plan(examples, self.predictor, self.num_labels, wanted.predicted, wanted.drop_structure)
            return self.objectives[0](examples.x0, examples.hole, t, z, plan, none).mean()


def train(run: DiffusionRun, dry_run: bool) -> None:
    accelerator = make_accelerator(run.optim.precision, run.optim.accumulate)
    torch.manual_seed(run.seed)  # initial weights; nothing after this draws from ambient state
    source = open_dataset(run.data.train)
    task = DiffusionTask(run, source, accelerator)
    data = lambda: fixed_set(run.data.val, accelerator.device)  # noqa: E731
    fit(run, task, source, lambda: Validation(data(), task.num_labels, task.predictor), dry_run)


if __name__ == "__main__":
    main()
