"""The results as a page of Markdown that explains itself, and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coherent_ddrm.export import write_atomic

MARKDOWN, JSON = "results.md", "results.json"
FEW = 10  # raters, below which resampling them says little


def write(results: dict[str, Any], out: Path) -> list[Path]:
    """Write both files; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / JSON, json.dumps(results, indent=1, allow_nan=False).encode() + b"\n")
    write_atomic(out / MARKDOWN, markdown(results).encode())
    return [out / MARKDOWN, out / JSON]


def markdown(results: dict[str, Any]) -> str:
    """All results."""
    study = results["study"]
    parts = [
        f"# {_cell(study['title'])}",
        f"Asked, of two results side by side: *{_cell(study['prompt'])}* {_counts(results)}",
        "## Scores",
        methods_table(results),
        "Preferred: of all comparisons the method took part in. Score: Bradley-Terry, in log odds with mean 0; a "
        "method beats another with probability 1 / (1 + exp(-difference)), so a difference of 1 means 73 %. Best: in "
        "how many of the bootstrap samples the method scored highest. Half a win is added to both sides of each pair.",
        "## Pairs",
        pairs_table(results),
        "Wilson: 95 % interval as if all answers were independent. Bootstrap: 95 % over raters drawn with replacement. "
        "By scores: the rate that the scores alone give; far from the rate, the methods do not lie on one scale.",
        "## Agreement",
        _agreement(results["agreement"]),
        "## Raters",
        _rule(results),
        raters_table(results),
    ]
    if results["answers"]["raters_kept"] < FEW:
        parts.insert(2, f"**Fewer than {FEW} raters: intervals over raters are too narrow to be trusted.**")
    return "\n\n".join(parts) + "\n"


def methods_table(results: dict[str, Any]) -> str:
    """Methods, best first."""
    rows = [
        (
            _cell(row["method"]),
            f"{row['won']} of {row['asked']}",
            _percent(row["rate"]),
            _range(row.get("bootstrap", row["wilson"])),
            f"{row['score']:+.2f}",
            f"{row['score_interval'][0]:+.2f} to {row['score_interval'][1]:+.2f}",
            _percent(row["best"]),
        )
        for row in results["methods"]
    ]
    return _table(["method", "won", "preferred", "95 %", "score", "95 %", "best"], rows)


def pairs_table(results: dict[str, Any]) -> str:
    """Pairs, the clearest first."""
    rows = [
        (
            f"{_cell(row['method'])} over {_cell(row['over'])}",
            f"{row['won']} of {row['asked']}",
            _percent(row["rate"]),
            _range(row["wilson"]),
            _range(row["bootstrap"]) if "bootstrap" in row else "",
            _percent(row["by_scores"]),
        )
        for row in results["pairs"]
    ]
    return _table(["pair", "won", "preferred", "Wilson", "bootstrap", "by scores"], rows)


def raters_table(results: dict[str, Any]) -> str:
    """Raters in the order they came."""
    rows = [
        (
            str(row["rater"]),
            str(row["answers"]),
            f"{row['catch_failed']} of {row['catch_trials']}",
            _percent(row["with_scores"]),
            _percent(row["chose_left"]),
            f"{row['median_seconds']:.1f}",
            "; ".join(row["notes"]),
        )
        for row in results["raters"]
    ]
    return _table(["rater", "answers", "catch failed", "with scores", "chose left", "median s", ""], rows)


def _counts(results: dict[str, Any]) -> str:
    study, answers = results["study"], results["answers"]
    low, high = answers["chose_left"]["wilson"]
    return (
        f"{answers['comparisons']} comparisons on {study['pictures']} pictures by {answers['raters_kept']} raters "
        f"({answers['raters']} took part), {answers['median_seconds']:.1f} s for the median answer. The left picture "
        f"was chosen in {_percent(answers['chose_left']['rate'])} ({_range([low, high])}); sides are balanced."
    )


def _agreement(found: dict[str, Any]) -> str:
    if not found["comparisons_repeated"]:
        return "No comparison was made by two raters, so agreement cannot be told."
    low, high = found["alpha_interval"]
    return (
        f"{found['comparisons_repeated']} comparisons (picture and pair) were made by two raters or more. Two raters "
        f"agree in {_percent(found['raters_agree'])} (a coin: 50 %). Krippendorff's alpha {found['alpha']:.2f} "
        f"({low:.2f} to {high:.2f}): 1 is full agreement, 0 is chance. Low values are no fault where two results are "
        "equally good."
    )


def _rule(results: dict[str, Any]) -> str:
    rule, out = results["rule"], [row for row in results["raters"] if not row["kept"]]
    if not rule["catch_trials"]:
        return "There were no catch trials, so nobody was excluded."
    failed, untested = ([str(row["rater"]) for row in out if bool(row["catch_trials"]) == met] for met in (True, False))
    names = f"Excluded: {', '.join(failed)}." if failed else "Nobody was excluded."
    names += f" Left out, as they left before a catch trial: {', '.join(untested)}." if untested else ""
    if rule["kept_with_fewer"]:
        names += (
            f" {rule['kept_with_fewer']} of those who count left before the last catch trial; of them one who guesses "
            f"passes with probability up to {_percent(rule['guesser_with_fewer'])}."
        )
    allowed = f"at most {rule['allowed']}" if rule["allowed"] else "none"
    return (
        f"Catch trials show the truth against a hole of noise. Of {rule['catch_trials']}, {allowed} "
        f"may be failed; one who guesses passes with probability {_percent(rule['guesser'])}. {names} With scores: how "
        "often the rater chose the method of the higher score."
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _range(edges: list[float]) -> str:
    return f"{100 * edges[0]:.1f} to {100 * edges[1]:.1f} %"


def _cell(text: str) -> str:
    """Text of the study's maker that must not break a table."""
    for letter in "\\|`*_<>[]":
        text = text.replace(letter, f"\\{letter}")
    return text


def _table(head: list[str], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
