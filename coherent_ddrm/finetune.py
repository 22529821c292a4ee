"""`coherent-ddrm finetune`: from a folder of a person's own pictures to a checkpoint, both stages, in one call.

    from coherent_ddrm.finetune import FineTune, finetune
    finetune(FineTune("pictures", "mine", lora=8))

    OUT/  the checkpoint: model_index.json, transformer/, structure/, manifest.json
          finetune.json      scores before and after, what was trained on
          sheets/            the same held-out pictures before and after
          lora/              the adapters alone (lora.py)
          run/               shards, run folders of both stages; may be deleted afterwards

Everything that can be checked without torch is checked first. The same call again goes on where it was stopped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coherent_ddrm import own_pictures
from coherent_ddrm.errors import UserError
from coherent_ddrm.export import INDEX, default_checkpoint, read_facts, read_json, verify_manifest, write_atomic
from coherent_ddrm.own_pictures import Pictures
from coherent_ddrm.run_lock import RunLock, RunLocked
from coherent_ddrm.shards import MANIFEST, DataError, write_json

if TYPE_CHECKING:
    import torch

REPORT = "finetune.json"
LOWER = ("val_loss", "val_mse")  # the better scores are lower
KINDS = ("saliency", "labels:DIR", "none")


@dataclass
class FineTune:
    """What is asked for.

    Args:
        pictures: a folder of pictures; sub-folders count.
        output: the checkpoint to make; a new folder, or one of an earlier call with the same settings.
        checkpoint: the checkpoint to start from; None = the shipped one.
        lora: rank of the adapters that learn beside frozen weights; None = all weights learn.
        merge: add the adapters to the exported weights; else `output` holds the old weights, and lora/ the adapters.
        steps: of each stage.
        segmentation: saliency, labels:DIR (maps with the checkpoint's ids, named as the pictures) or none.
        label: which of the checkpoint's labels the pictures' foreground carries, with saliency; None = per picture, the
            one that the checkpoint sees in it.
        holdout: share of the pictures that is not trained on.
    """

    pictures: str | Path
    output: str | Path
    checkpoint: str | Path | None = None
    lora: int | None = None
    merge: bool = True
    steps: int = 500
    segmentation: str = "saliency"
    label: str | None = None
    seed: int = 0
    holdout: float = 0.15


@dataclass(frozen=True)
class Job:
    """A FineTune that was checked."""

    wanted: FineTune
    checkpoint: Path
    checkpoint_hash: str
    resolution: int
    labels: tuple[str, ...]  # of the plan, by id; () = the checkpoint takes none
    planner: bool  # whether the checkpoint predicts plans
    pictures: Pictures

    @property
    def out(self) -> Path:
        return Path(os.path.abspath(self.wanted.output))

    @property
    def run(self) -> Path:
        return self.out / "run"

    @property
    def shards(self) -> Path:
        return self.run / "shards"

    @property
    def guesses(self) -> bool:
        """Whether the checkpoint has to say what each picture shows."""
        return self.wanted.segmentation == "saliency" and len(self.labels) > 2 and self.wanted.label is None

    def settings(self) -> dict[str, Any]:
        """What must be the same for a call to go on with an earlier one's work."""
        wanted = self.wanted
        named = {name: getattr(wanted, name) for name in ("lora", "segmentation", "label", "seed", "holdout")}
        return {"pictures": self.pictures.digest, "checkpoint": self.checkpoint_hash, **named}


def finetune(wanted: FineTune, device: torch.device | str | None = None) -> dict[str, Any]:
    """Check, then do it; what finetune.json says. UserError for what a person can mend."""
    return carry_out(examine(wanted), device)


# -- checks ------------------------------------------------------------------------------------------------------------


def examine(wanted: FineTune) -> Job:
    """All checks that need no torch; nothing is written. UserError, CheckpointError."""
    for package, flag, extra in (("peft", "--lora", "lora"), ("tensorboard", "training", "train")):
        if (package != "peft" or wanted.lora) and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag} needs {package}; install it with: pip install 'coherent-ddrm[{extra}]'")
    if not wanted.merge and not wanted.lora:
        raise UserError("without --lora there is no adapter to keep apart; leave --no-merge out, or give --lora RANK")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("finetune is one process; start it without a launcher, or use train/ on many devices")
    if not 0 < wanted.holdout <= 0.5:
        raise UserError(f"--holdout is {wanted.holdout:g}; it is a share above 0, at most 0.5")
    checkpoint = Path(wanted.checkpoint or default_checkpoint())
    digest, facts = verify_manifest(checkpoint), read_facts(checkpoint)
    if not facts.labels and wanted.segmentation != "none":
        wanted.segmentation = "none"  # nothing would read the maps
    labels = check_labels(wanted, checkpoint, facts.labels, facts.planner)
    check_places(wanted, checkpoint)
    pictures = own_pictures.split_pictures(Path(wanted.pictures), wanted.holdout)
    job = Job(wanted, checkpoint, digest, facts.resolution, labels, facts.planner, pictures)
    check_earlier(job)
    return job


