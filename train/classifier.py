"""Train a small classifier on the class labels of shards, for guidance.

    accelerate launch train/classifier.py --config configs/clothing_64_classifier.yaml [--dry-run] [--any.key value]

The same command again resumes. In the run folder: config.yaml, log.jsonl, sheets/, tensorboard/, checkpoints/ and
export/ (the averaged weights, for `Classifier.from_pretrained`). Samples without a class are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from coherent_ddrm.classifier import Classifier, make_classifier
from coherent_ddrm.config import ClassifierRun, ConfigError, optimizer_options, parse_run
from coherent_ddrm.data import DecodedCache, ShardDataset, open_dataset
from coherent_ddrm.examples import Examples, example_settings, make_examples
from coherent_ddrm.images import to_tensor, to_uint8
from coherent_ddrm.launch import check_run, make_accelerator, readable_errors, start_from
from coherent_ddrm.learner import Learner
from coherent_ddrm.rng import normal
from coherent_ddrm.schedule import VPCosine, add_noise
from coherent_ddrm.sheets import contact_sheet
from coherent_ddrm.training import Task, fit

NO_CLASS = -1  # class_id of a sample without one


class Objective(nn.Module):
    """One training step's loss: cross-entropy with label smoothing."""

    def __init__(self, net: Classifier, smoothing: float):
        super().__init__()
        self.net, self.smoothing = net, smoothing

    def forward(self, x: Tensor, labels: Tensor, t: Tensor | None) -> Tensor:
        """x: (B, 3, H, W); labels: (B,), -1 = none -> (B,), 0 without a label"""
        logits = self.net(x, t)
        return F.cross_entropy(logits, labels, reduction="none", ignore_index=NO_CLASS, label_smoothing=self.smoothing)


