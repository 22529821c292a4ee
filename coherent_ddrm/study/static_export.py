"""The study as a folder of files: index.html opens without a server, answers are kept by the browser and downloaded.

The page holds a number of finished sheets; a rater gets one at random, or the one of the link (index.html#sheet=7).
Neither the names of the methods nor which questions are catch trials is in it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from coherent_ddrm.study.new_folder import new_folder
from coherent_ddrm.study.page import ASSETS, asset, render
from coherent_ddrm.study.questions import PICTURES, load, sheet

INDEX = "index.html"


def export(folder: Path, out: Path, sheets: int = 100) -> int:
    """Write the page to `out`, new or empty; returns how many pictures it shows. UserError otherwise."""
    study = load(folder)
    lists = [[question.public() for question in sheet(study, rater)] for rater in range(sheets)]
    shown = sorted({name for questions in lists for question in questions for name in question.values()})
    with new_folder(out) as temporary:
        (temporary / PICTURES).mkdir()
        for name in shown:
            shutil.copyfile(folder / PICTURES / f"{name}.png", temporary / PICTURES / f"{name}.png")
        for name in ASSETS:
            (temporary / name).write_bytes(asset(name))
        (temporary / INDEX).write_bytes(render(study, mode="file", sheets=lists))
    return len(shown)