def check_labels(wanted: FineTune, checkpoint: Path, count: int, planner: bool) -> tuple[str, ...]:
    """The plan's labels by id. UserError if the maps that are asked for cannot carry them."""
    names = tuple(read_json(checkpoint / INDEX).get("label_names") or (f"label {i}" for i in range(count)))
    if len(names) != count:
        raise UserError(f"{checkpoint}: it names {len(names)} labels, its plan has {count}; export it again")
    kind, _, folder = wanted.segmentation.partition(":")
    if kind not in ("saliency", "labels", "none") or (kind == "labels") != bool(folder):
        raise UserError(f"--segmentation {wanted.segmentation!r}: choose one of {', '.join(KINDS)}")
    if kind == "labels" and not Path(folder).is_dir():
        raise UserError(f"--segmentation labels:{folder}: no such folder")
    if kind != "saliency":
        if wanted.label is not None:
            raise UserError("--label says what the foreground is, which only --segmentation saliency finds")
        return names
    if len(names) < 2 or names[0] != "background":
        raise UserError(
            f"{checkpoint} has the labels {', '.join(names[:5])}; saliency finds a foreground before 'background', "
            "which must be label 0: use --segmentation labels:DIR, or none"
        )
    if wanted.label is not None and wanted.label not in names[1:]:
        raise UserError(f"--label {wanted.label!r}: the checkpoint's labels are {', '.join(names[1:])}")
    if wanted.label is None and len(names) > 2 and not planner:
        raise UserError(f"--label is needed: say which of {', '.join(names[1:])} the pictures show")
    return names


def check_places(wanted: FineTune, checkpoint: Path) -> None:
    """UserError where folders lie in each other."""
    pictures, out = Path(wanted.pictures).resolve(), Path(wanted.output).resolve()
    if out.is_relative_to(pictures):
        raise UserError(f"{out} lies inside {pictures}: its sheets would become pictures; choose another folder")
    if out == checkpoint.resolve():
        raise UserError(f"{out} is the checkpoint to start from; choose another folder for the result")


def check_earlier(job: Job) -> None:
    """UserError if OUT holds anything but an earlier call's work with the same settings."""
    if not job.out.exists():
        return
    if not job.out.is_dir() or (any(job.out.iterdir()) and not (job.run / "settings.json").is_file()):
        raise UserError(f"{job.out} exists and is no unfinished fine-tuning; choose another folder, or remove it")
    if (job.run / "settings.json").is_file():
        before, now = read_json(job.run / "settings.json"), job.settings()
        changed = [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]
        if changed:
            raise UserError(f"{job.out} was begun otherwise ({'; '.join(changed)}); choose another folder")


# -- work --------------------------------------------------------------------------------------------------------------


def carry_out(job: Job, device: torch.device | str | None = None) -> dict[str, Any]:
    """The whole work on a device (None: CUDA if there is one) -> what finetune.json says. UserError."""
    from coherent_ddrm import finetune_stages as stages

    began, device = time.perf_counter(), stages.training_device(device)
    with mendable(), owned(job):
        skipped = prepare(job, device)
        seconds = {}
        for stage in (["structure"] if job.planner else []) + ["diffusion"]:
            start = time.perf_counter()
            stages.train(job, stage, device)
            seconds[stage] = round(time.perf_counter() - start, 1)
        facts = stages.export(job)
        scores = stages.compare(job, device)
        report = describe(job, skipped, seconds) | facts | {"scores": scores}
        report["seconds"]["all"] = round(time.perf_counter() - began, 1)
        write_atomic(job.out / REPORT, json.dumps(report, indent=2).encode() + b"\n")
    return report


@contextmanager
def mendable() -> Iterator[None]:
    """What a person can mend comes as a UserError."""
    from coherent_ddrm.config import ConfigError
    from coherent_ddrm.keeper import NonFinite

    try:
        yield
    except (ConfigError, DataError, NonFinite, RunLocked) as error:
        raise UserError(str(error)) from error


