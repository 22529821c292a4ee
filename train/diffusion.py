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
from torch import Tensor, nn

from coherent_ddrm.config import DiffusionRun, optimizer_options, parse_run
from coherent_ddrm.data import batches, open_dataset
from coherent_ddrm.denoiser import Bound
from coherent_ddrm.examples import Examples, draw_times, make_examples
from coherent_ddrm.images import to_tensor, to_uint8
from coherent_ddrm.learner import Learner
from coherent_ddrm.losses import diffusion_loss, hole_mean, v_weight
from coherent_ddrm.masks import make_holes
from coherent_ddrm.models.dit import DiT, make_dit
from coherent_ddrm.models.structure import StructurePredictor, decode_structure, encode_structure, predict_plan
from coherent_ddrm.operators import Inpainting
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.samplers import Coherent, sample
from coherent_ddrm.schedule import add_noise, expand, time_grid
from coherent_ddrm.sheets import contact_sheet, plan_preview
from coherent_ddrm.training import (
    Log,
    RunFolder,
    check_finite,
    describe,
    make_accelerator,
    passes,
    per_pass,
    prepare,
    readable_errors,
    report,
    start_from,
)

VALIDATION_TIMES = (0.2, 0.4, 0.6, 0.8, 1.0)


class Objective(nn.Module):
    """One training step's loss, so that data parallelism and compilation wrap the network and its loss together."""

    def __init__(self, net: DiT, draws: int):
        super().__init__()
        self.net, self.draws = net, draws

    def forward(self, x0: Tensor, hole: Tensor, t: Tensor, z: Tensor, structure: Tensor | None, drop: Tensor) -> Tensor:
        """x0, hole: (B, ...); t: (B draws,), z: (B draws, C, H, W), picture by picture -> loss (B draws,)."""
        x0_all, hole_all = (v.repeat_interleave(self.draws, dim=0) for v in (x0, hole))
        x_t = add_noise(self.net.schedule, x0_all, expand(t, x0_all) * hole_all, z)
        if self.draws == 1:
            x0_hat = self.net(x_t, t, hole, structure, drop)
        else:
            x0_hat = self.net.denoise(x_t, t, self.net.context(x0, hole, structure, drop, draws=self.draws))
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
    if predictor is not None:
        rows = ((examples.choice[:, 2] < predicted) & ~none).nonzero()[:, 0]  # nobody else's plan is worth predicting
        plan[rows] = predict_plan(predictor, examples.x0[rows], examples.hole[rows], steps=1).to(plan.dtype)
    return plan, none


class Validation:
    """The same pictures, holes, times and noise at every call, so that the curve is comparable."""

    HOLES = ("half", "lama-thick", "box")

    def __init__(self, folder: str, num_labels: int, predictor: StructurePredictor | None, device: torch.device):
        source = open_dataset(folder)
        count = min(len(source), 120)
        batch = source.batch(np.linspace(0, len(source) - 1, count).astype(int))
        holes = [make_holes(self.HOLES[i % 3], 1, *batch["image"].shape[1:3], seed=(1, i))[0] for i in range(count)]
        self.x0 = to_tensor(batch["image"]).to(device)
        self.hole = torch.from_numpy(np.stack(holes)).float().to(device)
        self.z = torch.cat([normal(x[None], [keyed_generator(1, i)]) for i, x in enumerate(self.x0)])
        self.plan = None
        if num_labels:
            edges, labels = (torch.from_numpy(batch[k]).to(device) for k in ("edges", "segmentation"))
            self.plan = encode_structure(edges, labels, num_labels)
            if predictor is not None:
                rng = [keyed_generator(2, i) for i in range(count)]
                self.plan = predict_plan(predictor, self.x0, self.hole, steps=1, rng=rng)

    @torch.no_grad()
    def scores(self, net: DiT, size: int = 40) -> dict[str, float]:
        """In the hole: v-weighted loss and squared error of x0_hat over the times; PSNR of one step from t = 1."""
        error = torch.zeros(len(VALIDATION_TIMES), len(self.x0))
        for i, t in enumerate(VALIDATION_TIMES):
            for rows in torch.arange(len(self.x0)).split(size):
                x0, hole = self.x0[rows], self.hole[rows]
                x_t = add_noise(net.schedule, x0, t * hole, self.z[rows])
                plan = None if self.plan is None else self.plan[rows]
                x0_hat = net(x_t, torch.full((len(rows),), t, device=x0.device), hole, plan)
                error[i, rows] = hole_mean((x0_hat.float().clamp(-1, 1) - x0) ** 2, hole).cpu()
        weight = v_weight(net.schedule(torch.tensor(VALIDATION_TIMES))[1])[:, None]
        psnr = -10 * (error[-1] / 4).log10()
        return {
            "val_loss": float((weight * error).mean()),
            "val_mse": float(error.mean()),
            "val_psnr": float(psnr.mean()),
        }

    @torch.no_grad()
    def sheet(self, net: DiT, steps: int = 25, count: int = 12) -> np.ndarray:
        """Input, plan, result, truth; uint8 picture."""
        x0, hole = self.x0[:count], self.hole[:count]
        plan = None if self.plan is None else self.plan[:count]
        denoiser = Bound(net, dict(hole=hole, structure=plan))
        rng = [keyed_generator(3, i) for i in range(len(x0))]
        result = sample(Coherent(denoiser, Inpainting(hole), x0), normal(x0, rng), time_grid(steps), rng)
        one_step = net(torch.where(hole > 0, self.z[:count], x0), torch.ones(len(x0), device=x0.device), hole, plan)
        columns = [x0 * (1 - hole), one_step, result, x0]
        pictures = [to_uint8(column.float().clamp(-1, 1)) for column in columns]
        if plan is not None:
            pictures.insert(1, plan_preview(*decode_structure(plan)))
        titles = ["input", *(["plan"] if plan is not None else []), "one step", f"{steps} steps", "truth"]
        return contact_sheet([list(row) for row in zip(*pictures, strict=True)], titles)


