"""What fills holes, by name: our pipeline, every sampler on a prior, classical baselines.

coherent    coherent:plan=none    repaint:jump_length=2:jump_samples=5    ddnm:steps=50:eta=1    telea
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coherent_ddrm.errors import UserError
from coherent_ddrm.evaluation.baselines import BASELINES
from coherent_ddrm.evaluation.gallery import GREY
from coherent_ddrm.restore_jobs import parse_options

if TYPE_CHECKING:
    import torch

    from coherent_ddrm.pipeline import CoherentInpaintPipeline
    from coherent_ddrm.restoration import RestorationPipeline


@dataclass(frozen=True)
class Filled:
    """Results of a batch, known pixels as given."""

    pictures: np.ndarray  # uint8 (B, H, W, 3)
    nfe: int  # evaluations of all networks, per result
    seconds: float  # of the batch
    memory: float | None  # MiB, the most in use beside what was before; None where it cannot be told


Fill = Callable[[np.ndarray, np.ndarray, list[int]], tuple[np.ndarray, int]]


class Method:
    """Fills (B, H, W, 3) uint8 pictures in their holes (B, H, W) bool, one seed each; what is under a hole is not read.

    Args:
        label: what it is called in files and tables.
        fill: -> (uint8 pictures, evaluations per result).
        facts: all that its results hang on, beside pictures, holes and seeds.
        device: whose memory is watched; None for the process's own.
    """

    def __init__(self, label: str, fill: Fill, facts: Mapping[str, Any], device: torch.device | None = None):
        self.label, self._fill, self.facts, self.device = label, fill, dict(facts), device

    def fill(self, pictures: np.ndarray, holes: np.ndarray, seeds: Sequence[int]) -> Filled:
        gauge, start = Gauge(self.device), time.perf_counter()
        filled, nfe = self._fill(np.where(holes[..., None], GREY, pictures), holes, list(seeds))
        memory = gauge.read()
        seconds = time.perf_counter() - start
        return Filled(np.where(holes[..., None], filled, pictures), nfe, seconds, memory)


class Makers:
    """Methods from their names, the networks loaded once.

    Args:
        checkpoint: of our pipeline, or any prior that `load_prior` takes (then "coherent" is not to be had).
        steps, shift: of every method's time grid; None = the method's own. An option of a method's comes first.
        dtype: of the networks; schedule and projection are fp32. None = fp32.
    """

    def __init__(
        self,
        checkpoint: str,
        device: torch.device,
        steps: int | None = None,
        shift: float | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.checkpoint, self.device, self.steps, self.shift = checkpoint, device, steps, shift
        self.dtype = "float32" if dtype is None else str(dtype).removeprefix("torch.")
        self.networks = {} if dtype is None else {"dtype": dtype}

    def make(self, text: str) -> Method:
        """The method that `text` describes. UserError for a name or an option that there is not."""
        name, *parts = text.split(":")
        options = parse_options(parts)
        label = "_".join([name, *(part.replace("=", "-") for part in parts)])
        if name in BASELINES:
            if options:
                raise UserError(f"{name} has no options, but {text!r} gives {', '.join(options)}")
            return Method(label, _one_by_one(BASELINES[name]), {"made_by": "coherent-ddrm", "method": name})
        grid = {"num_inference_steps": options.pop("steps", self.steps), "shift": options.pop("shift", self.shift)}
        _check(name, {"steps": grid["num_inference_steps"], "shift": grid["shift"]})
        plan = options.pop("plan", "predicted") if name == "coherent" else "none"
        if plan not in ("predicted", "none"):
            raise UserError(f"{text!r}: plan is predicted or none")
        fill = self._planned(grid, options) if plan == "predicted" else self._restored(name, grid, options)
        facts = {"made_by": "coherent-ddrm", "method": name, "plan": plan, **grid, **options}
        return Method(label, fill, facts | {"checkpoint": self.identity, "dtype": self.dtype}, self.device)

    @cached_property
    def identity(self) -> str:
        """What the checkpoint is: its own hash, or the name of another prior."""
        from coherent_ddrm.export import INDEX, MANIFEST, verify_manifest

        folder = Path(self.checkpoint)
        ours = (folder / INDEX).is_file() and (folder / MANIFEST).is_file()
        return f"{folder.name}, sha256 {verify_manifest(folder)}" if ours else str(self.checkpoint)

    @cached_property
    def pipeline(self) -> CoherentInpaintPipeline:
        """The two-stage pipeline. CheckpointError if the checkpoint is another prior."""
        from coherent_ddrm.pipeline import CoherentInpaintPipeline

        pipe = CoherentInpaintPipeline.from_pretrained(self.checkpoint, **self.networks).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def restoration(self) -> RestorationPipeline:
        """The checkpoint, or another prior, that is told nothing."""
        from coherent_ddrm.restoration import RestorationPipeline

        return RestorationPipeline.from_prior(self.checkpoint, self.device, **self.networks)

    def _planned(self, grid: dict[str, Any], options: dict[str, Any]) -> Fill:
        """The two-stage pipeline as a method."""
        _check("coherent", options)
        pipe = self.pipeline

        def fill(pictures: np.ndarray, holes: np.ndarray, seeds: list[int]) -> tuple[np.ndarray, int]:
            done = pipe(list(pictures), list(holes), generator=seeds, **grid, **options)
            return np.stack([np.asarray(image) for image in done.images]), done.nfe + done.structure_nfe

        return fill

    def _restored(self, name: str, grid: dict[str, Any], options: dict[str, Any]) -> Fill:
        """A sampler on the checkpoint, or another prior, that is told nothing unless the method tells it."""
        from coherent_ddrm.restoration import check_options
        from coherent_ddrm.samplers import RESTORERS

        if name not in RESTORERS:
            names = ", ".join([*RESTORERS, *BASELINES])
            raise UserError(f"unknown method {name!r}: choose of {names}; NAME:OPTION=VALUE sets an option")
        check_options(name, options)
        pipe = self.restoration

        def fill(pictures: np.ndarray, holes: np.ndarray, seeds: list[int]) -> tuple[np.ndarray, int]:
            masks = list(np.uint8(255) * holes)
            done = pipe(list(pictures), "inpainting", name, masks, generator=seeds, **grid, **options)
            return np.stack([np.asarray(image.convert("RGB")) for image in done.images]), done.nfe

        return fill


RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "steps": ("a whole number from 1", lambda v: isinstance(v, int) and v >= 1),
    "shift": ("a number above 0", lambda v: isinstance(v, int | float) and v > 0),
    "eta": ("a number from 0 to 1", lambda v: isinstance(v, int | float) and 0 <= v <= 1),
    "structure_steps": ("a whole number from 1", lambda v: isinstance(v, int) and v >= 1),
    "structure_scale": ("a number from 0", lambda v: isinstance(v, int | float) and v >= 0),
    "resample": ("a whole number from 1", lambda v: isinstance(v, int) and v >= 1),
}


def _check(name: str, options: Mapping[str, Any]) -> None:
    """UserError for an option of the pipeline, or of a grid, that there is not or that breaks its rule."""
    for option, value in options.items():
        if option not in RULES:
            raise UserError(f"{name} has no option {option!r}; it has plan, {', '.join(RULES)}")
        rule, kept = RULES[option]
        if value is not None and (isinstance(value, bool) or not kept(value)):
            raise UserError(f"{option} of {name} is {value!r}; it must be {rule}")


class Gauge:
    """The most memory in use since it was made, beside what was then: of a CUDA device, else of this process where
    Linux tells it. What was there before and goes meanwhile (garbage) hides as much."""

    def __init__(self, device: torch.device | None):
        self.cuda = device is not None and device.type == "cuda"
        self.device = device
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device) / 2**20
            return
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # starts the high-water mark anew
        except OSError:  # then the mark is that of all that ran before, which tells nothing of this
            self.before = None
            return
        self.before = _of_this_process("VmRSS")

    def read(self) -> float | None:
        """MiB"""
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated(self.device) / 2**20 - self.before
        most = _of_this_process("VmHWM")
        return None if most is None or self.before is None else max(0.0, most - self.before)


def _of_this_process(name: str) -> float | None:
    """MiB"""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith(name))
    except (OSError, StopIteration):
        return None


def _one_by_one(baseline: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Fill:
    return lambda pictures, holes, seeds: (np.stack([baseline(*one) for one in zip(pictures, holes, strict=True)]), 0)
