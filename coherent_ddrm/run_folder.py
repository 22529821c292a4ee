"""A run's folder: its config, log, sheets and checkpoints, and what is kept of them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from coherent_ddrm.checkpoints import load_checkpoint, read_checkpoint, tidy, verify_checkpoint, write_checkpoint
from coherent_ddrm.config import ConfigError, config_hash, dump_config
from coherent_ddrm.errors import CheckpointError
from coherent_ddrm.export import read_json, write_atomic

Tensors = dict[str, dict[str, Tensor]]  # file name -> named tensors


class RunFolder:
    """`out/`: config.yaml, log.jsonl, sheets/, tensorboard/, checkpoints/step-00000000/, best.json.

    Resuming raises ConfigError if the newest checkpoint has another config, unless only keys in FREE differ.
    """

    FREE = ("log", "out", "init", "data.workers", "data.damaged", "optim.compile", "optim.checkpointing")
    FREE += ("optim.shard", "optim.steps", "optim.cooldown")

    def __init__(self, out: str, config: object):
        self.folder, self.config = Path(out), config
        self.checkpoints = self.folder / "checkpoints"

    def create(self) -> None:
        """Make the folders, and clear up what a killed save left behind."""
        self.sheets.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        for stale in self.checkpoints.glob(".step-*"):
            tidy(stale.with_name(stale.stem[1:]))

    def write_config(self) -> None:
        """The resolved config, as the run goes on with it."""
        write_atomic(self.folder / "config.yaml", dump_config(self.config).encode())

    @property
    def sheets(self) -> Path:
        return self.folder / "sheets"

    def save(self, step: int, tensors: Tensors, keep: int, state: dict | None = None) -> Path:
        """The state after `step` steps. Then of the older ones the last `keep` stay, and the best.

        Raises OSError or SafetensorError if it cannot be written; no other checkpoint is touched then.
        """
        final = self.checkpoints / f"step-{step:08d}"
        facts = {"step": step, "config": _plain(self.config), "config_hash": config_hash(self.config)}
        write_checkpoint(final, tensors, facts | (state or {}))
        best = self.best()[0]
        for old in self.saved()[:-keep]:
            if old.name != best:
                shutil.rmtree(old)
        return final

    def saved(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(path for path in self.checkpoints.glob("step-*") if path.is_dir())

    def newest(self, put_aside: bool = True) -> Path | None:
        """The newest whole checkpoint. Torn or altered ones are named on stderr; put_aside: and renamed damaged-*."""
        for path in reversed(self.saved()):
            try:
                verify_checkpoint(path)
                return path
            except CheckpointError as error:
                print(f"warning: {error}; the checkpoint before it is used", file=sys.stderr)
                if put_aside:
                    aside = path.with_name(f"damaged-{path.name}")
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(path, aside)
        return None

    def load(self, path: Path) -> tuple[Tensors, dict]:
        """(tensors, state) of a checkpoint of this run that `newest` has found whole."""
        tensors, state = load_checkpoint(path)
        self._refuse_other(state["config"], path)
        if state["step"] > self.config.optim.steps:
            raise ConfigError(f"{path} is beyond optim.steps {self.config.optim.steps}; ask for more steps")
        return tensors, state

    def best(self) -> tuple[str | None, float]:
        """(name of the best checkpoint, its score), the lower the better; (None, inf) before the first."""
        if not (self.folder / "best.json").exists():
            return None, float("inf")
        content = read_json(self.folder / "best.json")
        return content["checkpoint"], content["score"]

    def mark_best(self, step: int, name: str, score: float) -> None:
        """Record that the checkpoint of `step` scores best."""
        content = {"checkpoint": f"step-{step:08d}", "name": name, "score": score}
        write_atomic(self.folder / "best.json", json.dumps(content).encode() + b"\n")

    def dump(self, step: int, tensors: Tensors, state: dict) -> Path:
        """A state to look into, failed/step-*, apart from the checkpoints and in their format."""
        final = self.folder / "failed" / f"step-{step:08d}"
        facts = {"step": step, "config": _plain(self.config), "config_hash": config_hash(self.config)}
        write_checkpoint(final, tensors, facts | state)
        return final

    def _refuse_other(self, theirs: dict, checkpoint: Path) -> None:
        mine, theirs = _flat(_plain(self.config)), _flat(theirs)
        changed = [k for k in sorted(mine.keys() | theirs.keys()) if mine.get(k) != theirs.get(k)]
        changed = [k for k in changed if not any(k == free or k.startswith(free + ".") for free in self.FREE)]
        if changed:
            listed = "; ".join(f"{k} was {theirs.get(k)!r}, is {mine.get(k)!r}" for k in changed)
            raise ConfigError(f"{checkpoint} has another config ({listed}); choose another --out, or put it back")


def newest_weights(run: Path, names: Sequence[str] = ("ema",)) -> tuple[list[dict[str, Tensor]], int]:
    """(named tensors of each file, step) of a run's newest whole checkpoint. ConfigError if there is none."""
    saved = RunFolder(str(run), None).saved()
    for path in reversed(saved):
        try:
            tensors, state = read_checkpoint(path)
            return [tensors[name] for name in names], state["step"]
        except CheckpointError as error:
            print(f"warning: {error}; the checkpoint before it is used", file=sys.stderr)
    raise ConfigError(f"{run}: no checkpoint saved yet")


def _plain(config: object) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
