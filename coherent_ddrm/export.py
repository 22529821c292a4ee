"""The exported checkpoint folder: what is in it, its sha256 manifest, and the checks before anything is loaded from it.

    model_index.json   transformer/   structure/ (optional)   manifest.json   README.md (the card; not in the manifest)

diffusers loads a file with a flipped byte in silence, ignores unknown keys in config.json, and only warns about missing
weights. Here each of them is an error that names the file. Nothing in this module imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
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
    """The JSON object in `file`; CheckpointError for a key outside `allowed` (keys with an underscore are diffusers')."""
    config = read_json(file)
    unknown = sorted(key for key in config if not key.startswith("_") and key not in set(allowed))
    if unknown:
        raise CheckpointError(f"{file}: unknown key {unknown[0]!r}; it was written by another version of this library")
    return config


def check_weight_names(folder: Path, expected: Iterable[str]) -> None:
    """CheckpointError unless the safetensors files in `folder` hold exactly the weights `expected`."""
    from safetensors import safe_open

    found: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as weights:
            found |= set(weights.keys())
    wrong = sorted(found ^ set(expected))
    if wrong:
        state = "missing" if wrong[0] not in found else "unknown"
        raise CheckpointError(f"{folder}: weight {wrong[0]!r} is {state} ({len(wrong)} such); export it again")


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
    """Move a finished export into place. A new folder appears at once; an old one has its files replaced, manifest last.

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
    """Names of the checkpoint's files, relative, with forward slashes: the index and all that lies in its components."""
    names = [INDEX] if (folder / INDEX).is_file() else []
    for component in COMPONENTS:
        files = sorted(path for path in (folder / component).rglob("*") if not path.is_dir())
        names += [path.relative_to(folder).as_posix() for path in files]
    return names
