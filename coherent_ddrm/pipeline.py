"""Inpainting in two stages behind the interface of diffusers: plan the structure, then render the hole.

    pipe = CoherentInpaintPipeline.from_pretrained("checkpoints/clothing-64")
    result = pipe(image, mask_image, candidates=4, generator=0)        # white in mask_image = fill
    result.images[0]; result.structure.edges[0]                        # edit an edge map, then structure=edges

Known pixels come back as they went in. Schedule, projection and sampler run in fp32; with `dtype=torch.bfloat16` the
networks alone compute in bf16.
"""

from __future__ import annotations

import inspect
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from coherent_ddrm import crop, export, plans
from coherent_ddrm.errors import CheckpointError, UserError
from coherent_ddrm.images import to_tensor, to_uint8
from coherent_ddrm.models.dit import DiT
from coherent_ddrm.models.structure import StructurePredictor, predict_plan
from coherent_ddrm.pipeline_io import Picture, check_output_type, read_inputs, seed_keys, write_outputs
from coherent_ddrm.plans import Structure
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.samplers import Sampler, sample
from coherent_ddrm.scene import PLANNED, SAMPLERS, Scene
from coherent_ddrm.schedule import time_grid, travel_path

CLASSES = {"transformer": DiT, "structure": StructurePredictor}  # what a checkpoint's components may be


@contextmanager
def damage() -> Iterator[None]:
    """Numbers that are not finite are the checkpoint's fault."""
    try:
        yield
    except FloatingPointError as error:
        raise CheckpointError(f"the network returned numbers that are not finite: {error}") from error


@dataclass
class InpaintOutput(BaseOutput):
    """What a call returns: N = pictures x candidates results, picture by picture."""

    images: list[Image.Image] | np.ndarray | Tensor
    structure: Structure | None  # the plans used, or None where the checkpoint plans nothing
    seeds: list[tuple[int, int]]  # (seed, candidate) of each result
    windows: list[crop.Window]  # where in its picture each result's model-sized square lies
    nfe: int  # evaluations of stage two, per result
    structure_nfe: int  # evaluations of stage one, per result
    seconds: float


