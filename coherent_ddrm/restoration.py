"""Restoration with any method, any operator and any prior.

    pipe = RestorationPipeline.from_prior("google/ddpm-celebahq-256")
    result = pipe(picture, "super_resolution:4", sampler="ddnm", degrade=True, generator=0)
    result.images[0]; result.y; result.nfe

The prior is our checkpoint, or any diffusers U-Net (see coherent_ddrm.priors). Schedule, projection and sampler run in
fp32, whatever the network's dtype.
"""

from __future__ import annotations

import inspect
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from coherent_ddrm.denoiser import Bound, Denoiser
from coherent_ddrm.errors import CheckpointError, UserError
from coherent_ddrm.guidance import ClassifierGuided, LogProb, Target, guide_class
from coherent_ddrm.measure import measure, read_pictures, read_region, write_pictures
from coherent_ddrm.operators import Inpainting, LinearOperator, Observation, Operator
from coherent_ddrm.pipeline_io import OUTPUT_TYPES, seed_keys
from coherent_ddrm.priors import DiTPrior, Prior, load_prior
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.samplers import RESTORERS, Restorer, sample
from coherent_ddrm.samplers.mask_shift import mask_shift

SHIFTED = ("ddnm", "hybrid")  # work by projection alone, so that mask-shift can be used with any operator


@dataclass
class RestorationOutput(BaseOutput):
    """What a call returns: N = pictures x candidates results, picture by picture."""

    images: list[Image.Image] | np.ndarray | Tensor
    y: Tensor  # the measurement, one row per picture, on the [-1, 1] scale
    residual: float | None  # max |A x0 - y| as the sampler left it; None where noise or a non-linear A explains it
    seeds: list[tuple[int, int]]
    nfe: int  # network evaluations per result
    seconds: float


