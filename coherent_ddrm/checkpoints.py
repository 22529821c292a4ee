"""One training checkpoint on disk: safetensors, state.json, and a manifest with the sha256 of each.

It is written beside its final name, flushed to the disk and renamed, so that a killed process or a full disk never
leaves half of one under a checkpoint's name; and read only when every file is what the manifest says. (accelerate's own
save_state writes into the final folder, and prunes before it writes.)
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from coherent_ddrm.errors import CheckpointError
from coherent_ddrm.export import read_json, sha256

MANIFEST, STATE = "manifest.json", "state.json"


def write_checkpoint(final: Path, tensors: dict[str, dict[str, Tensor]], state: dict) -> None:
    """Write `tensors` (file name -> named tensors) and `state` as the folder `final`, whole or not at all.

    Raises OSError or SafetensorError (a full disk, a lost mount); what was there before is then untouched.
    """
    beside, old = _beside(final)
    tidy(final)
    try:
        beside.mkdir(parents=True)
        for name, group in tensors.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in group.items()}, beside / f"{name}.safetensors")
        (beside / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        hashes = {path.name: sha256(path) for path in sorted(beside.iterdir())}
        (beside / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=1), encoding="utf-8")
        for path in beside.iterdir():
            path.chmod((beside / STATE).stat().st_mode & 0o777)  # safetensors lets only the owner read its files
            _flush(path)
        _flush(beside)
        if final.exists():
            os.replace(final, old)
        os.replace(beside, final)
        _flush(final.parent)
    finally:
        tidy(final)


def tidy(final: Path) -> None:
    """Remove what a cut-short save left beside `final`; put the old one back if it had just been moved away."""
    beside, old = _beside(final)
    if old.exists() and not final.exists():
        os.replace(old, final)
    for leftover in (beside, old):
        shutil.rmtree(leftover, ignore_errors=True)


def verify_checkpoint(folder: Path) -> None:
    """CheckpointError naming the first file that is missing, unknown, or not what the manifest says."""
    recorded = read_json(folder / MANIFEST).get("sha256")
    if not isinstance(recorded, dict):
        raise CheckpointError(f"{folder / MANIFEST}: no table 'sha256'")
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    for name in sorted(recorded.keys() | present):
        if name not in present:
            raise CheckpointError(f"{folder / name}: missing, but listed in {MANIFEST}")
        if sha256(folder / name) != recorded.get(name):
            raise CheckpointError(f"{folder / name}: torn or altered, its sha256 is not the one in {MANIFEST}")


def read_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """(tensors, state) as they were written. CheckpointError for a folder that `verify_checkpoint` refuses."""
    verify_checkpoint(folder)
    return load_checkpoint(folder)


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict]:
    """(tensors, state) of a folder that is known to be whole. On the CPU, mapped: what nobody asks is never read."""
    return {file.stem: load_file(file) for file in sorted(folder.glob("*.safetensors"))}, read_json(folder / STATE)


def _beside(final: Path) -> tuple[Path, Path]:
    """Where a checkpoint is written, and where the old one of its name lies meanwhile."""
    return final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old")


def _flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or renamed in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
