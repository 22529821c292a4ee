"""Turn a folder tree of pictures into shards: pictures, soft edges and segmentation maps, ready for training.

    python data_prep/build_shards.py IMAGES OUT --size 64 --segmentation saliency --classes classes.csv
    torchrun --nproc-per-node 4 data_prep/build_shards.py IMAGES OUT ...      (or an array job: rank r makes shards s
                                                                               with s mod W = r)

A run that was stopped continues when it is started again. A picture that cannot be used is left out and listed, with
the reason, in OUT/manifest.json. The same pictures and options give the same bytes, whatever the number of processes.
"""

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import signal
import sqlite3
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path

import numpy as np

from coherent_ddrm.shards import (
    FORMAT,
    MANIFEST,
    DataError,
    ShardWriter,
    dataset_hash,
    index_of,
    key_of,
    read_json,
    shard_name,
    temporary_name,
    write_json,
)

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".pnm"}
PLAN = "plan.json"  # options and input list of a build; a later run must agree with it
INPUTS = "inputs.jsonl"  # one picture per line, sorted
CHUNK = 8  # pictures per task


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


@dataclass
class Result:
    """One picture's share of a shard: its members, or why it was left out."""

    row: dict
    members: dict[str, bytes] = field(default_factory=dict)
    skipped: str | None = None
    saliency: str | None = None  # "kept" or "refused"
    largest_id: int = -1


# ---------------------------------------------------------------------------------------------- inputs


def walk(folder: Path, below: str = "") -> Iterator[tuple[str, str]]:
    """(kind, relative path) of everything under `folder`, sorted, one directory in memory at a time."""
    try:
        entries = sorted(os.scandir(folder / below), key=lambda entry: os.fsencode(entry.name))
    except OSError:
        yield "unreadable folder", below
        return
    for entry in entries:
        path = f"{below}/{entry.name}" if below else entry.name
        if entry.is_symlink() and entry.is_dir():
            yield "linked folder", path
        elif entry.is_dir(follow_symlinks=False):
            yield from walk(folder, path)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            yield "picture", path
        else:
            yield "other", path


class ClassTable:
    """The CSV of classes and captions, on disk (SQLite) so that its size costs no memory."""

    def __init__(self, path: Path | None, columns: tuple[str, str, str]) -> None:
        self._file = tempfile.NamedTemporaryFile(prefix="classes-", suffix=".sqlite")  # lives as long as self
        self._table = sqlite3.connect(self._file.name)
        self._table.execute("CREATE TABLE rows (image TEXT PRIMARY KEY, label TEXT, caption TEXT) WITHOUT ROWID")
        self.count = 0
        if path is not None:
            self._read(path, columns)

    def _read(self, path: Path, columns: tuple[str, str, str]) -> None:
        image_column, label_column, caption_column = columns
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                found = reader.fieldnames or []
                if image_column not in found or not {label_column, caption_column} & set(found):
                    raise DataError(
                        f"{path}: the header {','.join(found)!r} lacks the column {image_column!r}, or both "
                        f"{label_column!r} and {caption_column!r}; name them with --image-column, --label-column, "
                        "--caption-column."
                    )
                for line in reader:
                    label = (line.get(label_column) or "").strip() or None
                    caption = (line.get(caption_column) or "").strip() or None
                    self._add(path, reader.line_num, (line[image_column] or "").strip(), label, caption)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: not a readable UTF-8 CSV ({error}).") from error

    def _add(self, path: Path, number: int, image: str, label: str | None, caption: str | None) -> None:
        image = image.replace("\\", "/").removeprefix("./")
        known = self.find(image)
        if known not in ((None, None), (label, caption)):
            raise DataError(f"{path}, line {number}: {image!r} was {known[0]!r} on an earlier line, now {label!r}.")
        self._table.execute("INSERT OR REPLACE INTO rows VALUES (?, ?, ?)", (image, label, caption))
        self.count += 1

    def find(self, image: str) -> tuple[str | None, str | None]:
        """(label, caption) of a relative path."""
        query = "SELECT label, caption FROM rows WHERE image = ?"
        try:
            return self._table.execute(query, (image,)).fetchone() or (None, None)
        except UnicodeEncodeError:  # a file name that is not UTF-8 cannot stand in a UTF-8 CSV
            return None, None

    def names(self) -> list[str]:
        query = "SELECT DISTINCT label FROM rows WHERE label IS NOT NULL ORDER BY label"
        return [name for (name,) in self._table.execute(query)]


