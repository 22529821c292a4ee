"""Where the weights behind a score come from: a folder, the cache of torch, or their publisher; never from chance.

    networks, notes = available(["lpips_alex", "fid", "fid-clothing"], "weights")

In the folder: the publisher's own files under their own names (`FILES`), or the same as .safetensors; and for a name
such as fid-mine, a sub-folder `mine` with the export/ of train/classifier.py or train/perceptual.py.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from coherent_ddrm import export
from coherent_ddrm.classifier import load_classifier
from coherent_ddrm.errors import CheckpointError
from coherent_ddrm.metrics.networks import Inception, Lpips, OwnNetwork
from coherent_ddrm.metrics.table import network_of
from coherent_ddrm.models.perceptual import load_perceptual
from coherent_ddrm.weights import one_line

FILES = {  # by network: whose names end in the first digits of their own SHA-256
    "lpips_alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "lpips_vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "inception": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth",
}
SHIPPED = {"clothing": Path(__file__).resolve().parents[2] / "checkpoints" / "clothing-64-classifier"}
KINDS = {"Classifier": load_classifier, "PerceptualNet": load_perceptual}
UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError)


def available(
    wanted: Iterable[str],
    weights_dir: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    download: bool = True,
) -> tuple[dict[str, nn.Module], list[str]]:
    """The networks that the wanted scores need, by name, and a line for each score that has to be left out.

    wanted: names of scores, as in `table.METRICS`. download: whether files that are nowhere may be fetched.
    """
    folder = None if weights_dir is None else Path(weights_dir)
    if folder is not None and not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder of weights")
    users: dict[str, list[str]] = {}
    for name in dict.fromkeys(wanted):
        if network := network_of(name):
            users.setdefault(network, []).append(name)
    networks, notes = {}, []
    for network, names in users.items():
        try:
            with torch.random.fork_rng(devices=[]):  # modules draw weights before they are given theirs
                networks[network] = load(network, folder, download).to(device)
        except (CheckpointError, ImportError) as error:
            notes.append(f"left out: {', '.join(names)}: {error}")
    return networks, notes


def load(network: str, folder: Path | None = None, download: bool = True) -> Lpips | Inception | OwnNetwork:
    """One network by name. CheckpointError says what is missing or wrong, and what to put where."""
    if network not in FILES:
        return _own(network, folder)
    state, identity = _published(FILES[network], folder, download)
    try:
        if network == "inception":
            return Inception(state, identity)
        return Lpips(network.removeprefix("lpips_"), state, identity)
    except ModuleNotFoundError as error:
        raise ImportError(f"needs the package {error.name}: pip install coherent-ddrm[evaluate]") from error
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{identity}: holds no weights of {network} ({one_line(error)})") from error


def _published(url: str, folder: Path | None, download: bool) -> tuple[dict[str, Tensor], str]:
    """(state, what it is) of a published file: from the folder, from torch's cache, or fetched into that cache."""
    name = url.rpartition("/")[2]
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for place in [cache] if folder is None else [folder, cache]:
        for file in (place / name, (place / name).with_suffix(".safetensors")):
            if file.is_file():
                return _read(file)
    reason = "downloads are off"
    if download:
        try:
            with redirect_stdout(sys.stderr):  # it says what it fetches
                options = dict(map_location="cpu", progress=False, check_hash=True, weights_only=True)
                torch.hub.load_state_dict_from_url(url, **options)
            return _read(cache / name)
        except UNREADABLE as error:
            reason = f"and it could not be fetched ({one_line(error)})"
    where = folder or str(cache).replace(str(Path.home()), "~", 1)  # a report may be passed on
    raise CheckpointError(f"no weights: put {name} from {url} into {where} (it is not there, {reason})")


def _read(file: Path) -> tuple[dict[str, Tensor], str]:
    """(tensors, what it is) of a file. A .pth is read as tensors only, after its hash was compared with the one in its
    name. A .safetensors has another hash than the .pth it is named after: what it is, its own hash alone tells."""
    try:
        found = _sha256(file)
        identity = f"{file.name}, sha256 {found[:16]}"
        if file.suffix == ".safetensors":
            return load_file(file), identity
        wanted = re.search(r"-([0-9a-f]{8})$", file.stem)
        if wanted and not found.startswith(wanted[1]):
            raise CheckpointError(f"{file}: its SHA-256 is {found[:8]}..., not {wanted[1]}...; fetch it again")
        return torch.load(file, map_location="cpu", weights_only=True), identity
    except CheckpointError:
        raise
    except UNREADABLE as error:
        raise CheckpointError(f"{file}: cannot be read ({one_line(error)})") from error


def _own(network: str, folder: Path | None) -> OwnNetwork:
    """A network trained here, from folder/<network>, or the shipped one of that name."""
    places = ([] if folder is None else [folder / network]) + ([SHIPPED[network]] if network in SHIPPED else [])
    for place in places:
        if place.is_dir():
            kind = export.read_json(place / "config.json").get("_class_name")
            if kind not in KINDS:
                raise CheckpointError(f"{place}: holds a {kind}, not one of {', '.join(KINDS)}")
            hashes = " ".join(_sha256(file)[:16] for file in sorted(place.glob("*.safetensors")))
            return OwnNetwork(KINDS[kind](place), f"{kind} of {place.name}, sha256 {hashes}")
    where = places[0] if places else "the folder of weights"
    raise CheckpointError(
        f"no network {network!r}: put an export/ of train/classifier.py or train/perceptual.py at {where}"
        + ("" if places else f" under the name {network}")
    )


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
