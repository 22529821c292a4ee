"""Where an evaluation's time goes: python tests/benchmarks/evaluation.py --data SHARDS OUT [--methods coherent,repaint]

In the networks, in the samplers around them, and outside of both; without imports and the loading of networks.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from coherent_ddrm.evaluation import evaluate as whole
from coherent_ddrm.evaluation import work
from coherent_ddrm.evaluation.asked import Evaluation
from coherent_ddrm.evaluation.evaluate import make_makers
from coherent_ddrm.evaluation.gallery import Gallery
from coherent_ddrm.evaluation.methods import Method
from coherent_ddrm.evaluation.scores import Scorer
from coherent_ddrm.evaluation.setting import Setting
from coherent_ddrm.export import default_checkpoint
from coherent_ddrm.metrics import available
from coherent_ddrm.models.dit import DiT
from coherent_ddrm.models.structure import StructurePredictor

spent: dict[str, float] = defaultdict(float)
depth: dict[str, int] = defaultdict(int)


def timed(owner: object, name: str, part: str) -> None:
    """Add what owner.name takes to `spent[part]`; calls within calls count once."""
    inner: Callable = getattr(owner, name)

    def outer(*args: object, **options: object) -> object:
        depth[part] += 1
        start = time.perf_counter()
        try:
            return inner(*args, **options)
        finally:
            depth[part] -= 1
            if not depth[part]:
                spent[part] += time.perf_counter() - start

    setattr(owner, name, outer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--methods", default="coherent,ddnm,repaint:jump_length=2:jump_samples=5")
    parser.add_argument("--masks", default="half,lama-thick")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    for owner, name in ((DiT, "context"), (DiT, "denoise"), (StructurePredictor, "forward")):
        timed(owner, name, "networks")
    timed(Method, "fill", "methods")
    timed(work, "_fill", "work")
    for name in ("make", "verify"):
        timed(Gallery, name, "pictures")
    timed(Scorer, "score", "scores")
    timed(whole, "write_report", "report")
    methods = tuple(options.methods.split(","))
    setting = Setting(options.data, tuple(options.masks.split(",")), 64, options.count, 0)
    wanted = Evaluation(
        setting, methods, {}, str(default_checkpoint()), options.out, steps=20, shift=3.0, precision=options.precision
    )
    wanted.download = False
    makers = make_makers(wanted, torch.device("cpu"))
    for text in methods:  # imports and loading, which no number of pictures makes longer
        makers.make(text)
    available(wanted.scores, download=False)
    start = time.perf_counter()
    whole.evaluate(wanted)
    total, results = time.perf_counter() - start, len(setting.masks) * options.count * len(methods)
    rows = {
        "networks": spent["networks"],
        "samplers around them": spent["methods"] - spent["networks"],
        "pictures, holes, results as files": spent["pictures"] + spent["work"] - spent["methods"],
        "scores": spent["scores"],
        "tables, tests, plots, page": spent["report"],
    }
    rows["the rest"] = total - sum(rows.values())
    print(f"{results} results of {', '.join(methods)} in {total:.1f} s")
    for name, seconds in rows.items():
        print(f"{name:40s} {1000 * seconds / results:7.2f} ms a result  {seconds / total:6.1%}")


if __name__ == "__main__":
    main()
