"""Train stage two, the diffusion transformer.

    accelerate launch train/diffusion.py --config configs/clothing_64.yaml [--dry-run] [--any.key value]

The same command again resumes. In the run folder: config.yaml, log.jsonl, sheets/, tensorboard/, checkpoints/ and
export/ (the averaged weights, ready for the pipeline).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coherent_ddrm.config import DiffusionRun, parse_run
from coherent_ddrm.data import open_dataset
from coherent_ddrm.launch import make_accelerator, readable_errors
from coherent_ddrm.tasks.diffusion import DiffusionTask, Validation
from coherent_ddrm.training import fit
from coherent_ddrm.validation import fixed_set


def main(argv: Sequence[str] | None = None) -> None:
    run, invocation = parse_run(DiffusionRun, argv)
    with readable_errors():
        train(run, invocation.dry_run)


def train(run: DiffusionRun, dry_run: bool) -> None:
    accelerator = make_accelerator(run.optim.precision, run.optim.accumulate)
    torch.manual_seed(run.seed)  # initial weights; nothing after this draws from ambient state
    source = open_dataset(run.data.train)
    task = DiffusionTask(run, source, accelerator)
    data = lambda: fixed_set(run.data.val, accelerator.device)  # noqa: E731
    fit(run, task, source, lambda: Validation(data(), task.num_labels, task.predictor), dry_run)


if __name__ == "__main__":
    main()
