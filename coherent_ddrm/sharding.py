"""One network spread over the processes of each machine, for those that do not fit one device: torch's FSDP2.

https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html . Between machines it is replicated, since their
wires are slow (HSDP). accelerate still launches, accumulates and casts; its own FSDP2 path is not taken: it knows calls
of whole modules only, not parts of a block that are asked before the block is, and on CPUs, where tests run, it falls
back to data parallelism without a word.
"""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from coherent_ddrm.config import ConfigError
from coherent_ddrm.models.dit import DiT


def shard(objective: nn.Module, net: DiT, low_precision: bool, compile: bool) -> None:
    """Spread the parameters of `net`, in place; only `objective`, whose part it is, may be called from then on.

    A block is gathered when it runs. Its modulations are asked twice, at time 0 and at t, and stay in between; what
    reads the plan is asked before the block is.

    Args:
        low_precision: gather parameters in bf16, as autocast would cast them; gradients are summed in fp32.
        compile: each block by torch.compile.

    Raises:
        ConfigError: one process alone.
    """
    mesh = _mesh(next(net.parameters()).device)
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh, "mp_policy": low if low_precision else MixedPrecisionPolicy()}
    # keys and values leave a block as views; nothing here writes into them
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for block in net.blocks:
        if compile:
            block.compile()
        for modulation in (block.modulation, block.structure_modulation):
            if modulation is not None:
                fully_shard(modulation, reshard_after_forward=False, **options)
        if block.cross is not None:
            fully_shard(block.cross, **options)
            for method in ("keys_values", "read"):
                register_fsdp_forward_method(block.cross, method)
        fully_shard(block, **options)
    fully_shard(objective, **options)


def held(net: nn.Module) -> int:
    """Parameters of `net` that this process holds."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in net.parameters())


def is_spread(net: nn.Module) -> bool:
    """Whether some of its parameters are."""
    return any(isinstance(p, DTensor) for p in net.parameters())


def whole(value: Tensor) -> Tensor:
    """A spread tensor in one piece: on the CPU of the first process, without content on the others. All must ask.

    Any other tensor as it is.
    """
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else full.to("meta")


def spread_as(value: Tensor, like: Tensor) -> Tensor:
    """`value`, which every process has in one piece, spread as `like` is; as it is if `like` is not."""
    if not isinstance(like, DTensor):
        return value
    value = value.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _mesh(device: torch.device) -> DeviceMesh:
    """Processes of a machine side by side, machines below each other."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        raise ConfigError("optim.shard: one process has nobody to share with; launch several, or leave it out")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if local in (1, world):
        return init_device_mesh(device.type, (world,))
    return init_device_mesh(device.type, (world // local, local), mesh_dim_names=("replicate", "shard"))
