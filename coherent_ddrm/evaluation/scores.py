"""Scores of every result, read back from its PNG, beside the truth's PNG; kept per method and kind of hole.

Known pixels are given back before anything is measured but `changed` and `measurement_error`, so that pictures of
another program are scored as ours are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
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
    Truth,
    by_itself,
    changed,
    diversity,
    foreground_iou,
    foregrounds,
    measurement_error,
    network_of,
    reinpaint_invented,
    reinpaint_known,
    score_sets,
    segmentation_iou,
)
from coherent_ddrm.models.structure import StructurePredictor, decode_structure, predict_plan
from coherent_ddrm.operators import Inpainting

BATCH, PIXELS = 32, 2**21  # pictures, and pixels, scored together at most
ROOM = 2**30  # bytes of truths that are kept from one method to the next
EDITION = 2  # of the scores: another one is measured anew
COSTS = ("nfe", "seconds", "memory")
SLOW = ("foreground_iou", "segmentation_iou", "reinpaint_known", "reinpaint_invented")
TRUTH = "the truth"  # the row with its own values of the scores that need no truth
FACTS = ("method", "mask", "key", "candidate", "hole_hash", "hole_share", "area", *COSTS)


@dataclass(frozen=True)
class Scores:
    """Of one method and kind of hole."""

    rows: list[dict[str, Any]]  # per result
    sets: dict[str, float]  # of the whole set
    notes: list[str]  # what was left out or is to be read with care


@dataclass(frozen=True)
class Part:
    """What one process measured of one method and kind of hole."""

    rows: list[list[dict[str, Any]]]  # per picture, of each candidate
    features: dict[str, Tensor]  # (N, d) by network, of the first candidates

    @property
    def flat(self) -> list[dict[str, Any]]:
        """The rows of all results."""
        return [row for candidates in self.rows for row in candidates]


class Scorer:
    """Scores results of a gallery.

    Args:
        networks: those that are to be had, by name, as metrics.available gives them.
        wanted: names of scores; those on pairs that need no network are always there, those of SLOW if they are named.
        again: the method that inpaints again, for reinpaint_known and reinpaint_invented.
        planner: stage one, which labels whole pictures, results and truths alike, for segmentation_iou.
        checkpoint: what the planner is of, by its hash.
        published_at: numbers of pictures at which FID is given, however biased: those of a published protocol.
    """

    def __init__(
        self,
        gallery: Gallery,
        networks: Mapping[str, nn.Module],
        wanted: Sequence[str],
        device: torch.device,
        again: Method | None = None,
        planner: StructurePredictor | None = None,
        checkpoint: str = "",
        published_at: Sequence[int] = (),
    ):
        self.gallery, self.networks, self.wanted, self.device = gallery, networks, wanted, device
        self.again, self.planner, self.checkpoint, self.published_at = again, planner, checkpoint, list(published_at)
        self.identities = {name: getattr(net, "identity", "") for name, net in sorted(networks.items())}
        self.extractors = {name: net for name, net in networks.items() if hasattr(net, "features")}
        self.hashes = gallery.hashes()
        self._truths: dict[tuple[str, ...], Truth] = {}  # by the keys of a batch, as many as there is room for
        self._real: dict[str, Tensor] = {}  # features of all truths by network

    def score(self, kind: str, labels: Sequence[str], rank: int = 0, world: int = 1) -> dict[str, Scores]:
        """By label, TRUTH first. All processes call it, which share the pictures; the first one gets the answer.

        Kept after every label, so that a stop loses one at most. UserError while results are missing.
        """
        noted = {label: self._records(label, kind) for label in labels}
        stamps = {label: self._stamp(label, kind) for label in labels}
        found = {label: self._kept(label, kind, stamps[label]) for label in labels}
        missing, mine = [label for label in labels if found[label] is None], self.gallery.keys[rank::world]
        missing = missing if world == 1 else gather_object([missing])[0]  # what the first one says
        truths = _shared(self._measure(TRUTH, kind, mine, {}, bool(missing) and not self._real), world)
        self._real = self._real or truths.features
        for label in missing:
            whole = _shared(self._measure(label, kind, mine, noted[label]), world)
            if rank:
                continue
            sets, notes = {}, []
            if self.extractors:
                sets, notes = score_sets(self.wanted, self._real, whole.features, self.published_at)
            found[label] = Scores(whole.flat, sets, notes)
            kept = {"stamp": stamps[label]} | asdict(found[label])
            write_atomic(self._file(label, kind), json.dumps(kept).encode())
        return {} if rank else {TRUTH: Scores(truths.flat, {}, [])} | found

    # -- what was measured before --------------------------------------------------------------------------------------

    def _records(self, label: str, kind: str) -> dict[str, dict]:
        noted = records(self.gallery, label, kind)
        if missing := [key for key in self.gallery.keys if key not in noted]:
            raise UserError(f"{label}, {kind}: {len(missing)} results are missing, the first of {missing[0]!r}")
        return noted

    def _kept(self, label: str, kind: str, stamp: dict[str, Any]) -> Scores | None:
        file = self._file(label, kind)
        if not file.is_file() or (found := read_json(file)).pop("stamp", None) != stamp:
            return None
        return Scores(**found)

    def _file(self, label: str, kind: str) -> Path:
        return self.gallery.folder / "results" / label / kind / "scores.json"

    def _stamp(self, label: str, kind: str) -> dict[str, Any]:
        """All that the scores hang on."""
        digest = hashlib.sha256()
        for key in self.gallery.keys:
            for k in range(self.gallery.setting.candidates):
                digest.update(self.gallery.result(label, kind, key, k).read_bytes())
        slow = sorted(name for name in SLOW if name in self.wanted)
        again = self.again.facts if self.again and any(name.startswith("reinpaint") for name in slow) else None
        stamp = {"version": [__version__, EDITION], "results": digest.hexdigest(), "truth": self.hashes["truth"]}
        stamp |= {"holes": self.hashes[kind], "networks": self.identities, "slow": slow, "again": again}
        stamp["sets"] = sorted(name for name in self.wanted if network_of(name) in self.extractors)
        stamp["published_at"] = self.published_at
        stamp["planner"] = self.checkpoint if "segmentation_iou" in slow else None
        return json.loads(json.dumps(stamp))

    # -- measuring -----------------------------------------------------------------------------------------------------

    def _measure(
        self, label: str, kind: str, keys: Sequence[str], noted: Mapping[str, dict], featured: bool = True
    ) -> Part:
        """A method's results of these pictures; of TRUTH its own values."""
        rows: list[list[dict[str, Any]]] = []
        features: dict[str, list[Tensor]] = {name: [] for name in self.extractors if featured}
        size = min(BATCH, max(1, PIXELS // self.gallery.setting.size**2))
        for first in range(0, len(keys), size):
            batch = keys[first : first + size]
            truth, hole = self._truth(batch), self._holes(kind, batch)
            if label == TRUTH:
                candidates, scores = [truth.pictures], [by_itself(truth.pictures, hole)]
            else:
                candidates, scores = self._results(label, kind, batch, truth, hole)
            rows += self._rows(label, kind, batch, hole, scores, noted)
            for name, parts in features.items():
                parts.append(self.extractors[name].features(candidates[0]).float().cpu())
            if sum(kept.nbytes for kept in self._truths.values()) > ROOM:
                self._truths.pop(tuple(batch), None)
        return Part(rows, {name: torch.cat(parts) for name, parts in features.items() if parts})

    def _results(
        self, label: str, kind: str, keys: Sequence[str], truth: Truth, hole: Tensor
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """A method's candidates with their known pixels given back, uint8 (B, 3, R, R) each, and their scores."""
        count = self.gallery.setting.candidates
        files = [[self.gallery.result(label, kind, key, k) for key in keys] for k in range(count)]
        raw = [self._read(of) for of in files]
        candidates = [torch.where(hole, result, truth.pictures) for result in raw]
        spread = {"diversity": diversity(torch.stack(candidates), hole)} if count > 1 else {}
        scores = []
        for before, result in zip(raw, candidates, strict=True):
            found = truth.score(result, hole) | spread | self._slow(result, truth, hole)
            found["changed"] = changed(before, truth.pictures, hole)
            found["measurement_error"] = _error(before, truth.pictures, hole)
            scores.append(found)
        return candidates, scores

    def _slow(self, result: Tensor, truth: Truth, hole: Tensor) -> dict[str, Tensor]:
        scores = {}
        if "foreground_iou" in self.wanted:
            scores["foreground_iou"] = foreground_iou(foregrounds(result)[0], *truth.foregrounds, hole)
        if "segmentation_iou" in self.wanted:
            labels = [self._labels(pictures) for pictures in (result, truth.pictures)]
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
        hole: Tensor,
        scores: Sequence[Mapping[str, Tensor]],
        noted: Mapping[str, dict],
    ) -> list[list[dict[str, Any]]]:
        """Per picture a row of each candidate, from the scores (B,) of each candidate."""
        values = [{name: value.double().cpu().tolist() for name, value in of.items()} for of in scores]
        rows = []
        for i, (key, of) in enumerate(zip(keys, hole.cpu(), strict=True)):
            share = int(of.sum()) / of.numel()
            digest = hashlib.sha256(of.numpy().astype(np.uint8).tobytes()).hexdigest()[:16]
            facts = {"method": label, "mask": kind, "key": key, "hole_hash": digest, "hole_share": share}
            facts |= {"area": area_bin(share)} | {name: noted.get(key, {}).get(name) for name in COSTS}
            rows.append(
                [
                    facts | {"candidate": k} | {name: _finite(value[i]) for name, value in of.items()}
                    for k, of in enumerate(values)
                ]
            )
        return rows

    def _truth(self, keys: Sequence[str]) -> Truth:
        if tuple(keys) not in self._truths:
            pictures = self._read([self.gallery.folder / "truth" / f"{key}.png" for key in keys])
            self._truths[tuple(keys)] = Truth(pictures, self.networks)
        return self._truths[tuple(keys)]

    def _holes(self, kind: str, keys: Sequence[str]) -> Tensor:
        return torch.from_numpy(np.stack([self.gallery.hole(kind, key) for key in keys]))[:, None].to(self.device)

    def _read(self, files: Sequence[Path]) -> Tensor:
        """uint8 (B, 3, R, R)"""
        pictures, side = [read_image(file) for file in files], self.gallery.setting.size
        for file, picture in zip(files, pictures, strict=True):
            if picture.shape[:2] != (side, side):
                raise UserError(f"{file}: {picture.shape[1]} x {picture.shape[0]}, not {side} px; remove it")
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous().to(self.device)


def _shared(part: Part, world: int) -> Part:
    """All processes' parts as one, on each of them."""
    return part if world == 1 else _merged(gather_object([part]))


def _merged(parts: Sequence[Part]) -> Part:
    """The pictures in their order: process r of n measured r, r + n, ..."""
    world, total = len(parts), sum(len(part.rows) for part in parts)
    if len({frozenset(part.features) for part in parts if part.rows}) > 1:
        raise RuntimeError("the processes have other networks to score with")
    rows: list[Any] = [None] * total
    features: dict[str, Tensor] = {}
    for rank, part in enumerate(parts):
        rows[rank::world] = part.rows
        for net, own in part.features.items():
            features.setdefault(net, own.new_empty(total, own.shape[1]))[rank::world] = own
    return Part(rows, features)


def _error(result: Tensor, truth: Tensor, hole: Tensor) -> Tensor:
    """max |A x - y| of each result on the [-1, 1] scale, (B,)."""
    operator = Inpainting(hole.float())
    return measurement_error(result, operator.A(truth.float() / 127.5 - 1), operator)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
