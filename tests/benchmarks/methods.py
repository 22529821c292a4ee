"""Every restorer on one prior and the same pictures: python tests/benchmarks/methods.py --val SHARDS [--count 64]

Half and thick holes and super-resolution by 4. Scores are of the hole (of the whole picture for super-resolution); one
sample per picture. The prior is the shipped network told nothing (no known pixel, no plan); "coherent" tells it the
hole, and with "plan" the predicted plan; rad tells it times. --overhead instead times a step over the bare network.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coherent_ddrm.data import open_dataset
from coherent_ddrm.export import default_checkpoint
from coherent_ddrm.images import to_tensor, to_uint8, write_image
from coherent_ddrm.masks import make_holes
from coherent_ddrm.metrics import l1, psnr, seam, ssim
from coherent_ddrm.models.dit import InContext
from coherent_ddrm.models.structure import predict_plan
from coherent_ddrm.operators import AveragePooling, Inpainting, Observation
from coherent_ddrm.pipeline import CoherentInpaintPipeline
from coherent_ddrm.priors import DiTPrior
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.samplers import RESTORERS, sample
from coherent_ddrm.sheets import contact_sheet

CHOSEN: dict[str, dict] = {  # options for few steps; the rest at their defaults
    "repaint": {"jump_length": 2, "jump_samples": 5},
    "hybrid": {"length": 2, "repeats": 3},
    "copaint_tt": {"length": 4},
}
INPAINTERS = ("coherent", "coherent, plan", "repaint", "rad")


def restore(name: str, net, observation: Observation, plan: Tensor | None, times: tuple, keys: list) -> tuple:
    """(x0, nfe) of one batch."""
    method = RESTORERS[name.split(",")[0]]
    y = observation.y
    denoiser = {"rad": net, "coherent": None}.get(name.split(",")[0], DiTPrior(net))
    if denoiser is None:
        hole = observation.operator.hole.float()
        denoiser = InContext(net, net.context(y, hole, plan if "plan" in name else None, cached=net.config.one_way))
    sampler = method(denoiser, observation, **CHOSEN.get(name, {}))
    rng = [keyed_generator(11, *key) for key in keys]
    z = normal(torch.zeros(len(y), 3, 64, 64), rng)
    return sample(sampler, z, sampler.times(*times), rng), sampler.nfe


@torch.no_grad()
def table(net, planner, x0: Tensor, holes: dict[str, Tensor | None], times: tuple, out: Path, batch: int) -> None:
    truth = (x0 + 1) / 2
    for task, hole in holes.items():
        names = [n for n in RESTORERS if hole is not None or n not in INPAINTERS]
        names = ["coherent, plan", *names] if hole is not None else names
        rows, titles = [], []
        print(f"== {task}, {len(x0)} pictures, {times[0]} steps, shift {times[1]}", flush=True)
        for name in names:
            results, begin = [], time.perf_counter()
            for first in range(0, len(x0), batch):
                rows_of = slice(first, first + batch)
                part = x0[rows_of]
                if hole is None:
                    observation = Observation(AveragePooling(4).A(part), AveragePooling(4))
                else:
                    observation = Observation(part * (1 - hole[rows_of]), Inpainting(hole[rows_of]))
                with torch.autocast("cpu", torch.bfloat16):
                    plan = predict_plan(planner, observation.y, hole[rows_of]) if "plan" in name else None
                    x, nfe = restore(name, net, observation, plan, times, [(first + i,) for i in range(len(part))])
                results.append(x.float())
            seconds = (time.perf_counter() - begin) / len(x0)
            x = torch.cat(results)
            if hole is not None:
                x = Inpainting(hole).project(x, x0)  # the composite
            unit = (x.clamp(-1, 1) + 1) / 2
            scores = {"psnr": psnr(unit, truth, hole), "ssim": ssim(unit, truth, hole), "l1": l1(unit, truth, hole)}
            scores |= {} if hole is None else {"seam": seam(unit, truth, hole)}
            scores = {k: round(float(v.nanmean()), 4) for k, v in scores.items()}
            print(f"{name:15s} {json.dumps(scores | {'nfe': nfe, 'seconds': round(seconds, 3)})}", flush=True)
            rows.append(list(to_uint8(x[:10])))
            titles.append(name)
        first = x0[:10] * (1 - hole[:10]) if hole is not None else AveragePooling(4).pinv(AveragePooling(4).A(x0[:10]))
        rows = [list(to_uint8(first)), *rows, list(to_uint8(x0[:10]))]
        out.mkdir(parents=True, exist_ok=True)
        sheet = contact_sheet(rows, [], cell=64, labels=["input", *titles, "truth"])
        write_image(out / f"methods-{task}.png", sheet)


@torch.no_grad()
def overhead(net, x0: Tensor, hole: Tensor, repeats: int) -> None:
    """A step of each method over its evaluations of the bare network, minimum of interleaved repeats."""
    observation = Observation(x0 * (1 - hole), Inpainting(hole))
    rng = [keyed_generator(0, i) for i in range(len(x0))]
    t = torch.full((1,), 0.5).expand(len(x0))
    print("method: step / bare network x evaluations - 1")
    for name in RESTORERS:
        if name in ("dps", "pigdm", "copaint", "copaint_tt"):
            continue  # their steps are gradients, not bookkeeping
        denoiser = DiTPrior(net)
        bare = lambda d=denoiser: d(x0, t)  # noqa: E731
        if name == "coherent":
            denoiser = InContext(net, net.context(observation.y, hole))
            bare = lambda d=denoiser: d(x0, t)  # noqa: E731
        if name == "rad":
            denoiser = net
            bare = lambda: net(x0, 0.5 * hole)  # noqa: E731
        sampler = RESTORERS[name](denoiser, observation)
        x_t = sampler.start(x0, 1.0)
        sampler.step(x_t, 0.5, 0.4, rng)
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            step = lambda s=sampler, x=x_t: s.step(x, 0.5, 0.4, rng)  # noqa: E731
            for work, into in zip((bare, step), seconds, strict=True):
                begin = time.perf_counter()
                work()
                into.append(time.perf_counter() - begin)
        print(f"{name:10s} {min(seconds[1]) / min(seconds[0]) - 1:6.1%}  of {min(seconds[0]) * 1e3:.1f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--val", required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shift", type=float, default=3.0, help="of the time grid, for every method")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", default="runs/methods")
    parser.add_argument("--overhead", action="store_true")
    options = parser.parse_args()
    source = open_dataset(options.val)
    ids = np.linspace(0, len(source) - 1, min(options.count, len(source))).astype(int)
    pipe = CoherentInpaintPipeline.from_pretrained(options.checkpoint or default_checkpoint())
    net, planner = pipe.transformer.eval().requires_grad_(False), pipe.structure
    x0 = to_tensor(source.batch(ids)["image"])
    make = lambda kind: torch.cat([torch.from_numpy(make_holes(kind, 1, 64, 64, seed=(1, int(i)))) for i in ids])  # noqa: E731
    holes = {"half": make("half").float(), "thick": make("lama-thick").float(), "sr4": None}
    if options.overhead:
        overhead(net, x0[:8], holes["half"][:8], 100)
    else:
        table(net, planner, x0, holes, (options.steps, options.shift), Path(options.out), options.batch)


if __name__ == "__main__":
    main()
