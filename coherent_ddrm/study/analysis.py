"""From answers to results: who counts, who is preferred how often, scores, agreement.

Intervals come in two kinds, both 95 %. Wilson's takes all answers as independent. The bootstrap draws raters with
replacement, so it also holds for raters who differ; neither speaks for other pictures than those shown.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from coherent_ddrm.errors import UserError
from coherent_ddrm.study.answers import FILE, Answer, Answers
from coherent_ddrm.study.questions import Study, load
from coherent_ddrm.study.statistics import (
    bradley_terry,
    guesser_passes,
    interval,
    krippendorff,
    resampled,
    wilson,
)

LUCK = 0.05  # a guesser should pass the catch trials no more often than this
BOOTSTRAPS = 2000
HASTE = 400  # milliseconds: nobody compares two pictures in less


@dataclass(frozen=True)
class Vote:
    """One comparison of two methods: who won on which picture, and where the winner stood."""

    rater: int
    picture: int
    winner: int
    loser: int
    left: bool


@dataclass
class Ballot:
    """All that one rater answered."""

    number: int  # 1, 2, ... in the order they came
    votes: list[Vote]
    caught: list[bool]  # catch trials in turn: True = failed
    milliseconds: list[int]
    left: int  # answers that chose the left picture


@dataclass(frozen=True)
class Rule:
    """Who counts, by the catch trials that they met: those of a rater who left early are fewer than `catches`."""

    catches: int  # on a whole sheet
    allow_wrong: int | None = None  # forgiven on a whole sheet, and as large a part of those met; None: by LUCK
    include_untested: bool = False  # those who left before a catch trial

    def allowed(self, met: int) -> int:
        """How many failed ones of `met` are forgiven: as many as leave a guesser at most LUCK, and none at the least,
        unless allow_wrong says it."""
        if self.allow_wrong is not None:
            return self.allow_wrong * met // max(1, self.catches)
        return max((wrong for wrong in range(met) if guesser_passes(met, wrong) <= LUCK), default=0)

    def keeps(self, one: Ballot) -> bool:
        """Whether a rater counts."""
        if not one.caught:
            return self.include_untested or not self.catches
        return sum(one.caught) <= self.allowed(len(one.caught))

    def guesser(self, met: int) -> float:
        """How likely one who guesses counts, with that many met."""
        return guesser_passes(met, self.allowed(met))


def analyse(folder: Path, allow_wrong: int | None = None, include_untested: bool = False) -> dict[str, Any]:
    """Everything about a study, ready for JSON. UserError when there are no answers to analyse.

    allow_wrong: failed catch trials forgiven, of a whole sheet's. include_untested: also who left before a catch trial.
    """
    study = load(folder)
    if not (folder / FILE).is_file():
        raise UserError(f"{folder}: nobody has answered yet")
    ballots = [
        ballot(study, number, answers) for number, answers in enumerate(Answers(folder).all().values(), 1) if answers
    ]
    if not any(one.votes for one in ballots):
        raise UserError(f"{folder}: nobody has answered yet")
    rule = Rule(study.catches, allow_wrong, include_untested)
    if not any(one.votes for one in ballots if rule.keeps(one)):
        raise UserError(
            f"{folder}: every rater failed the catch trials or left before one; look at them with --allow-wrong N "
            "and --include-untested"
        )
    return summarise(study, ballots, rule)


def ballot(study: Study, number: int, answers: list[Answer]) -> Ballot:
    """Answers read with the key of the study. UserError for a picture that is not in it."""
    maker = {name: (i, method) for i, p in enumerate(study.pictures) for method, name in enumerate(p.results)}
    good = {picture.catch.truth for picture in study.pictures if picture.catch}
    bad = {picture.catch.broken for picture in study.pictures if picture.catch}
    votes, caught = [], []
    for answer in answers:
        shown, chosen = {answer.left, answer.right}, answer.chosen
        (other,) = shown - {chosen}
        if shown & good and shown & bad:
            caught.append(chosen in bad)
        elif chosen in maker and other in maker and maker[chosen][0] == maker[other][0]:
            picture, winner = maker[chosen]
            votes.append(Vote(number, picture, winner, maker[other][1], answer.choice == "left"))
        else:
            raise UserError(f"rater {number}: answer {answer.position + 1} is to pictures that are not in this study")
    times = [answer.milliseconds for answer in answers]
    return Ballot(number, votes, caught, times, sum(answer.choice == "left" for answer in answers))


def summarise(study: Study, ballots: list[Ballot], rule: Rule) -> dict[str, Any]:
    """The results of the raters that the rule keeps, and the list of all."""
    methods, kept = len(study.methods), [one for one in ballots if rule.keeps(one)]
    wins = np.zeros((len(kept), methods, methods))
    for i, one in enumerate(kept):
        for vote in one.votes:
            wins[i, vote.winner, vote.loser] += 1
    total, drawn = wins.sum(0), resampled(len(kept), BOOTSTRAPS)
    samples = np.einsum("br,rij->bij", drawn, wins)
    scores = bradley_terry(total)
    votes = [vote for one in kept for vote in one.votes]
    return {
        "study": {
            "title": study.title,
            "prompt": study.prompt,
            "pictures": len(study.pictures),
            "questions": study.questions,
            "catch_trials": study.catches,
            "seed": study.seed,
        },
        "answers": {
            "raters": len(ballots),
            "raters_kept": len(kept),
            "comparisons": len(votes),
            "median_seconds": median(ms for one in kept for ms in one.milliseconds) / 1000,
            "chose_left": _share(sum(vote.left for vote in votes), len(votes)),
        },
        "methods": _methods(study.methods, total, samples, scores),
        "pairs": _pairs(study, total, samples, scores),
        "agreement": agreement(votes),
        "raters": [_rater(one, rule, scores) for one in ballots],
        "rule": _rule(rule, kept),
    }


def _methods(names: list[str], wins: np.ndarray, samples: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
    """Each method, best first: how often it was preferred, its score, how sure it is the best."""
    spread = bradley_terry(samples)
    low, high = interval(spread)
    best = np.bincount(spread.argmax(-1), minlength=len(names)) / len(spread)
    won, asked = wins.sum(1), wins.sum(1) + wins.sum(0)
    rates = _rates(samples.sum(2), samples.sum(1))
    found = [
        {
            "method": names[m],
            **_share(won[m], asked[m], rates[:, m]),
            "score": float(scores[m]),
            "score_interval": [float(low[m]), float(high[m])],
            "best": float(best[m]),
        }
        for m in range(len(names))
    ]
    return sorted(found, key=lambda row: -row["score"])


def _pairs(study: Study, wins: np.ndarray, samples: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
    """Each pair, the method of the higher score first, and what the scores alone would say of it."""
    found = []
    for a, b in study.pairs:
        a, b = (a, b) if scores[a] >= scores[b] else (b, a)
        rates = _rates(samples[:, a, b], samples[:, b, a])
        found.append(
            {
                "method": study.methods[a],
                "over": study.methods[b],
                **_share(wins[a, b], wins[a, b] + wins[b, a], rates),
                "by_scores": float(1 / (1 + np.exp(scores[b] - scores[a]))),
            }
        )
    return sorted(found, key=lambda row: -row["rate"] if row["rate"] is not None else 1.0)


def _rates(won: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """won / (won + lost), NaN where nothing was asked."""
    asked = won + lost
    return np.where(asked > 0, won / np.maximum(asked, 1), np.nan)


def _share(won: float, asked: float, samples: np.ndarray | None = None) -> dict[str, Any]:
    found = {
        "won": int(won),
        "asked": int(asked),
        "rate": float(won / asked) if asked else None,
        "wilson": list(wilson(won, asked)),
    }
    if samples is not None and asked:
        found["bootstrap"] = [float(edge) for edge in interval(samples)]
    return found


def agreement(votes: list[Vote]) -> dict[str, Any]:
    """How far raters agree on the same comparison (picture and pair of methods).

    Which method of a pair is called the first is arbitrary, so every comparison counts under both namings: then chance
    is 1/2 whatever the order of the methods.
    """
    units: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for vote in votes:
        low, high = sorted((vote.winner, vote.loser))
        units[vote.picture, low, high].append(int(vote.winner == low))
    repeated = [unit for unit in units.values() if len(unit) > 1]
    together = sum(sum(unit) * (sum(unit) - 1) + unit.count(0) * (unit.count(0) - 1) for unit in repeated)
    possible = sum(len(unit) * (len(unit) - 1) for unit in repeated)
    alpha = _alpha(repeated)
    rng, samples = np.random.default_rng(0), []
    for _ in range(200 if repeated else 0):
        samples.append(_alpha([repeated[i] for i in rng.integers(len(repeated), size=len(repeated))]))
    return {
        "comparisons_repeated": len(repeated),
        "raters_agree": together / possible if possible else None,
        "alpha": alpha if repeated else None,
        "alpha_interval": [float(edge) for edge in interval(np.array(samples))] if repeated else None,
    }


def _alpha(units: list[list[int]]) -> float:
    return krippendorff([*units, *([1 - choice for choice in unit] for unit in units)])


def _rater(one: Ballot, rule: Rule, scores: np.ndarray) -> dict[str, Any]:
    """A line about a rater, and what about them deserves a look."""
    answers, kept = len(one.milliseconds), rule.keeps(one)
    with_scores = sum(bool(scores[vote.winner] > scores[vote.loser]) for vote in one.votes)
    hasty = sum(ms < HASTE for ms in one.milliseconds) / answers
    untested = bool(rule.catches) and not one.caught
    notes = ["excluded: failed the catch trials"] if not kept and not untested else []
    notes += [f"{'included' if kept else 'left out'}: left before a catch trial"] if untested else []
    notes += ["one side only"] if answers >= 8 and one.left in (0, answers) else []
    notes += [f"{hasty:.0%} of answers in under {HASTE} ms"] if hasty > 0.2 else []
    return {
        "rater": one.number,
        "kept": kept,
        "answers": answers,
        "catch_trials": len(one.caught),
        "catch_failed": sum(one.caught),
        "with_scores": with_scores / len(one.votes) if one.votes else None,
        "chose_left": one.left / answers,
        "median_seconds": median(one.milliseconds) / 1000,
        "notes": notes,
    }


def _rule(rule: Rule, kept: list[Ballot]) -> dict[str, Any]:
    """The rule of exclusion for one who answered all, and how far it holds for those kept who met fewer."""
    fewer = [len(one.caught) for one in kept if len(one.caught) < rule.catches]
    return {
        "catch_trials": rule.catches,
        "allowed": rule.allowed(rule.catches),
        "guesser": rule.guesser(rule.catches),
        "kept_with_fewer": len(fewer),
        "guesser_with_fewer": max(map(rule.guesser, fewer), default=None),
        "include_untested": rule.include_untested,
    }