@contextmanager
def owned(job: Job) -> Iterator[None]:
    """OUT/run, made and locked; removed again if the very first call could not even make the shards."""
    there, new = job.out.exists(), not job.run.exists()
    job.run.mkdir(parents=True, exist_ok=True)
    lock = RunLock(job.run)
    lock.take_first()
    try:
        write_json(job.run / "settings.json", job.settings())
        yield
    except Exception:
        if new and not (job.run / "prepared.json").is_file():
            shutil.rmtree(job.run if there else job.out)
        raise
    finally:
        lock.release()


def prepare(job: Job, device: torch.device) -> list[tuple[str, str]]:
    """Shards of both splits; (picture, reason) of those that were left out."""
    done = job.run / "prepared.json"
    if not done.is_file():
        names = job.run / "names.json"
        write_json(names, {"label_names": job.labels, "class_names": job.labels[1:]})
        own_pictures.link_pictures(job.pictures, job.run / "pictures")
        classes = write_classes(job, device)
        count = len(job.pictures.train) + len(job.pictures.val)
        print(f"{job.pictures.root}: {count} pictures, {len(job.pictures.val)} of them held out", flush=True)
        for split in ("train", "val"):
            build(job, split, names, classes)
        skipped = own_pictures.left_out(job.shards)
        write_json(done, {"left_out": skipped})
        for path, reason in skipped[:10]:
            print(f"warning: left out: {path}: {reason}", flush=True)
    return [tuple(row) for row in read_json(done)["left_out"]]


def write_classes(job: Job, device: torch.device) -> Path | None:
    """The label that each picture's foreground carries, as CSV; None where maps say it themselves."""
    if job.wanted.segmentation != "saliency":
        return None
    path = job.run / "classes.csv"
    names = [*job.pictures.train, *job.pictures.val]
    if path.is_file():
        return path
    if job.guesses:
        from coherent_ddrm.finetune_stages import guess_labels

        labels = guess_labels(job, names, device)
    else:
        labels = dict.fromkeys(names, job.wanted.label or job.labels[1])
    own_pictures.write_classes(path, labels)
    return path


def build(job: Job, split: str, names: Path, classes: Path | None) -> None:
    """The shards of one split. A signal to stop ends the builder, too; the next call goes on with what it made."""
    from coherent_ddrm.training import TERMINATED, StopSignal

    if (job.shards / split / MANIFEST).is_file():
        return
    job.shards.mkdir(exist_ok=True)
    segmentation = job.wanted.segmentation
    command = own_pictures.build_command(
        job.run / "pictures" / split, job.shards / split, job.resolution, segmentation, names, classes
    )
    with StopSignal() as signalled, own_pictures.start(command) as process:
        while process.poll() is None and not signalled.stop:
            time.sleep(0.1)
        if signalled.stop:
            process.terminate()
            process.wait()
            raise SystemExit(TERMINATED)
        problem = own_pictures.fault(process)
    if problem:
        raise UserError(problem)


def describe(job: Job, skipped: list[tuple[str, str]], seconds: dict[str, float]) -> dict[str, Any]:
    """Of finetune.json: what was asked for and what it was done on."""
    used = {split: read_json(job.shards / split / MANIFEST)["samples"] for split in ("train", "val")}
    wanted = job.wanted
    return {
        "version": 1,
        "checkpoint_sha256": job.checkpoint_hash,
        "pictures": {"trained_on": used["train"], "held_out": used["val"], "left_out": dict(skipped)},
        "pictures_sha256": job.pictures.digest,
        "segmentation": wanted.segmentation.partition(":")[0],
        "label": "as the checkpoint sees it" if job.guesses else wanted.label,
        "lora": wanted.lora,
        "merged": wanted.merge,
        "steps": wanted.steps,
        "seed": wanted.seed,
        "seconds": dict(seconds),
    }


def table(report: dict[str, Any]) -> str:
    """The scores before and after, as text, and which way each went."""
    held_out = report["pictures"]["held_out"]
    lines = [f"{f'{held_out} held-out pictures':32}{'before':>10}{'after':>10}"]
    for stage, scores in report["scores"].items():
        for name in scores["before"]:
            before, after = scores["before"][name], scores["after"][name]
            gain = (before - after) if name in LOWER else (after - before)
            verdict = "better" if gain > 0 else "worse" if gain < 0 else "the same"
            lines.append(f"{f'{stage}: {name}':32}{before:10.4f}{after:10.4f}  {verdict}")
    return "\n".join(lines)
