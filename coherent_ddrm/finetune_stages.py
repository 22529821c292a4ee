"""Fine-tuning, the part with networks: both stages through the one training loop, the export, scores before and after.

Each stage is a run of train/ with its own folder, so it resumes, locks and survives as any run does.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import ModelMixin
from torch import nn

from coherent_ddrm import export as folders
from coherent_ddrm import lora
from coherent_ddrm.checkpoints import read_checkpoint
from coherent_ddrm.config import (
    DataConfig,
    DiffusionObjective,
    DiffusionRun,
    DiTConfig,
    LogConfig,
    OptimConfig,
    StructureConfig,
    StructureObjective,
    StructureRun,
)
from coherent_ddrm.data import open_dataset
from coherent_ddrm.errors import UserError
from coherent_ddrm.images import ImageError, read_image, to_tensor, write_image
from coherent_ddrm.images import fit as fit_picture
from coherent_ddrm.launch import as_it_is, check_run, make_accelerator
from coherent_ddrm.models.dit import SIZES, DiT
from coherent_ddrm.models.structure import StructurePredictor, predict_plan
from coherent_ddrm.pipeline import CoherentInpaintPipeline
from coherent_ddrm.run_folder import RunFolder
from coherent_ddrm.tasks import diffusion, structure
from coherent_ddrm.training import Task, fit
from coherent_ddrm.validation import FixedSet, fixed_set

if TYPE_CHECKING:
    from coherent_ddrm.finetune import Job

BATCH = 16
LOOKS = 10  # at the held-out pictures, of which the best is kept
FULL_RATE, LORA_RATE = 2e-4, 1e-3  # a fifth of the rate from scratch; adapters start at nothing and need the whole
COMPONENT = {"structure": "structure", "diffusion": "transformer"}  # stage -> its folder in a checkpoint


def training_device(device: torch.device | str | None) -> torch.device:
    """The device as a torch.device; None: CUDA if there is one. UserError for kinds that are not trained on."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {device} is not trained on; use cpu or cuda")
    return device


# -- before training ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def guess_labels(job: Job, names: Sequence[str], device: torch.device, batch: int = 32) -> dict[str, str]:
    """For each readable picture the label, background aside, that the checkpoint sees most of; nothing is hidden."""
    net = StructurePredictor.from_pretrained(job.checkpoint / "structure").to(device).eval()
    guessed: dict[str, str] = {}
    for first in range(0, len(names), batch):
        part = {}
        for name in names[first : first + batch]:
            try:
                source = read_image(job.pictures.root / name, at_least=4 * job.resolution)
                part[name] = fit_picture(source, job.resolution)
            except (ImageError, OSError):
                continue  # it is named when the shards are made
        if part:
            x0 = to_tensor(np.stack(list(part.values()))).to(device)
            plan = predict_plan(net, x0, torch.zeros_like(x0[:, :1]))  # (B, 1 + L, H, W)
            ids = plan[:, 2:].mean(dim=(2, 3)).argmax(dim=1) + 1
            guessed |= {name: job.labels[i] for name, i in zip(part, ids.tolist(), strict=True)}
    return guessed


# -- training ----------------------------------------------------------------------------------------------------------


class Adapted(Task):
    """Its export is the best of its validations, since few pictures are soon learned by heart: plain weights, adapters
    merged into them; these lie beside, in adapter/."""

    def export(self, folder: Path) -> None:
        runs = RunFolder(str(folder), None)
        if (best := runs.best()[0]) is not None:
            self.load(read_checkpoint(runs.checkpoints / best)[0])
        net = self.main.averaged()
        if lora.is_adapted(net):
            lora.save_adapter(net, folder / "adapter")
        lora.merge(net).save_pretrained(folder / "export")


class StructureStage(Adapted, structure.StructureTask):
    pass


class DiffusionStage(Adapted, diffusion.DiffusionTask):
    pass


def train(job: Job, stage: str, device: torch.device) -> None:
    """One stage, on from where it was. ConfigError, DataError, NonFinite, RunLocked; SystemExit after a signal."""
    rank = job.wanted.lora
    adapt: Callable[[nn.Module], nn.Module] = as_it_is if rank is None else lambda net: lora.add_adapter(net, rank)
    print(f"stage {'one, the plans' if stage == 'structure' else 'two, the pictures'}", flush=True)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), torch.random.fork_rng():
        torch.manual_seed(job.wanted.seed)  # first adapters; nothing after this draws from ambient state
        try:
            _train(job, stage, adapt, cpu=device.type == "cpu")
        except ValueError as error:
            raise UserError(str(error)) from error


def _train(job: Job, stage: str, adapt: Callable[[nn.Module], nn.Module], cpu: bool) -> None:
    run = structure_run(job) if stage == "structure" else diffusion_run(job)
    source = open_dataset(run.data.train)
    accelerator = make_accelerator(run.optim.precision, run.optim.accumulate, cpu)
    data = lambda: fixed_set(run.data.val, accelerator.device)  # noqa: E731
    if stage == "structure":
        check_run(run, source)
        task = StructureStage(run, source, accelerator, adapt)
        fit(run, task, source, lambda: structure.Validation(data(), task.num_labels))
    else:
        task = DiffusionStage(run, source, accelerator, adapt)
        fit(run, task, source, lambda: diffusion.Validation(data(), task.num_labels, task.predictor))


def structure_run(job: Job) -> StructureRun:
    """Stage one's run: the checkpoint's own network and weights."""
    config = folders.read_json(job.checkpoint / "structure" / "config.json")
    model = StructureConfig(**{f.name: config[f.name] for f in dataclasses.fields(StructureConfig)})
    return StructureRun(model=model, objective=StructureObjective(known_weight=0.4), **_common(job, "structure"))


