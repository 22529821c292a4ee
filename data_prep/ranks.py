"""Which share of the shards this process makes."""

import argparse
import os

from coherent_ddrm.shards import DataError


def rank_and_world(args: argparse.Namespace) -> tuple[int, int]:
    """From --rank and --world, else torchrun or accelerate, else SLURM's array or tasks, else 0 of 1."""
    if (args.rank is None) != (args.world is None):
        raise DataError("--rank and --world belong together; give both or neither.")
    pairs = [
        ("RANK", "WORLD_SIZE"),
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
        ("SLURM_PROCID", "SLURM_NTASKS"),
    ]
    rank, world = args.rank, args.world
    for rank_name, world_name in pairs:
        if rank is None and rank_name in os.environ and world_name in os.environ:
            rank, world = _number(rank_name), _number(world_name)
            if rank_name == "SLURM_ARRAY_TASK_ID":
                rank -= _number("SLURM_ARRAY_TASK_MIN")
    rank, world = (0, 1) if rank is None else (rank, world)
    if not 0 <= rank < world:
        raise DataError(
            f"rank {rank} of {world}: ranks count from 0 to {world - 1}; an array job wants --array=0-{world - 1}."
        )
    return rank, world


def _number(variable: str) -> int:
    text = os.environ.get(variable, "0")
    try:
        return int(text)
    except ValueError as error:
        raise DataError(
            f"the environment variable {variable} is {text!r}, no number; set it right or unset it."
        ) from error