def list_inputs(images: Path, out: Path, table: ClassTable) -> dict:
    """Write a hidden inputs.jsonl, one line per picture; returns counts and a hash. Every rank writes the same one."""
    counts, unused, digest, classed = Counter(), [], hashlib.sha256(), 0
    temporary = temporary_name(out / INPUTS)
    with open(temporary, "wb") as file:
        for kind, path in walk(images):
            counts[kind] += 1
            if kind.endswith("folder"):
                unused.append(f"{path} ({kind})")
            if kind != "picture":
                continue
            label, caption = table.find(path)
            classed += (label, caption) != (None, None)
            line = json.dumps({"path": path, "class": label, "caption": caption}).encode() + b"\n"
            digest.update(line)
            file.write(line)
    return {
        "pictures": counts["picture"],
        "other_files": counts["other"],
        "folders_not_entered": unused,
        "pictures_in_csv": classed,
        "csv_rows_without_picture": max(0, table.count - classed),
        "sha256": digest.hexdigest(),
    }


def shard_starts(path: Path, per_shard: int) -> list[int]:
    """Byte offset in inputs.jsonl of each shard's first line."""
    starts, offset = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if number % per_shard == 0:
                starts.append(offset)
            offset += len(line)
    return starts


def shard_rows(path: Path, start: int, per_shard: int) -> list[dict]:
    with open(path, "rb") as file:
        file.seek(start)
        return [json.loads(line) for line in islice(file, per_shard)]


# ---------------------------------------------------------------------------------------------- one picture


class Maker:
    """Makes the members of one sample. Lives in a worker; holds no state that a picture could change."""

    def __init__(self, images: Path, options: Options, plan: dict) -> None:
        self.images, self.options, self.plan = images, options, plan
        kind, _, self.argument = options.segmentation.partition(":")
        self.segment = {"none": None, "saliency": self._saliency, "labels": self._labels, "model": self._model}[kind]
        if kind == "model":
            from coherent_ddrm.structure_maps import SegmentationModel

            self.network = SegmentationModel(self.argument)

    def __call__(self, row: dict) -> Result:
        from coherent_ddrm.images import ImageError

        result = Result(row)
        try:
            self._make(result)
        except ImageError as error:
            result.members, result.skipped = {}, str(error).removeprefix(f"{row['path']}: ")
        except Exception as error:  # one odd picture must not end a run over millions; it is listed, never lost
            result.members, result.skipped = {}, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return result

    def _make(self, result: Result) -> None:
        from coherent_ddrm import images
        from coherent_ddrm.structure_maps import edges

        options, path = self.options, result.row["path"]
        try:
            content = (self.images / path).read_bytes()
        except OSError as error:
            raise images.ImageError(f"{path}: cannot be read ({error.strerror}).") from error
        source_size = images.read_size(content, path, options.max_pixels)
        if min(source_size) < options.min_size:
            raise images.ImageError(
                f"{path}: {source_size[1]} x {source_size[0]} is smaller than --min-size {options.min_size}."
            )
        source = images.read_image(content, path, options.max_pixels, at_least=4 * max(options.size, 64))
        picture = images.fit(source, options.size, options.fit)
        twice = images.fit(source, 2 * options.size, options.fit)
        format = {"jpg": "JPEG"}.get(options.format, options.format.upper())
        members = {"image": images.encode(picture, format, options.quality)}
        members["edges"] = images.encode(edges(twice[None])[0], "PNG")
        if self.segment is not None:
            labels = self.segment(source, source_size, result)
            found = labels[labels != 255]
            result.largest_id = int(found.max()) if found.size else -1
            members["segmentation"] = images.encode(labels, "PNG")
        members["json"] = self._description(result.row, content, source_size)
        result.members = members

    def _description(self, row: dict, content: bytes, size: tuple[int, int]) -> bytes:
        names = self.plan["class_names"]
        description = {
            "class": row["class"],
            "class_id": names.index(row["class"]) if row["class"] is not None else -1,
            "caption": row["caption"],
            "path": row["path"],
            "size": list(size),
            "source_sha256": hashlib.sha256(content).hexdigest(),
        }
        return json.dumps(description, sort_keys=True).encode()

    def _saliency(self, source: np.ndarray, source_size: tuple[int, int], result: Result) -> np.ndarray:
        """Background 0; foreground 1, or 1 + the class; all ignored when no cut was good enough."""
        from coherent_ddrm.images import fit, resize
        from coherent_ddrm.saliency import WORKING_SIZE, foreground
        from coherent_ddrm.structure_maps import IGNORE

        size, names = self.options.size, self.plan["class_names"]
        cut = foreground(fit(source, WORKING_SIZE, self.options.fit))
        result.saliency = "kept" if cut.kept else "refused"
        if not cut.kept:
            return np.full((size, size), IGNORE, np.uint8)
        inside = 1
        if names:
            inside = 1 + names.index(result.row["class"]) if result.row["class"] is not None else IGNORE
        covered = resize(cut.mask.astype(np.uint8) * 255, size, size) >= 128
        return np.where(covered, inside, 0).astype(np.uint8)

    def _labels(self, source: np.ndarray, source_size: tuple[int, int], result: Result) -> np.ndarray:
        from coherent_ddrm.images import ImageError, fit, read_labels

        relative = os.path.splitext(result.row["path"])[0] + ".png"
        labels = read_labels(Path(self.argument) / relative, f"label map {relative}", self.options.max_pixels)
        if labels.shape != source_size:
            raise ImageError(f"label map {relative} is {labels.shape[::-1]}, its picture {source_size[::-1]} (w, h).")
        return self._known_ids(fit(labels, self.options.size, self.options.fit, labels=True))

    def _model(self, source: np.ndarray, source_size: tuple[int, int], result: Result) -> np.ndarray:
        from coherent_ddrm.images import fit

        side = max(self.options.size, min(512, *source.shape[:2]))
        ids = self.network(fit(source, side, self.options.fit))
        return self._known_ids(fit(ids, self.options.size, "stretch", labels=True))

    def _known_ids(self, labels: np.ndarray) -> np.ndarray:
        from coherent_ddrm.images import ImageError
        from coherent_ddrm.structure_maps import IGNORE

        labels = np.where(np.isin(labels, self.options.ignore_label), IGNORE, labels).astype(np.uint8)
        names = self.plan["label_names"]
        unknown = [] if names is None else sorted(set(np.unique(labels)) - set(range(len(names))) - {IGNORE})
        if unknown:
            raise ImageError(f"the label map holds the id {unknown[0]}, but there are {len(names)} label names.")
        return labels


