"""`coherent-ddrm restore`: which files, all checked before any work; one picture after another; JSON beside."""

from __future__ import annotations

import glob
import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from coherent_ddrm import __version__
from coherent_ddrm.errors import UserError
from coherent_ddrm.export import write_atomic
from coherent_ddrm.images import read_hole, read_image
from coherent_ddrm.jobs import SUFFIXES, numbered
from coherent_ddrm.originals import encode, result_format

if TYPE_CHECKING:
    from coherent_ddrm.restoration import RestorationOutput, RestorationPipeline


@dataclass
class Job:
    """One picture: what to read, and where its results go."""

    image: Path
    mask: Path | None
    output: Path

    @property
    def measured(self) -> Path:
        """Where the measurement goes as a picture: out.png -> out.y.png."""
        return self.output.with_name(f"{self.output.stem}.y.png")


def list_jobs(args: Namespace) -> list[Job]:
    """One job for a file, one per picture for a folder (masks matched by name). UserError where files do not fit."""
    image, out = Path(args.image), Path(args.output)
    mask = None if args.mask is None else Path(args.mask)
    if image.is_dir():
        pictures = sorted(p for p in image.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
        if not pictures:
            raise UserError(f"{image}: no pictures in this folder")
        jobs = [Job(path, _mask_of(path, mask), out / path.name) for path in pictures]
    else:
        jobs = [Job(image, mask, out / image.name if out.is_dir() or not out.suffix else out)]
    if image.is_dir() and out.is_file():
        raise UserError(f"{out} is a file; {image} is a folder, so name a folder to write to")
    _check_paths(jobs, args, [Path(text.partition("=")[2]) for text in args.show if "=" in text])
    for job in jobs:
        read_image(job.image)  # raises for what cannot be read
        if job.mask is not None:
            read_hole(job.mask)
    return jobs


def _mask_of(path: Path, masks: Path | None) -> Path | None:
    if masks is None or masks.is_file():
        return masks
    found = [mask for mask in sorted(masks.glob(f"{glob.escape(path.stem)}.*")) if mask.suffix.lower() in SUFFIXES]
    if not found:
        raise UserError(f"{path.name} has no mask in {masks}; pictures and masks are matched by name")
    return found[0]


def _check_paths(jobs: list[Job], args: Namespace, masks: list[Path]) -> None:
    read = [path for job in jobs for path in (job.image, job.mask) if path is not None]
    inputs = {path.resolve() for path in [*read, *masks]}
    taken: set[Path] = set()
    for job in jobs:
        result_format(job.output)
        outputs = [numbered(job.output, k, args.candidates) for k in range(args.candidates)]
        measured = [job.measured] if args.degrade else []
        for path in [*outputs, *(o.with_suffix(".json") for o in outputs), *measured]:
            if path.resolve() in inputs | taken or path.is_dir():
                raise UserError(f"{path} is an input, a folder, or would be written twice; name another output")
            taken.add(path.resolve())


def read_show(texts: list[str]) -> list[str | tuple[str, np.ndarray]]:
    """["Dress", "Hat=top.png"] -> "Dress" for the whole hole, ("Hat", mask) for the white of the mask."""
    found: list[str | tuple[str, np.ndarray]] = []
    for text in texts:
        name, equals, path = text.partition("=")
        found.append((name, read_hole(Path(path))) if equals else name)
    return found


def restore(
    job: Job, pipe: RestorationPipeline, args: Namespace, options: dict[str, Any], check_only: bool = False
) -> RestorationOutput | None:
    """The result for one picture; with `check_only` nothing but the errors it would meet.

    options: the sampler's, and classifier and show of RestorationPipeline.
    """
    return pipe(
        read_image(job.image),
        args.operator,
        sampler=args.sampler,
        mask_image=None if job.mask is None else read_hole(job.mask),
        sigma_y=args.sigma_y,
        degrade=args.degrade,
        num_inference_steps=args.steps,
        shift=args.shift,
        generator=args.seed,
        candidates=args.candidates,
        class_labels=None if args.class_label is None else [args.class_label],
        class_scale=args.class_scale,
        null_label=args.null_label,
        guidance_scale=args.guidance_scale,
        check_only=check_only,
        **options,
    )


def run(job: Job, pipe: RestorationPipeline, args: Namespace, options: dict[str, Any]) -> RestorationOutput:
    """Restore one picture and write the results, the measurement where it is a picture, and what was done."""
    output = restore(job, pipe, args, options)
    job.output.parent.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(output.images):
        path = numbered(job.output, k, args.candidates)
        write_atomic(path, encode(image, result_format(path), path))
        record = {
            "image": job.image.name,
            "mask": None if job.mask is None else job.mask.name,
            "operator": args.operator,
            "sigma_y": args.sigma_y,
            "degraded_here": args.degrade,
            "sampler": args.sampler,
            "options": {k: v for k, v in options.items() if k not in ("classifier", "show")},
            "prior": Path(args.prior).name,
            "show": args.show,
            "guidance_scale": args.guidance_scale if args.show else None,
            "seed": output.seeds[k][0],
            "candidate": output.seeds[k][1],
            "nfe": output.nfe,
            "residual": output.residual,
            "seconds": round(output.seconds / len(output.images), 4),
            "version": __version__,
        }
        write_atomic(path.with_suffix(".json"), json.dumps(record, indent=2).encode() + b"\n")
    if args.degrade and output.y.ndim == 4:
        write_atomic(job.measured, encode(_as_picture(output.y[0]), "PNG", job.measured))
    return output


def _as_picture(y: Any) -> Image.Image:
    """(1 or 3, H, W) on the [-1, 1] scale."""
    levels = ((y.float().cpu() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def parse_options(texts: list[str]) -> dict[str, Any]:
    """["eta=0.5", "repeats=2"] -> {"eta": 0.5, "repeats": 2}; whole numbers, numbers, words."""
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--option {text!r}: write NAME=VALUE, such as eta=0.5")
        options[name] = _value(value)
    return options


def _value(text: str) -> int | float | bool | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
