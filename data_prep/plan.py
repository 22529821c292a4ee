"""What a build is going to do, recorded in OUT/plan.json, so that no later run continues it with something else."""

import argparse
import os
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from inputs import SUFFIXES, ClassTable, list_inputs

from coherent_ddrm.shards import DataError, read_json, temporary_name, write_json

PLAN = "plan.json"  # options, names and input list of a build; a later run must agree with it
INPUTS = "inputs.jsonl"  # one picture per line, sorted


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the shards. A build is continued only with equal options."""

    size: int
    fit: str
    format: str
    quality: int
    min_size: int
    max_pixels: int
    segmentation: str
    ignore_label: tuple[int, ...]
    samples_per_shard: int
    split: str


def options_from(args: argparse.Namespace) -> Options:
    kind, colon, argument = args.segmentation.partition(":")
    if kind not in ("labels", "saliency", "model", "none") or (kind in ("labels", "model")) != bool(colon and argument):
        raise DataError(f"--segmentation {args.segmentation!r}: use labels:DIR, saliency, model:NAME or none.")
    if kind == "labels" and not Path(argument).is_dir():
        raise DataError(f"--segmentation labels:{argument}: no such folder.")
    return Options(
        size=args.size,
        fit=args.fit,
        format=args.format,
        quality=args.quality,
        min_size=args.size if args.min_size is None else args.min_size,
        max_pixels=args.max_pixels,
        segmentation=args.segmentation,
        ignore_label=tuple(sorted(set(args.ignore_label))),
        samples_per_shard=args.samples_per_shard,
        split=args.split or args.out.resolve().name,
    )


def make_plan(args: argparse.Namespace, options: Options) -> dict:
    """List the inputs and fix all names; refuse to continue a build that was started otherwise."""
    table = ClassTable(args.classes, (args.image_column, args.label_column, args.caption_column))
    class_names, label_names = names_of(args, options, table)
    listing = temporary_name(args.out / INPUTS)
    try:
        plan = {
            "options": recorded(options),
            "inputs": list_inputs(args.images, table, listing),
            "class_names": class_names,
            "label_names": label_names,
            "made_with": made_with(),
        }
        if not plan["inputs"]["pictures"]:
            raise DataError(f"{args.images}: no picture in this folder (looked for {' '.join(sorted(SUFFIXES))}).")
        agree(args.out, plan)
        os.replace(listing, args.out / INPUTS)  # only now: a refused run must not touch another's list
    finally:
        listing.unlink(missing_ok=True)
    return plan


def recorded(options: Options) -> dict:
    """Options as JSON. Where the label maps lie may change between two runs; which model is used may not."""
    kind, _, argument = options.segmentation.partition(":")
    segmentation = f"model:{argument}" if kind == "model" else kind
    return asdict(options) | {"ignore_label": list(options.ignore_label), "segmentation": segmentation}


def names_of(args: argparse.Namespace, options: Options, table: ClassTable) -> tuple[list[str], list[str] | None]:
    """(class names, label names) by id; label names are None where only the finished maps can tell how many."""
    class_names, label_names = table.names(), []
    kind, _, argument = options.segmentation.partition(":")
    given = read_names(args.label_names) if args.label_names else None
    if given and kind in ("saliency", "none"):
        unknown = sorted(set(class_names) - set(given["class_names"]))
        if unknown:
            raise DataError(f"{args.classes}: the class {unknown[0]!r} is not among the names in {args.label_names}.")
        class_names = given["class_names"]
    if kind == "saliency":
        label_names = ["background", *(class_names or ["foreground"])]
    elif kind == "labels":
        label_names = given["label_names"] if given else None
    elif kind == "none" and given:
        label_names = given["label_names"]  # no map, yet a network that plans these labels can train on the shards
    elif kind == "model":
        label_names = model_names(argument)
    if label_names and len(label_names) > 255:
        raise DataError(f"{len(label_names)} labels are too many: ids are bytes, and 255 means 'ignore'.")
    return class_names, label_names


def model_names(name: str) -> list[str]:
    from coherent_ddrm.structure_maps import SegmentationModel

    try:
        return SegmentationModel.label_names(name)
    except (ImportError, OSError, ValueError) as error:
        raise DataError(f"--segmentation model:{name}: {' '.join(str(error).split())[:300]}") from error


def agree(out: Path, plan: dict) -> None:
    """Record the plan, or compare it with the one on record."""
    path = out / PLAN
    if not path.exists():
        write_json(path, plan)  # then read again: another rank may have been faster, with other options
    old = read_json(path)
    for part in plan:
        if old.get(part) == plan[part]:
            continue
        detail = f"{old.get(part)!r} then, {plan[part]!r} now"
        if isinstance(plan[part], dict) and isinstance(old.get(part), dict):
            name = next(n for n in plan[part] if old[part].get(n) != plan[part][n])
            part, detail = f"{part}.{name}", f"{old[part].get(name)!r} then, {plan[part][name]!r} now"
        raise DataError(
            f"{out} was begun with other {part}: {detail[:300]}. Use the same again, another folder, or --overwrite."
        )


def read_names(path: Path) -> dict[str, list[str]]:
    """Names from another split's manifest.json, or from a text file with one name per line."""
    if path.suffix == ".json":
        content = read_json(path)
        if not all(isinstance(content.get(part), list) for part in ("label_names", "class_names")):
            raise DataError(f"{path}: not a manifest.json of shards (no label_names and class_names in it).")
        return {"label_names": content["label_names"], "class_names": content["class_names"]}
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable text file ({error}).") from error
    return {"label_names": names, "class_names": names}


def made_with() -> dict[str, str]:
    """Versions that decide bytes."""
    found = {}
    for package in ("coherent-ddrm", "pillow", "opencv-python-headless", "kornia", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