_maker: Maker | None = None


def _start_worker(*arguments: object) -> None:
    global _maker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _one_thread()
    _maker = Maker(*arguments)


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers; without this they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _one_thread() -> None:
    """One thread a process: the processes fill the cores, and the bytes do not depend on a thread count."""
    import cv2
    import torch
    from PIL import Image

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    Image.MAX_IMAGE_PIXELS = None  # --max-pixels is the limit, checked before decoding, and it may be higher


def _make_chunk(rows: list[dict]) -> list[Result]:
    return [_maker(row) for row in rows]


# ---------------------------------------------------------------------------------------------- many pictures


class InProcess:
    """--workers 0: the same work in this process, for debugging."""

    def __init__(self, *arguments: object) -> None:
        _one_thread()
        self._maker = Maker(*arguments)

    def results(self, rows: list[dict]) -> Iterator[Result]:
        return map(self._maker, rows)

    def close(self) -> None:
        pass


class Workers:
    """Processes that make samples. Results come in input order; a picture that kills its process is left out."""

    def __init__(self, count: int, *arguments: object) -> None:
        self.count, self.arguments = count, arguments
        self.pool = self._start(count)
        self._check()

    def _start(self, count: int) -> ProcessPoolExecutor:
        spawn = multiprocessing.get_context("spawn")  # fork would copy the threads of torch in an unknown state
        return ProcessPoolExecutor(count, spawn, _start_worker, self.arguments)

    def _check(self) -> None:
        """Start one worker for real, so that a broken installation is an error and not a thousand skipped pictures."""
        try:
            self.pool.submit(_make_chunk, []).result()
        except BrokenProcessPool as error:
            raise DataError("A worker process did not start; its message stands above.") from error

    def results(self, rows: list[dict]) -> Iterator[Result]:
        waiting: deque[tuple[list[dict], Future]] = deque()
        chunks = iter([rows[i : i + CHUNK] for i in range(0, len(rows), CHUNK)])
        while True:
            for chunk in islice(chunks, 3 * self.count - len(waiting)):
                waiting.append((chunk, self.pool.submit(_make_chunk, chunk)))
            if not waiting:
                return
            chunk, future = waiting.popleft()
            try:
                made = future.result()
            except BrokenProcessPool:
                made = self._one_by_one(chunk)
                self.pool.shutdown(wait=False)
                self.pool = self._start(self.count)
                waiting = deque((other, self.pool.submit(_make_chunk, other)) for other, _ in waiting)
            yield from made

    def _one_by_one(self, chunk: list[dict]) -> list[Result]:
        """Each picture by itself, after some picture of this chunk or of another ended a worker."""
        made, pool = [], self._start(1)
        for row in chunk:
            try:
                made += pool.submit(_make_chunk, [row]).result()
            except BrokenProcessPool:
                reason = "crashed: its decoder ended the worker process (or memory ran out)"
                made.append(Result(row, skipped=reason))
                pool = self._start(1)
        pool.shutdown(wait=False)
        return made

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


