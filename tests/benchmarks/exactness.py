"""How exactly is y kept? max |A x0 - y| in fp32 at sigma_y = 0: python tests/benchmarks/exactness.py --val SHARDS

Every operator with every sampler, the shipped network as the prior. x0 is as the sampler returns it: before the final
composite, which makes inpainting exact for every method, and before it is rounded to pixels.
"""

import argparse

import numpy as np
import torch

from coherent_ddrm.data import open_dataset
from coherent_ddrm.errors import UserError
from coherent_ddrm.export import default_checkpoint
from coherent_ddrm.images import to_tensor
from coherent_ddrm.masks import make_holes
from coherent_ddrm.measure import write_pictures
from coherent_ddrm.restoration import RestorationPipeline
from coherent_ddrm.samplers import RESTORERS

OPERATORS = (
    "inpainting super_resolution:2 super_resolution:4 super_resolution:16 bicubic:4 colourisation blur:gaussian:2 "
    "blur:anisotropic:6:1:30 blur:motion:9:45 blur:uniform:9 compressed_sensing:2 compressed_sensing:20 denoising "
    "blur:gaussian:1+super_resolution:4 inpainting+colourisation"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--val", required=True)
    parser.add_argument("--prior")
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    source = open_dataset(options.val)
    ids = np.linspace(0, len(source) - 1, options.count).astype(int)
    pictures = write_pictures(to_tensor(source.batch(ids)["image"]), "pil")
    side = pictures[0].size[1]
    masks = [make_holes("half", 1, side, side, seed=(1, int(i)))[0, 0].astype(bool) for i in ids]
    pipe = RestorationPipeline.from_prior(options.prior or default_checkpoint())
    torch.set_num_threads(2)
    print("| operator | " + " | ".join(RESTORERS) + " |")
    print("|---|" + "---|" * len(RESTORERS))
    for operator in OPERATORS:
        cells = []
        for sampler in RESTORERS:
            try:
                out = pipe(
                    pictures,
                    operator,
                    sampler,
                    mask_image=masks if "inpainting" in operator else None,
                    degrade=True,
                    num_inference_steps=options.steps,
                    generator=0,
                )
                cells.append(f"{out.residual:.1e}" if out.residual else "0")
            except UserError:
                cells.append("")  # not for this operator
        print(f"| `{operator}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
