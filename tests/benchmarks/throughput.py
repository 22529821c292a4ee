"""Training pictures per second as a share of the machine's matrix rate, and data loading alone.

python tests/benchmarks/throughput.py --data SHARDS [--batch 64] [--repeats 5]

One process, its threads as set by OMP_NUM_THREADS. FLOPs: three times what torch counts on a forward pass (its count
of a backward pass takes grouped convolutions for full ones).
"""

import argparse
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from coherent_ddrm.config import DiffusionRun, StructureRun, optimizer_options
from coherent_ddrm.data import batches, open_dataset
from coherent_ddrm.examples import make_examples
from coherent_ddrm.learner import Learner
from coherent_ddrm.losses import diffusion_loss, v_weight
from coherent_ddrm.models.dit import make_dit
from coherent_ddrm.models.structure import StructurePredictor, encode_structure
from coherent_ddrm.structure_losses import edge_loss, region_weight, segmentation_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def best(work, repeats: int) -> float:
    """Least seconds of several runs, after one to warm up."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def matrix_rate(repeats: int, side: int = 2048) -> float:
    """FLOP/s of a bf16 matrix product."""
    a, b = torch.randn(2, side, side, dtype=torch.bfloat16, device=DEVICE)
    return 2 * side**3 / best(lambda: a @ b, 4 * repeats)


def steps(examples, num_labels: int):
    """(name, step function, loss function) of both stages."""
    x0, hole = examples.x0.to(DEVICE), examples.hole.to(DEVICE)
    s0 = encode_structure(examples.edges, examples.segmentation, num_labels).to(DEVICE)
    edges, labels = examples.edges.to(DEVICE), examples.segmentation.to(DEVICE)
    t = examples.u[:, 0].to(DEVICE)
    dit = make_dit("demo", structure_channels=1 + num_labels).to(DEVICE)
    predictor = StructurePredictor(num_labels=num_labels).to(DEVICE)
    noisy = lambda x, z, t: (1 - t) * x + t * z  # noqa: E731

    def diffusion():
        x_t = noisy(x0, torch.randn_like(x0), t[:, None, None, None] * hole)
        return diffusion_loss(dit(x_t, t, hole, s0), x0, hole, v_weight(t)).mean()

    def structure():
        s_t = noisy(s0, torch.randn_like(s0), t[:, None, None, None])
        edge, classes = predictor.logits(s_t, t, x0, hole)
        weight = region_weight(hole)
        return (edge_loss(edge, edges[:, None] / 255, weight) + segmentation_loss(classes, labels, weight)).mean()

    for name, net, loss, run in (
        ("stage two", dit, diffusion, DiffusionRun()),
        ("stage one", predictor, structure, StructureRun()),
    ):
        learner = Learner(net, **(optimizer_options(run) | {"optimizer": "adamw"}))

        def step(learner=learner, loss=loss):
            with torch.autocast(DEVICE, torch.bfloat16):
                value = loss()
            value.backward()
            for optimizer in learner.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            learner.average(1)

        yield name, step, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    source = open_dataset(options.data)
    stream = batches(source, options.batch, seed=0)
    _, batch = next(stream)
    examples = make_examples(batch, "coherent-train", 0, 0, range(options.batch), options.batch)
    rate = matrix_rate(options.repeats)
    print(f"matrix rate, bf16: {rate / 1e9:.0f} GFLOP/s, {torch.get_num_threads()} threads")
    for name, step, loss in steps(examples, source.num_labels):
        with FlopCounterMode(display=False) as counter, torch.autocast(DEVICE, torch.bfloat16):
            loss()
        flops = 3 * counter.get_total_flops()
        seconds = best(step, options.repeats)
        print(
            f"{name}: {options.batch / seconds:.1f} pictures/s, {flops / options.batch / 1e9:.2f} GFLOP a picture, "
            f"{flops / seconds / rate:.0%} of the matrix rate",
            flush=True,
        )
    load = best(lambda: [next(stream) for _ in range(20)], options.repeats)
    print(f"reading batches: {20 * options.batch / load:.0f} pictures/s")
    make = lambda: make_examples(batch, "coherent-train", 0, 1, range(options.batch), options.batch)  # noqa: E731
    print(f"flips, holes, noise keys: {options.batch / best(make, options.repeats):.0f} pictures/s")


if __name__ == "__main__":
    main()