def build_shard(out: Path, shard: int, rows: list[dict], plan: dict, workers: Workers | InProcess, progress) -> None:
    """Write one shard, its index, then its record, whose presence says that the shard is complete."""
    names, suffix = plan["class_names"], "." + plan["options"]["format"]
    skipped, classes, saliency, largest_id = [], Counter(), Counter(), -1
    with ShardWriter(out, shard) as writer:
        for result in workers.results(rows):
            progress.update()
            if result.skipped is not None:
                skipped.append({"path": result.row["path"], "reason": result.skipped})
                continue
            label = result.row["class"]
            writer.add(
                key_of(result.row["path"]), result.members, suffix, names.index(label) if label is not None else -1
            )
            classes[label or ""] += 1
            saliency.update([result.saliency] if result.saliency else [])
            largest_id = max(largest_id, result.largest_id)
    record = writer.record() | {"skipped": skipped, "classes": classes, "saliency": saliency, "largest_id": largest_id}
    write_json(out / f"{shard_name(shard)}.json", record | {"plan_sha256": _plan_hash(plan)})


def is_done(out: Path, shard: int, plan: dict) -> bool:
    record, tar = out / f"{shard_name(shard)}.json", out / f"{shard_name(shard)}.tar"
    if not (record.exists() and tar.exists() and index_of(tar).exists()):
        return False
    content = read_json(record)
    return content.get("plan_sha256") == _plan_hash(plan) and tar.stat().st_size == content["bytes"]


def _plan_hash(plan: dict) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def finish(out: Path, shard_count: int, plan: dict) -> dict | None:
    """Write manifest.json if every shard is there, else None. The last rank does it; two write the same bytes."""
    if not all(is_done(out, shard, plan) for shard in range(shard_count)):
        return None
    listed, skipped, classes, saliency, largest_id = [], [], Counter(), Counter(), -1
    for shard in range(shard_count):
        record = read_json(out / f"{shard_name(shard)}.json")
        listed.append({name: record[name] for name in ("name", "samples", "bytes", "sha256", "index_sha256")})
        skipped += record["skipped"]
        classes.update(record["classes"])
        saliency.update(record["saliency"])
        largest_id = max(largest_id, record["largest_id"])
    label_names = plan["label_names"]
    if label_names is None:
        label_names = [f"label {i}" for i in range(largest_id + 1)]
    manifest = {
        "format": FORMAT,
        "split": plan["options"]["split"],
        "resolution": plan["options"]["size"],
        "samples": sum(shard["samples"] for shard in listed),
        "label_names": label_names,
        "class_names": plan["class_names"],
        "class_counts": classes,
        "saliency": saliency,
        "shards": listed,
        "dataset_hash": dataset_hash(listed, label_names, plan["class_names"]),
        "made_with": plan["made_with"],
        "options": plan["options"],
        "inputs": plan["inputs"],
        "skipped_count": len(skipped),
        "skipped": skipped,
    }
    write_json(out / MANIFEST, manifest)
    return manifest


# ---------------------------------------------------------------------------------------------- the command