def deform(x: Tensor, u: Tensor) -> Tensor:
    """Turned by up to 15 degrees, 0.75 to 1.25 as large, moved by up to a tenth, each channel's contrast and brightness
    changed. x: (B, 3, H, W); u: (B, 10) in [0, 1) -> like x"""
    u = 2 * u - 1
    angle, size = u[:, 0] * math.pi / 12, 1 + 0.25 * u[:, 1]
    rows = [
        torch.stack([angle.cos(), -angle.sin(), u[:, 2] / 5], 1),
        torch.stack([angle.sin(), angle.cos(), u[:, 3] / 5], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1) / size[:, None, None], x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    gain, offset = 1 + 0.2 * u[:, 4:7], 0.2 * u[:, 7:10]
    return (gain[..., None, None] * x + offset[..., None, None]).clamp(-1, 1)


def soften(x: Tensor, u: Tensor, z: Tensor) -> Tensor:
    """Blurred, by 0 (nothing) to 1 (pooled 8 by 8), and noisy, by a deviation up to 0.3. u: (B, 2); z: like x"""
    levels = [x] + [
        F.interpolate(F.avg_pool2d(x, side), x.shape[-2:], mode="bilinear", align_corners=False) for side in (2, 4, 8)
    ]
    place = 3 * u[:, :1, None, None]
    blurred = sum((1 - (place - i).abs()).clamp(min=0) * level for i, level in enumerate(levels))
    return blurred + 0.3 * u[:, 1:, None, None] * z


def erase(x: Tensor, hole: Tensor, coin: Tensor, share: float) -> Tensor:
    """For half of a `share` of the samples the hole is white, for the other half all but the hole, if it is large
    enough to tell something. hole: (B, 1, H, W); coin: (B,)"""
    large = hole.mean(dim=(1, 2, 3)) > 0.25
    inside, outside = coin < share / 2, (coin >= share / 2) & (coin < share) & large
    white = torch.where(inside[:, None, None, None], hole, (1 - hole) * outside[:, None, None, None])
    return torch.where(white > 0, torch.ones_like(x), x)


def shown(examples: Examples, erased: float, softened: float, timed: bool) -> tuple[Tensor, Tensor | None]:
    """(x, t), what the network is to learn from: changed pictures, noisy at t if it is `timed`."""
    u = torch.stack([torch.rand(12, generator=g) for g in examples.rng]).to(examples.x0.device)
    z = normal(examples.x0, examples.rng)
    x = erase(deform(examples.x0, u[:, :10]), examples.hole, examples.choice[:, 0], erased)
    if timed:
        return add_noise(VPCosine(), x, examples.u[:, 0], z), examples.u[:, 0]
    soft = examples.choice[:, 1] < softened
    return torch.where(soft[:, None, None, None], soften(x, u[:, 10:], z), x), None


class Validation:
    """All labelled pictures of the validation shards, whole and with half of them white."""

    best = "-val_accuracy"

    def __init__(self, source: ShardDataset | DecodedCache, device: torch.device):
        batch = source.batch(np.arange(len(source)))
        labelled = batch["class_id"] != NO_CLASS
        if not labelled.any():
            raise ConfigError("data.val: no picture has a class")
        self.x0 = to_tensor(batch["image"][labelled]).to(device)
        self.labels = torch.from_numpy(batch["class_id"][labelled]).to(device)
        self.class_names = source.class_names

    def logits(self, net: Classifier, x: Tensor) -> Tensor:
        parts = [net(part, torch.zeros(len(part), device=part.device)) for part in x.split(64)]
        return torch.cat(parts)

    @torch.no_grad()
    def scores(self, net: Classifier) -> dict[str, float]:
        """Loss and share of right answers; that of always the commonest class; that for the lower half alone."""
        logits, lower = self.logits(net, self.x0), self.x0.clone()
        lower[:, :, : lower.shape[2] // 2] = 1
        right = lambda logits: float((logits.argmax(dim=1) == self.labels).float().mean())  # noqa: E731
        return {
            "val_loss": float(F.cross_entropy(logits, self.labels)),
            "val_accuracy": right(logits),
            "val_accuracy_lower_half": right(self.logits(net, lower)),
            "val_majority": float(self.labels.bincount().max() / len(self.labels)),
        }

    @torch.no_grad()
    def sheet(self, net: Classifier, count: int = 8) -> np.ndarray:
        """What the network takes for each class, a column each, the surest first; uint8 picture."""
        sure, chosen = self.logits(net, self.x0).softmax(dim=1).max(dim=1)
        pictures, blank = to_uint8(self.x0), np.full((1, 1, 3), 255, np.uint8)
        columns = []
        for label in range(len(self.class_names)):
            order = [int(i) for i in sure.argsort(descending=True) if chosen[i] == label][:count]
            columns.append([pictures[i] for i in order] + [blank] * (count - len(order)))
        return contact_sheet(list(zip(*columns, strict=True)), self.class_names, cell=72)


def main(argv: Sequence[str] | None = None) -> None:
    run, invocation = parse_run(ClassifierRun, argv)
    with readable_errors():
        train(run, invocation.dry_run)


def make_net(run: ClassifierRun, class_names: list[str]) -> Classifier:
    if not class_names:
        raise ConfigError(f"{run.data.train}: its pictures have no classes (build_shards.py --classes)")
    try:
        return make_classifier(run.model.network, len(class_names), class_names=class_names, timed=run.model.timed)
    except ValueError as error:
        raise ConfigError(f"model.network: {error}") from None


class ClassifierTask(Task):
    """A classifier of pictures, erased, softened or noisy as guidance will show them."""

    def __init__(self, run: ClassifierRun, source: ShardDataset | DecodedCache, accelerator: Accelerator):
        net = start_from(make_net(run, source.class_names), run.init).to(accelerator.device)
        learner = Learner(net, **optimizer_options(run))
        super().__init__({"classifier": learner}, [Objective(net, run.objective.smoothing)], accelerator)
        self.erased, self.softened, self.timed = run.objective.erased, run.objective.softened, run.model.timed
        self.settings = example_settings(run)

    def loss_of(self, part: dict, step: int, places: Sequence[int]) -> Tensor:
        device = self.accelerator.device
        examples = make_examples(part, step=step, places=places, **self.settings).to(device)
        x, t = shown(examples, self.erased, self.softened, self.timed)
        labels = torch.from_numpy(part["class_id"]).to(device)
        with self.accelerator.autocast():
            return self.objectives[0](x.contiguous(memory_format=torch.channels_last), labels, t).mean()


def train(run: ClassifierRun, dry_run: bool) -> None:
    accelerator = make_accelerator(run.optim.precision, run.optim.accumulate)
    torch.manual_seed(run.seed)  # initial weights; nothing after this draws from ambient state
    source = open_dataset(run.data.train)
    check_run(run, source)
    task = ClassifierTask(run, source, accelerator)
    fit(run, task, source, lambda: Validation(open_dataset(run.data.val), accelerator.device), dry_run)


if __name__ == "__main__":
    main()
