"""How sure a mean is, and whether two methods differ. Values are per picture; nan = no value there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES, FLIPS = 2000, 9999
AT_ONCE = 2**21  # numbers of one matrix of flips
BINS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0)  # of the share of missing pixels


class Interval(NamedTuple):
    """A mean with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float
    count: int  # pictures that have a value


class Difference(NamedTuple):
    """A method minus the one it is held against, on the same pictures and holes."""

    mean: float
    low: float
    high: float
    p: float  # of so large a mean difference by chance, two-sided
    count: int


def interval(values: np.ndarray, seed: int = 0) -> Interval:
    """Mean and 95 % percentile bootstrap interval over pictures. Equal values have no width, one value no interval.

    With few pictures it is too narrow: it covers the mean in about 86 % of sets of 5, 90 % of 10, 94 % of 100.
    """
    kept = np.asarray(values, dtype=float)
    kept = kept[np.isfinite(kept)]
    if not len(kept):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    low, high = _bootstrap(kept, seed)
    return Interval(float(kept.mean()), low, high, len(kept))


def difference(values: np.ndarray, against: np.ndarray, seed: int = 0) -> Difference:
    """Paired: interval by bootstrap of the differences, p by flipping their signs at random (at least 1 / 10,000)."""
    apart = np.asarray(values, dtype=float) - np.asarray(against, dtype=float)
    apart = apart[np.isfinite(apart)]
    if len(apart) < 2:
        return Difference(
            float(apart.mean()) if len(apart) else float("nan"), float("nan"), float("nan"), 1.0, len(apart)
        )
    low, high = _bootstrap(apart, seed)
    if not apart.any():
        return Difference(0.0, 0.0, 0.0, 1.0, len(apart))
    return Difference(float(apart.mean()), low, high, sign_flip(apart, seed), len(apart))


def sign_flip(apart: np.ndarray, seed: int = 0) -> float:
    """How often flipping the signs of paired differences (n,) at random makes their mean as far from 0; two-sided.

    What scipy.stats.permutation_test(permutation_type="samples") does, by a matrix product: a sixth of its time.
    """
    rng, count, total = np.random.default_rng(seed), len(apart), apart.sum()
    rows, width = max(1, AT_ONCE // count), -(-count // 8)
    as_far, done = 0, 0
    while done < FLIPS:
        size = min(rows, FLIPS - done)
        bits = np.frombuffer(rng.bytes(size * width), np.uint8).reshape(size, width)
        flipped = np.unpackbits(bits, axis=1, count=count).astype(float) @ apart  # the sum of those that are flipped
        as_far += int((np.abs(total - 2 * flipped) >= abs(total) * (1 - 1e-12)).sum())
        done += size
    return (1 + as_far) / (1 + FLIPS)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests made at once, adjusted by Holm's method; an adjusted one below 0.05 holds for all.

    Holm 1979, https://www.jstor.org/stable/4615733
    """
    order, adjusted, least = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted


def area_bin(share: float) -> str:
    """The bin of a hole by its share of the picture: "0-10", ..., "50-60", ">60" %. Upper ends belong to their bin."""
    if not 0 <= share <= 1:
        raise ValueError(f"a share of missing pixels lies in [0, 1], got {share}")
    for low, high in pairwise(BINS):
        if share <= high:
            return ">60" if high == 1 else f"{round(100 * low)}-{round(100 * high)}"
    raise AssertionError("unreachable")


AREA_BINS = tuple(area_bin(high) for high in BINS[1:])


def _bootstrap(values: np.ndarray, seed: int) -> tuple[float, float]:
    if len(values) < 2:
        return float("nan"), float("nan")
    if not np.ptp(values):
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=200,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