def make_plan(images: Path, out: Path, options: Options, args: argparse.Namespace) -> dict:
    """List the inputs and fix all names; refuse to continue a build that was started otherwise."""
    table = ClassTable(args.classes, (args.image_column, args.label_column, args.caption_column))
    class_names, label_names = table.names(), None
    kind, _, argument = options.segmentation.partition(":")
    given = read_names(args.label_names) if args.label_names else None
    if given and kind in ("saliency", "none"):
        unknown = sorted(set(class_names) - set(given["class_names"]))
        if unknown:
            raise DataError(f"{args.classes}: the class {unknown[0]!r} is not among the names in {args.label_names}.")
        class_names = given["class_names"]
    if kind == "saliency":
        label_names = ["background", *class_names] if class_names else ["background", "foreground"]
    elif kind == "labels":
        label_names = given["label_names"] if given else None
    elif kind == "model":
        from coherent_ddrm.structure_maps import SegmentationModel

        try:
            label_names = SegmentationModel.label_names(argument)
        except (ImportError, OSError, ValueError) as error:
            raise DataError(f"--segmentation model:{argument}: {' '.join(str(error).split())[:300]}") from error
    else:
        label_names = []
    if label_names and len(label_names) > 255:
        raise DataError(f"{len(label_names)} labels are too many: ids are bytes, and 255 means 'ignore'.")
    plan = {
        "options": asdict(options)
        | {"ignore_label": list(options.ignore_label), "segmentation": kind_for_plan(kind, argument)},
        "inputs": list_inputs(images, out, table),
        "class_names": class_names,
        "label_names": label_names,
        "made_with": made_with(),
    }
    if not plan["inputs"]["pictures"]:
        raise DataError(f"{images}: no picture in this folder (looked for {' '.join(sorted(SUFFIXES))}).")
    plan = agree(out, plan)
    os.replace(temporary_name(out / INPUTS), out / INPUTS)  # only now: a refused run must not touch another's list
    return plan


def kind_for_plan(kind: str, argument: str) -> str:
    """Where the label maps lie may change between two runs; which model is used may not."""
    return f"model:{argument}" if kind == "model" else kind


def agree(out: Path, plan: dict) -> dict:
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
    return plan


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


def rank_and_world(args: argparse.Namespace) -> tuple[int, int]:
    """From --rank and --world, else torchrun or accelerate, else SLURM's array or tasks, else 0 of 1."""
    if (args.rank is None) != (args.world is None):
        raise DataError("--rank and --world belong together; give both or neither.")
    pairs = [
        ("RANK", "WORLD_SIZE"),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
        ("SLURM_PROCID", "SLURM_NTASKS"),
    ]
    rank, world = args.rank, args.world
    for rank_name, world_name in pairs:
        if rank is None and rank_name in os.environ and world_name in os.environ:
            rank, world = _number(rank_name), _number(world_name)
            if rank_name == "SLURM_ARRAY_TASK_ID":
                rank -= _number("SLURM_ARRAY_TASK_MIN")
    rank, world = (0, 1) if rank is None else (rank, world)
    if not 0 <= rank < world:
        raise DataError(
            f"rank {rank} of {world}: ranks count from 0 to {world - 1}; an array job wants --array=0-{world - 1}."
        )
    return rank, world


def _number(variable: str) -> int:
    text = os.environ.get(variable, "0")
    try:
        return int(text)
    except ValueError as error:
        raise DataError(
            f"the environment variable {variable} is {text!r}, no number; set it right or unset it."
        ) from error


def clear(out: Path) -> None:
    """Remove an earlier build, and only what a build writes."""
    for pattern in ("shard-[0-9]*", ".shard-[0-9]*.tmp-*", ".inputs.jsonl.tmp-*", MANIFEST, PLAN, INPUTS):
        for path in out.glob(pattern):
            path.unlink()


def build(args: argparse.Namespace) -> int:
    images, out = args.images, args.out
    rank, world = rank_and_world(args)
    if not images.is_dir():
        raise DataError(f"{images}: no such folder of pictures.")
    if out.resolve().is_relative_to(images.resolve()):
        raise DataError(f"{out} lies inside {images}: the shards would become pictures of the next run.")
    options = options_from(args)
    out.mkdir(parents=True, exist_ok=True)
    try:
        return build_all(images, out, options, args, rank, world)
    finally:
        temporary_name(out / INPUTS).unlink(missing_ok=True)


def build_all(images: Path, out: Path, options: Options, args: argparse.Namespace, rank: int, world: int) -> int:
    if args.overwrite:
        if world > 1:
            raise DataError(
                "--overwrite with several ranks: one would delete what another wrote. Delete the folder instead."
            )
        clear(out)
    plan = make_plan(images, out, options, args)
    starts = shard_starts(out / INPUTS, options.samples_per_shard)
    mine = list(range(rank, len(starts), world))
    missing = [shard for shard in mine if not is_done(out, shard, plan)]
    if missing:
        run_shards(args, out, options, plan, starts, missing, f"rank {rank} of {world}")
    manifest = finish(out, len(starts), plan)
    if manifest is None:
        print(f"rank {rank} of {world}: {len(mine)} shards done; the last rank to finish writes {MANIFEST}.")
        return 0
    report(out, manifest)
    return 0 if manifest["samples"] else 1


