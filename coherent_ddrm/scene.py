"""From a picture, its hole and its plan to a sampler that is ready to walk: the pipeline's methods, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coherent_ddrm.guidance import guide_structure
from coherent_ddrm.models.dit import DiT, InContext
from coherent_ddrm.operators import Inpainting, Observation
from coherent_ddrm.samplers import DDNM, Coherent, Sampler


@dataclass
class Scene:
    """What a method is given: N rows, picture by picture, on the model's device, in fp32."""

    y: Tensor  # (N, 3, R, R) in [-1, 1], 0 in the hole
    hole: Tensor  # (N, 1, R, R), 1 = missing
    plan: Tensor | None  # (N, 1 + L, R, R)
    draws: int  # so many rows after one another share their picture and plan
    structure_scale: float = 1.0  # classifier-free guidance on the plan, 1 = none

    @property
    def observation(self) -> Observation:
        return Observation(self.y, Inpainting(self.hole))


def make_coherent(net: DiT, scene: Scene, eta: float | None) -> Sampler:
    """Our method; eta 1 unless given. Known tokens are computed once, if the network's attention allows it."""
    own = slice(None, None, scene.draws)
    plan = None if scene.plan is None else scene.plan[own]
    known = (scene.y[own], scene.hole[own])
    how = dict(draws=scene.draws, cached=net.config.one_way)
    if plan is not None and scene.structure_scale != 1:
        denoiser = guide_structure(net, *known, plan, scene.structure_scale, **how)
    else:
        denoiser = InContext(net, net.context(*known, plan, **how))
    return Coherent(denoiser, scene.observation, 1.0 if eta is None else eta)


def make_ddnm(net: DiT, scene: Scene, eta: float | None) -> Sampler:
    """The same network as an unconditional prior: it is not told what is known, nor the plan. eta 0.85 unless given."""
    prior = InContext(net, net.context(torch.zeros_like(scene.y), cached=False))
    return DDNM(prior, scene.observation, 0.85 if eta is None else eta)


SAMPLERS: dict[str, Callable[[DiT, Scene, float | None], Sampler]] = {"coherent": make_coherent, "ddnm": make_ddnm}
PLANNED = ("coherent",)  # the methods that read a plan
