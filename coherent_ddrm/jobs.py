"""`coherent-ddrm inpaint`: which files, all checked before any work; then batches; results written whole, JSON beside.

Results take their input's name and format unless the output names others.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from coherent_ddrm import __version__
from coherent_ddrm.crop import check_hole, to_model
from coherent_ddrm.errors import UserError
from coherent_ddrm.export import Facts, write_atomic
from coherent_ddrm.images import FORMATS, read_hole, read_image, read_labels
from coherent_ddrm.originals import encode, paste, read_original, result_format, writable_mode

if TYPE_CHECKING:
    from coherent_ddrm.pipeline import CoherentInpaintPipeline, InpaintOutput

SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


@dataclass
class Job:
    """One picture: what to read, and where its results go."""

    image: Path
    mask: Path
    structure: Path | None
    output: Path  # candidate k is written to output-k when there are several
    save_structure: Path | None


# -- which files -------------------------------------------------------------------------------------------------------


def list_jobs(args: Namespace) -> list[Job]:
    """One job for two files, one per picture for two folders. UserError where files do not match or would collide."""
    image, mask, out = Path(args.image), Path(args.mask), Path(args.output)
    if image.is_dir() != mask.is_dir():
        raise UserError(f"{image} and {mask}: one is a folder, the other is not; give two pictures or two folders")
    if image.is_dir():
        jobs = _folder_jobs(image, mask, out, args)
    else:
        output = out / image.name if out.is_dir() or not out.suffix or args.output.endswith("/") else out
        jobs = [Job(image, mask, _path(args.structure), output, _path(args.save_structure))]
    _check_paths(jobs, args.candidates)
    return jobs


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _folder_jobs(images: Path, masks: Path, out: Path, args: Namespace) -> list[Job]:
    pictures, holes = _by_stem(images), _by_stem(masks)
    for folder in (out, _path(args.save_structure)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; with folders as input it must be a folder")
    if not pictures:
        raise UserError(f"{images}: no pictures in this folder (looked for {', '.join(sorted(SUFFIXES))})")
    lonely = sorted(set(pictures) ^ set(holes))
    if lonely:
        has, lacks = (images, masks) if lonely[0] in pictures else (masks, images)
        raise UserError(f"{lonely[0]!r} is in {has} but not in {lacks}; pictures and masks are matched by name")
    plans = {} if args.structure is None else _by_stem(Path(args.structure))
    if set(plans) - set(pictures):
        raise UserError(f"{sorted(set(plans) - set(pictures))[0]!r} is in {args.structure} but not in {images}")
    save = _path(args.save_structure)
    return [
        Job(path, holes[stem], plans.get(stem), out / path.name, None if save is None else save / f"{stem}.png")
        for stem, path in pictures.items()
    ]


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; with folders as input this must be one too")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith(".") or path.stem.endswith(".segmentation"):
            continue
        if path.stem in found:
            raise UserError(
                f"{found[path.stem]} and {path.name} share a name; their results would overwrite each other"
            )
        found[path.stem] = path
    return found


def numbered(path: Path, candidate: int, candidates: int) -> Path:
    """out.png -> out-1.png, out-2.png, ... when there are several candidates."""
    return path if candidates == 1 else path.with_name(f"{path.stem}-{candidate + 1}{path.suffix}")


def segmentation_path(edges: Path) -> Path:
    """The segmentation that belongs to an edge map: plan.png -> plan.segmentation.png."""
    return edges.with_name(f"{edges.stem}.segmentation.png")


def _check_paths(jobs: list[Job], candidates: int) -> None:
    """UserError if a result would overwrite an input or another result."""
    inputs = {path.resolve() for job in jobs for path in (job.image, job.mask, job.structure) if path is not None}
    taken: set[Path] = set()
    for job in jobs:
        outputs = [numbered(job.output, k, candidates) for k in range(candidates)]
        outputs += [path.with_suffix(".json") for path in outputs]
        if job.save_structure is not None:
            edges = [job.save_structure, *(numbered(job.save_structure, k, candidates) for k in range(candidates))]
            outputs += [path for e in dict.fromkeys(edges) for path in (e, segmentation_path(e))]
        for path in outputs:
            parent = next(folder for folder in path.absolute().parents if folder.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK):
                raise UserError(f"{path}: {parent} is not a folder that can be written to; name another output")
            if path.is_dir():
                raise UserError(f"{path} is a folder; name a file for the result")
            if path.resolve() in inputs:
                raise UserError(f"{path} is an input and would be overwritten; name another output")
            if path.resolve() in taken:
                raise UserError(f"{path} would be written twice; rename an input or an output")
            taken.add(path.resolve())


# -- checks and reading ------------------------------------------------------------------------------------------------


def check(job: Job, facts: Facts) -> list[str]:
    """Read everything once. Warnings, one line each; UserError or ImageError for what cannot be used."""
    original, hole = read_original(job.image), read_hole(job.mask)
    size = (original.height, original.width)
    check_hole(hole, size, str(job.mask))
    to_model(np.broadcast_to(np.uint8(0), (*size, 3)), hole, facts.resolution, str(job.mask))
    format = result_format(job.output)
    writable_mode(original.mode, format, job.output)
    if job.structure is not None:
        _check_structure(job.structure, size, facts)
    if job.save_structure is not None and job.save_structure.suffix.lower() != ".png":
        raise UserError(f"{job.save_structure}: a plan is saved as PNG; name it .png")
    warnings = []
    if format == "JPEG":
        warnings.append(f"{job.output}: JPEG is lossy, known pixels change a little; write a .png to keep them exact")
    if original.info["frames"] > 1:
        warnings.append(f"{job.image}: only the first of its {original.info['frames']} frames is used")
    return warnings


def _check_structure(path: Path, size: tuple[int, int], facts: Facts) -> None:
    given = read_structure(path)
    maps = given if isinstance(given, tuple) else (given,)
    for one, name in zip(maps, (path, segmentation_path(path)), strict=False):
        if (one.height, one.width) not in (size, (facts.resolution, facts.resolution)):
            raise UserError(
                f"{name} is {one.width} x {one.height}; it must be as large as the picture, {size[1]} x {size[0]}, "
                f"or as the model's square, {facts.resolution} x {facts.resolution}"
            )
    if len(maps) == 2:
        ids = np.asarray(maps[1])
        worst = int(ids[ids != 255].max(initial=0))
        if worst >= facts.labels:
            raise UserError(
                f"{segmentation_path(path)} holds label {worst}; the checkpoint has 0 to {facts.labels - 1}"
            )
    elif not facts.planner:
        raise UserError(
            f"{path} needs {segmentation_path(path).name} beside it: the checkpoint predicts no segmentation"
        )


def read_structure(path: Path) -> Image.Image | tuple[Image.Image, Image.Image]:
    """An edge map, with its segmentation where `<name>.segmentation.png` lies beside it."""
    edges = Image.fromarray(read_image(path)).convert("L")
    beside = segmentation_path(path)
    return (edges, Image.fromarray(read_labels(beside))) if beside.is_file() else edges


# -- work --------------------------------------------------------------------------------------------------------------


def run(jobs: list[Job], pipe: CoherentInpaintPipeline, args: Namespace, bar: Any) -> Iterator[InpaintOutput]:
    """Inpaint in batches and write; yields each batch's output once its files are in place."""
    size = max(1, args.batch_size // args.candidates)
    for start in range(0, len(jobs), size):
        batch = jobs[start : start + size]
        given = [None if job.structure is None else read_structure(job.structure) for job in batch]
        output = pipe(
            image=[Image.fromarray(read_image(job.image)) for job in batch],
            mask_image=[read_hole(job.mask) for job in batch],
            num_inference_steps=args.steps,
            generator=args.seed,
            candidates=args.candidates,
            structure=given if any(one is not None for one in given) else None,
            structure_steps=args.structure_steps,
            structure_scale=args.structure_scale,
            resample=args.resample,
            sampler=args.sampler,
            callback_on_step_end=lambda *_: bar.update(),
        )
        for i, job in enumerate(batch):
            _write(job, output, i, args, pipe)
        yield output


def _write(job: Job, output: InpaintOutput, i: int, args: Namespace, pipe: CoherentInpaintPipeline) -> None:
    original, hole = read_original(job.image), read_hole(job.mask)
    for k in range(args.candidates):
        row = i * args.candidates + k
        path = numbered(job.output, k, args.candidates)
        path.parent.mkdir(parents=True, exist_ok=True)
        result = paste(original, np.asarray(output.images[row]), hole)
        write_atomic(path, encode(result, result_format(path), path))
        record = describe(job, output, row, args, pipe)
        write_atomic(path.with_suffix(".json"), json.dumps(record, indent=2).encode() + b"\n")
        if job.save_structure is not None and (k == 0 or args.structure_steps > 1):
            several = args.candidates if args.structure_steps > 1 else 1  # else all candidates share one plan
            _write_structure(numbered(job.save_structure, k, several), output, row)


def _write_structure(path: Path, output: InpaintOutput, row: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    maps = (path, output.structure.edges[row]), (segmentation_path(path), output.structure.segmentation[row])
    for name, picture in maps:
        write_atomic(name, encode(picture, "PNG", name))


def describe(
    job: Job, output: InpaintOutput, row: int, args: Namespace, pipe: CoherentInpaintPipeline
) -> dict[str, Any]:
    """What the JSON beside a result says. `seconds` is its share of the batch's."""
    seed, candidate = output.seeds[row]
    window = output.windows[row]
    return {
        "image": job.image.name,
        "mask": job.mask.name,
        "structure": None if job.structure is None else job.structure.name,
        "seed": seed,
        "candidate": candidate,
        "sampler": args.sampler,
        "steps": args.steps or pipe.config.steps,
        "nfe": output.nfe,
        "structure_nfe": output.structure_nfe,
        "seconds": round(output.seconds / len(output.seeds), 4),
        "window": {"top": window.top, "left": window.left, "side": window.side},
        "lossless": result_format(job.output) != "JPEG",
        "checkpoint": Path(args.checkpoint).name,
        "checkpoint_sha256": pipe.checkpoint_hash,
        "version": __version__,
    }
