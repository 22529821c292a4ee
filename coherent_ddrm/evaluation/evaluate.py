"""`coherent-ddrm evaluate`: every method on the same pictures, holes and noise; scores; the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from coherent_ddrm.errors import UserError
from coherent_ddrm.evaluation.asked import Evaluation
from coherent_ddrm.evaluation.gallery import Gallery
from coherent_ddrm.evaluation.methods import Makers, Method
from coherent_ddrm.evaluation.report import write_report
from coherent_ddrm.evaluation.scores import SLOW, TRUTH, Scorer
from coherent_ddrm.evaluation.work import adopt, carry_out, claim, find_results
from coherent_ddrm.metrics import available, network_of
from coherent_ddrm.ranks import first_does, launched

PATIENCE = timedelta(days=7)  # for which a process waits for the slowest one
FEW = 30  # pictures, below which bootstrap intervals are known to be too narrow


def evaluate(wanted: Evaluation) -> Path | None:
    """Do it, or go on with it; the report's path, None on all processes but the first.

    Raises:
        UserError: something asked for is not there, or does not fit what the folder holds.
    """
    check_scores(wanted)
    rank, world = launched()
    device = torch.device(wanted.device)
    # accelerate's state is global to a program, which may train afterwards: it is made for several processes alone
    state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE) if world > 1 else None
    if state is not None and device.index is None:
        device = state.device  # a GPU for each process
    gallery, makers = Gallery(wanted.output, wanted.setting), make_makers(wanted, device)
    methods = [makers.make(text) for text in wanted.methods]
    baselines = [makers.make(text) for text in wanted.baselines]
    labels = [method.label for method in methods] + list(wanted.results) + [method.label for method in baselines]
    methods += baselines
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(f"two methods are called {twice[0]!r}; results are told apart by name")
    if "segmentation_iou" in wanted.scores and makers.pipeline.structure is None:
        raise UserError(f"--scores segmentation_iou: {wanted.checkpoint} has no stage one that would see labels")
    again = makers.make(wanted.reinpaint) if any("reinpaint" in name for name in wanted.scores) else None

    _first(state, gallery.begin)
    gallery.make(rank, world)
    _wait(state)
    _first(state, claim_all, gallery, methods, wanted.results)
    for method in methods:
        carry_out(gallery, method, wanted.batch, rank, world, quiet=rank > 0)
    _wait(state)
    return score(wanted, gallery, labels, makers, again, state)


def claim_all(gallery: Gallery, methods: Sequence[Method], results: Mapping[str, Path]) -> None:
    """Give every method its place, and take in what other programs made."""
    gallery.verify()
    for label, folder in results.items():
        adopt(gallery, label, find_results(gallery, folder))
    for method in methods:
        claim(gallery, method.label, method.facts)


def score(
    wanted: Evaluation,
    gallery: Gallery,
    labels: list[str],
    makers: Makers,
    again: Method | None,
    state: PartialState | None,
) -> Path | None:
    """Score all results, shared out over processes; the first one writes the report."""
    device, (rank, world) = makers.device, launched()
    networks, notes = find_networks(wanted, device, state)
    planner = makers.pipeline.structure if "segmentation_iou" in wanted.scores else None
    published_at = fid_counts(wanted.published) if wanted.published else ()
    scorer = Scorer(gallery, networks, wanted.scores, device, again, planner, makers.identity, published_at)
    found = {kind: scorer.score(kind, labels, rank, world) for kind in gallery.kinds}
    if rank:
        return None
    every = [(label, kind, found[kind][label]) for label in (TRUTH, *labels) for kind in gallery.kinds]
    rows = [row for *_, scores in every for row in scores.rows]
    sets = {(label, kind): scores.sets for label, kind, scores in every}
    said = [*wanted.notes, *notes, *(note for *_, scores in every for note in scores.notes)]
    if len(gallery.keys) < FEW:
        said.append(f"{len(gallery.keys)} pictures: intervals of fewer than {FEW} are narrower than 95 %")
    if again is not None:
        partial = ", which is scored here itself" if again.label in labels else ""
        said.append(f"reinpaint_*: {again.label} inpainted again{partial}; its own fills are the easier for it")
    if planner is not None:
        said.append("segmentation_iou: the labels are those of stage one, which has planned the fills of coherent, too")
    if wanted.published and len(gallery.keys) not in wanted.published["counts"].values():
        counts = " or ".join(f"{count:,}" for count in dict.fromkeys(wanted.published["counts"].values()))
        said.append(
            f"{len(gallery.keys):,} pictures, {wanted.published['name']} has {counts}: scores of sets (FID, P-IDS, "
            "U-IDS) are not comparable with those of papers, the others only if these are a fair sample"
        )
    facts = {"command": wanted.command, "checkpoint": makers.identity, "device": str(device)}
    facts |= {"precision": wanted.precision, "processes": world, "networks of the scores": scorer.identities or "none"}
    return write_report(gallery, rows, sets, labels[0], facts, list(dict.fromkeys(said)), wanted.published)


def find_networks(
    wanted: Evaluation, device: torch.device, state: PartialState | None
) -> tuple[dict[str, nn.Module], list[str]]:
    """What `available` finds; of several processes on a machine the first one fetches.

    Raises:
        UserError: processes find different ones.
    """
    with state.local_main_process_first() if state else nullcontext():
        networks, notes = available(wanted.scores, wanted.weights, device, wanted.download)
    found = [sorted((name, net.identity) for name, net in networks.items())]
    if state and any(other != found[0] for other in gather_object(found.copy())):
        raise UserError("the processes find different networks to score with; give all machines the same --weights")
    return networks, notes


def fid_counts(published: Mapping[str, Any]) -> list[int]:
    """Numbers of pictures at which papers report an FID that is shown here."""
    return sorted({published["counts"][row["data"]] for row in published["rows"] if row["metric"] == "fid"})


def check_scores(wanted: Evaluation) -> None:
    """UserError for scores that there are not, or that cannot be asked for."""
    for name in wanted.scores:
        try:
            network = network_of(name)
        except ValueError as error:
            raise UserError(str(error)) from error
        if network is None and name not in SLOW:
            raise UserError(
                f"--scores {name}: it is there always or not at all; what can be asked for needs a network "
                f"(lpips_alex, fid-clothing, ...), or is one of {', '.join(SLOW)}"
            )


def make_makers(wanted: Evaluation, device: torch.device) -> Makers:
    dtype = torch.bfloat16 if wanted.precision == "bf16" else None
    return Makers(wanted.checkpoint, device, wanted.steps, wanted.shift, dtype)


def _first(state: PartialState | None, work: Callable[..., None], *arguments: Any) -> None:
    """The first process does it; what it raises ends all of them."""
    work(*arguments) if state is None else first_does(state, work, *arguments)


def _wait(state: PartialState | None) -> None:
    if state is not None:
        state.wait_for_everyone()