class RestorationPipeline:
    """Restore measurements y = A x + sigma_y n of pictures as large as the prior's, or larger.

    Args:
        prior: a denoiser with `resolution` and `channels`, as `load_prior` returns it.
    """

    def __init__(self, prior: Prior, device: str | torch.device = "cpu"):
        self.prior, self.device = prior, torch.device(device)

    @classmethod
    def from_prior(
        cls,
        source: str | os.PathLike[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> RestorationPipeline:
        """The pipeline around a prior on disk or on the Hub. CheckpointError names what is wrong with it."""
        return cls(load_prior(source, device, dtype), device)

    def __call__(
        self,
        image: Any,
        operator: str | Operator,
        sampler: str = "ddnm",
        mask_image: Any = None,
        sigma_y: float = 0.0,
        degrade: bool = False,
        num_inference_steps: int | None = None,
        generator: Any = None,
        candidates: int = 1,
        shift: float | None = None,
        class_labels: Sequence[int] | None = None,
        class_scale: float = 1.0,
        null_label: int | None = None,
        classifier: LogProb | None = None,
        show: Sequence[str | tuple[str, Any]] = (),
        guidance_scale: float = 20.0,
        output_type: str = "pil",
        callback_on_step_end: Callable[[int, float, Tensor], Tensor | None] | None = None,
        check_only: bool = False,
        **options: Any,
    ) -> RestorationOutput | None:
        """Restore each picture.

        Args:
            image: what was measured: PIL, uint8 numpy (H, W) or (H, W, 3), lists of these, or a torch tensor
                (B, ...) on the [-1, 1] scale. With `degrade` a clean picture, brought to the prior's size and measured
                first.
            operator: a spec such as "blur:gaussian:2+super_resolution:4" (see operators.OPERATORS), or an Operator.
            sampler: a name of samplers.RESTORERS; `options` are its own (eta, jump_samples, scale, ...).
            mask_image: for inpainting: white = missing.
            sigma_y: standard deviation of y's noise on the [-1, 1] scale; `degrade` adds it.
            num_inference_steps: steps of the grid; the method's default unless given.
            generator: a seed, a torch.Generator, or a list of them, one per picture.
            candidates: results per picture.
            shift: above 1 spends more steps at high noise; the prior's own unless given.
            class_labels: one per picture, for a prior that has classes.
            class_scale: classifier-free guidance on them, 1 = none; `null_label` is the prior's label for "any class".
            classifier: guides towards what `show` names (see guidance.ClassifierGuided), "guidpaint" in its first stage
                alone, the other samplers all the way. classifier.load_classifier reads one.
            show: class names, each for the hole (without one, for the whole picture) or, as (name, mask), for the white
                of a mask.
            guidance_scale: strength of the classifier; 0 = not guided.
            output_type: "pil", "np" (N, H, W, C) or "pt" (N, C, H, W), floats in [0, 1].
            callback_on_step_end: called with (move, s, x_s) after each; a returned tensor replaces x_s.
            check_only: raise what would be raised before the first evaluation, restore nothing and return None.

        Raises:
            UserError: an input or an argument cannot be used.
            CheckpointError: the network returned numbers that are not finite.
        """
        start = time.perf_counter()
        shift = self.prior.shift if shift is None else shift
        self._check(sampler, output_type, candidates, num_inference_steps, sigma_y, shift, guidance_scale, options)
        pictures = read_pictures(image)
        keys = seed_keys(generator, len(pictures), candidates)
        with torch.no_grad(), _plain_words():
            observation, size = measure(
                pictures, operator, mask_image, sigma_y, degrade, self.prior, keys[::candidates], self.device
            )
            y, operator = observation.y.repeat_interleave(candidates, dim=0), observation.operator.repeat(candidates)
            seen = Observation(y, operator, sigma_y)
            labels = self._labels(class_labels, len(pictures), candidates)
            told = self._classes(labels, class_scale, null_label)
            read = lambda mask: read_region(mask, pictures, self.prior.resolution if degrade else None)  # noqa: E731
            regions = [(name, None if mask is None else read(mask)) for name, mask in _named(show)]
            targets = self._targets(classifier, regions, operator, candidates, size)
            whole = self._check_size(operator, sampler, size, bool(targets), callback_on_step_end is not None)

            def method(part: Observation) -> Restorer:
                denoiser, own = self._denoiser(sampler, part, told, options.get("clean", False)), {}
                if targets:
                    own = {"plain": denoiser} if sampler == "guidpaint" else {}
                    hole = part.operator.hole.float() if isinstance(part.operator, Inpainting) else None
                    denoiser = ClassifierGuided(denoiser, classifier, targets, guidance_scale, hole)
                return RESTORERS[sampler](denoiser, part, **own, **options)

            if check_only:
                method(seen)
                return None
            times = lambda made: made.times(num_inference_steps or made.default_steps, shift)  # noqa: E731
            shape, rng = (len(keys), self.prior.channels, *size), [keyed_generator(*key) for key in keys]
            if whole:
                engine = method(seen)
                z = normal(torch.empty(shape, device=self.device), rng)
                x0, nfe = sample(engine, z, times(engine), rng, callback_on_step_end), engine.nfe
            else:
                x0, nfe = mask_shift(method, seen, shape, self.prior.resolution, times, rng)
        residual = float((operator.A(x0) - y).abs().max()) if _exact(seen) else None
        if _exact(seen) and isinstance(operator, Inpainting):
            x0 = operator.project(x0, y)  # the composite: not every method keeps known pixels exactly
        images = write_pictures(x0, output_type)
        return RestorationOutput(images, observation.y, residual, keys, nfe, time.perf_counter() - start)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _check(
        self,
        sampler: str,
        output_type: str,
        candidates: int,
        steps: int | None,
        sigma_y: float,
        shift: float,
        guidance_scale: float,
        options: dict[str, Any],
    ) -> None:
        if sampler not in RESTORERS:
            raise UserError(f"unknown sampler {sampler!r}: choose one of {', '.join(RESTORERS)}")
        check_options(sampler, options)
        if (sampler in ("coherent", "rad") or options.get("clean")) and not isinstance(self.prior, DiTPrior):
            name = sampler if sampler in ("coherent", "rad") else "clean"
            raise UserError(f"{name!r} needs a time per pixel, which this prior cannot take; use our checkpoint")
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"unknown output_type {output_type!r}; choose one of {', '.join(OUTPUT_TYPES)}")
        for name, count in (("candidates", candidates), ("num_inference_steps", 1 if steps is None else steps)):
            if not isinstance(count, int) or count < 1:
                raise UserError(f"{name} is {count}; it must be a whole number from 1")
        if not 0 <= sigma_y < float("inf"):
            raise UserError(f"sigma_y is {sigma_y}; it is a standard deviation on the [-1, 1] scale, 0 or more")
        for name, number in (("shift", shift), ("guidance_scale", guidance_scale)):
            if not 0 <= number < float("inf") or (name == "shift" and number == 0):
                raise UserError(f"{name} is {number}; it must be a number {'above' if name == 'shift' else 'from'} 0")
        if sigma_y and not RESTORERS[sampler].knows_noise:
            knowing = ", ".join(name for name, method in RESTORERS.items() if method.knows_noise)
            warnings.warn(f"sampler {sampler!r} takes y as free of noise; {knowing} use sigma_y", stacklevel=3)

    def _check_size(self, operator: Operator, sampler: str, size: Sequence[int], guided: bool, watched: bool) -> bool:
        """Whether the prior takes pictures of `size` whole; UserError where it takes them in no way."""
        resolution, multiple, by = self.prior.resolution, self.prior.multiple, f"{size[1]} x {size[0]}"
        if resolution is None and any(side % multiple for side in size):
            raise UserError(f"the picture is {by}; this prior needs sides that are multiples of {multiple}")
        if resolution is None or tuple(size) == (resolution, resolution):
            return True
        if min(size) < resolution:
            raise UserError(f"the picture is {by}, the prior's are {resolution} x {resolution}; enlarge it")
        larger = f"the picture is {by}, larger than the prior's {resolution} x {resolution}"
        if guided or watched:
            cause = "a classifier cannot guide" if guided else "a callback cannot look on"
            raise UserError(f"{larger}, and {cause} window by window; shrink it")
        if not isinstance(operator, Inpainting) and sampler not in SHIFTED:
            raise UserError(
                f"{larger}: choose {' or '.join(SHIFTED)}, which work window by window (so does all inpainting), or "
                "shrink it"
            )
        return False

    def _labels(self, class_labels: Sequence[int] | None, pictures: int, candidates: int) -> Tensor | None:
        count = self.prior.labels
        if (class_labels is None) != (count == 0):
            raise UserError(f"this prior knows {count} classes; give class_labels if and only if it has any")
        if class_labels is None:
            return None
        if len(class_labels) != pictures or not all(0 <= label < count for label in class_labels):
            raise UserError(f"class_labels are {list(class_labels)}; give {pictures}, each from 0 to {count - 1}")
        return torch.tensor(class_labels, device=self.device).repeat_interleave(candidates)

    def _targets(
        self,
        classifier: LogProb | None,
        show: Sequence[tuple[str, Tensor | None]],
        operator: Operator,
        candidates: int,
        size: Sequence[int],
    ) -> list[Target]:
        """(region, label) of each thing to be shown, a row per result."""
        if (classifier is None) != (not show):
            raise UserError("a classifier and what to `show` go together; give both or neither")
        everywhere = operator.hole.float() if isinstance(operator, Inpainting) else None
        targets: list[Target] = []
        for name, region in show:
            if region is not None and tuple(region.shape[-2:]) != tuple(size):
                raise UserError(
                    f"the mask for {name} is {region.shape[-1]} x {region.shape[-2]}, the picture to be made "
                    f"{size[1]} x {size[0]}; they must be alike"
                )
            region = everywhere if region is None else region.to(self.device).repeat_interleave(candidates, dim=0)
            targets.append((region, classifier.label(name)))
        return targets

    def _classes(self, labels: Tensor | None, scale: float, null: int | None) -> Denoiser:
        """The prior that knows its classes."""
        if scale == 1:
            return self.prior if labels is None else Bound(self.prior, {"class_labels": labels})
        if labels is None or null is None or not 0 <= null < self.prior.labels:
            raise UserError(
                f"class_scale {scale:g} needs class_labels and null_label, the label of 0 ... {self.prior.labels - 1} "
                "that means any class"
            )
        return guide_class(self.prior, labels, null, scale)

    def _denoiser(self, sampler: str, observation: Observation, told: Denoiser, clean: bool) -> Denoiser:
        """The prior; for the methods that tell the network what is known, the network itself."""
        if (sampler == "coherent" or clean) and isinstance(observation.operator, Inpainting):  # else it refuses
            return self.prior.told(observation.y, observation.operator.hole.float())
        return told


SHARES = ("eta", "eta_b", "zeta", "shrink", "switch")  # options from 0 to 1


def option_defaults(method: type[Restorer]) -> dict[str, Any]:
    """The keyword arguments of a method that are a person's to choose, with their defaults."""
    found: dict[str, Any] = {}
    for kind in method.__mro__:
        if issubclass(kind, Restorer) and "__init__" in vars(kind):
            parameters = list(inspect.signature(kind.__init__).parameters.values())[3:]
            own = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}
            found |= {name: default for name, default in own.items() if name not in found}
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return {name: default for name, default in found.items() if name not in method.internal}


