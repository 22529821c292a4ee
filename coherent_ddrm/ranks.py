"""The processes of a run: which one this is, what they agree on, and what the first of them alone does."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

Result = TypeVar("Result")


def launched() -> tuple[int, int]:
    """(rank, number of processes) that torchrun or accelerate launched; (0, 1) without."""
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def agree(accelerator: Accelerator, value: Tensor, stop: bool) -> tuple[bool, bool]:
    """(value is finite on every rank, some rank was asked to stop); one small message, and one wait for the device."""
    flags = torch.stack([~value.isfinite(), torch.as_tensor(stop, device=value.device)]).float()
    bad, stop = accelerator.reduce(flags, "sum").tolist()
    return bad == 0, stop > 0


def first_does(accelerator: Accelerator | PartialState, work: Callable[..., Result], *arguments: Any) -> Result:
    """What `work` returns or raises on the first process, which alone does it, on all: else they would wait for it.

    All processes call it; `work` needs none of the others.
    """
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work(*arguments)
        except Exception as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
