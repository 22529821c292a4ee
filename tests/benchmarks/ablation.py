"""What each loss is worth: python tests/benchmarks/ablation.py --val SHARDS --runs NAME=RUN ... --predictor DIR

Each run's exported network fills the same holes from the same noise, one sample a picture. In the hole: PSNR, SSIM, L1,
seam; sharpness, the mean gradient magnitude over the truth's (1 = as sharp); features, the distance in the perceptual
network's (a loss of some of the runs) and in the classifier's last layer (of none). A run with export-structure/ plans
for itself. Writes a sheet for each kind of hole, a row per run.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coherent_ddrm.classifier import load_classifier
from coherent_ddrm.data import open_dataset
from coherent_ddrm.images import to_tensor, to_uint8, write_image
from coherent_ddrm.losses import perceptual_loss
from coherent_ddrm.masks import make_holes
from coherent_ddrm.metrics import l1, psnr, seam, sharpness, ssim
from coherent_ddrm.models.dit import DiT, InContext
from coherent_ddrm.models.perceptual import load_perceptual
from coherent_ddrm.models.structure import StructurePredictor, predict_plan
from coherent_ddrm.operators import Inpainting, Observation
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.samplers import Coherent, sample
from coherent_ddrm.schedule import time_grid
from coherent_ddrm.sheets import contact_sheet


@torch.no_grad()
def fill(net: DiT, planner: StructurePredictor, x0: Tensor, hole: Tensor, steps: int, shift: float) -> Tensor:
    """(B, 3, H, W) in [-1, 1], known pixels the truth's."""
    results = []
    for first in range(0, len(x0), 16):
        y, h = (v[first : first + 16] for v in (x0 * (1 - hole), hole))
        rng = [keyed_generator(7, first + i) for i in range(len(y))]
        with torch.autocast("cpu", torch.bfloat16):
            context = net.context(y, h, predict_plan(planner, y, h), cached=net.config.one_way)
            sampler = Coherent(InContext(net, context), Observation(y, Inpainting(h)))
            results.append(sample(sampler, normal(y, rng), time_grid(steps, shift), rng).float())
    return Inpainting(hole).project(torch.cat(results).clamp(-1, 1), x0)


@torch.no_grad()
def scores(x: Tensor, x0: Tensor, hole: Tensor, perceptual, classifier) -> dict[str, float]:
    unit, truth = (x + 1) / 2, (x0 + 1) / 2
    last = lambda v: classifier.net.forward_head(classifier.net.forward_features(v), pre_logits=True)  # noqa: E731
    values = {
        "psnr": psnr(unit, truth, hole),
        "ssim": ssim(unit, truth, hole),
        "l1": l1(unit, truth, hole),
        "seam": seam(unit, truth, hole),
        "sharpness": sharpness(unit, truth, hole),
        "features": perceptual_loss(perceptual, x, x0),
        "classifier": 1 - torch.cosine_similarity(last(x), last(x0), dim=1),
    }
    return {name: round(float(value.nanmean()), 4) for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--val", required=True)
    parser.add_argument("--runs", nargs="+", required=True, metavar="NAME=RUN")
    parser.add_argument("--predictor", required=True, help="export of stage one, for runs without their own")
    parser.add_argument("--perceptual", required=True)
    parser.add_argument("--classifier", default="checkpoints/clothing-64-classifier")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shift", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    options = parser.parse_args()
    source = open_dataset(options.val)
    ids = np.linspace(0, len(source) - 1, min(options.count, len(source))).astype(int)
    x0 = to_tensor(source.batch(ids)["image"])
    perceptual, classifier = load_perceptual(options.perceptual), load_classifier(options.classifier)
    options.out.mkdir(parents=True, exist_ok=True)
    for kind in ("half", "lama-thick"):
        hole = torch.cat([torch.from_numpy(make_holes(kind, 1, *x0.shape[-2:], seed=(1, int(i)))) for i in ids]).float()
        print(f"== {kind}, {len(ids)} pictures", flush=True)
        shown = slice(0, len(ids), max(1, len(ids) // 12))
        rows, labels = [list(to_uint8(x0 * (1 - hole))[shown])], ["input"]
        for name, run in (text.split("=", 1) for text in options.runs):
            net = DiT.from_pretrained(Path(run) / "export").eval()
            own = Path(run) / "export-structure"
            planner = StructurePredictor.from_pretrained(own if own.is_dir() else options.predictor).eval()
            x = fill(net, planner, x0, hole, options.steps, options.shift)
            print(f"{name:14s} {json.dumps(scores(x, x0, hole, perceptual, classifier))}", flush=True)
            rows, labels = [*rows, list(to_uint8(x)[shown])], [*labels, name]
        rows, labels = [*rows, list(to_uint8(x0)[shown])], [*labels, "truth"]
        write_image(options.out / f"ablation-{kind}.png", contact_sheet([r[:12] for r in rows], [], 72, labels))


if __name__ == "__main__":
    main()
