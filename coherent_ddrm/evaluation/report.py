"""The report: one HTML file that needs no network, with results.json, results.md and scores.csv beside it."""

from __future__ import annotations

import base64
import io
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from coherent_ddrm import __version__
from coherent_ddrm.evaluation import plots, tables
from coherent_ddrm.evaluation.gallery import Gallery
from coherent_ddrm.evaluation.scores import TRUTH
from coherent_ddrm.export import write_atomic
from coherent_ddrm.images import read_image
from coherent_ddrm.metrics import describe
from coherent_ddrm.sheets import contact_sheet

Row = Mapping[str, Any]
ARROW = {"higher": "↑", "lower": "↓", "one": "→ 1", "truth": "→ truth", "none": ""}
HEADLINES = ("lpips_alex_hole", "pd-clothing_hole", "psnr_hole", "ssim_hole")  # plotted and tested
PACKAGES = ("torch", "torchmetrics", "lpips", "torch-fidelity", "diffusers", "scikit-image", "opencv-python-headless")
IN_MARKDOWN = ("l1_hole", "seam", "sharpness", "edge_f1", "surround_agreement", "mirror_agreement", "changed")
CELL, EACH = 128, 4  # largest side of a picture on a sheet; how many best, median and worst ones


def write_report(
    gallery: Gallery,
    rows: Sequence[Row],
    sets: Mapping[tuple[str, str], Mapping[str, float]],
    reference: str,
    facts: Mapping[str, Any],
    notes: Sequence[str],
    published: Mapping[str, Any] | None = None,
) -> Path:
    """Write all files of a report into the gallery's folder; the HTML file's path.

    Args:
        rows: scores per result (scores.py).
        sets: (method, kind of hole) -> scores of the whole set.
        reference: the method that the others are tested against.
        facts: what was run: command, networks, device.
        notes: what was left out or is to be read with care.
        published: a protocol's title, text, and rows of what papers report (asked.told).
    """
    results_of = [row for row in rows if row["method"] != TRUTH]
    summary = tables.summaries(rows)
    for row in summary:
        row["sets"] = dict(sets.get((row["method"], row["mask"]), {}))
    names = tables.metric_names(results_of)
    chosen = [name for name in HEADLINES if name in names]
    bins = tables.bins(results_of)
    tests = tables.differences(results_of, reference, chosen)
    on_sets = list(dict.fromkeys(name for row in summary for name in row["sets"]))
    results = {
        "facts": {**facts, **surroundings()},
        "setting": {**vars(gallery.setting), "pictures": len(gallery.keys)},
        "notes": list(notes),
        "summary": summary,
        "areas": bins,
        "differences": tests,
        "published": published,
    }
    folder = gallery.folder
    tables.write_csv(folder / "scores.csv", results_of)
    write_atomic(folder / "results.json", json.dumps(_plain(results), indent=1).encode() + b"\n")
    titles = {name: title(name) for name in [*names, *on_sets]}
    more = [name for name in IN_MARKDOWN if name in names and any(tables.mean_of(row, name) for row in summary)]
    columns = [*chosen, *more, *(name for name in on_sets if "_spread" not in name)]
    write_atomic(folder / "results.md", tables.markdown(summary, columns, titles).encode())
    page = _template().render(
        results=results,
        names=names,
        on_sets=on_sets,
        titles=titles,
        meanings={name: describe(name) for name in [*names, *on_sets]},
        beside=tables.beside_papers(summary, published["rows"]) if published else [],
        best=best_values(summary, [*names, *on_sets]),
        masks=list(dict.fromkeys(row["mask"] for row in summary)),
        plots=draw_plots(folder / "plots", tables.pooled(results_of), bins, chosen, titles),
        sheets=draw_sheets(gallery, results_of, chosen[0] if chosen else "psnr_hole"),
        sorted_by=titles.get(chosen[0]) if chosen else title("psnr_hole"),
        reference=reference,
    )
    write_atomic(folder / "report.html", page.encode())
    return folder / "report.html"


def title(name: str) -> str:
    """A score's name with the way that is better: "psnr, hole ↑"."""
    base = name.removesuffix("_hole")
    return f"{base.replace('_', ' ')}{', hole' if base != name else ''} {ARROW[describe(name).better]}".strip()


