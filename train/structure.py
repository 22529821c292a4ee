"""Train stage one, the structure predictor.

    accelerate launch train/structure.py --config configs/clothing_64_structure.yaml [--dry-run] [--any.key value]

The same command again resumes. In the run folder: config.yaml, log.jsonl, sheets/, tensorboard/, checkpoints/ and
export/ (the averaged weights, ready for stage two and for the pipeline).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor, nn

from coherent_ddrm.config import StructureRun, optimizer_options, parse_run
from coherent_ddrm.data import batches, open_dataset
from coherent_ddrm.examples import make_examples
from coherent_ddrm.images import to_tensor, to_uint8
from coherent_ddrm.learner import Learner
from coherent_ddrm.masks import make_holes
from coherent_ddrm.models.structure import StructurePredictor, decode_structure, encode_structure, predict_plan
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.schedule import add_noise
from coherent_ddrm.sheets import contact_sheet, plan_preview
from coherent_ddrm.structure_losses import (
    edge_counts,
    edge_loss,
    f1,
    iou,
    region_weight,
    segmentation_counts,
    segmentation_loss,
)
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

IGNORE = 255
EDGE_THRESHOLD = 0.2  # a mean plan spreads an edge over the places where it may be, so its peaks are low


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
    """The same pictures and holes at every call: the mean plan against the truth on hidden pixels."""

    HOLES = ("half", "lama-thick", "box")

    def __init__(self, folder: str, num_labels: int, device: torch.device):
        source = open_dataset(folder)
        batch = source.batch(np.arange(len(source)))
        holes = [
            make_holes(self.HOLES[i % 3], 1, *batch["image"].shape[1:3], seed=(1, i))[0] for i in range(len(source))
        ]
        self.picture = to_tensor(batch["image"]).to(device)
        self.hole = torch.from_numpy(np.stack(holes)).float().to(device)
        self.edges, self.labels = (torch.from_numpy(batch[k]).to(device) for k in ("edges", "segmentation"))
        self.num_labels = num_labels

    def plans(self, net: StructurePredictor, rows: Tensor, steps: int = 1) -> Tensor:
        rng = [keyed_generator(2, int(i)) for i in rows]
        return predict_plan(net, self.picture[rows], self.hole[rows], steps=steps, rng=rng)

    @torch.no_grad()
    def scores(self, net: StructurePredictor) -> dict[str, float]:
        """Edge F1, mean IoU over labels, and IoU of foreground (any label but 0), of the mean plan on hidden pixels."""
        plans = torch.cat([self.plans(net, rows) for rows in torch.arange(len(self.picture)).split(64)])
        edges, labels = decode_structure(plans)
        strength, truth = (x[:, None].float() / 255 for x in (edges, self.edges))
        foreground = [torch.where(x == IGNORE, x, (x > 0).to(x.dtype)) for x in (labels, self.labels)]
        per_label = iou(segmentation_counts(labels, self.labels, self.num_labels, self.hole).sum(dim=0))
        return {
            "val_edge_f1": float(f1(edge_counts(strength, truth, self.hole, threshold=EDGE_THRESHOLD).sum(dim=0))),
            "val_iou": float(per_label.nanmean()),
            "val_foreground_iou": float(iou(segmentation_counts(*foreground, 2, self.hole).sum(dim=0))[1]),
        }

    @torch.no_grad()
    def sheet(self, net: StructurePredictor, count: int = 12) -> np.ndarray:
        """Input, mean plan, two sampled plans, truth; uint8 picture."""
        rows = torch.arange(count)
        seen = to_uint8(self.picture[:count] * (1 - self.hole[:count]))
        plans = [
            self.plans(net, rows),
            self.plans(net, rows, steps=10),
            encode_structure(self.edges[:count], self.labels[:count], self.num_labels),
        ]
        previews = [plan_preview(*(x.cpu().numpy() for x in decode_structure(plan))) for plan in plans]
        columns = [seen, *previews, to_uint8(self.picture[:count])]
        titles = ["input", "mean plan", "plan, 10 steps", "true plan", "truth"]
        return contact_sheet([list(row) for row in zip(*columns, strict=True)], titles)


def main(argv: Sequence[str] | None = None) -> None:
    run, invocation = parse_run(StructureRun, argv)
    with readable_errors():
        train(run, invocation.dry_run)


def train(run: StructureRun, dry_run: bool) -> None:
    accelerator = make_accelerator(run.optim.precision, run.optim.accumulate)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    torch.manual_seed(run.seed)  # initial weights; nothing after this draws from ambient state
    source = open_dataset(run.data.train)
    labels = source.num_labels
    net = StructurePredictor(num_labels=labels, **asdict(run.model)).to(device)
    validation = Validation(run.data.val, labels, device)
    net = start_from(net, run.init)
    folder, learner = RunFolder(run.out, run), Learner(net, **optimizer_options(run))
    start = folder.resume(learner)
    share = per_pass(run.optim.batch, world, run.optim.accumulate)
    if accelerator.is_main_process:
        print(describe(net, len(source), run.optim.steps, run.optim.batch, start, world))
    if dry_run:
        return

    weights = run.objective
    objective = Objective(net, weights.edges, weights.segmentation, weights.known_weight)
    if run.optim.compile:
        objective.compile()
    objective, optimizers = prepare(accelerator, objective, learner)
    log = Log(folder, run.optim.steps, start, run.optim.batch, accelerator.is_main_process)
    settings = dict(holes=run.data.holes, seed=run.seed, global_batch=run.optim.batch, flip=run.data.flip)
    for step, batch in batches(source, run.optim.batch, run.seed, start, rank, world, run.data.workers):
        if step == run.optim.steps:
            break
        learner.set_rate(step)
        for part, places in passes(batch, share, rank, world):
            examples = make_examples(part, step=step, places=places, **settings).to(device)
            t = structure_time(examples.u[:, 0], examples.choice[:, 3], run.objective.pure_noise)
            s0 = encode_structure(examples.edges, examples.segmentation, labels)
            s_t = add_noise(net.schedule, s0, t, normal(s0, examples.rng))
            with accelerator.accumulate(objective), accelerator.autocast():
                seen = (examples.x0, examples.hole, examples.edges, examples.segmentation)
                loss = objective(s_t, t, *seen).mean()
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
