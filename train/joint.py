"""Train both stages together: stage two's loss flows back into the plan, and so into stage one.

    accelerate launch train/joint.py --config configs/clothing_64_joint.yaml [--dry-run] [--any.key value]

From staged weights (`init`, `structure_init`) or from nothing. The same command again resumes. In the run folder beside
what train/diffusion.py leaves: export-structure/, stage one's averaged weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from coherent_ddrm.config import JointRun, parse_run
from coherent_ddrm.data import open_dataset
from coherent_ddrm.launch import make_accelerator, readable_errors
from coherent_ddrm.tasks.joint import JointTask, Validation
from coherent_ddrm.training import fit
from coherent_ddrm.validation import fixed_set


def main(argv: Sequence[str] | None = None) -> None:
    run, invocation = parse_run(JointRun, argv)
    with readable_errors():
        train(run, invocation.dry_run)


def train(run: JointRun, dry_run: bool) -> None:
    accelerator = make_accelerator(run.optim.precision, run.optim.accumulate)
    torch.manual_seed(run.seed)  # initial weights; nothing after this draws from ambient state
    source = open_dataset(run.data.train)
    task = JointTask(run, source, accelerator)
    fit(run, task, source, lambda: Validation(fixed_set(run.data.val, accelerator.device), task), dry_run)


if __name__ == "__main__":
    main()
