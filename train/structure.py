"""Train stage one, the structure predictor.

    accelerate launch train/structure.py --config configs/clothing_64_structure.yaml [--dry-run] [--any.key value]

The same command again resumes. In the run folder: config.yaml, log.jsonl, sheets/, tensorboard/, checkpoints/ and
export/ (the averaged weights, ready for stage two and for the pipeline).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coherent_ddrm.config import StructureRun, parse_run
from coherent_ddrm.data import open_dataset
from coherent_ddrm.launch import check_run, make_accelerator, readable_errors
from coherent_ddrm.tasks.structure import StructureTask, Validation
from coherent_ddrm.training import fit
from coherent_ddrm.validation import fixed_set


def main(argv: Sequence[str] | None = None) -> None:
    run, invocation = parse_run(StructureRun, argv)
    with readable_errors():
        train(run, invocation.dry_run)


def train(run: StructureRun, dry_run: bool) -> None:
    accelerator = make_accelerator(run.optim.precision, run.optim.accumulate)
    torch.manual_seed(run.seed)  # initial weights; nothing after this draws from ambient state
    source = open_dataset(run.data.train)
    check_run(run, source)
    task = StructureTask(run, source, accelerator)
    fit(run, task, source, lambda: Validation(fixed_set(run.data.val, accelerator.device), task.num_labels), dry_run)


if __name__ == "__main__":
    main()
