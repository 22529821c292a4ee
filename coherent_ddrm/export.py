"""The exported checkpoint folder: what is in it, its sha256 manifest, and the checks before anything is loaded from it.

    model_index.json   transformer/   structure/ (optional)   manifest.json   README.md (the card; not in the manifest)

diffusers loads a file with a flipped byte in silence, ignores unknown keys in config.json, and only warns about missing
weights. Here each of them is an error that names the file. Nothing in this module imports torch.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coherent_ddrm.errors import CheckpointError

INDEX = "model_index.json"
MANIFEST = "manifest.json"
COMPONENTS = ("transformer", "structure")
VERSION = 1


def default_checkpoint() -> Path:
    """The checkpoint that the repository ships. CheckpointError when it is not there."""
    folder = Path(__file__).resolve().parent.parent / "checkpoints" / "clothing-64"
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"no checkpoint at {folder}: the shipped one lies in a clone of the repository; "
            "name another folder, on the command line with --checkpoint DIR"
        )
    return folder


def write_manifest(folder: Path) -> None:
    """Record the sha256 of every file of the checkpoint; written last, so a save that was cut short has no manifest."""
    files = {name: sha256(folder / name) for name in _files(folder)}
    write_atomic(folder / MANIFEST, json.dumps({"version": VERSION, "sha256": files}, indent=2).encode() + b"\n")


def verify_manifest(folder: Path) -> str:
    """Check every file of the checkpoint; return the checkpoint's own hash, the sha256 of its manifest.

    Raises CheckpointError naming the first file that differs from the manifest, is missing, or is not in it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}, so this is no finished export; save it with save_pretrained")
    recorded = read_json(folder / MANIFEST).get("sha256")
    if not isinstance(recorded, dict):
        raise CheckpointError(f"{folder / MANIFEST}: no table 'sha256'; export the checkpoint again")
    present = _files(folder)
    for name in sorted(set(recorded) | set(present)):
        if name not in present:
            raise CheckpointError(f"{folder / name}: missing, but listed in {MANIFEST}; copy the checkpoint again")
        if name not in recorded:
            raise CheckpointError(f"{folder / name}: not listed in {MANIFEST}; remove it or export again")
        if sha256(folder / name) != recorded[name]:
            raise CheckpointError(f"{folder / name}: damaged, its sha256 is not the one in {MANIFEST}; copy it again")
    return sha256(folder / MANIFEST)


def check_keys(file: Path, allowed: Iterable[str]) -> dict[str, Any]:
    """The JSON object in `file`; CheckpointError for keys not in `allowed`; those of diffusers start with "_"."""
    config = read_json(file)
    unknown = sorted(key for key in config if not key.startswith("_") and key not in set(allowed))
    if unknown:
        raise CheckpointError(f"{file}: unknown key {unknown[0]!r}; it was written by another version of this library")
    return config


def check_components(folder: Path, index: dict[str, Any], classes: dict[str, type]) -> None:
    """CheckpointError unless the index names `classes` (structure may be null), with known keys in their configs."""
    for name, kind in classes.items():
        entry = list(index.get(name) or [None, None])
        if entry == [None, None] and name == "structure":
            continue
        if entry != [kind.__module__, kind.__name__]:
            raise CheckpointError(f"{folder / INDEX}: {name} is {entry}, not {kind.__module__}.{kind.__name__}")
        check_keys(folder / name / "config.json", inspect.signature(kind.__init__).parameters)


def check_weights(folder: Path, weights: dict[str, Any]) -> None:
    """CheckpointError unless the safetensors files in `folder` hold exactly `weights`, and these are finite numbers."""
    from safetensors import safe_open

    found: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as stored:
            found |= set(stored.keys())
    wrong = sorted(found ^ set(weights))
    if wrong:
        state = "missing" if wrong[0] not in found else "unknown"
        raise CheckpointError(f"{folder}: weight {wrong[0]!r} is {state} ({len(wrong)} such); export it again")
    for name, weight in weights.items():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise CheckpointError(f"{folder}: weight {name!r} holds numbers that are not finite (NaN); export it again")


def local_folder(checkpoint: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    """The folder itself, or a snapshot of the Hub repository "org/name". Takes the Hub's options out of `options`.

    diffusers refuses Hub repositories with components from other packages, but loads the same files from a folder.
    """
    names = ("revision", "cache_dir", "token", "local_files_only", "force_download")
    hub = {name: options.pop(name) for name in names if name in options}
    if os.path.isdir(checkpoint):
        return Path(checkpoint)
    if str(checkpoint).count("/") != 1 or str(checkpoint).startswith((".", "/", "~")):
        raise CheckpointError(f"{checkpoint}: no such checkpoint folder, and no Hub repository (org/name)")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(checkpoint), allow_patterns=["*.json", "*.safetensors", "*.md"], **hub))


@dataclass(frozen=True)
class Facts:
    """What can be asked of a checkpoint without loading it."""

    resolution: int
    labels: int  # of the plan; 0 = it takes none
    planner: bool  # whether it predicts plans
    shift: float  # of its time grid


def read_facts(folder: Path) -> Facts:
    """Facts from the checkpoint's JSON files. CheckpointError where they are not there."""
    index, network = read_json(folder / INDEX), read_json(folder / "transformer" / "config.json")
    try:
        channels = int(network["structure_channels"])
        planner = bool((index.get("structure") or [None])[0])
        return Facts(int(index["resolution"]), max(0, channels - 1), planner, float(index.get("shift", 1.0)))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: no resolution or structure_channels in its JSON files ({error})") from error


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. CheckpointError if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not a JSON object")
    return content


def tidy(folder: Path) -> None:
    """After diffusers saved: drop the path it was loaded from, and make files readable as the umask says.

    safetensors writes files that only their owner can read (its issue 782).
    """
    umask = os.umask(0)
    os.umask(umask)
    for name in _files(folder):
        file = folder / name
        if file.suffix == ".json":
            content = read_json(file)
            if content.pop("_name_or_path", None) is not None:
                file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        file.chmod(0o666 & ~umask)


def publish(temporary: Path, folder: Path) -> None:
    """Move a finished export into place. A new folder appears at once; an old one gets new files, manifest last.

    Other files in an old folder, such as its README.md, stay.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, folder)
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in COMPONENTS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        if (temporary / name).exists():
            os.replace(temporary / name, folder / name)
    for name in (INDEX, MANIFEST):
        os.replace(temporary / name, folder / name)


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: a reader meets the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(file: Path) -> str:
    """Hex digest of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(folder: Path) -> list[str]:
    """Relative names of the checkpoint's files, with forward slashes: the index and all in its components."""
    names = [INDEX] if (folder / INDEX).is_file() else []
    for component in COMPONENTS:
        files = sorted(path for path in (folder / component).rglob("*") if not path.is_dir())
        names += [path.relative_to(folder).as_posix() for path in files]
    return names
