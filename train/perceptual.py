"""Train the network behind the perceptual loss on segmentation maps and class labels of shards (LaMa's idea).

    accelerate launch train/perceptual.py --config configs/clothing_64_perceptual.yaml [--dry-run] [--any.key value]

The same command again resumes. In the run folder: config.yaml, log.jsonl, sheets/, tensorboard/, checkpoints/ and
export/ (the averaged weights, for `load_perceptual`). Batch norm takes its statistics from what one process sees in one
pass, so here, unlike in stage two, results depend on the number of processes and passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from coherent_ddrm.config import ConfigError, PerceptualRun, optimizer_options, parse_run
from coherent_ddrm.data import DecodedCache, ShardDataset, open_dataset
from coherent_ddrm.examples import example_settings, make_examples
from coherent_ddrm.images import to_tensor, to_uint8
from coherent_ddrm.launch import check_run, make_accelerator, readable_errors, start_from
from coherent_ddrm.learner import Learner
from coherent_ddrm.models.perceptual import PerceptualNet, make_perceptual
from coherent_ddrm.sheets import contact_sheet, plan_preview
from coherent_ddrm.structure_losses import IGNORE, iou, segmentation_counts, segmentation_loss
from coherent_ddrm.training import Task, fit

NO_CLASS = -1  # class_id of a sample without one
PART = 32  # pictures at once that are not learned from
SETTLE = 256  # pictures that batch norm's statistics for the averaged weights are taken from


class Objective(nn.Module):
    """One training step's loss, per sample: cross-entropy over labelled pixels, and over classes."""

    def __init__(self, net: PerceptualNet, segmentation: float, classes: float, smoothing: float):
        super().__init__()
        self.net, self.segmentation, self.classes, self.smoothing = net, segmentation, classes, smoothing

    def forward(self, x: Tensor, segmentation: Tensor, labels: Tensor) -> Tensor:
        """x: (B, 3, H, W); segmentation: (B, H, W), 255 = none; labels: (B,), -1 = none -> (B,), 0 without either"""
        maps, classes = self.net(x)
        loss = x.new_zeros(len(x))
        if maps is not None:
            loss = loss + self.segmentation * segmentation_loss(maps, segmentation, torch.ones_like(x[:, :1]))
        if classes is not None:
            options = dict(reduction="none", ignore_index=NO_CLASS, label_smoothing=self.smoothing)
            loss = loss + self.classes * F.cross_entropy(classes, labels, **options)
        return loss