def best_values(summary: Sequence[Row], names: Sequence[str]) -> dict[tuple[str, str], float]:
    """(kind of hole, score) -> the best mean there."""
    best = {}
    for mask in {row["mask"] for row in summary}:
        for name in names:
            values = {row["method"]: tables.mean_of(row, name) for row in summary if row["mask"] == mask}
            aim, better = values.pop(TRUTH, None), describe(name).better
            found = [value for value in values.values() if value is not None and np.isfinite(value)]
            if not found or better == "none" or (better == "truth" and aim is None):
                continue
            far = {"higher": lambda v: -v, "lower": lambda v: v, "one": lambda v: abs(v - 1)}
            best[mask, name] = min(found, key=far.get(better, lambda v, aim=aim: abs(v - aim)))
    return best


def draw_plots(
    folder: Path, pooled: Sequence[Row], bins: Sequence[Row], names: Sequence[str], titles: Mapping[str, str]
) -> list[dict[str, str]]:
    """Write each as SVG; title and data: URI of each."""
    made = []
    folder.mkdir(exist_ok=True)
    for name in names:
        for what, file, draw, of in (
            ("against network evaluations", "cost", plots.quality_against_cost, pooled),
            ("against the missing share", "area", plots.quality_against_area, bins),
        ):
            drawn = draw(of, name, titles[name]).encode()
            write_atomic(folder / f"{name}-{file}.svg", drawn)
            data = base64.b64encode(drawn).decode()
            made.append({"title": f"{titles[name]} {what}", "uri": f"data:image/svg+xml;base64,{data}"})
    return made


def draw_sheets(gallery: Gallery, rows: Sequence[Row], by: str) -> list[dict[str, str]]:
    """The same pictures by all methods per kind of hole; then each method's best, median and worst ones."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    made = []
    for kind in gallery.kinds:
        keys = [gallery.keys[i] for i in np.linspace(0, len(gallery.keys) - 1, min(10, len(gallery.keys))).astype(int)]
        lines = [[gallery.given(kind, key) for key in keys]]
        lines += [[read_image(gallery.result(method, kind, key)) for key in keys] for method in methods]
        lines.append([gallery.truth(key) for key in keys])
        labels = ["given", *methods, "truth"]
        made.append({"title": f"{kind}: every method on the same pictures", "uri": _sheet(lines, [], labels)})
    for method in methods:
        own = [row for row in rows if row["method"] == method and row["candidate"] == 0 and row.get(by) is not None]
        sign = -1 if describe(by).better == "higher" else 1
        order = sorted(own, key=lambda row: sign * row[by])
        middle = max(0, (len(order) - EACH) // 2)
        groups = [("best", order[:EACH]), ("median", order[middle : middle + EACH]), ("worst", order[-EACH:])]
        lines = [[part for row in group for part in _triple(gallery, row)] for _, group in groups]
        titles, labels = ["given", "result", "truth"] * EACH, [name for name, _ in groups]
        made.append({"title": method, "uri": _sheet(lines, titles, labels)})
    return made


def surroundings() -> dict[str, Any]:
    """Versions and machine."""
    versions = {"coherent-ddrm": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"versions": versions, "machine": platform.machine(), "date": now}


# -- parts -------------------------------------------------------------------------------------------------------------


def _triple(gallery: Gallery, row: Row) -> list[np.ndarray]:
    result = gallery.result(row["method"], row["mask"], row["key"])
    return [gallery.given(row["mask"], row["key"]), read_image(result), gallery.truth(row["key"])]


def _sheet(lines: Sequence[Sequence[np.ndarray]], titles: Sequence[str], labels: Sequence[str]) -> str:
    """A contact sheet as a data: URI, without loss: as PNG or WebP, whichever is smaller."""
    sheet = Image.fromarray(contact_sheet(lines, titles, min(CELL, lines[0][0].shape[0]), labels))
    png, webp = io.BytesIO(), io.BytesIO()
    sheet.save(png, format="PNG", optimize=True)
    sheet.save(webp, format="WEBP", lossless=True)
    kind, stream = ("png", png) if png.tell() <= webp.tell() else ("webp", webp)
    return f"data:image/{kind};base64," + base64.b64encode(stream.getvalue()).decode()


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("coherent_ddrm.evaluation", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["number"] = _number
    environment.globals["mean_of"] = tables.mean_of
    return environment.get_template("report.html")


def _number(value: float | None, digits: int = 3) -> str:
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:.{2 if abs(value) >= 5 and digits == 3 else digits}f}"


def _plain(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
