"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) in both stages' networks, made by peft.

A layer's weight W stays; W + B A is what is used, A (rank, in) and B (out, rank) alone are learned. Merged, B A is
added to W and the network is a plain one again. A folder of adapters:

    adapter.json   transformer/   structure/      each with adapter_config.json, adapter_model.safetensors, peft's files

peft is imported where it is needed: it is optional, and slow to load.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from coherent_ddrm.errors import CheckpointError
from coherent_ddrm.export import read_json, sha256, write_atomic

if TYPE_CHECKING:
    from coherent_ddrm.pipeline import CoherentInpaintPipeline

RECORD, CONFIG, WEIGHTS = "adapter.json", "adapter_config.json", "adapter_model.safetensors"
COMPONENTS = ("transformer", "structure")


def targets(net: nn.Module, rank: int) -> list[str]:
    """Layers that get an adapter: linear ones and ungrouped convolutions, where both sides are wider than `rank`."""
    names = []
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear):
            sides = layer.in_features, layer.out_features
        elif isinstance(layer, nn.Conv2d) and layer.groups == 1:
            sides = layer.in_channels, layer.out_channels
        else:
            continue
        if min(sides) > rank:
            names.append(name)
    return names


def add_adapter(net: nn.Module, rank: int) -> nn.Module:
    """`net` with adapters inside, which alone learn; at first they change nothing (B is zero).

    A is drawn from torch's global generator. Raises ValueError if no layer is wider than `rank`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    wanted = targets(net, rank)
    if not wanted:
        raise ValueError(f"rank {rank}: no layer of this network is wider; take a smaller one")
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=wanted), net)


def is_adapted(net: nn.Module) -> bool:
    return hasattr(net, "peft_config")


def merge(net: nn.Module) -> nn.Module:
    """`net` with its adapters added to the weights, and a plain network again; a plain one stays as it is."""
    if not is_adapted(net):
        return net
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(net.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            net.set_submodule(name, layer.get_base_layer())
    del net.peft_config
    return net.requires_grad_(True)


def save_adapter(net: nn.Module, folder: Path) -> None:
    """Write the adapters of one network, in peft's own files."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    net.peft_config["default"].save_pretrained(str(folder))
    weights = {name: value.detach().cpu().contiguous() for name, value in get_peft_model_state_dict(net).items()}
    save_file(weights, folder / WEIGHTS)
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode & 0o777)  # safetensors lets only the owner read its files


def restore_adapter(net: nn.Module, folder: Path) -> nn.Module:
    """`net` with the adapters that `save_adapter` wrote, not merged. CheckpointError unless they fit it exactly."""
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config, weights = LoraConfig.from_pretrained(str(folder)), load_file(folder / WEIGHTS)
        inject_adapter_in_model(config, net)
        if get_peft_model_state_dict(net).keys() != weights.keys():
            raise ValueError("its layers are others")
        set_peft_model_state_dict(net, weights)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: the adapter does not fit this network ({' '.join(str(error).split())[:200]})"
        ) from error
    return net.requires_grad_(False)


def count_parameters(folder: Path) -> int:
    """Numbers in the adapters of one network."""
    return sum(value.numel() for value in load_file(folder / WEIGHTS).values())


def write_record(folder: Path, base: str) -> None:
    """Record which checkpoint (its hash) the adapters in `folder` belong to, and the sha256 of their files."""
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.glob("*/adapter_*"))}
    content = {"version": 1, "checkpoint_sha256": base, "sha256": files}
    write_atomic(folder / RECORD, json.dumps(content, indent=2).encode() + b"\n")


def load_adapter(pipe: CoherentInpaintPipeline, folder: str | Path) -> CoherentInpaintPipeline:
    """`pipe` with the adapters in `folder` (OUT/lora of a fine-tuning) merged into its networks.

    Raises CheckpointError if a file is missing or altered, or if `pipe` was not loaded from the checkpoint that the
    adapters were trained on; nothing has been changed then.
    """
    folder = Path(folder)
    record = read_json(folder / RECORD)
    for name, digest in record["sha256"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name}: missing or damaged, its sha256 is not the one in {RECORD}")
    if pipe.checkpoint_hash != record["checkpoint_sha256"]:
        theirs, mine = record["checkpoint_sha256"][:12], str(pipe.checkpoint_hash)[:12]
        raise CheckpointError(f"{folder}: the adapter belongs to checkpoint {theirs}, this one is {mine}")
    for name in COMPONENTS:
        if (folder / name).is_dir():
            merge(restore_adapter(getattr(pipe, name), folder / name).eval())
    pipe.checkpoint_hash = None  # no folder holds these weights
    return pipe
