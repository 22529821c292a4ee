"""A person's own pictures: which there are, which are held out of training, and shards made of them. No torch here.

Shards are made by data_prep/build_shards.py, run as a program: it owns its processes, threads and signals, and the same
call continues a build that was stopped. It lies in the repository beside this package, as the shipped checkpoint does.
"""

from __future__ import annotations

import csv
import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coherent_ddrm.errors import UserError
from coherent_ddrm.export import sha256
from coherent_ddrm.jobs import SUFFIXES
from coherent_ddrm.shards import MANIFEST, read_json

TOOL = Path(__file__).resolve().parent.parent / "data_prep" / "build_shards.py"
FEWEST = 10  # pictures
LEAST_HELD_OUT = 2
MOST_LEFT_OUT = 0.2  # share of the pictures that may be unusable
FEW = 500  # pictures that one process prepares before a second one has loaded its libraries


@dataclass(frozen=True)
class Pictures:
    """Relative paths under `root`, in a fixed order, and a hash of names and contents."""

    root: Path
    train: tuple[str, ...]
    val: tuple[str, ...]
    digest: str


def split_pictures(root: Path, share: float) -> Pictures:
    """The pictures under `root`, about `share` of them held out: those with the lowest hash of their content.

    So it does not depend on names or on a seed, and copies of one picture are never on both sides. Raises UserError if
    there are too few.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder of pictures")
    names = list_pictures(root)
    if len(names) < FEWEST:
        what = f"only {len(names)} pictures" if names else "no pictures"
        raise UserError(f"{root}: {what} in this folder (looked for {', '.join(sorted(SUFFIXES))}); give {FEWEST}")
    hashed = sorted((content_hash(root / name), name) for name in names)
    contents = sorted({content for content, _ in hashed})
    held_out = set(contents[: max(LEAST_HELD_OUT, round(share * len(contents)))])
    val = tuple(name for content, name in hashed if content in held_out)
    train = tuple(name for content, name in hashed if content not in held_out)
    digest = hashlib.sha256(repr(hashed).encode()).hexdigest()
    if not train:
        raise UserError(f"{root}: its pictures are copies of each other; nothing is left to train on")
    return Pictures(root, train, val, digest)


def list_pictures(root: Path) -> list[str]:
    """Relative paths of all pictures, sorted. Hidden files and linked folders are not looked at."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(folder).relative_to(root)
        found += [str(below / n) for n in files if not n.startswith(".") and Path(n).suffix.lower() in SUFFIXES]
    return sorted(found, key=os.fsencode)


def content_hash(path: Path) -> str:
    """Of a file that cannot be read, of its name: it is named when the shards are made."""
    try:
        return sha256(path)
    except OSError:
        return hashlib.sha256(os.fsencode(path.name)).hexdigest()


def link_pictures(pictures: Pictures, folder: Path) -> None:
    """`folder`/train and `folder`/val: links to the pictures, laid out as they are."""
    for split in ("train", "val"):
        for name in getattr(pictures, split):
            link = folder / split / name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(pictures.root.resolve() / name)


def write_classes(path: Path, labels: Mapping[str, str]) -> None:
    """The label that each picture's foreground shall carry, as build_shards.py reads it."""
    with open(path, "w", encoding="utf-8", errors="replace", newline="") as file:
        csv.writer(file).writerows([("image", "label"), *labels.items()])


def build_command(links: Path, out: Path, size: int, segmentation: str, names: Path, classes: Path | None) -> list[str]:
    """How build_shards.py is called for one split; `names` holds label_names and class_names, as a manifest does."""
    if not TOOL.is_file():
        raise UserError(f"no {TOOL}: shards are built by a program of the repository; run this in a clone of it")
    count = sum(len(files) for _, _, files in os.walk(links))
    workers = 0 if count < FEW else len(os.sched_getaffinity(0))
    options = {"size": size, "segmentation": segmentation, "label-names": names, "split": out.name, "workers": workers}
    options |= {"rank": 0, "world": 1}  # whatever a cluster's variables say: this program is one process
    options |= {} if classes is None else {"classes": classes}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(TOOL), str(links), str(out), "--quiet", *words]


def start(command: Sequence[str]) -> subprocess.Popen[str]:
    """The command, its words kept for `fault`."""
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def fault(process: subprocess.Popen[str]) -> str:
    """What a finished build complained of; "" if there is a manifest to read (code 1: of no usable picture)."""
    said = process.stderr.read().strip().splitlines()
    if process.returncode in (0, 1):
        return ""
    return said[-1].removeprefix("build_shards: ") if said else f"build_shards.py ended with code {process.returncode}"


def left_out(shards: Path) -> list[tuple[str, str]]:
    """(picture, reason) of what could not be used. UserError if that is too much, or if a split has none left."""
    listed, counts = [], {}
    for split in ("train", "val"):
        manifest = read_json(shards / split / MANIFEST)
        counts[split] = manifest["samples"]
        listed += [(row["path"], row["reason"]) for row in manifest["skipped"]]
    total = sum(counts.values()) + len(listed)
    named = "; ".join(f"{path}: {reason}" for path, reason in listed[:3])
    if len(listed) > MOST_LEFT_OUT * total:
        limit = f"more than {MOST_LEFT_OUT:.0%}"
        raise UserError(f"{len(listed)} of {total} pictures cannot be used, {limit}: {named}")
    for split, count in counts.items():
        if not count:
            raise UserError(f"none of the pictures for {split} can be used: {named}")
    return listed
