"""Where an evaluation's time goes: python tests/benchmarks/evaluation.py --data SHARDS OUT [--methods coherent,repaint]

What is paid per picture, in milliseconds: networks, samplers around them, files, scores. What is paid once: loading,
pictures and holes, the report.
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
from coherent_ddrm.evaluation.gallery import Gallery
from coherent_ddrm.evaluation.methods import Makers, Method
from coherent_ddrm.evaluation.scores import Scorer
from coherent_ddrm.evaluation.setting import Setting
from coherent_ddrm.export import default_checkpoint
from coherent_ddrm.models.dit import DiT
from coherent_ddrm.models.structure import StructurePredictor

ONCE = {"loading networks": "loading", "pictures and holes": "pictures", "tables, tests, plots, page": "report"}
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
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    for owner, name in ((DiT, "context"), (DiT, "denoise"), (StructurePredictor, "forward")):
        timed(owner, name, "networks")
    timed(Method, "fill", "methods")
    timed(work, "_fill", "work")
    timed(Makers, "make", "loading")
    timed(whole, "available", "loading")
    timed(Gallery, "make", "pictures")
    timed(Scorer, "_measure", "scores")
    timed(whole, "write_report", "report")
    methods = tuple(options.methods.split(","))
    setting = Setting(options.data, ("half", "lama-thick"), 64, options.count, 0)
    wanted = Evaluation(
        setting, methods, {}, str(default_checkpoint()), options.out, steps=20, shift=3.0, precision=options.precision
    )
    wanted.download = False
    start = time.perf_counter()
    whole.evaluate(wanted)
    total, results = time.perf_counter() - start, 2 * options.count * len(methods)
    each = {
        "networks": spent["networks"],
        "samplers around them": spent["methods"] - spent["networks"],
        "files": spent["work"] - spent["methods"],
        "scores": spent["scores"],
    }
    once = {name: spent[part] for name, part in ONCE.items()}
    once["the rest (imports, scores of sets)"] = total - sum(each.values()) - sum(once.values())
    print(f"{results} results of {', '.join(methods)} in {total:.1f} s, {sum(each.values()):.1f} s of it per result")
    for name, seconds in each.items():
        print(f"{name:40s} {1000 * seconds / results:7.2f} ms a result  {seconds / sum(each.values()):6.1%}")
    for name, seconds in once.items():
        print(f"{name:40s} {seconds:7.2f} s once")


if __name__ == "__main__":
    main()
