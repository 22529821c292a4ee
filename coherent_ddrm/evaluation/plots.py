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


def quality_against_cost(pooled: Sequence[Row], name: str, title: str) -> str:
    """A score's mean over all pictures and holes by evaluations per picture, with its interval; SVG.

    Methods without a network stand at the left end; what another program made is left out, nobody counted there.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    for i, row in enumerate(pooled):
        value = row["scores"].get(name, {})
        if row["nfe"] is None or not value.get("count"):
            continue
        spread = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
        style = dict(color=f"C{i % 10}", marker=MARKERS[i % len(MARKERS)], capsize=3, linestyle="none")
        axes.errorbar(max(row["nfe"], 0.5), value["mean"], spread, label=row["method"], **style)
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
