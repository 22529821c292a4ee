"""Guidance: a denoiser in, a denoiser out. Classifier-free (https://arxiv.org/abs/2207.12598) and by a classifier.

A classifier guides in GuidPaint's manner: its gradient is taken at x0_hat, so that none passes through the denoiser and
the classifier need not know noise; regions have labels of their own. The two stages are in samplers/guidpaint.py.

    guided = ClassifierGuided(denoiser, classifier, [(hole, classifier.label("Dress"))], hole=hole)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from coherent_ddrm.denoiser import Bound, Denoiser, evaluations, takes_pixel_times
from coherent_ddrm.models.dit import DiT, InContext
from coherent_ddrm.operators.transforms import dct, idct
from coherent_ddrm.schedule import Schedule, expand

# ---------------------------------------------------------------------------------------------- classifier-free


@dataclasses.dataclass
class ClassifierFree:
    """x0_hat = x0_u + scale (x0_c - x0_u), from a conditional and an unconditional denoiser (Equation 6).

    The same in eps and in v, which are affine in x0_hat. At scale 1 only the conditional denoiser is evaluated, at 0
    only the unconditional one, elsewhere both.
    """

    conditional: Denoiser
    unconditional: Denoiser
    scale: float = 1.0

    @property
    def schedule(self) -> Schedule:
        return self.conditional.schedule

    @property
    def per_pixel_time(self) -> bool:
        return takes_pixel_times(self.conditional) and takes_pixel_times(self.unconditional)

    @property
    def evaluations(self) -> int:
        return 1 if self.scale in (0, 1) else 2

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        if self.scale == 1:
            return self.conditional(x_t, t)
        x0_u = self.unconditional(x_t, t)
        return x0_u if self.scale == 0 else x0_u + self.scale * (self.conditional(x_t, t) - x0_u)


def guide_structure(
    net: DiT, y: Tensor, hole: Tensor | None, plan: Tensor, scale: float, draws: int = 1, cached: bool = True
) -> ClassifierFree:
    """Classifier-free guidance on the plan, for a network that was trained with dropped plans.

    Args:
        y, hole, draws, cached: as `DiT.context` takes them.
        plan: (B, structure_channels, H, W).
    """
    planned = net.context(y, hole, plan, draws=draws, cached=cached)
    own = net.context(y, hole, None, draws=draws, cached=cached)
    # all else is the same: held once
    unplanned = dataclasses.replace(planned, past=own.past, plans=own.plans, plan_tokens=own.plan_tokens)
    return ClassifierFree(InContext(net, planned), InContext(net, unplanned), scale)


def guide_class(denoiser: Denoiser, labels: Tensor, null: int, scale: float) -> ClassifierFree:
    """Classifier-free guidance on class_labels (B,); `null` is the label that the denoiser knows as "any class"."""
    bind = lambda value: Bound(denoiser, {"class_labels": value})  # noqa: E731
    return ClassifierFree(bind(labels), bind(torch.full_like(labels, null)), scale)


# ---------------------------------------------------------------------------------------------- by a classifier

PIXEL_VARIANCE = 0.2  # of photographs in [-1, 1]; 0.23 on the clothing pictures


class LogProb(Protocol):
    """What guides: log p(label | x), (B,), of x (B, C, H, W); classifier.Classifier, or one's own.

    With an attribute `timed` that is true it is given noisy pictures and their time t, (B,), on the VP-cosine schedule.
    RestorationPipeline finds labels by `label(name)`.
    """

    def log_prob(self, x: Tensor, labels: int | Tensor, t: Tensor | None = None) -> Tensor: ...


Target = tuple[Tensor | None, "int | Tensor"]  # region (B or 1, 1, H, W), 1 = the label applies here; label or (B,)


@dataclasses.dataclass
class ClassifierGuided:
    """x0_hat + scale C ∇ Σ log p(label | x0_hat in its region), `iterations` times over.

    C is the covariance of x0 given x_t if x0 were Gaussian with variances lambda_k in some basis: there it is
    lambda_k sigma_t² / (alpha_t² lambda_k + sigma_t²), and the mean of x0 given x_t and the label is, to first order,
    x0_hat + C ∇ log p. `covariance` says what is assumed:

    "white"    lambda = 1 for every pixel, so C = r² = sigma_t² / (alpha_t² + sigma_t²).
    "natural"  the spectrum of photographs, lambda_k ~ 1 / (1 + k²) for k half-waves across the picture. While noise is
               high, C is smooth and moves whole shapes and colours, details come later; "white" breaks them up.

    Args:
        classifier: see `LogProb`. Only its own pass is differentiated.
        targets: (region, label) pairs, region None = the whole picture; their gradients are added. The hole is a good
            region: what surrounds it does not argue then.
        scale: 1 is the rule above, 0 leaves x0_hat alone. Holes that hide a garment wanted 20 with a denoiser that is
            told the known pixels, 5 with a prior.
        hole: (B or 1, 1, H, W), where x0_hat may move; None = everywhere.
        background: what the classifier sees outside the region; 1 is white.
    """

    denoiser: Denoiser
    classifier: LogProb
    targets: Sequence[Target]
    scale: float = 20.0
    hole: Tensor | None = None
    background: float = 1.0
    iterations: int = 2
    covariance: Literal["natural", "white"] = "natural"

    def __post_init__(self) -> None:
        if self.covariance not in ("natural", "white"):
            raise ValueError(f"unknown covariance {self.covariance!r}: choose natural or white")

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    @property
    def per_pixel_time(self) -> bool:
        return takes_pixel_times(self.denoiser)

    @property
    def evaluations(self) -> int:
        return evaluations(self.denoiser)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        x0_hat = self.denoiser(x_t, t)
        if self.scale == 0 or not self.targets:
            return x0_hat
        level = t if t.ndim == 1 else t.flatten(1).amax(dim=1)  # (B,), that of the hole where pixels have their own
        alpha_t, sigma_t = self.schedule(expand(level, x_t))  # (B, 1, 1, 1)
        noise = x_t - alpha_t * x0_hat
        for _ in range(self.iterations):
            gradient = self._gradient(x0_hat, noise, alpha_t, sigma_t)
            step = self.scale * self._spread(gradient, alpha_t, sigma_t)
            x0_hat = x0_hat + (step if self.hole is None else step * self.hole)
        return x0_hat

    def _gradient(self, x0_hat: Tensor, noise: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """∇ Σ log p(label | x0_hat in its region), like x0_hat."""
        with torch.enable_grad():
            x = x0_hat.detach().requires_grad_()
            total = torch.zeros((), device=x.device)
            for region, label in self.targets:
                seen = x if region is None else region * x + (1 - region) * self.background
                if getattr(self.classifier, "timed", False):  # as it would be on its way, with the noise of x_t
                    seen = (alpha_t * seen + noise.detach()) / torch.hypot(alpha_t, sigma_t)
                    time = torch.atan2(sigma_t, alpha_t).flatten() / (math.pi / 2)
                    total = total + self.classifier.log_prob(seen, label, time).sum()
                else:
                    total = total + self.classifier.log_prob(seen, label).sum()
            return torch.autograd.grad(total, x)[0]

    def _spread(self, gradient: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        """C times the gradient, (B, C, H, W)."""
        if self.covariance == "white":
            return sigma_t**2 / (alpha_t**2 + sigma_t**2) * gradient
        spectrum = natural_spectrum(*gradient.shape[-2:], device=gradient.device)
        gain = spectrum * sigma_t**2 / (alpha_t**2 * spectrum + sigma_t**2)
        coefficients = dct(dct(gradient.float()).mT).mT
        return idct(idct((gain * coefficients).mT).mT)


def natural_spectrum(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Variances of the cosine coefficients of photographs, ~ 1 / (1 + k²), with mean PIXEL_VARIANCE. (H, W)"""
    y, x = (torch.arange(n, device=device, dtype=torch.float32) for n in (height, width))
    spectrum = 1 / (1 + y[:, None] ** 2 + x**2)
    return spectrum * (PIXEL_VARIANCE / spectrum.mean())