class CoherentInpaintPipeline(DiffusionPipeline):
    """Fill the hole of pictures of any size.

    Args:
        transformer: stage two.
        structure: stage one; None if stage two takes no plan, or plans are always handed in.
        resolution: side of the square that both networks were trained on.
        label_names: names of the segmentation labels, by id.
        steps, shift: the default time grid.
    """

    _optional_components = ["structure"]  # noqa: RUF012, read by diffusers
    model_cpu_offload_seq = "structure->transformer"

    def __init__(
        self,
        transformer: DiT,
        structure: StructurePredictor | None = None,
        resolution: int = 64,
        label_names: list[str] | None = None,
        steps: int = 20,
        shift: float = 1.0,
    ):
        super().__init__()
        if resolution < 1 or resolution % transformer.config.patch:
            raise CheckpointError(f"resolution {resolution} is no multiple of the patch, {transformer.config.patch}")
        channels = transformer.config.structure_channels
        if structure is not None and channels not in (0, 1 + structure.config.num_labels):
            raise CheckpointError(
                f"stage one plans {1 + structure.config.num_labels} channels, stage two takes {channels}"
            )
        self.register_modules(transformer=transformer, structure=structure)
        self.register_to_config(resolution=resolution, label_names=label_names, steps=steps, shift=shift)
        self.checkpoint_hash: str | None = None  # of the folder it was loaded from

    # -- folders -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write the checkpoint folder with its sha256 manifest; safetensors only. A new folder appears all at once.

        `options` go to diffusers (max_shard_size, variant).
        """
        if options.pop("push_to_hub", False) or not options.pop("safe_serialization", True):
            raise UserError("save_pretrained writes safetensors to a folder; upload the folder with `hf upload`")
        folder = Path(os.path.abspath(save_directory))
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.tmp-", dir=folder.parent) as parent:
            temporary = Path(parent) / folder.name
            super().save_pretrained(temporary, safe_serialization=True, **options)
            export.tidy(temporary)
            export.write_manifest(temporary)
            export.publish(temporary, folder)

    @classmethod
    def from_pretrained(cls, checkpoint: str | os.PathLike[str], **options: Any) -> CoherentInpaintPipeline:
        """Load a checkpoint folder, or a Hub repository ("org/name"), after checking every file against its manifest.

        `options` go to diffusers (dtype, variant, components). Raises CheckpointError naming what is wrong.
        """
        if options.pop("use_safetensors", True) is False or options.get("trust_remote_code"):
            raise UserError("only safetensors are loaded, and no code from a checkpoint")
        folder = export.local_folder(checkpoint, options)
        digest = export.verify_manifest(folder)
        settings = inspect.signature(cls.__init__).parameters
        index = export.check_keys(folder / export.INDEX, settings)
        export.check_components(folder, index, CLASSES)
        try:
            pipe = super().from_pretrained(folder, use_safetensors=True, **options)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:300]})") from error
        for name, net in pipe.components.items():
            if isinstance(net, torch.nn.Module) and name not in options:
                export.check_weights(folder / name, net.state_dict())
                for weight in net.parameters():  # mapped from the file, at odd addresses where sums round differently
                    weight.data = weight.data.clone()
        pipe.checkpoint_hash = digest
        return pipe

    # -- inpainting ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        mask_image: Any,
        num_inference_steps: int | None = None,
        generator: Any = None,
        candidates: int = 1,
        structure: Any = None,
        structure_steps: int = 1,
        structure_scale: float = 1.0,
        sampler: str = "coherent",
        eta: float | None = None,
        shift: float | None = None,
        resample: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> InpaintOutput | tuple[Any, ...]:
        """Fill the white part of each mask.

        Args:
            image: PIL (any mode, read as RGB), numpy (H, W, 3) or torch (3, H, W), batches, or lists of these. uint8,
                or float in [0, 1].
            mask_image: the same forms with one channel; white (half and above) = fill. One per picture, or one for all.
            num_inference_steps: network evaluations; the checkpoint's default unless given.
            generator: a seed, a torch.Generator, or a list of them, one per picture. A result depends on its own
                picture, seed and candidate number, not on its batch.
            candidates: results per picture (diffusers' num_images_per_prompt), returned picture by picture.
            structure: a plan instead of the predicted one: `output.structure`, a tensor (1 + L, R, R) per picture, a
                PIL edge map (white = edge) of the model's or the picture's size, or (edges, segmentation); a list
                with one entry per picture, None = predict.
            structure_steps: 1 = the mean plan, the same for all candidates; N = a plan of its own for each.
            structure_scale: classifier-free guidance on the plan: above 1 follows it more than the network would by
                itself, at twice the evaluations; 0 ignores it.
            sampler: a name in `SAMPLERS`; eta and shift override its stochasticity and the checkpoint's time grid.
            resample: passes over each tenth of the steps in the middle of the way, 1 = none repeated; more cost more
                evaluations and may mend seams (RePaint's time travel).
            output_type: "pil", "np" (N, H, W, 3) or "pt" (N, 3, H, W), floats in [0, 1].
            callback_on_step_end: called as (pipe, step, t, {"latents": x_s}) after each step, t in [0, 1]; a returned
                dict with "latents" replaces x_s, (N, 3, R, R) in [-1, 1].

        Raises:
            UserError: an input or an argument cannot be used.
            CheckpointError: the network returned numbers that are not finite.
        """
        start = time.perf_counter()
        pictures = read_inputs(image, mask_image)
        steps = self.config.steps if num_inference_steps is None else num_inference_steps
        shift = self.config.shift if shift is None else shift
        counts = {"candidates": candidates, "structure_steps": structure_steps, "resample": resample}
        self._check_arguments({"num_inference_steps": steps, **counts}, sampler, shift, eta, structure_scale)
        check_output_type(output_type, pictures)
        keys = seed_keys(generator, len(pictures), candidates)
        windows, y, hole = self._to_model(pictures)
        with self._autocast():
            plan, planned = None, 0
            if sampler in PLANNED:
                plan, planned = self._plan(pictures, windows, y, hole, structure, structure_steps, keys)
            elif structure is not None or structure_scale != 1:
                raise UserError(f"sampler {sampler!r} takes no plan; leave structure out, or use coherent")
            draws = candidates if plan is None or len(plan) < len(keys) else 1
            rows = [x.repeat_interleave(len(keys) // len(x), dim=0) for x in (y, hole)]
            plan = None if plan is None else plan.repeat_interleave(len(keys) // len(plan), dim=0)
            engine = SAMPLERS[sampler](self.transformer, Scene(*rows, plan, draws, structure_scale), eta)
            rng = [keyed_generator(*key) for key in keys]
            times = travel_path(time_grid(steps, shift), max(1, steps // 10), resample)
            hook = (callback_on_step_end, callback_on_step_end_tensor_inputs)
            x_0 = self._walk(engine, normal(rows[0], rng), times, rng, *hook)
        repeated = [picture for picture in pictures for _ in range(candidates)]
        squares = [window for window in windows for _ in range(candidates)]
        results = [
            crop.put_back(p.pixels, p.hole, f, w) for p, f, w in zip(repeated, to_uint8(x_0), squares, strict=True)
        ]
        images = write_outputs(repeated, results, output_type)
        described = None if plan is None else plans.describe(plan.cpu())
        seconds = time.perf_counter() - start
        output = InpaintOutput(images, described, keys, squares, engine.nfe, planned, seconds)
        return output if return_dict else (images,)

    def _check_arguments(
        self, counts: dict[str, int], sampler: str, shift: float, eta: float | None, structure_scale: float
    ) -> None:
        if sampler not in SAMPLERS:
            raise UserError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
        for name, count in counts.items():
            if not isinstance(count, int) or count < 1:
                raise UserError(f"{name} is {count}; it must be a whole number from 1")
        if eta is not None and not 0 <= eta <= 1:
            raise UserError(f"eta is {eta}; it must lie in 0 ... 1")
        if not shift > 0:
            raise UserError(f"shift is {shift}; it must be above 0, 1 for even times")
        if not 0 <= structure_scale < float("inf"):
            raise UserError(f"structure_scale is {structure_scale}; it must be a number from 0, 1 for no guidance")

    def _to_model(self, pictures: Sequence[Picture]) -> tuple[list[crop.Window], Tensor, Tensor]:
        """Windows, y (B, 3, R, R) with 0 in the hole, hole (B, 1, R, R), on the device."""
        size = self.config.resolution
        windows, pixels, holes = zip(*(crop.to_model(p.pixels, p.hole, size) for p in pictures), strict=True)
        y = to_tensor(np.stack(pixels)).to(self._execution_device)
        hole = torch.from_numpy(np.stack(holes))[:, None].to(y)
        return list(windows), torch.where(hole > 0, torch.zeros_like(y), y), hole

    def _plan(
        self,
        pictures: Sequence[Picture],
        windows: Sequence[crop.Window],
        y: Tensor,
        hole: Tensor,
        structure: Any,
        steps: int,
        keys: Sequence[tuple[int, int]],
    ) -> tuple[Tensor | None, int]:
        """The plan, one row per picture or per result, and how many evaluations of stage one it took."""
        channels = self.transformer.config.structure_channels
        if not channels:
            if structure is not None:
                raise UserError("this checkpoint takes no plan; leave structure out")
            return None, 0
        given = plans.per_picture(structure, len(pictures), len(keys))
        if self.structure is None and all(one is None for one in given):
            return None, 0
        predicted = None
        if self.structure is not None and not all(isinstance(one, Tensor) for one in given):
            repeats = len(keys) // len(y) if steps > 1 else 1
            rng = [keyed_generator(*key, 1) for key in keys] if steps > 1 else None  # 1: apart from stage two's noise
            rows = [x.repeat_interleave(repeats, dim=0) for x in (y, hole)]
            with damage():
                predicted = predict_plan(self.structure, *rows, steps=steps, rng=rng)
        places = [
            plans.Place(w, p.hole.shape, (channels, *y.shape[-2:])) for p, w in zip(pictures, windows, strict=True)
        ]
        return plans.combine(given, predicted, places).to(y), 0 if predicted is None else steps

    def _walk(
        self,
        engine: Sampler,
        x_1: Tensor,
        times: Sequence[float],
        rng: Sequence[torch.Generator],
        callback: Callable[..., dict[str, Tensor] | None] | None,
        names: Sequence[str],
    ) -> Tensor:
        """The sampler's loop with progress bar and callback -> x_0."""
        unknown = sorted(set(names) - {"latents"})
        if unknown:
            raise UserError(f"callback_on_step_end_tensor_inputs names {unknown[0]!r}; only 'latents' is known")
        with self.progress_bar(total=len(times) - 1) as bar:

            def on_step(i: int, s: float, x_s: Tensor) -> Tensor | None:
                bar.update()
                if callback is None:
                    return None
                returned = callback(self, i, times[i], {name: x_s for name in names})
                changed = returned.get("latents") if isinstance(returned, dict) else None
                if changed is not None and changed.shape != x_s.shape:
                    raise UserError(f"the callback returned latents {tuple(changed.shape)} for {tuple(x_s.shape)}")
                return None if changed is None else changed.to(x_s)

            with damage():
                return sample(engine, x_1, times, rng, on_step)

    def _autocast(self) -> torch.autocast:
        """Networks compute in the dtype of their weights; inputs, schedule and projection stay in fp32."""
        dtype = self.transformer.dtype
        low = dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self._execution_device.type, dtype=dtype if low else torch.bfloat16, enabled=low)