def diffusion_run(job: Job) -> DiffusionRun:
    """Stage two's run. It sees true plans and the fine-tuned predictor's; where no map is true, the latter alone."""
    predictor = str(job.run / "structure" / "export") if job.planner and job.labels else None
    only = predictor is not None and job.wanted.segmentation == "none"
    objective = DiffusionObjective(structure=bool(job.labels), predictor=predictor, predicted=1.0 if only else 0.5)
    return DiffusionRun(model=model_config(job.checkpoint), objective=objective, **_common(job, "diffusion"))


def model_config(checkpoint: Path) -> DiTConfig:
    """The transformer's switches, and the name of its size. UserError if it has none."""
    config = folders.read_json(checkpoint / "transformer" / "config.json")
    for size, spec in SIZES.items():
        if all(config.get(key) == value for key, value in spec.items()):
            names = [f.name for f in dataclasses.fields(DiTConfig) if f.name != "size"]
            return DiTConfig(size=size, **{name: config[name] for name in names})
    raise UserError(f"{checkpoint}: its transformer has none of the sizes {', '.join(SIZES)}")


def _common(job: Job, stage: str) -> dict[str, Any]:
    """What both stages' runs share."""
    steps, rank = job.wanted.steps, job.wanted.lora
    return dict(
        out=str(job.run / stage),
        seed=job.wanted.seed,
        init=str(job.checkpoint / COMPONENT[stage]),
        data=DataConfig(train=str(job.shards / "train"), val=str(job.shards / "val")),
        optim=OptimConfig(
            optimizer="adamw",
            lr=FULL_RATE if rank is None else LORA_RATE,
            warmup=20,
            cooldown=0.5,
            steps=steps,
            batch=BATCH,
            ema=0.99,
        ),
        log=LogConfig(every=10, validate=max(1, steps // LOOKS), sheet=steps, save=100),
    )


# -- after training ----------------------------------------------------------------------------------------------------


def tuned(job: Job) -> dict[str, ModelMixin]:
    """The networks that came of it, by their component's name."""
    nets: dict[str, ModelMixin] = {"transformer": DiT.from_pretrained(job.run / "diffusion" / "export")}
    if job.planner:
        nets["structure"] = StructurePredictor.from_pretrained(job.run / "structure" / "export")
    return nets


def export(job: Job) -> dict[str, Any]:
    """Write OUT's checkpoint, and OUT/lora; what finetune.json says of them."""
    facts: dict[str, Any] = {}
    if job.wanted.lora:
        facts["adapter_parameters"] = export_adapters(job)
    if job.wanted.merge:
        pipe = CoherentInpaintPipeline.from_pretrained(job.checkpoint)
        settings = {name: pipe.config[name] for name in ("resolution", "label_names", "steps", "shift")}
        CoherentInpaintPipeline(**{"structure": None, **tuned(job)}, **settings).save_pretrained(job.out)
    else:
        copy_checkpoint(job.checkpoint, job.out)
    return facts | {"result_sha256": folders.verify_manifest(job.out)}


def export_adapters(job: Job) -> int:
    """Write OUT/lora whole, in place of an earlier one; its number of parameters."""
    final, count = job.out / "lora", 0
    with tempfile.TemporaryDirectory(prefix=".lora.tmp-", dir=job.out) as parent:
        beside = Path(parent) / "lora"
        for stage in ("structure", "diffusion"):
            made = job.run / stage / "adapter"
            if made.is_dir():
                shutil.copytree(made, beside / COMPONENT[stage])
                count += lora.count_parameters(made)
        lora.write_record(beside, job.checkpoint_hash)
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
    return count


def copy_checkpoint(checkpoint: Path, out: Path) -> None:
    """The files of a checkpoint as they are, so that its hash stays, which adapters are recorded with."""
    with tempfile.TemporaryDirectory(prefix=".copy.tmp-", dir=out) as parent:
        for name in (folders.INDEX, folders.MANIFEST):
            shutil.copy(checkpoint / name, parent)
        for name in folders.COMPONENTS:
            if (checkpoint / name).is_dir():
                shutil.copytree(checkpoint / name, Path(parent) / name)
        folders.publish(Path(parent), out)


@torch.no_grad()
def compare(job: Job, device: torch.device) -> dict[str, dict[str, dict[str, float]]]:
    """Scores {component: {before, after: {name: score}}} on the same held-out pictures, holes and noise; draws sheets.

    Each time both stages together: stage two renders the plans of the stage one beside it.
    """
    pipe = CoherentInpaintPipeline.from_pretrained(job.checkpoint)
    data = fixed_set(str(job.shards / "val"), device)
    nets = {"before": {name: net for name, net in pipe.components.items() if net is not None}, "after": tuned(job)}
    found: dict[str, dict[str, dict[str, float]]] = {}
    (job.out / "sheets").mkdir(exist_ok=True)
    for when, both in nets.items():
        for name, validation in validations(job, data, both, device).items():
            scores = validation.scores(both[name])
            finite = {k: round(v, 6) for k, v in scores.items() if math.isfinite(v)}  # without maps some are not
            found.setdefault(name, {})[when] = finite
            write_image(job.out / "sheets" / f"{name}-{when}.png", validation.sheet(both[name]))
    return found


def validations(job: Job, data: FixedSet, nets: dict[str, ModelMixin], device: torch.device) -> dict[str, Any]:
    """How each component is scored; `nets` are moved to the device."""
    nets = {name: net.to(device).eval() for name, net in nets.items()}
    made: dict[str, Any] = {}
    if "structure" in nets:
        made["structure"] = structure.Validation(data, len(job.labels))
    made["transformer"] = diffusion.Validation(data, len(job.labels), nets.get("structure"))
    return made
