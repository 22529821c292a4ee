"""Small studies, and scripted raters whose preference is known."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Thread

import numpy as np

from coherent_ddrm.images import write_image
from coherent_ddrm.study.create import Sources, create
from coherent_ddrm.study.questions import Study


def make_sources(folder: Path, methods: Sequence[str], count: int = 6, size: int = 16) -> Sources:
    """`count` pictures of noise with a box hole, and a result of each method, as PNG."""
    rng = np.random.default_rng(0)
    hole = np.zeros((size, size, 3), np.uint8)
    hole[size // 4 : -size // 4, size // 4 : -size // 4] = 255
    for i in range(count):
        truth = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        pictures = {"truth": truth, "masks": hole}
        for level, method in enumerate(methods):
            pictures[f"by-{method}"] = np.where(hole > 0, np.uint8(40 * level), truth)
        for name, picture in pictures.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_image(folder / name / f"picture-{i}.png", picture)
    return Sources(folder / "truth", folder / "masks", {method: folder / f"by-{method}" for method in methods})


def make_study(folder: Path, methods: Sequence[str] = "ABCD", count: int = 6, **options: int) -> Study:
    """A study of such pictures in `folder / "study"`."""
    return create(make_sources(folder, methods, count), folder / "study", **options)


class Judge:
    """One who prefers i to j with probability sigmoid(score_i - score_j), or, without scores, tosses a coin.

    A judge with scores knows a broken picture from the truth.
    """

    def __init__(self, study: Study, scores: Sequence[float] | None, seed: int):
        self.rng, self.careful = np.random.default_rng(seed), scores is not None
        self.worth = {name: s for p in study.pictures for name, s in zip(p.results, scores or [], strict=False)}
        for catch in (picture.catch for picture in study.pictures if picture.catch):
            self.worth |= {catch.truth: 1e3, catch.broken: -1e3}

    def choose(self, left: str, right: str) -> str:
        """ "left" or "right", for two pictures by id."""
        gap = self.worth[left] - self.worth[right] if self.careful else 0.0
        return "left" if self.rng.random() < 1 / (1 + np.exp(np.clip(-gap, -50, 50))) else "right"


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The study's server in a thread; yields its address."""
    import uvicorn

    from coherent_ddrm.study.server import make_app

    server = uvicorn.Server(uvicorn.Config(make_app(folder), log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(20)


@contextmanager
def serving_process(folder: Path) -> Iterator[str]:
    """`coherent-ddrm study serve` in a process of its own; yields its address."""
    command = [sys.executable, "-m", "coherent_ddrm.cli", "study", "serve", str(folder), "--port", "0"]
    process = Popen(command, stdout=PIPE, text=True)
    try:
        yield process.stdout.readline().split()[0]
    finally:
        process.terminate()
        process.wait(20)
