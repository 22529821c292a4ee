"""Weights from files: diffusers' folders, strictly, and timm's own; every fault is one line that says what to do."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import timm
from diffusers import ModelMixin
from safetensors import SafetensorError
from torch import nn

from coherent_ddrm import export
from coherent_ddrm.errors import CheckpointError

Net = TypeVar("Net", bound=nn.Module)
CONVERT = (
    "torch pickles are never loaded; where you trust one, convert it once: "
    "safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW_FILE)"
)
UNREADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError, SafetensorError)


def load_network(kind: type[ModelMixin], folder: Path) -> Any:
    """A network of diffusers' format from its folder: strict, safetensors only."""
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: no weights in .safetensors; {CONVERT}")
    export.check_keys(folder / "config.json", inspect.signature(kind.__init__).parameters)
    try:
        net, found = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    except UNREADABLE as error:
        raise CheckpointError(f"{folder}: cannot be loaded ({one_line(error)})") from error
    for state in ("missing", "unexpected", "mismatched"):
        if names := sorted(map(str, found[f"{state}_keys"])):
            raise CheckpointError(f"{folder}: weight {names[0]!r} is {state} ({len(names)} such); get it again")
    for weight in net.parameters():  # mapped from the file, at odd addresses where sums round differently
        weight.data = weight.data.clone()
    return net


def load_or_pretrained(
    kind: type[Net], source: str | os.PathLike[str], pretrained: Callable[[str], Net], script: str
) -> Net:
    """A network of `kind` from its folder, or a timm model by name through `pretrained`, which downloads its weights.

    script: what makes such a folder. Raises CheckpointError.
    """
    folder = Path(source)
    if folder.is_dir():
        if export.read_json(folder / "config.json").get("_class_name") != kind.__name__:
            raise CheckpointError(f"{folder}: holds no {kind.__name__}; {script} makes one (its export/)")
        return load_network(kind, folder)
    if not timm.is_model(str(source)):
        raise CheckpointError(f"{source}: neither a folder with a {kind.__name__} nor a model of timm")
    try:
        return pretrained(str(source))
    except Exception as error:  # of timm, huggingface_hub, httpx or the disk: no one type covers them
        raise CheckpointError(
            f"{source}: its weights are not to be had ({type(error).__name__}: {one_line(error)[:200]}); "
            f"download them where there is a network, or name a folder of {script}"
        ) from error


def one_line(error: BaseException) -> str:
    """An error of another library on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
