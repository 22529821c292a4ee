"""Unconditional priors from files: our checkpoint, a diffusers pipeline or U-Net, a guided-diffusion state dict.

    prior = load_prior("google/ddpm-celebahq-256", "cuda")            # also a folder, or a .safetensors file
    x0 = sample(DDIM(prior), z, time_grid(50), rng)                   # prior(x_t, t) -> x0_hat, prior.schedule

| given | read |
|---|---|
| our checkpoint, or its transformer/ | the DiT without known pixels and without a plan: any size its patch divides |
| a diffusers pipeline folder | unet/ (UNet2DModel) and scheduler/ (betas, prediction type, clipping) |
| a UNet2DModel folder | with its scheduler_config.json, there or in scheduler/ (beside unet/); refused without one |
| "org/name" on the Hub | any of the above, downloaded once |
| NAME.safetensors | guided-diffusion's U-Net with its flags in NAME.json, see coherent_ddrm.guided_diffusion |

Only safetensors are read, never torch pickles (.bin, .pt, .ckpt). A scheduler gives the levels the network was trained
on; which of them are walked is the sampler's choice. Level 0 is clean data (diffusers' set_alpha_to_one). x0_hat is
clipped as the scheduler's clip_sample says; set `prior.clip = None` to undo it.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from diffusers import UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from coherent_ddrm import export, guided_diffusion
from coherent_ddrm.denoiser import Denoiser, DiscreteDenoiser
from coherent_ddrm.errors import CheckpointError
from coherent_ddrm.models.dit import Context, DiT
from coherent_ddrm.schedule import Schedule, VPDiscrete
from coherent_ddrm.weights import CONVERT, UNREADABLE, load_network, one_line

SCHEDULERS = tuple(
    f"{name}Scheduler"
    for name in (
        "DDPM DDIM PNDM UniPCMultistep DEISMultistep DPMSolverMultistep DPMSolverSinglestep EulerDiscrete "
        "EulerAncestralDiscrete HeunDiscrete LMSDiscrete"
    ).split()
)  # built on the betas of a DDPM
SCHEDULER = "scheduler_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Prior(Denoiser, Protocol):
    """A denoiser that says what pictures it takes."""

    net: torch.nn.Module
    resolution: int | None  # side of its training pictures; None = unknown, or any
    channels: int
    labels: int  # classes, one of which it must be told (`class_labels`); 0 = none
    shift: float  # of the time grid that suits it
    multiple: int  # what sides of pictures must be a multiple of


@dataclass
class DiTPrior:
    """Our own network as an unconditional prior: every pixel is missing, and there is no plan."""

    net: DiT
    resolution: int | None = None
    labels: int = 0
    shift: float = 1.0
    per_pixel_time = True
    _context: tuple[object, Context] | None = field(default=None, repr=False)  # for the last shape of x_t

    @property
    def schedule(self) -> Schedule:
        return self.net.schedule

    @property
    def channels(self) -> int:
        return self.net.config.in_channels

    @property
    def multiple(self) -> int:
        return self.net.config.patch

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x0_hat in fp32. x_t: (B, C, H, W); t: (B,) in [0, 1], or (B, 1, H, W), where 0 means known."""
        with self.autocast(x_t):
            dtype = self.net.dtype
            if t.ndim == 4:
                return self.net(x_t, t).float()
            key = (tuple(x_t.shape), x_t.device, dtype)
            if self._context is None or self._context[0] != key:
                with torch.no_grad():
                    self._context = key, self.net.context(torch.zeros_like(x_t), cached=False)
            return self.net.denoise(x_t, t, self._context[1]).float()

    def told(self, y: Tensor, hole: Tensor) -> ToldPrior:
        """The denoiser that knows the pixels of y (B, C, H, W) outside `hole` (B, 1, H, W)."""
        with self.autocast(y):
            return ToldPrior(self, self.net.context(y, hole, cached=self.net.config.one_way))

    def autocast(self, x: Tensor) -> AbstractContextManager:
        """The network's own precision, where it is a low one."""
        low = self.net.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(x.device.type, self.net.dtype) if low else nullcontext()


@dataclass
class ToldPrior:
    """Our own network with known pixels, x0_hat in fp32."""

    prior: DiTPrior
    context: Context

    @property
    def schedule(self) -> Schedule:
        return self.prior.schedule

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        with self.prior.autocast(x_t):
            return self.prior.net.denoise(x_t, t, self.context).float()


def load_prior(
    source: str | os.PathLike[str], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Prior:
    """The prior in a folder, a file or a Hub repository, ready to use; `dtype` is that of its network alone.

    Raises CheckpointError, one line that says what is wrong and what to do.
    """
    path = Path(source)
    if path.is_file() or (path.suffix in (".safetensors", *PICKLES) and not path.is_dir()):
        prior = _guided(path)
    else:
        prior = _from_folder(_folder(source))
    for name, weight in prior.net.state_dict().items():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise CheckpointError(f"{source}: weight {name!r} holds numbers that are not finite (NaN); get it again")
    torch.nn.Module.to(prior.net, device=device, dtype=dtype)  # diffusers' own `to` warns for every dtype
    prior.net.eval().requires_grad_(False)
    return prior


def _folder(source: str | os.PathLike[str]) -> Path:
    """The folder, or a snapshot of the Hub repository of that name."""
    try:
        return export.local_folder(source, {})
    except CheckpointError:
        raise
    except Exception as error:  # of huggingface_hub, httpx or the disk: no one type covers them
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{source}: no such folder, and not to be had from the Hub ({type(error).__name__}: {reason}); "
            "download it where there is a network, and name its folder"
        ) from error