def main(argv: Sequence[str] | None = None) -> None:
    run, invocation = parse_run(DiffusionRun, argv)
    with readable_errors():
        train(run, invocation.dry_run)


def train(run: DiffusionRun, dry_run: bool) -> None:
    accelerator = make_accelerator(run.optim.precision, run.optim.accumulate)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    torch.manual_seed(run.seed)  # initial weights; nothing after this draws from ambient state
    source = open_dataset(run.data.train)
    labels = source.num_labels if run.objective.structure else 0
    net = make_dit(**asdict(run.model), structure_channels=1 + labels if labels else 0).to(device)
    predictor = load_predictor(run.objective.predictor, device)
    validation = Validation(run.data.val, labels, predictor, device)
    net = start_from(net, run.init)
    folder, learner = RunFolder(run.out, run), Learner(net, **optimizer_options(run))
    start = folder.resume(learner)
    share = per_pass(run.optim.batch, world, run.optim.accumulate)
    if accelerator.is_main_process:
        print(describe(net, len(source), run.optim.steps, run.optim.batch, start, world))
    if dry_run:
        return

    objective = Objective(net, run.objective.draws)
    if run.optim.compile:
        objective.compile()
    objective, optimizers = prepare(accelerator, objective, learner)
    log = Log(folder, run.optim.steps, start, run.optim.batch, accelerator.is_main_process)
    settings = dict(
        holes=run.data.holes,
        seed=run.seed,
        global_batch=run.optim.batch,
        flip=run.data.flip,
        prior=run.objective.prior,
        draws=run.objective.draws,
    )
    times = (run.objective.time_mean, run.objective.time_std, run.objective.pure_noise)
    for step, batch in batches(source, run.optim.batch, run.seed, start, rank, world, run.data.workers):
        if step == run.optim.steps:
            break
        learner.set_rate(step)
        for part, places in passes(batch, share, rank, world):
            examples = make_examples(part, step=step, places=places, **settings).to(device)
            t = draw_times(examples, *times)
            with accelerator.accumulate(objective), accelerator.autocast():
                plan, none = make_plan(
                    examples, predictor, labels, run.objective.predicted, run.objective.drop_structure
                )
                loss = objective(examples.x0, examples.hole, t, examples.noise(run.objective.draws), plan, none).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(objective.parameters(), run.optim.clip)
                    check_finite(float(norm + loss.detach()), step, batch["key"])
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            log.add(loss.detach())
        learner.average(step)

        done = step + 1
        if done % run.log.every == 0:
            log.write(accelerator, done, rate=learner.rate, grad_norm=float(norm))
        if accelerator.is_main_process:
            report(folder, done, learner, validation, log)
        accelerator.wait_for_everyone()
    log.close()
    if accelerator.is_main_process:
        learner.averaged().save_pretrained(folder.folder / "export")
    accelerator.end_training()


if __name__ == "__main__":
    main()
