"""The statistics of forced choices: Wilson's interval, Bradley-Terry scores, Krippendorff's alpha."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb, sqrt

import numpy as np

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal
PRIOR = 0.5  # wins added to each side of every pair


def wilson(wins: float, trials: float, z: float = Z95) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927), taking the trials as independent. (0, 1) for no trials."""
    if trials == 0:
        return 0.0, 1.0
    rate, extra = wins / trials, z * z / trials
    centre = (rate + extra / 2) / (1 + extra)
    half = z * sqrt(rate * (1 - rate) / trials + extra / (4 * trials)) / (1 + extra)
    return max(0.0, centre - half), min(1.0, centre + half)


def guesser_passes(trials: int, wrong: int) -> float:
    """How likely a coin makes at most `wrong` mistakes in `trials` catch trials."""
    return sum(comb(trials, k) for k in range(min(trials, wrong) + 1)) / 2**trials


def bradley_terry(wins: np.ndarray, prior: float = PRIOR, steps: int = 100) -> np.ndarray:
    """Scores s with P(i beats j) = sigmoid(s_i - s_j), mean 0, at the maximum of the likelihood.

    `wins` is (..., M, M), how often row beat column; scores are (..., M). `prior` wins are added to both sides of
    every pair. Half a win is the usual correction of a log odds (for two methods the score difference is
    log((a + 1/2) / (b + 1/2))) and keeps the score of a method that never won finite. Newton's steps, cut at 2.
    """
    methods = wins.shape[-1]
    wins = wins + prior * (1 - np.eye(methods))
    trials = wins + np.swapaxes(wins, -1, -2)
    scores = np.zeros(wins.shape[:-1])
    for _ in range(steps):
        chance = 1 / (1 + np.exp(scores[..., None, :] - scores[..., :, None]))  # row beats column
        gradient = (wins - trials * chance).sum(-1)
        weight = trials * chance * (1 - chance)
        curvature = weight.sum(-1)[..., None] * np.eye(methods) - weight + 1 / methods  # the last term fixes the mean
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        step /= np.maximum(1, np.abs(step).max(-1, keepdims=True) / 2)
        scores = scores + step
        if np.abs(step).max() < 1e-10:
            break
    return scores - scores.mean(-1, keepdims=True)


def resampled(count: int, times: int, seed: int = 0) -> np.ndarray:
    """(times, count): how often each of `count` raters is drawn in each of `times` bootstrap samples of them."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=times)


def interval(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The middle 95 % along the first axis, NaN left out."""
    low, high = np.nanpercentile(samples, (2.5, 97.5), axis=0)
    return low, high


def krippendorff(units: Sequence[Sequence[Hashable]]) -> float:
    """Krippendorff's alpha for categories: 1 is full agreement, 0 is what chance gives. NaN if nothing is comparable.

    Each unit holds the categories that its raters chose; units with less than two count for nothing.
    """
    units = [unit for unit in units if len(unit) > 1]
    total = sum(map(len, units))
    observed, pooled = 0.0, Counter()
    for unit in units:
        counts = Counter(unit)
        pooled += counts
        observed += (len(unit) ** 2 - sum(n * n for n in counts.values())) / (len(unit) - 1)
    expected = (total**2 - sum(n * n for n in pooled.values())) / (total - 1) if total > 1 else 0.0
    return 1 - observed / expected if expected else float("nan")
