"""Scores of a set of results against a set of truths, from their features; what would mislead is left out, with why."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from torch import Tensor

from coherent_ddrm.errors import UserError
from coherent_ddrm.metrics.discriminative import Discriminative, discriminative_scores
from coherent_ddrm.metrics.frechet import fid, fid_infinity
from coherent_ddrm.metrics.kernel import kid
from coherent_ddrm.metrics.table import ON_SETS, network_of, split

FEWEST = 1000  # pictures of an FID


def score_sets(
    wanted: Iterable[str], real: Mapping[str, Tensor], fake: Mapping[str, Tensor], published_at: Container[int] = ()
) -> tuple[dict[str, float], list[str]]:
    """The wanted scores, such as fid-clothing, and a line for each left out or to be read with care.

    real, fake: features (N, d) by network, row i of one belonging to row i of the other. Scores without features are
    passed over: `available` has said why. kid and fid_infinity come with their spread, as kid_spread-clothing.

    published_at: numbers of pictures at which papers report FID; at these `fid` is given, however biased it is.
    """
    scores, notes = {}, []
    discriminative: dict[str, Discriminative] = {}
    for name in wanted:
        base, network = split(name)[0], network_of(name)
        if base not in ON_SETS or network not in real:
            continue
        ours = real[network], fake[network]
        try:
            if base == "fid":
                if name != "fid" or len(ours[0]) not in published_at:
                    _refuse_few(*ours)
                scores[name] = fid(*ours)
                notes += _few(name, *ours, 10, "biased upwards, comparable at this count alone")
            elif base in ("kid", "fid_infinity"):
                value, spread, _ = (kid if base == "kid" else fid_infinity)(*ours, paired=True)
                scores[name], scores[name.replace(base, base + "_spread", 1)] = value, spread
                if base == "fid_infinity":
                    notes += _few(name, *ours, 8, "some of the bias may be left in it")
            else:
                if network not in discriminative:
                    discriminative[network] = discriminative_scores(*ours)
                scores[name] = getattr(discriminative[network], base)
        except UserError as error:
            notes.append(f"left out: {name}: {error}")
    return scores, notes


def _refuse_few(real: Tensor, fake: Tensor) -> None:
    """FID of too few pictures is mostly bias: its covariances have not been seen along every direction."""
    count, dimensions = min(len(real), len(fake)), real.shape[1]
    fewest = max(FEWEST, dimensions + 1)
    if count < fewest:
        raise UserError(
            f"{count} pictures at {dimensions} features: FID is then mostly bias, {fewest} or more are needed; use kid"
        )


def _few(name: str, real: Tensor, fake: Tensor, enough: int, what: str) -> list[str]:
    """A note on a score of fewer than `enough` pictures per feature."""
    count, dimensions = min(len(real), len(fake)), real.shape[1]
    return [] if count >= enough * dimensions else [f"{name}: {count} pictures at {dimensions} features: {what}"]
