"""Hole scores on validation shards: python tests/benchmarks/quality.py --val SHARDS [--checkpoint DIR] [--count 96]

Coherent against the same network as an unconditional prior under DDNM with the same steps, and against OpenCV's Telea;
for one sample, the mean of several, and the one-step mean (a single sample of a perfect model has twice the squared
error of the mean). What the plan is worth: none, predicted, true. Stage one on hidden pixels against the trivial guess.
"""

import argparse
import json

import cv2
import numpy as np
import torch
from torch import Tensor

from coherent_ddrm.data import open_dataset
from coherent_ddrm.export import default_checkpoint
from coherent_ddrm.images import to_tensor, to_uint8
from coherent_ddrm.masks import make_holes
from coherent_ddrm.metrics import l1, psnr, ssim
from coherent_ddrm.models.structure import decode_structure, encode_structure, predict_plan
from coherent_ddrm.pipeline import CoherentInpaintPipeline
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.samplers import sample
from coherent_ddrm.scene import SAMPLERS, Scene
from coherent_ddrm.schedule import time_grid
from coherent_ddrm.structure_losses import EDGE_THRESHOLD, IGNORE, edge_counts, f1, iou, segmentation_counts


def telea(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """OpenCV's inpaint, radius 3. (H, W, 3) and (H, W) -> (H, W, 3) uint8"""
    return cv2.inpaint(image, hole.astype(np.uint8) * 255, 3, cv2.INPAINT_TELEA)


@torch.no_grad()
def run(
    net,
    method: str,
    x0: Tensor,
    hole: Tensor,
    plan: Tensor | None,
    times: list[float],
    draws: int,
    eta: float | None = None,
) -> Tensor:
    """(B, draws, 3, H, W) in [0, 1], bf16 matrix products, 8-bit values."""
    results = []
    for first in range(0, len(x0), 16):
        rows = slice(first, first + 16)
        y, h = (v[rows].repeat_interleave(draws, 0) for v in (x0, hole))
        p = None if plan is None else plan[rows].repeat_interleave(draws, 0)
        rng = [keyed_generator(5, first + i, k) for i in range(len(y) // draws) for k in range(draws)]
        with torch.autocast("cpu", torch.bfloat16):
            sampler = SAMPLERS[method](net, Scene(y * (1 - h), h, p, draws), eta)
            out = sample(sampler, normal(y, rng), times, rng)
        results.append(torch.from_numpy(to_uint8(out.clamp(-1, 1))).permute(0, 3, 1, 2) / 255)
    return torch.cat(results).unflatten(0, (len(x0), draws))


def scores(result: Tensor, x0: Tensor, hole: Tensor) -> dict[str, float]:
    """Mean hole PSNR, SSIM, L1 of (B, 3, H, W) in [0, 1]."""
    truth = (x0 + 1) / 2
    parts = {"psnr": psnr(result, truth, hole), "ssim": ssim(result, truth, hole), "l1": l1(result, truth, hole)}
    return {name: round(float(value.mean()), 4) for name, value in parts.items()}


def stage_one(plan: Tensor, edges: Tensor, labels: Tensor, num_labels: int, hole: Tensor) -> dict[str, float]:
    """Edge F1, mean IoU over labels and foreground IoU, all on hidden pixels."""
    ours, ids = decode_structure(plan)
    found = edge_counts(ours[:, None].float() / 255, edges[:, None].float() / 255, hole, threshold=EDGE_THRESHOLD).sum(
        0
    )
    binary = [torch.where(x == IGNORE, x, (x > 0).to(x.dtype)) for x in (ids, labels)]
    return {
        "edge_f1": round(float(f1(found)), 4),
        "mean_iou": round(float(iou(segmentation_counts(ids, labels, num_labels, hole).sum(0)).nanmean()), 4),
        "foreground_iou": round(float(iou(segmentation_counts(*binary, 2, hole).sum(0))[1]), 4),
        "background_iou": round(float(iou(segmentation_counts(*binary, 2, hole).sum(0))[0]), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--val", required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shift", type=float, default=1.0)
    parser.add_argument("--draws", type=int, default=8)
    options = parser.parse_args()
    times, once = time_grid(options.steps, options.shift), time_grid(1)
    source = open_dataset(options.val)
    ids = np.linspace(0, len(source) - 1, min(options.count, len(source))).astype(int)
    batch = source.batch(ids)
    pipe = CoherentInpaintPipeline.from_pretrained(options.checkpoint or default_checkpoint())
    net, planner = pipe.transformer.eval(), pipe.structure
    x0 = to_tensor(batch["image"])
    edges, labels = torch.from_numpy(batch["edges"]), torch.from_numpy(batch["segmentation"])
    true_plan = encode_structure(edges, labels, source.num_labels)
    for kind in ("half", "lama-thick"):
        hole = torch.cat([torch.from_numpy(make_holes(kind, 1, *x0.shape[-2:], seed=(1, int(i)))) for i in ids]).float()
        plan = predict_plan(planner, x0 * (1 - hole), hole, steps=1)
        print(f"== {kind}: {len(ids)} pictures, mean hole {float(hole.mean()):.2f}, {options.steps} steps", flush=True)

        def show(name: str, result: Tensor, hole: Tensor = hole) -> None:
            print(f"{name:32s} {json.dumps(scores(result, x0, hole))}", flush=True)

        for name, other_eta in (("coherent", 0.0), ("ddnm", 1.0)):
            several = run(net, name, x0, hole, plan, times, options.draws)
            show(f"{name}, one sample", several[:, 0])
            show(f"{name}, mean of {options.draws}", several.mean(dim=1))
            show(f"{name}, one step", run(net, name, x0, hole, plan, once, 1)[:, 0])
            show(f"{name}, eta {other_eta}, one sample", run(net, name, x0, hole, plan, times, 1, other_eta)[:, 0])
        filled = [telea(image, h[0].numpy()) for image, h in zip(batch["image"], hole, strict=True)]
        show("Telea", torch.from_numpy(np.stack(filled)).permute(0, 3, 1, 2) / 255)
        for name, one in (("no plan", None), ("true plan", true_plan)):
            show(f"coherent, {name}, one sample", run(net, "coherent", x0, hole, one, times, 1)[:, 0])
            show(f"coherent, {name}, one step", run(net, "coherent", x0, hole, one, once, 1)[:, 0])
        nothing = torch.full_like(true_plan, -1.0)
        nothing[:, 1] = 1  # background everywhere, no edge
        print("stage one, mean plan     ", stage_one(plan, edges, labels, source.num_labels, hole))
        print("stage one, trivial guess ", stage_one(nothing, edges, labels, source.num_labels, hole), flush=True)


if __name__ == "__main__":
    main()