def _from_folder(folder: Path) -> Prior:
    if (folder / export.INDEX).is_file():
        index = export.read_json(folder / export.INDEX)
        if index.get("_class_name") != "CoherentInpaintPipeline":
            return _from_pipeline(folder, index)
        export.verify_manifest(folder)
        facts = export.read_facts(folder)
        return DiTPrior(load_network(DiT, folder / "transformer"), facts.resolution, shift=facts.shift)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: neither {export.INDEX} nor config.json in it, so it holds no prior")
    kind = export.read_json(folder / "config.json").get("_class_name")
    if kind == "DiT":
        return DiTPrior(load_network(DiT, folder))
    if kind != "UNet2DModel":
        raise CheckpointError(f"{folder}: a {kind}; a prior is a UNet2DModel, a pipeline around one, or our checkpoint")
    beside = folder.parent if folder.name == "unet" else folder  # unet/ of a pipeline
    places = [folder / SCHEDULER, beside / "scheduler" / SCHEDULER]
    scheduler = next((place for place in places if place.is_file()), None)
    if scheduler is None:
        raise CheckpointError(
            f"{folder}: a U-Net without {SCHEDULER}, so the noise it was trained on is unknown; put that file there "
            "(DDPM's own: diffusers.DDPMScheduler().save_pretrained(FOLDER))"
        )
    return _denoiser(load_network(UNet2DModel, folder), folder, **_read_scheduler(scheduler))


def _from_pipeline(folder: Path, index: dict[str, Any]) -> DiscreteDenoiser:
    """A pipeline of a UNet2DModel and a scheduler (DDPMPipeline, DDIMPipeline, PNDMPipeline)."""
    name = index.get("_class_name")
    parts = {key: value for key, value in index.items() if isinstance(value, list) and len(value) == 2 and value[1]}
    if more := sorted(parts.keys() - {"unet", "scheduler"}):
        raise CheckpointError(f"{folder}: {name} has a {more[0]} too; a prior is a U-Net on pixels and its scheduler")
    if parts.get("unet") != ["diffusers", "UNet2DModel"]:
        raise CheckpointError(f"{folder}: the unet of its {name} is {parts.get('unet')}, not diffusers' UNet2DModel")
    settings = _read_scheduler(folder / "scheduler" / SCHEDULER)
    return _denoiser(load_network(UNet2DModel, folder / "unet"), folder, **settings)


def _read_scheduler(file: Path) -> dict[str, Any]:
    """schedule, prediction and clip, as the scheduler itself computes them from its config."""
    name = export.read_json(file).get("_class_name")
    if name not in SCHEDULERS:
        raise CheckpointError(
            f"{file}: {name} has no betas of a DDPM; a prior's scheduler is one of {', '.join(SCHEDULERS)}"
        )
    try:
        scheduler = getattr(diffusers, name).from_pretrained(file.parent)
        schedule = VPDiscrete(tuple(scheduler.alphas_cumprod.double().tolist()))
    except (*UNREADABLE, NotImplementedError) as error:
        raise CheckpointError(f"{file}: not usable ({one_line(error)})") from error
    config = scheduler.config
    if config.get("thresholding"):
        raise CheckpointError(f"{file}: thresholding is not done here; set it to false, and clip_sample to true")
    clip = float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample", False) else None
    return dict(schedule=schedule, prediction=config.get("prediction_type", "epsilon"), clip=clip)


def _denoiser(net: UNet2DModel, source: Path, **settings: Any) -> DiscreteDenoiser:
    """The U-Net as a denoiser, if it is one that takes a picture and a timestep and returns a picture."""
    config = net.config
    sides = {config.sample_size} if isinstance(config.sample_size, int | None) else set(config.sample_size)
    if len(sides) != 1:
        raise CheckpointError(f"{source}: sample_size is {config.sample_size}; a prior makes square pictures")
    if config.time_embedding_type != "positional":
        raise CheckpointError(f"{source}: time_embedding_type is {config.time_embedding_type!r}, not 'positional'")
    if config.class_embed_type is not None:
        raise CheckpointError(f"{source}: class_embed_type is {config.class_embed_type!r}; only class numbers are told")
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise CheckpointError(
            f"{source}: {config.out_channels} channels from {config.in_channels}; a prior returns as many, or twice as "
            "many where it learned its variance"
        )
    takes = dict(resolution=sides.pop(), channels=config.in_channels, labels=config.num_class_embeds or 0)
    takes["multiple"] = 2 ** (len(config.down_block_types) - 1)
    try:
        return DiscreteDenoiser(net, **takes, **settings)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _guided(file: Path) -> DiscreteDenoiser:
    """guided-diffusion's U-Net from NAME.safetensors and NAME.json."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file}: a prior is a folder or a .safetensors file; {CONVERT}")
    described = file.with_suffix(".json")
    if not described.is_file():
        raise CheckpointError(f"{described}: missing; it holds guided-diffusion's flags of {file.name}, as JSON")
    flags = guided_diffusion.read_flags(export.read_json(described), str(described))
    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be loaded ({one_line(error)})") from error
    net = UNet2DModel(**guided_diffusion.unet_config(flags))
    weights = guided_diffusion.convert(state, flags, str(file))
    try:
        net.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{file}: does not fit the flags in {described.name} ({one_line(error)})") from error
    return _denoiser(
        net,
        file,
        schedule=VPDiscrete(tuple(guided_diffusion.alphas_cumprod(flags).tolist())),
        prediction="sample" if flags.predict_xstart else "epsilon",
        clip=1.0,
        timestep_scale=1000 / flags.diffusion_steps if flags.rescale_timesteps else 1.0,
    )
