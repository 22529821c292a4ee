"""Draw the loss and validation curves of runs: python train/curve.py RUN [RUN ...] -o curve.png"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read_log(run: Path) -> list[dict]:
    """Rows of log.jsonl; of steps run twice after a kill, the last; a line cut by a kill is left out."""
    rows = {}
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["step"], "loss" in row] = row
    return [rows[key] for key in sorted(rows)]


def draw(run: Path, axis: plt.Axes) -> None:
    """Training loss on the left scale, each validation score on the right, over steps."""
    rows = read_log(run)
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    axis.plot(*zip(*losses, strict=True), color="0.7", label="training loss")
    axis.set(title=run.name, xlabel="step", ylabel="loss", yscale="log")
    names = sorted({name for row in rows for name in row if name.startswith("val_")})
    right = axis.twinx()
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        target = axis if name == "val_loss" else right
        target.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    lines = axis.get_legend_handles_labels(), right.get_legend_handles_labels()
    axis.legend(lines[0][0] + lines[1][0], lines[0][1] + lines[1][1], fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    figure, axes = plt.subplots(1, len(options.runs), figsize=(5 * len(options.runs), 3.2), squeeze=False)
    for run, axis in zip(options.runs, axes[0], strict=True):
        draw(run, axis)
    figure.tight_layout()
    figure.savefig(options.output, dpi=90)


if __name__ == "__main__":
    main()
