"""Sampling time, cached against full-token, in interleaved pairs: python tests/benchmarks/sampling.py [--size demo]

Both runs use the same weights, the same steps and the same precomputed static parts; the full run only lacks the known
tokens' keys and values. Ceiling: 1 / (h + (1 - h) / N) for a hole-token share h and N steps. Absolute times are of this
machine and moment; the ratio is what counts. On two threads of a shared machine small operations wait for each other
more than they compute; --threads 1 shows the work itself.
"""

import argparse
import statistics
import time

import torch

from coherent_ddrm.models.dit import DiT, InContext, make_dit
from coherent_ddrm.operators import Inpainting, Observation
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.samplers import Coherent, sample
from coherent_ddrm.schedule import time_grid


def hole_of(share: float, batch: int, side: int, patch: int) -> torch.Tensor:
    """The same number of hole tokens in every sample, whole columns first, (B, 1, side, side)."""
    tokens = (side // patch) ** 2
    flat = torch.zeros(tokens)
    flat[: round(share * tokens)] = 1
    grid = flat.view(side // patch, side // patch).T
    return grid.repeat_interleave(patch, 0).repeat_interleave(patch, 1).expand(batch, 1, side, side).contiguous()


@torch.no_grad()
def inpaint(net: DiT, x0, hole, structure, steps: int, cached: bool) -> torch.Tensor:
    """One whole run, the context included."""
    rng = [keyed_generator(0, i) for i in range(len(x0))]
    context = net.context(x0, hole, structure, cached=cached)
    sampler = Coherent(InContext(net, context), Observation(x0, Inpainting(hole)))
    return sample(sampler, normal(x0, rng), time_grid(steps), rng)


def compare(net: DiT, share: float, batch: int, steps: int, pairs: int, side: int) -> dict:
    """Median of paired ratios, ratio of minima, and agreement."""
    x0 = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    hole = hole_of(share, batch, side, net.config.patch)
    share = float((hole[0, 0, :: net.config.patch, :: net.config.patch]).mean())  # as it came out in whole tokens
    structure = torch.zeros(batch, net.config.structure_channels, side, side)
    run = lambda cached: inpaint(net, x0, hole, structure, steps, cached)  # noqa: E731
    difference = float((run(True) - run(False)).abs().max())
    seconds = {True: [], False: []}
    for _ in range(pairs):
        for cached in (True, False):
            begin = time.perf_counter()
            run(cached)
            seconds[cached].append((time.perf_counter() - begin) / batch)
    ratios = [full / cached for cached, full in zip(seconds[True], seconds[False], strict=True)]
    return {
        "hole": share,
        "batch": batch,
        "cached_s": min(seconds[True]),
        "full_s": min(seconds[False]),
        "median_ratio": statistics.median(ratios),
        "ratio_of_minima": min(seconds[False]) / min(seconds[True]),
        "ceiling": 1 / (share + (1 - share) / steps),
        "difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="demo")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.25, 0.5, 0.75])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, help="default: torch's own")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    net = make_dit(options.size, structure_channels=22).eval()
    for p in net.parameters():  # open the zero gates, so that agreement means something
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    print("hole batch | cached s/picture  full s/picture | median ratio  ratio of minima  ceiling  share | difference")
    for batch in options.batches:
        for share in options.shares:
            r = compare(net, share, batch, options.steps, options.pairs, options.side)
            print(
                f"{r['hole']:4.0%} {batch:5d} | {r['cached_s']:16.4f} {r['full_s']:15.4f} | {r['median_ratio']:12.2f}  "
                f"{r['ratio_of_minima']:15.2f}  {r['ceiling']:7.2f}  {r['ratio_of_minima'] / r['ceiling']:5.0%} | "
                f"{r['difference']:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
