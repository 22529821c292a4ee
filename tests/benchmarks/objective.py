"""What the auxiliary losses cost: python tests/benchmarks/objective.py --data SHARDS --perceptual DIR [--predictor DIR]

Whole training steps of 32 at the demo size, not compiled, the four objectives in turn; the least of several.
"""

import argparse
import time

import torch
from accelerate import Accelerator

from coherent_ddrm.config import AuxiliaryConfig, DiffusionObjective, DiffusionRun, DiTConfig, OptimConfig
from coherent_ddrm.data import ids_for_step, open_dataset
from coherent_ddrm.tasks.diffusion import DiffusionTask

WEIGHTS = {"diffusion": (0, 0), "+ perceptual": (0.5, 0), "+ adversarial": (0, 0.25), "all": (0.5, 0.25)}
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--perceptual", required=True)
    parser.add_argument("--predictor", default="checkpoints/clothing-64/structure")
    parser.add_argument("--repeats", type=int, default=6)
    options = parser.parse_args()
    source, tasks = open_dataset(options.data), {}
    for name, (perceptual, adversarial) in WEIGHTS.items():
        losses = dict(perceptual=perceptual, adversarial=adversarial, network=options.perceptual, start=0, cutoff=0.6)
        run = DiffusionRun(
            model=DiTConfig(size="demo"),
            optim=OptimConfig(batch=BATCH, optimizer="adamw"),
            objective=DiffusionObjective(predictor=options.predictor),
            auxiliary=AuxiliaryConfig(**losses),
        )
        tasks[name] = DiffusionTask(run, source, Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16"))
        tasks[name].prepare(False)
    least = dict.fromkeys(tasks, float("inf"))
    for step in range(1 + options.repeats):
        batch = source.batch(ids_for_step(step, BATCH, len(source), 0))
        for name, task in tasks.items():
            begin = time.perf_counter()
            task.main.set_rate(step)
            task.backward(batch, step, range(BATCH), look=False)
            float(task.clip(1.0))
            task.update(step)
            task.zero_grad()
            least[name] = min(least[name], time.perf_counter() - begin) if step else least[name]
    for name, seconds in least.items():
        ratio = seconds / least["diffusion"]
        print(f"{name:14s} {BATCH / seconds:6.1f} pictures/s, {ratio:.2f} times a step of diffusion alone")


if __name__ == "__main__":
    main()