def deform(x: Tensor, segmentation: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """0.75 to 1.25 as large and moved by up to a tenth, the map with the picture; each channel's contrast and
    brightness changed. x: (B, 3, H, W); segmentation: (B, H, W) uint8; u: (B, 9) in [0, 1) -> like x, segmentation"""
    u = 2 * u - 1
    scale, zero = 1 / (1 + 0.25 * u[:, 0]), torch.zeros_like(u[:, 0])
    rows = [torch.stack([scale, zero, u[:, 1] / 5], 1), torch.stack([zero, scale, u[:, 2] / 5], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), x.shape, align_corners=False)
    options = dict(padding_mode="border", align_corners=False)
    ids = F.grid_sample(segmentation[:, None].float(), grid, mode="nearest", **options)
    gain, offset = 1 + 0.2 * u[:, 3:6], 0.2 * u[:, 6:9]
    x = gain[..., None, None] * F.grid_sample(x, grid, **options) + offset[..., None, None]
    return x.clamp(-1, 1), ids[:, 0].to(segmentation.dtype)


def settle(net: PerceptualNet, pictures: Tensor) -> PerceptualNet:
    """Give averaged weights statistics of their own: those that come with them are of the last steps' weights. Halfway
    through a run on clothing this made 0.49 right classes 0.52, at its end 0.55 0.57. pictures: (N, 3, H, W)"""
    update_bn(pictures.split(PART), net)
    return net


class Validation:
    """All pictures of the validation shards. ConfigError unless the task's network can be scored on them."""

    def __init__(self, source: ShardDataset | DecodedCache, task: PerceptualTask):
        batch, net, train, device = source.batch(np.arange(len(source))), task.main.net, task.source, task.seen.device
        for head, what, theirs, ours, there in (
            (net.segment, "labels", source.label_names, train.label_names, batch["segmentation"] != IGNORE),
            (net.classify, "classes", source.class_names, train.class_names, batch["class_id"] != NO_CLASS),
        ):
            if head is not None and theirs != ours:
                raise ConfigError(f"data.val: its {what} are {theirs}, those of data.train {ours} (--label-names)")
            if head is not None and not there.any():
                raise ConfigError(f"data.val: none of its pictures has {what}")
        self.x0 = to_tensor(batch["image"]).to(device)
        self.segmentation = torch.from_numpy(batch["segmentation"]).to(device)
        self.labels = torch.from_numpy(batch["class_id"]).to(device)
        self.num_labels, self.class_names, self.seen = source.num_labels, source.class_names, task.seen
        self.best = "-val_iou" if net.segment is not None else "-val_accuracy"

    @torch.no_grad()
    def scores(self, net: PerceptualNet) -> dict[str, float]:
        """Mean IoU over the labels that occur and share of right pixels, share of right classes, each beside what
        always saying the commonest gives."""
        settle(net, self.seen)
        parts = [net(x) for x in self.x0.split(PART)]
        scores: dict[str, float] = {}
        if net.segment is not None:
            labelled = self.segmentation[self.segmentation != IGNORE]
            trivial = torch.full_like(self.segmentation, int(labelled.long().bincount().argmax()))
            predicted = torch.cat([maps.argmax(dim=1).to(trivial.dtype) for maps, _ in parts])
            for name, ids in (("", predicted), ("_trivial", trivial)):
                right = (ids == self.segmentation)[self.segmentation != IGNORE]
                scores |= {f"val_iou{name}": self._iou(ids), f"val_pixels{name}": float(right.float().mean())}
        if net.classify is not None:
            known = self.labels != NO_CLASS
            right = torch.cat([classes.argmax(dim=1) for _, classes in parts]) == self.labels
            commonest = self.labels[known].bincount().max() / known.sum()
            scores |= {"val_accuracy": float(right[known].float().mean()), "val_accuracy_trivial": float(commonest)}
        return scores

    def _iou(self, ids: Tensor) -> float:
        """Of all pictures together, mean over the labels that occur."""
        everywhere = torch.ones_like(self.x0[:, :1])
        parts = zip(ids.split(PART), self.segmentation.split(PART), everywhere.split(PART), strict=True)
        counts = sum(segmentation_counts(a, b, self.num_labels, where).sum(dim=0) for a, b, where in parts)
        return float(iou(counts).nanmean())

    @torch.no_grad()
    def sheet(self, net: PerceptualNet, count: int = 12) -> np.ndarray:
        """Picture, segmentation, true segmentation; the class it is taken for beside it. uint8 picture."""
        maps, classes = settle(net, self.seen)(self.x0[:count])
        columns, titles = [to_uint8(self.x0[:count])], ["picture"]
        if maps is not None:
            for title, ids in (("segmentation", maps.argmax(dim=1)), ("truth", self.segmentation[:count])):
                ids = ids.byte().cpu().numpy()
                columns.append(plan_preview(np.zeros_like(ids), ids))
                titles.append(title)
        labels = [self.class_names[i] for i in classes.argmax(dim=1).tolist()] if classes is not None else []
        return contact_sheet([list(row) for row in zip(*columns, strict=True)], titles, labels=labels)


def main(argv: Sequence[str] | None = None) -> None:
    run, invocation = parse_run(PerceptualRun, argv)
    with readable_errors():
        train(run, invocation.dry_run)


def make_net(run: PerceptualRun, source: ShardDataset | DecodedCache) -> PerceptualNet:
    """The network with a head for each thing it learns. ConfigError where there is nothing to learn from."""
    weights = run.objective
    if not weights.segmentation and not weights.classes:
        raise ConfigError("objective: segmentation and classes are both 0; give one a weight")
    if weights.segmentation and not source.num_labels:
        raise ConfigError(f"{run.data.train}: no segmentation maps in it; set objective.segmentation 0 or build some")
    if weights.classes and not source.class_names:
        raise ConfigError(
            f"{run.data.train}: its pictures have no classes (build_shards.py --classes); or set objective.classes 0"
        )
    heads = dict(
        num_labels=source.num_labels if weights.segmentation else 0,
        num_classes=source.num_classes if weights.classes else 0,
    )
    try:
        return make_perceptual(run.model.network, **heads)
    except ValueError as error:
        raise ConfigError(f"model.network: {error}") from None


class PerceptualTask(Task):
    """A network of high receptive field that segments pictures, tells their classes, or both."""

    def __init__(self, run: PerceptualRun, source: ShardDataset | DecodedCache, accelerator: Accelerator):
        net = start_from(make_net(run, source), run.init).to(accelerator.device)
        net.eval()  # until `prepare`: what the launch measures on one sample must not enter the statistics
        weights, learner = run.objective, Learner(net, **optimizer_options(run))
        objective = Objective(net, weights.segmentation, weights.classes, weights.smoothing)
        super().__init__({"perceptual": learner}, [objective], accelerator)
        self.source, self.settings = source, example_settings(run)
        some = source.batch(np.linspace(0, len(source) - 1, min(SETTLE, len(source))).astype(int))
        self.seen = to_tensor(some["image"]).to(accelerator.device)

    def prepare(self, compile: bool) -> None:
        super().prepare(compile)
        self.objectives[0].train()

    def loss_of(self, part: dict, step: int, places: Sequence[int]) -> Tensor:
        device = self.accelerator.device
        examples = make_examples(part, step=step, places=places, **self.settings).to(device)
        u = torch.stack([torch.rand(9, generator=g) for g in examples.rng]).to(device)
        x, segmentation = deform(examples.x0, examples.segmentation, u)
        labels = torch.from_numpy(part["class_id"]).to(device)
        with self.accelerator.autocast():
            return self.objectives[0](x, segmentation, labels).mean()

    def backward(self, part: dict, step: int, places: Sequence[int], look: bool) -> dict[str, Tensor]:
        before = [b.clone() for b in self.main.net.buffers()]
        losses = super().backward(part, step, places, look)
        for now, then in zip(self.main.net.buffers(), before, strict=True):
            now.copy_(torch.where(losses["loss"].isfinite(), now, then))  # the step is skipped: so are its statistics
        return losses

    def export(self, folder: Path) -> None:
        settle(self.main.averaged(), self.seen).save_pretrained(folder / "export")


def train(run: PerceptualRun, dry_run: bool) -> None:
    accelerator = make_accelerator(run.optim.precision, run.optim.accumulate)
    torch.manual_seed(run.seed)  # initial weights; nothing after this draws from ambient state
    source = open_dataset(run.data.train)
    check_run(run, source)
    task = PerceptualTask(run, source, accelerator)
    fit(run, task, source, lambda: Validation(open_dataset(run.data.val), task), dry_run)


if __name__ == "__main__":
    main()