def run_shards(args, out: Path, options: Options, plan: dict, starts: list[int], missing: list[int], name: str) -> None:
    from tqdm import tqdm

    for shard in missing:  # what a killed run left behind
        for path in out.glob(f".{shard_name(shard)}.*.tmp-*"):
            path.unlink()
    last = plan["inputs"]["pictures"] - (len(starts) - 1) * options.samples_per_shard
    total = sum(last if shard == len(starts) - 1 else options.samples_per_shard for shard in missing)
    what = (args.images, options, plan)
    workers = Workers(args.workers, *what) if args.workers else InProcess(*what)
    try:
        with tqdm(total=total, unit="picture", desc=name, disable=None if not args.quiet else True) as progress:
            for shard in missing:
                rows = shard_rows(out / INPUTS, starts[shard], options.samples_per_shard)
                build_shard(out, shard, rows, plan, workers, progress)
    finally:
        workers.close()


def report(out: Path, manifest: dict) -> None:
    print(f"{out}: {manifest['samples']} samples of {manifest['resolution']} px in {len(manifest['shards'])} shards.")
    inputs = manifest["inputs"]
    if manifest["saliency"]:
        kept, refused = manifest["saliency"].get("kept", 0), manifest["saliency"].get("refused", 0)
        print(f"saliency: {kept} kept, {refused} refused (their segmentation is all 'ignore').")
    if manifest["skipped_count"]:
        reasons = Counter(entry["reason"].split(" (")[0][:60] for entry in manifest["skipped"])
        common = reasons.most_common(1)[0][0]
        print(f"left out: {manifest['skipped_count']} pictures, listed in {MANIFEST}; most often: {common}")
    for count, what in (
        (inputs["other_files"], "files that are no pictures"),
        (len(inputs["folders_not_entered"]), "folders, linked or unreadable"),
        (inputs["csv_rows_without_picture"], "lines of the CSV without a picture"),
    ):
        if count:
            print(f"not used: {count} {what}.")


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


def natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} must be 0 or more")
    return number


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be 1 or more")
    return number


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", type=Path, metavar="IMAGES", help="a folder of pictures; sub-folders count")
    p.add_argument("out", type=Path, metavar="OUT", help="the folder for shards")
    p.add_argument("--size", type=positive, default=256, help="side of the square pictures, in pixels (256)")
    p.add_argument(
        "--fit", choices=("crop", "stretch", "pad"), default="crop", help="how a picture becomes square (crop)"
    )
    p.add_argument(
        "--format", choices=("png", "webp", "jpg"), default="png", help="of the pictures; webp is lossless (png)"
    )
    p.add_argument("--quality", type=positive, default=95, help="of jpg (95)")
    p.add_argument("--min-size", type=positive, help="leave out pictures whose short side is below this (SIZE)")
    p.add_argument("--max-pixels", type=positive, default=89_478_485, help="leave out pictures above this (89 million)")
    p.add_argument(
        "--segmentation", default="saliency", metavar="HOW", help="labels:DIR, saliency, model:NAME or none (saliency)"
    )
    p.add_argument(
        "--ignore-label", type=int, action="append", default=[], help="an id of the label maps to ignore; repeatable"
    )
    p.add_argument(
        "--classes", type=Path, metavar="CSV", help="class and caption of each picture, by its path under IMAGES"
    )
    p.add_argument("--image-column", default="image")
    p.add_argument("--label-column", default="label")
    p.add_argument("--caption-column", default="caption")
    p.add_argument(
        "--label-names", type=Path, help="manifest.json of the training split, or a text file with one name a line"
    )
    p.add_argument("--split", help="name of this split (the name of OUT)")
    p.add_argument("--samples-per-shard", type=positive, default=1000)
    p.add_argument(
        "--workers", type=natural, default=len(os.sched_getaffinity(0)), help="processes (all cores); 0: none"
    )
    p.add_argument("--rank", type=int, help="this machine's number, if no launcher sets it")
    p.add_argument("--world", type=int, help="how many machines")
    p.add_argument("--overwrite", action="store_true", help="remove what an earlier run wrote in OUT")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return build(args)
    except (DataError, OSError) as error:
        print(f"build_shards: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("build_shards: stopped; the same command continues.", file=sys.stderr)
        return 130


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # a cluster's notice: tidy up as after Ctrl-C
    sys.exit(main())
