"""From rows of scores to what a report says: means with intervals, bins of area, differences between methods."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coherent_ddrm.evaluation.published import PERCENT
from coherent_ddrm.evaluation.scores import COSTS, FACTS, TRUTH
from coherent_ddrm.evaluation.statistics import AREA_BINS, difference, holm, interval
from coherent_ddrm.export import write_atomic

Row = Mapping[str, Any]


def metric_names(rows: Sequence[Row]) -> list[str]:
    """Scores that some row has, in the order of the rows."""
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name not in FACTS]


def summaries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per method and kind of hole: every score's mean and interval over pictures, cost per result."""
    found = []
    for (method, mask), group in _groups(rows, "method", "mask"):
        scores = {name: interval(_per_picture(group, name))._asdict() for name in metric_names(group)}
        costs = {name: _mean([row[name] for row in group]) for name in COSTS}
        pictures = len({row["key"] for row in group})
        found.append(dict(method=method, mask=mask, pictures=pictures, scores=scores, **costs))
    return found


def pooled(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per method, over all kinds of holes: every score's mean and interval over pictures, evaluations per result."""
    found = []
    for (method,), group in _groups(rows, "method"):
        scores = {name: interval(_per_picture(group, name))._asdict() for name in metric_names(group)}
        found.append(dict(method=method, scores=scores, nfe=_mean([row["nfe"] for row in group])))
    return found


def bins(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Per method and bin of the missing share, over all kinds of holes: mean scores and how many results."""
    found = []
    for (method, area), group in _groups(rows, "method", "area"):
        scores = {name: _mean([row.get(name) for row in group]) for name in metric_names(group)}
        found.append(dict(method=method, area=area, results=len(group), scores=scores))
    order = list(dict.fromkeys(row["method"] for row in found))  # and so each method's colour in all plots
    return sorted(found, key=lambda row: (order.index(row["method"]), AREA_BINS.index(row["area"])))


def differences(rows: Sequence[Row], reference: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Each method against the `reference`, on the same pictures and holes; p adjusted over all of one score's tests."""
    found = []
    for name in names:
        tests = []
        by_mask: dict[str, dict[str, Sequence[Row]]] = {}
        for (method, mask), group in _groups(rows, "method", "mask"):
            by_mask.setdefault(mask, {})[method] = group
        for mask, groups in by_mask.items():
            if reference not in groups:
                continue
            ours = _per_picture(groups[reference], name)
            for method, group in groups.items():
                if method != reference:
                    test = difference(_per_picture(group, name), ours)._asdict()
                    tests.append(dict(score=name, mask=mask, method=method, against=reference, **test))
        for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
            test["p_adjusted"] = p
        found += tests
    return found


def beside_papers(summary: Sequence[Row], published: Sequence[Row]) -> list[dict[str, Any]]:
    """Per kind of hole that papers report: their scores, a row of each method measured here, then the papers' rows."""
    found = []
    for (mask,), theirs in _groups(published, "mask"):
        names = list(dict.fromkeys(row["metric"] for row in theirs))
        rows = []
        for row in summary:
            if row["mask"] == mask and row["method"] != TRUTH:
                values = {name: _value(row, name) for name in names}
                rows.append({"method": row["method"], "values": values, "pictures": "these", "source": "measured here"})
        for (method, data, source, checked), group in _groups(theirs, "method", "data", "source", "checked"):
            values = {row["metric"]: row["printed"] for row in group}
            source += "" if checked else " (unverified)"
            rows.append({"method": method, "values": values, "pictures": data, "source": source})
        found.append({"mask": mask, "names": names, "rows": rows})
    return found


def mean_of(row: Row, name: str) -> float | None:
    """A summary's score, of the whole set or the mean over pictures; None where there is none."""
    return row["sets"].get(name, row["scores"].get(name, {}).get("mean"))


def _value(row: Row, name: str) -> str:
    """A score as papers print it, a dash where there is none."""
    value = mean_of(row, name)
    if value is None or not np.isfinite(value):
        return "–"
    return f"{100 * value:.2f} %" if name in PERCENT else f"{value:.3g}"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """All rows as CSV, the facts first."""
    names = [*FACTS, *dict.fromkeys(name for row in rows for name in row if name not in FACTS)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def markdown(summary: Sequence[Row], names: Sequence[str], titles: Mapping[str, str]) -> str:
    """One table per kind of hole, for a README: mean ± half the width of the interval."""
    parts = []
    for mask in dict.fromkeys(row["mask"] for row in summary):
        own = [row for row in summary if row["mask"] == mask]
        head = ["method", *(titles.get(name, name) for name in names), "nfe", "s / picture"]
        lines = [f"**{mask}**, {own[0]['pictures']} pictures", "", _line(head), _line(["---"] * len(head))]
        for row in own:
            cells = [
                row["method"],
                *(_cell(row["scores"].get(name) or row.get("sets", {}).get(name)) for name in names),
            ]
            lines.append(_line([*cells, _number(row["nfe"], 0), _number(row["seconds"], 3)]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Mapping[str, float] | float | None) -> str:
    if value is None:
        return ""
    if not isinstance(value, Mapping):
        return f"{value:.{2 if abs(value) >= 5 else 4}f}"
    if not value["count"]:
        return ""
    half = (value["high"] - value["low"]) / 2
    digits = 2 if abs(value["mean"]) >= 5 else 3
    return f"{value['mean']:.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _groups(rows: Sequence[Row], *names: str) -> list[tuple[tuple, list[Row]]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(groups.items())


def _per_picture(rows: Sequence[Row], name: str) -> np.ndarray:
    """One value per picture, in the order of their names: candidates of a picture are no independent samples."""
    values: dict[str, list[float]] = {}
    for row in rows:
        value = row.get(name)
        values.setdefault(row["key"], []).append(np.nan if value is None else value)
    return np.array([_mean_or_nan(values[key]) for key in sorted(values)])


def _mean_or_nan(values: Sequence[float]) -> float:
    kept = [value for value in values if np.isfinite(value)]
    return float(np.mean(kept)) if kept else np.nan


def _mean(values: Sequence[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return float(np.mean(kept)) if kept else None
