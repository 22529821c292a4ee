"""Before the first step: the engine, the checks, and what is told of the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from coherent_ddrm.config import ConfigError
from coherent_ddrm.data import DataError, DecodedCache, ShardDataset
from coherent_ddrm.errors import UserError
from coherent_ddrm.keeper import NonFinite
from coherent_ddrm.masks import MAKERS
from coherent_ddrm.models.dit import SIZES
from coherent_ddrm.run_lock import RunLocked
from coherent_ddrm.sharding import held

if TYPE_CHECKING:
    from coherent_ddrm.training import Task


def as_it_is(net: nn.Module) -> nn.Module:
    """All weights of `net` learn."""
    return net


def start_from(net: nn.Module, folder: str | None) -> nn.Module:
    """`net` with the weights exported to `folder`, or as it is for None. ConfigError unless they fit exactly."""
    if folder is None:
        return net
    try:
        net.load_state_dict(load_file(Path(folder) / "diffusion_pytorch_model.safetensors"), strict=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"init {folder}: {' '.join(str(error).split())[:300]}") from None
    return net


@contextmanager
def readable_errors() -> Iterator[None]:
    """What a user can mend leaves as one line per fault and exit code 2."""
    try:
        yield
    except (ConfigError, DataError, UserError, NonFinite, RunLocked, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def bf16_is_fast() -> bool:
    """Whether matrix products in bf16 are faster than in fp32 here: any current GPU, CPUs with bf16 instructions."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def make_accelerator(precision: str, accumulate: int, cpu: bool = False) -> Accelerator:
    """accelerate's engine, on the CPU where there is no CUDA device, or for `cpu`. precision: fp32, bf16, or auto (bf16
    if fast)."""
    low = precision == "bf16" or (precision == "auto" and bf16_is_fast())
    return Accelerator(
        mixed_precision="bf16" if low else "no",
        gradient_accumulation_steps=accumulate,
        cpu=cpu or not torch.cuda.is_available(),
    )


def check_run(run: object, source: ShardDataset | DecodedCache, predictor: nn.Module | None = None) -> None:
    """Raise ConfigError for what a config's types cannot tell: names, and how networks and data fit."""
    if run.data.holes not in MAKERS:
        raise ConfigError(f"data.holes: unknown maker {run.data.holes!r}: choose one of {', '.join(MAKERS)}")
    size = getattr(run.model, "size", None)
    if size is not None and size not in SIZES:
        raise ConfigError(f"model.size: unknown size {size!r}: choose one of {', '.join(SIZES)}")
    if size is not None and source.resolution % SIZES[size]["patch"]:
        raise ConfigError(f"the pictures have {source.resolution} px, no multiple of the patch of size {size}")
    if predictor is not None and predictor.channels != 1 + source.num_labels:
        theirs = predictor.channels - 1
        raise ConfigError(f"objective.predictor plans {theirs} labels, the shards have {source.num_labels}")


def activation_bytes(loss_of: Callable[[], Tensor]) -> int:
    """Bytes that the backward pass of one loss keeps, each tensor counted once."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss_of()
    return sum(kept.values())


def describe(task: Task, source: ShardDataset | DecodedCache, run: object, start: int, world: int, share: int) -> str:
    """What is about to run: parameters, memory per process (measured on two samples), steps."""
    steps, batch, count = run.optim.steps, run.optim.batch, len(source)
    nets = [learner.net for learner in task.learners.values()]
    sizes = [sum(p.numel() for p in net.parameters()) for net in nets]
    held_here = sum(held(net) for net in nets)
    kept = lambda n: activation_bytes(lambda: task.loss_of(source.batch(np.arange(n)), 0, range(n)))  # noqa: E731
    activations = (kept(2) - kept(1)) * share  # the difference: both keep the weights, or what autocast made of them
    named = "; ".join(f"{type(net).__name__}: {n / 1e6:.2f} M parameters" for net, n in zip(nets, sizes, strict=True))
    return (
        f"{named}\n"
        f"memory per process: weights, average, gradients, optimizer {20 * held_here / 2**20:.0f} MiB; activations of "
        f"{share} pictures about {activations / 2**20:.0f} MiB\n"
        f"{count} pictures; {steps} steps of {batch}, {steps * batch / 1e6:.3f} M, {steps * batch / count:.0f} epochs\n"
        f"{world} process(es); starting at step {start}"
    )