def check_options(sampler: str, options: dict[str, Any]) -> None:
    """UserError for an option that the sampler does not have, or a value of the wrong kind or out of range."""
    known = option_defaults(RESTORERS[sampler])
    for name, value in options.items():
        if name not in known:
            raise UserError(f"sampler {sampler!r} has no option {name!r}; it has {', '.join(known) or 'none'}")
        kind = type(known[name])
        number = isinstance(value, int | float) and not isinstance(value, bool)
        rules = {
            bool: ("true or false", isinstance(value, bool)),
            int: ("a whole number from 1", number and isinstance(value, int) and value >= 1),
            float: ("a number from 0", number and 0 <= value < float("inf")),
            str: ("a word", isinstance(value, str)),
        }
        rule, kept = rules[kind]
        if name in SHARES:
            rule, kept = "a number from 0 to 1", number and 0 <= value <= 1
        if not kept:
            raise UserError(f"{name} of sampler {sampler!r} is {value!r}; it must be {rule}")


@contextmanager
def _plain_words() -> Iterator[None]:
    """What an operator or a method cannot do is said as it is; numbers that are not finite are the network's fault."""
    try:
        yield
    except FloatingPointError as error:
        raise CheckpointError(str(error)) from error
    except ValueError as error:
        raise error if isinstance(error, UserError | CheckpointError) else UserError(str(error)) from error


def _named(show: Sequence[str | tuple[str, Any]]) -> list[tuple[str, Any]]:
    """(class name, mask or None) each."""
    return [(one, None) if isinstance(one, str) else one for one in show]


def _exact(observation: Observation) -> bool:
    return observation.sigma_y == 0 and isinstance(observation.operator, LinearOperator)
