"""Make a hidden garment something else: python tests/benchmarks/guidance.py --val SHARDS --classifier DIR [--judge DIR]

Held-out pictures of other classes, their lower half or nearly all hidden; GuidPaint on the shipped network, not guided
and guided towards each class. Says how sure a judge is of the class in the result, and how often it puts it first; one
trained apart from the guide (another --seed) is not fooled by what fools the guide. Writes a sheet for each hole.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from coherent_ddrm.classifier import load_classifier
from coherent_ddrm.data import open_dataset
from coherent_ddrm.export import default_checkpoint
from coherent_ddrm.images import to_tensor, write_image
from coherent_ddrm.measure import write_pictures
from coherent_ddrm.restoration import RestorationPipeline
from coherent_ddrm.sheets import contact_sheet


def make_hole(name: str, side: int) -> np.ndarray:
    hole = np.zeros((side, side), bool)
    if name == "lower":
        hole[side * 7 // 16 :] = True
    else:
        hole[side * 3 // 32 : side * 15 // 16, side * 3 // 32 : side * 29 // 32] = True
    return hole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--val", required=True)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--judge", help="another classifier; the guide itself unless given")
    parser.add_argument("--show", nargs="+", default=["Dress", "Pants", "T-Shirt"])
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--scale", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=Path("runs/guidance"))
    options = parser.parse_args()
    guide = load_classifier(options.classifier)
    judge = load_classifier(options.judge) if options.judge else guide
    source = open_dataset(options.val)
    batch = source.batch(np.arange(len(source)))
    wanted = [guide.label(name) for name in options.show]
    other = np.flatnonzero((batch["class_id"] >= 0) & ~np.isin(batch["class_id"], wanted))
    ids = other[np.linspace(0, len(other) - 1, min(options.count, len(other))).astype(int)]
    pictures = write_pictures(to_tensor(batch["image"][ids]), "pil")
    pipe = RestorationPipeline.from_prior(default_checkpoint())
    options.out.mkdir(parents=True, exist_ok=True)
    for kind in ("lower", "box"):
        hole = make_hole(kind, pictures[0].size[1])
        settings = dict(mask_image=hole, num_inference_steps=20, generator=0, output_type="pt", clean=True)
        hidden = [np.where(hole[..., None], 128, np.asarray(picture)).astype(np.uint8) for picture in pictures]
        plain = pipe(pictures, "inpainting", "guidpaint", **settings).images
        rows, labels = [hidden, _uint8(plain)], ["hidden", "not guided"]
        for name in options.show:
            guidance = dict(classifier=guide, show=[name], guidance_scale=options.scale)
            guided = pipe(pictures, "inpainting", "guidpaint", **guidance, **settings).images
            rows, labels = [*rows, _uint8(guided)], [*labels, name]
            before, after = (_sure(judge, x, name) for x in (plain, guided))
            print(f"{kind:6s} {name:8s} p {before[0]:.3f} -> {after[0]:.3f}, first {before[1]:.0%} -> {after[1]:.0%}")
        rows = [row[:: max(1, len(ids) // 12)][:12] for row in [*rows, [np.asarray(p) for p in pictures]]]
        write_image(options.out / f"guidance-{kind}.png", contact_sheet(rows, [], cell=96, labels=[*labels, "truth"]))


@torch.no_grad()
def _sure(judge, x: torch.Tensor, name: str) -> tuple[float, float]:
    """Mean probability of the class, and how often it is the likeliest."""
    p = judge(2 * x - 1).softmax(dim=1)
    label = judge.label(name)
    return float(p[:, label].mean()), float((p.argmax(dim=1) == label).float().mean())


def _uint8(x: torch.Tensor) -> list[np.ndarray]:
    return list((255 * x).round().byte().permute(0, 2, 3, 1).numpy())


if __name__ == "__main__":
    main()
