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
from coherent_ddrm.guidance import ClassifierGuided, LogProb, Target
from coherent_ddrm.models.dit import InContext
from coherent_ddrm.operators import Inpainting, LinearOperator, Observation, Operator, make_operator, size_from_y
from coherent_ddrm.pipeline_io import OUTPUT_TYPES, seed_keys
from coherent_ddrm.priors import DiTPrior, Prior, load_prior
from coherent_ddrm.restoration_io import read_masks, read_pictures, write_pictures
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
        classifier: LogProb | None = None,
        show: Sequence[str | tuple[str, Any]] = (),
        guidance_scale: float = 20.0,
        output_type: str = "pil",
        callback_on_step_end: Callable[[int, float, Tensor], Tensor | None] | None = None,
        **options: Any,
    ) -> RestorationOutput:
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
            classifier: guides towards what `show` names (see guidance.ClassifierGuided), "guidpaint" in its first stage
                alone, the other samplers all the way. classifier.load_classifier reads one.
            show: class names, each for the hole (without one, for the whole picture) or, as (name, mask), for the white
                of a mask.
            guidance_scale: strength of the classifier; 0 = not guided.
            output_type: "pil", "np" (N, H, W, C) or "pt" (N, C, H, W), floats in [0, 1].
            callback_on_step_end: called with (move, s, x_s) after each; a returned tensor replaces x_s.

        Raises:
            UserError: an input or an argument cannot be used.
            CheckpointError: the network returned numbers that are not finite.
        """
        start = time.perf_counter()
        shift = self.prior.shift if shift is None else shift
        self._check(sampler, output_type, candidates, num_inference_steps, sigma_y, shift, options)
        side = self.prior.resolution if degrade else None
        pictures = read_pictures(image, side).to(self.device)
        keys = seed_keys(generator, len(pictures), candidates)
        with torch.no_grad(), _plain_words():
            observation, size = self._observe(pictures, operator, mask_image, sigma_y, degrade, keys[::candidates])
            seen = _repeat(observation, candidates)
            labels = self._labels(class_labels, len(pictures), candidates)
            targets = self._targets(classifier, show, seen, candidates, side)

            def method(part: Observation) -> Restorer:
                denoiser, own = self._denoiser(sampler, part, labels, options.get("clean", False)), {}
                if targets:
                    own = {"plain": denoiser} if sampler == "guidpaint" else {}
                    hole = part.operator.hole.float() if isinstance(part.operator, Inpainting) else None
                    denoiser = ClassifierGuided(denoiser, classifier, targets, guidance_scale, hole)
                return RESTORERS[sampler](denoiser, part, **own, **options)

            times = lambda made: made.times(num_inference_steps or made.default_steps, shift)  # noqa: E731
            shape, rng = (len(keys), self.prior.channels, *size), [keyed_generator(*key) for key in keys]
            if self._fits(size):
                engine = method(seen)
                z = normal(torch.empty(shape, device=self.device), rng)
                x0, nfe = sample(engine, z, times(engine), rng, callback_on_step_end), engine.nfe
            else:
                self._check_windows(seen.operator, sampler, size, guided=bool(targets))
                x0, nfe = mask_shift(method, seen, shape, self.prior.resolution, times, rng)
        residual = float((seen.operator.A(x0) - seen.y).abs().max()) if _exact(seen) else None
        if _exact(seen) and isinstance(seen.operator, Inpainting):
            x0 = seen.operator.project(x0, seen.y)  # the composite: not every method keeps known pixels exactly
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
        options: dict[str, Any],
    ) -> None:
        if sampler not in RESTORERS:
            raise UserError(f"unknown sampler {sampler!r}: choose one of {', '.join(RESTORERS)}")
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
        if not shift > 0:
            raise UserError(f"shift is {shift}; it must be above 0, 1 for even times")
        known = option_names(RESTORERS[sampler])
        for name in options:
            if name not in known:
                raise UserError(f"sampler {sampler!r} has no option {name!r}; it has {', '.join(known) or 'none'}")

    def _observe(
        self,
        pictures: Tensor,
        operator: str | Operator,
        mask_image: Any,
        sigma_y: float,
        degrade: bool,
        keys: Sequence[tuple[int, int]],
    ) -> tuple[Observation, tuple[int, int]]:
        """What is known of the pictures, and their (H, W)."""
        side = self.prior.resolution if degrade else None
        hole = None if mask_image is None else read_masks(mask_image, len(pictures), side).to(self.device)

        if isinstance(operator, str):
            size = tuple(pictures.shape[-2:]) if degrade else size_from_y(operator, pictures.shape)
            operator = make_operator(operator, size, hole=hole)
        elif degrade:
            size = tuple(pictures.shape[-2:])
        else:
            size = (
                tuple(operator.pinv(pictures).shape[-2:])
                if isinstance(operator, LinearOperator)
                else pictures.shape[-2:]
            )
        operator = operator.to(self.device)
        if not degrade:
            return Observation(
                operator.A(pictures) if isinstance(operator, Inpainting) else pictures, operator, sigma_y
            ), size
        if pictures.shape[1] != self.prior.channels:
            raise UserError(f"the pictures have {pictures.shape[1]} channels, the prior {self.prior.channels}")
        y = operator.A(pictures)
        if sigma_y:
            n = normal(y, [keyed_generator(*key, 2) for key in keys])  # 2: apart from the sampler's noise
            y = y + sigma_y * (operator.A(n) if isinstance(operator, Inpainting) else n)
        return Observation(y, operator, sigma_y), size

    def _fits(self, size: Sequence[int]) -> bool:
        resolution = self.prior.resolution
        return resolution is None or tuple(size) == (resolution, resolution)

    def _check_windows(self, operator: Operator, sampler: str, size: Sequence[int], guided: bool) -> None:
        resolution = self.prior.resolution
        if min(size) < resolution:
            raise UserError(
                f"the picture is {size[1]} x {size[0]}, the prior's are {resolution} x {resolution}; enlarge it"
            )
        if guided:
            raise UserError(
                f"the picture is {size[1]} x {size[0]}, larger than the prior's {resolution} x {resolution}, and a "
                "classifier cannot guide window by window; shrink it"
            )
        if not isinstance(operator, Inpainting) and sampler not in SHIFTED:
            raise UserError(
                f"the picture is {size[1]} x {size[0]}, larger than the prior's {resolution} x {resolution}: choose "
                f"{' or '.join(SHIFTED)}, which work window by window (so does all inpainting), or shrink it"
            )

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
        show: Sequence[str | tuple[str, Any]],
        observation: Observation,
        candidates: int,
        side: int | None,
    ) -> list[Target]:
        """(region, label) of each thing to be shown, a row per result."""
        if (classifier is None) != (not show):
            raise UserError("a classifier and what to `show` go together; give both or neither")
        rows, everywhere = len(observation.y), None
        if isinstance(observation.operator, Inpainting):
            everywhere = observation.operator.hole.float()
        targets: list[Target] = []
        for one in show:
            name, mask = (one, None) if isinstance(one, str) else one
            region = everywhere
            if mask is not None:
                region = read_masks(mask, rows // candidates, side).to(self.device).repeat_interleave(candidates, dim=0)
            targets.append((region, classifier.label(name)))
        return targets

    def _denoiser(self, sampler: str, observation: Observation, labels: Tensor | None, clean: bool) -> Denoiser:
        """The prior; for the methods that tell the network what is known, the network itself."""
        if (sampler == "coherent" or clean) and isinstance(observation.operator, Inpainting):  # else it refuses
            net, hole = self.prior.net, observation.operator.hole.float()
            return InContext(net, net.context(observation.y, hole, cached=net.config.one_way))
        if sampler == "rad":
            return self.prior.net
        return self.prior if labels is None else Bound(self.prior, {"class_labels": labels})


def option_names(method: type[Restorer]) -> list[str]:
    """The keyword arguments of a method that are a user's to choose."""
    found: dict[str, None] = {}
    for kind in method.__mro__:
        if issubclass(kind, Restorer) and "__init__" in vars(kind):
            parameters = list(inspect.signature(kind.__init__).parameters.values())[3:]
            chosen = [p for p in parameters if p.kind is not p.VAR_KEYWORD and "Denoiser" not in str(p.annotation)]
            found |= dict.fromkeys(p.name for p in chosen)
            if all(p.kind is not p.VAR_KEYWORD for p in parameters):
                break
    return list(found)


@contextmanager
def _plain_words() -> Iterator[None]:
    """What an operator or a method cannot do is said as it is; numbers that are not finite are the network's fault."""
    try:
        yield
    except FloatingPointError as error:
        raise CheckpointError(str(error)) from error
    except ValueError as error:
        raise error if isinstance(error, UserError | CheckpointError) else UserError(str(error)) from error


def _repeat(observation: Observation, candidates: int) -> Observation:
    """One row per result."""
    operator, y = observation.operator, observation.y.repeat_interleave(candidates, dim=0)
    if isinstance(operator, Inpainting) and candidates > 1:
        operator = Inpainting(operator.hole.repeat_interleave(candidates, dim=0).float())
    return Observation(y, operator, observation.sigma_y)


def _exact(observation: Observation) -> bool:
    return observation.sigma_y == 0 and isinstance(observation.operator, LinearOperator)
