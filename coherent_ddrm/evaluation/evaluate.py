"""`coherent-ddrm evaluate`: every method on the same pictures, holes and noise; scores; the report."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import PartialState

from coherent_ddrm.errors import UserError
from coherent_ddrm.evaluation.asked import Evaluation
from coherent_ddrm.evaluation.gallery import Gallery
from coherent_ddrm.evaluation.methods import Makers
from coherent_ddrm.evaluation.report import write_report
from coherent_ddrm.evaluation.scores import Scorer
from coherent_ddrm.evaluation.work import adopt, carry_out, ranks
from coherent_ddrm.metrics import available


def evaluate(wanted: Evaluation) -> Path | None:
    """Do it, or go on with it; the report's path, None on all processes but the first.

    Raises:
        UserError: something asked for is not there, or does not fit what the folder holds.
    """
    rank, world = ranks()
    device = torch.device(wanted.device)
    state = PartialState(cpu=device.type == "cpu") if world > 1 else None
    if state is not None and device.index is None:
        device = state.device  # a GPU for each process
    gallery = Gallery(wanted.output, wanted.setting)
    makers = make_makers(wanted, device)
    methods = [makers.make(text) for text in wanted.methods]
    labels = [method.label for method in methods] + list(wanted.results)
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(f"two methods are called {twice[0]!r}; results are told apart by name")
    try:
        networks, notes = available(wanted.scores, wanted.weights, device, wanted.download)
    except ValueError as error:  # a name that is no score's
        raise UserError(str(error)) from error
    again = None
    if any(name.startswith("reinpaint") for name in wanted.scores):
        again = makers.make(wanted.reinpaint)
    if rank == 0:
        gallery.prepare()
    _wait(state)
    for method in methods:
        carry_out(gallery, method, wanted.batch, rank, world, quiet=rank > 0)
    _wait(state)
    if rank:
        return None
    for label, folder in wanted.results.items():
        adopt(gallery, label, folder)
    scorer = Scorer(gallery, networks, wanted.scores, device, again)
    rows, sets, said = [], {}, list(notes)
    for label in labels:
        for kind in gallery.kinds:
            rows += scorer.pairs(label, kind)
            sets[label, kind], more = scorer.sets(label, kind)
            said += more
    facts = {
        "command": wanted.command,
        "device": str(device),
        "precision": wanted.precision,
        "checkpoint": Path(wanted.checkpoint).name,
    }
    facts |= {"networks of the scores": scorer.stamp or "none", "processes": world}
    reference = labels[0]
    return write_report(gallery, rows, sets, reference, facts, list(dict.fromkeys(said)), wanted.published)


def make_makers(wanted: Evaluation, device: torch.device) -> Makers:
    dtype = torch.bfloat16 if wanted.precision == "bf16" else None
    return Makers(wanted.checkpoint, device, wanted.steps, wanted.shift, dtype)


def _wait(state: PartialState | None) -> None:
    if state is not None:
        state.wait_for_everyone()
