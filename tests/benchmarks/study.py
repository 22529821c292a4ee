"""A whole user study with scripted raters whose preference is known, and what the analysis makes of it:

    python tests/benchmarks/study.py PICTURES OUT [--browser 8] [--studies 200]

Four methods with known Bradley-Terry scores, 40 raters, 20 questions and 3 catch trials each; 3 of the 40 toss a coin.
The first raters use the page in a real browser, the others its calls over HTTP, eight at a time. Then the same study is
repeated without pages, to see how often its intervals hold.
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from browser import new_page, open_browser
from study_raters import Judge, serving_process

from coherent_ddrm.cli import main as coherent_ddrm
from coherent_ddrm.images import fit, read_image, write_image
from coherent_ddrm.masks import make_hole
from coherent_ddrm.study.analysis import Rule, analyse, ballot, summarise
from coherent_ddrm.study.answers import Answer
from coherent_ddrm.study.questions import Study, load, sheet
from coherent_ddrm.study.report import methods_table, pairs_table, raters_table

TRUE = {"telea": 0.8, "navier-stokes": 0.5, "blur": -0.2, "mean": -1.1}
RATERS, CARELESS = 40, (7, 19, 31)


def prepare(pictures: Path, out: Path, count: int = 24, size: int = 64) -> None:
    """Real photographs, holes of three kinds, and four cheap results of each."""
    for i, path in enumerate(sorted(pictures.iterdir())[:count]):
        truth = fit(read_image(path), size)
        hole = make_hole(("box", "half", "lama-thick")[i % 3], size, size, seed=(1, i))
        mask, average = hole.astype(np.uint8) * 255, truth[~hole].mean(0).astype(np.uint8)
        telea = cv2.inpaint(truth, mask, 3, cv2.INPAINT_TELEA)
        made = {
            "truth": truth,
            "masks": np.repeat(mask[..., None], 3, 2),
            "telea": telea,
            "navier-stokes": cv2.inpaint(truth, mask, 3, cv2.INPAINT_NS),
            "blur": np.where(hole[..., None], cv2.GaussianBlur(telea, (0, 0), 6), truth),
            "mean": np.where(hole[..., None], average, truth),
        }
        for name, picture in made.items():
            (out / name).mkdir(parents=True, exist_ok=True)
            write_image(out / name / f"{path.stem}.png", picture)


def over_http(address: str, token: str, judge: Judge) -> None:
    """One rater, by the calls that the page makes."""
    with httpx.Client(base_url=address, timeout=60, verify=False) as client:
        client.headers["authorization"] = f"Bearer {token}"
        for i, q in enumerate(client.get("api/sheet").json()["questions"]):
            given = {"position": i, "choice": judge.choose(q["left"], q["right"]), "milliseconds": 1500}
            client.post("api/answers", json=given).raise_for_status()


def in_browser(browser: Any, address: str, token: str, judge: Judge, questions: int) -> None:
    """One rater at the page itself, by a personal link, with the arrow keys."""
    with new_page(browser) as visit:
        page = visit.page
        page.goto(f"{address}#rater={token}")
        for _ in range(questions):
            page.wait_for_selector("#ask[aria-busy=false]:not([hidden])")
            shown = [page.get_attribute(f"#{side}-picture", "src")[9:-4] for side in ("left", "right")]
            page.keyboard.press({"left": "ArrowLeft", "right": "ArrowRight"}[judge.choose(*shown)])
        page.wait_for_selector("#end:not([hidden])")
        visit.check()


def ask(study: Study, folder: Path, in_browsers: int) -> None:
    """All raters, eight at a time."""
    scores = tuple(TRUE[name] for name in study.methods)
    judges = [Judge(study, None if i in CARELESS else scores, i) for i in range(RATERS)]
    with serving_process(folder) as address:
        tokens = [httpx.post(f"{address}api/raters", json={}, verify=False).json()["rater"] for _ in judges]
        people = list(zip(tokens, judges, strict=True))  # rater i has sheet i: the same study each time
        begin = time.perf_counter()
        if in_browsers:
            with open_browser() as browser:
                for token, judge in people[:in_browsers]:
                    in_browser(browser, address, token, judge, study.questions + study.catches)
        between = time.perf_counter()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda one: over_http(address, *one), people[in_browsers:]))
        print(f"{in_browsers} raters in the browser: {between - begin:.0f} s", end="; ")
        print(f"{RATERS - in_browsers} over HTTP, eight at a time: {time.perf_counter() - between:.0f} s\n")


def calibration(study: Study, studies: int) -> None:
    """The same study many times without pages: how often the 95 % intervals hold, and how often coins are caught."""
    true = np.array([TRUE[name] for name in study.methods])
    true -= true.mean()
    inside, errors, caught = [], [], []
    for repeat in range(studies):
        judges = [
            Judge(study, None if i in CARELESS else tuple(true), 1000 + repeat * RATERS + i) for i in range(RATERS)
        ]
        ballots = []
        for i, judge in enumerate(judges):
            asked = enumerate(sheet(study, i))
            ballots.append(
                ballot(study, i, [Answer(k, q.left, q.right, judge.choose(q.left, q.right), 1500) for k, q in asked])
            )
        results = summarise(study, ballots, Rule(study.catches))
        rows = {row["method"]: row for row in results["methods"]}
        for name, score in zip(study.methods, true, strict=True):
            low, high = rows[name]["score_interval"]
            inside.append(low <= score <= high)
            errors.append(rows[name]["score"] - score)
        caught.append(len(ballots) - results["answers"]["raters_kept"])
    print(
        f"\n{studies} such studies: true score inside the 95 % interval in {np.mean(inside):.1%}, mean error "
        f"{np.mean(np.abs(errors)):.3f}, excluded of the {len(CARELESS)} who toss a coin {np.mean(caught):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--browser", type=int, default=8)
    parser.add_argument("--studies", type=int, default=200, help="repeated without pages, for the calibration")
    options = parser.parse_args()
    prepare(options.pictures, options.out)
    folders = [f"--{name}={options.out / name}" for name in ("truth", "masks")]
    folders += [f"--results={name}={options.out / name}" for name in TRUE]
    folder = options.out / "study"
    if coherent_ddrm(["study", "create", *folders, "-o", str(folder), "--questions", "20", "--catch", "3"]):
        raise SystemExit(2)
    ask(load(folder), folder, options.browser)
    coherent_ddrm(["study", "analyse", str(folder)])
    results = analyse(folder)
    print("\n| method | true score | recovered | 95 % | inside |\n|---|---|---|---|---|")
    centre = np.mean(list(TRUE.values()))
    for row in results["methods"]:
        true, (low, high) = TRUE[row["method"]] - centre, row["score_interval"]
        inside = "yes" if low <= true <= high else "no"
        print(f"| {row['method']} | {true:+.2f} | {row['score']:+.2f} | {low:+.2f} to {high:+.2f} | {inside} |")
    print("\n" + methods_table(results) + "\n\n" + pairs_table(results) + "\n\n" + raters_table(results))
    print({key: results[key] for key in ("agreement", "rule", "answers")})
    if options.studies:
        calibration(load(folder), options.studies)


if __name__ == "__main__":
    main()
