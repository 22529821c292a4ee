"""The report's plots, as SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from coherent_ddrm.evaluation.statistics import AREA_BINS

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "coherent-ddrm"  # the same picture, the same bytes

Row = Mapping[str, Any]
MARKERS = "osD^vPX*<>ph"


def quality_against_cost(summary: Sequence[Row], name: str, title: str) -> str:
    """A score's mean over all holes by evaluations per picture, both ends of its interval drawn; SVG."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    for i, method in enumerate(_methods(summary)):
        own = [row for row in summary if row["method"] == method and row["scores"].get(name, {}).get("count")]
        if not own:
            continue
        mean, low, high = (sum(row["scores"][name][end] for row in own) / len(own) for end in ("mean", "low", "high"))
        x = max(own[0]["nfe"] or 0, 0.5)  # those without a network stand at the left end
        style = dict(color=f"C{i % 10}", marker=MARKERS[i % len(MARKERS)], capsize=3, linestyle="none")
        axes.errorbar(x, mean, [[mean - low], [high - mean]], label=method, **style)
    axes.set_xscale("log")
    axes.set_xlabel("network evaluations per picture (no network: left end)")
    axes.set_ylabel(title)
    return _svg(figure)


def quality_against_area(bins: Sequence[Row], name: str, title: str) -> str:
    """A score's mean by the share of missing pixels; SVG."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    for i, method in enumerate(_methods(bins)):
        values = {row["area"]: row["scores"].get(name) for row in bins if row["method"] == method}
        points = [(j, values[area]) for j, area in enumerate(AREA_BINS) if values.get(area) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=f"C{i % 10}", marker=MARKERS[i % len(MARKERS)], label=method)
    axes.set_xticks(range(len(AREA_BINS)), AREA_BINS)
    axes.set_xlabel("share of missing pixels, %")
    axes.set_ylabel(title)
    return _svg(figure)


def _methods(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _svg(figure: Any) -> str:
    from matplotlib import pyplot

    axes = figure.axes[0]
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return stream.getvalue()
