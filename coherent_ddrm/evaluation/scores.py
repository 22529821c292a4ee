"""Scores of every result, read back from its PNG, beside the truth's PNG; kept per method and kind of hole.

Known pixels are given back before anything is measured but `changed` and `measurement_error`, so that pictures of
another program are scored as ours are.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coherent_ddrm import __version__
from coherent_ddrm.errors import UserError
from coherent_ddrm.evaluation.gallery import Gallery
from coherent_ddrm.evaluation.methods import Method
from coherent_ddrm.evaluation.statistics import area_bin
from coherent_ddrm.evaluation.work import records
from coherent_ddrm.export import read_json, write_atomic
from coherent_ddrm.images import read_image
from coherent_ddrm.metrics import (
    changed,
    diversity,
    foreground_iou,
    measurement_error,
    reinpaint_invented,
    reinpaint_known,
    score_pairs,
    score_sets,
    segmentation_iou,
)
from coherent_ddrm.models.structure import StructurePredictor, decode_structure, predict_plan
from coherent_ddrm.operators import Inpainting

BATCH = 32
SLOW = ("foreground_iou", "segmentation_iou", "reinpaint_known", "reinpaint_invented")
BY_ITSELF = ("surround_agreement", "mirror_agreement")  # need no truth, so the truth has a value of its own
TRUTH = "the truth"  # the row with these values
FACTS = ("method", "mask", "key", "candidate", "hole_hash", "hole_share", "area", "nfe", "seconds", "memory")


class Scorer:
    """Scores results of a gallery.

    Args:
        networks: those that are to be had, by name, as metrics.available gives them.
        wanted: names of scores; those on pairs that need no network are always there, those of SLOW if they are named.
        again: the method that inpaints again, for reinpaint_known and reinpaint_invented.
        planner: stage one, which labels whole pictures, results and truths alike, for segmentation_iou.
    """

    def __init__(
        self,
        gallery: Gallery,
        networks: Mapping[str, nn.Module],
        wanted: Sequence[str],
        device: torch.device,
        again: Method | None = None,
        planner: StructurePredictor | None = None,
    ):
        self.gallery, self.networks, self.wanted, self.device = gallery, networks, wanted, device
        self.again, self.planner = again, planner
        self.identities = {name: getattr(net, "identity", "") for name, net in sorted(networks.items())}
        self.hashes = gallery.verify()

    def pairs(self, label: str, kind: str) -> list[dict[str, Any]]:
        """A row per result. UserError while some are missing."""
        noted, rows = records(self.gallery, label, kind), []
        if missing := [key for key in self.gallery.keys if key not in noted]:
            raise UserError(f"{label}, {kind}: {len(missing)} results are missing, the first of {missing[0]!r}")
        kept, stamp = self.gallery.folder / "results" / label / kind / "scores.json", self._stamp(label, kind)
        if kept.is_file() and (found := read_json(kept)).get("stamp") == stamp:
            return found["rows"]
        count = self.gallery.setting.candidates
        for keys in self._batches():
            truth, hole = self._truth(keys), self._holes(kind, keys)
            raw = [self._results(label, kind, keys, k) for k in range(count)]
            candidates = [torch.where(hole, result, truth) for result in raw]
            spread = {"diversity": diversity(torch.stack(candidates), hole)} if count > 1 else {}
            for k, result in enumerate(candidates):
                scores = score_pairs(result, truth, hole, self.networks) | spread | self._slow(result, truth, hole)
                scores |= {"changed": changed(raw[k], truth, hole), "measurement_error": _error(raw[k], truth, hole)}
                rows += self._rows(label, kind, keys, k, hole, scores, noted)
        write_atomic(kept, json.dumps({"stamp": stamp, "rows": rows}).encode())
        return rows

    def truths(self, kind: str) -> list[dict[str, Any]]:
        """The truth's own values of the scores that need no truth, rows as of a method."""
        rows, nothing = [], {key: dict.fromkeys(("nfe", "seconds", "memory")) for key in self.gallery.keys}
        for keys in self._batches():
            truth, hole = self._truth(keys), self._holes(kind, keys)
            scores = score_pairs(truth, truth, hole)
            own = {name: scores[name] for name in BY_ITSELF}
            rows += self._rows(TRUTH, kind, keys, 0, hole, own, nothing)
        return rows

    def sets(self, label: str, kind: str) -> tuple[dict[str, float], list[str]]:
        """Scores of the whole set, and what is to be said of them."""
        if not self._extractors:
            return {}, []

        def read(keys: Sequence[str]) -> Tensor:
            return torch.where(self._holes(kind, keys), self._results(label, kind, keys, 0), self._truth(keys))

        return score_sets(self.wanted, self._real, self._features(read))

    # -- parts ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _extractors(self) -> dict[str, nn.Module]:
        return {name: net for name, net in self.networks.items() if hasattr(net, "features")}

    @cached_property
    def _real(self) -> dict[str, Tensor]:
        return self._features(self._truth)

    def _features(self, read: Callable[[Sequence[str]], Tensor]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {name: [] for name in self._extractors}
        for keys in self._batches():
            pictures = read(keys)
            for name, net in self._extractors.items():
                found[name].append(net.features(pictures).float().cpu())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _stamp(self, label: str, kind: str) -> dict[str, Any]:
        """All that the scores hang on."""
        digest = hashlib.sha256()
        for key in self.gallery.keys:
            for k in range(self.gallery.setting.candidates):
                digest.update(self.gallery.result(label, kind, key, k).read_bytes())
        slow = sorted(name for name in SLOW if name in self.wanted)
        again = self.again.facts if self.again and any(name.startswith("reinpaint") for name in slow) else None
        stamp = {"version": __version__, "results": digest.hexdigest(), "truth": self.hashes["truth"]}
        stamp |= {"holes": self.hashes[kind], "networks": self.identities, "slow": slow, "again": again}
        return json.loads(json.dumps(stamp))

    def _slow(self, result: Tensor, truth: Tensor, hole: Tensor) -> dict[str, Tensor]:
        scores = {}
        if "foreground_iou" in self.wanted:
            scores["foreground_iou"] = foreground_iou(result, truth, hole)
        if "segmentation_iou" in self.wanted:
            labels = [self._labels(pictures) for pictures in (result, truth)]
            scores["segmentation_iou"] = segmentation_iou(*labels, self.planner.config.num_labels, hole)
        for name, measure in (("reinpaint_known", reinpaint_known), ("reinpaint_invented", reinpaint_invented)):
            if name in self.wanted:
                scores[name] = measure(result, hole, self._inpaint)
        return scores

    def _labels(self, pictures: Tensor) -> Tensor:
        """What stage one sees in pictures of which nothing is hidden, (B, H, W) ids."""
        x = pictures.float() / 127.5 - 1
        return decode_structure(predict_plan(self.planner, x, torch.zeros_like(x[:, :1])))[1]

    def _inpaint(self, pictures: Tensor, hidden: Tensor) -> Tensor:
        """Pictures without anything hidden come back as they are."""
        holes, arrays = hidden[:, 0].cpu().numpy(), pictures.permute(0, 2, 3, 1).cpu().numpy().copy()
        some = np.flatnonzero(holes.any(axis=(1, 2)))
        if len(some):
            arrays[some] = self.again.fill(arrays[some], holes[some], [0] * len(some)).pictures
        return torch.from_numpy(arrays).permute(0, 3, 1, 2).to(self.device)

    def _rows(
        self,
        label: str,
        kind: str,
        keys: Sequence[str],
        candidate: int,
        hole: Tensor,
        scores: Mapping[str, Tensor],
        noted: Mapping[str, dict],
    ) -> list[dict[str, Any]]:
        values, rows = {name: value.double().cpu().tolist() for name, value in scores.items()}, []
        for i, key in enumerate(keys):
            share = float(hole[i].float().mean())
            digest = hashlib.sha256(hole[i].cpu().numpy().astype(np.uint8).tobytes()).hexdigest()[:16]
            facts = dict(method=label, mask=kind, key=key, candidate=candidate, hole_hash=digest, hole_share=share)
            facts |= {"area": area_bin(share)} | {k: noted[key][k] for k in ("nfe", "seconds", "memory")}
            rows.append(facts | {name: _finite(value[i]) for name, value in values.items()})
        return rows

    def _batches(self) -> list[list[str]]:
        keys = self.gallery.keys
        return [keys[first : first + BATCH] for first in range(0, len(keys), BATCH)]

    def _truth(self, keys: Sequence[str]) -> Tensor:
        return self._stack([self.gallery.truth(key) for key in keys])

    def _results(self, label: str, kind: str, keys: Sequence[str], candidate: int) -> Tensor:
        return self._stack([read_image(self.gallery.result(label, kind, key, candidate)) for key in keys])

    def _holes(self, kind: str, keys: Sequence[str]) -> Tensor:
        return torch.from_numpy(np.stack([self.gallery.hole(kind, key) for key in keys]))[:, None].to(self.device)

    def _stack(self, pictures: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous().to(self.device)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """All rows as CSV, the facts first."""
    names = [*FACTS, *dict.fromkeys(name for row in rows for name in row if name not in FACTS)]
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    beside.replace(path)


def _error(result: Tensor, truth: Tensor, hole: Tensor) -> Tensor:
    """max |A x - y| of each result on the [-1, 1] scale, (B,)."""
    operator = Inpainting(hole.float())
    return measurement_error(result, operator.A(truth.float() / 127.5 - 1), operator)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
