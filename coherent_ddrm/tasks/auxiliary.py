"""Beside the diffusion loss: what a perceptual network and a discriminator say of x0_hat where noise is low.

Each auxiliary loss pulls at x0_hat with a gradient g_k. What the network gets is

    g = g_diffusion + sum_k weight_k lambda_k g_k,    lambda_k = |low g_diffusion| / |g_k|

with `low`(t) the weight at low noise and |.| over the batch, averaged over steps (VQGAN's adaptive weight,
https://arxiv.org/abs/2012.09841, Equation 7, taken at the output instead of the last layer: a gradient there costs
nothing, and is whole under data parallelism, sharding and compilation). So weight 1 pulls as strongly as the diffusion
loss does on the same samples, whatever the scale of the loss, and diffusion is never drowned.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from coherent_ddrm.adversarial import (
    discriminator_loss,
    feature_matching,
    generator_loss,
    r1_penalty,
)
from coherent_ddrm.config import AuxiliaryConfig, optimizer_options
from coherent_ddrm.learner import Learner
from coherent_ddrm.losses import low_noise, perceptual_loss
from coherent_ddrm.models.discriminator import Discriminator
from coherent_ddrm.models.perceptual import load_perceptual
from coherent_ddrm.schedule import expand

MEMORY = 0.95  # of the averages that lambda is made from, per step


class Judge(nn.Module):
    """The discriminator with its loss, so that data parallelism wraps both."""

    def __init__(self, net: Discriminator, kind: str, r1: float):
        super().__init__()
        self.net, self.kind, self.r1 = net, kind, r1

    def forward(self, x0: Tensor, composite: Tensor, hole: Tensor, plan: Tensor | None) -> Tensor:
        """(B,): what the discriminator pays, with R1 at the truth."""
        x0 = x0.detach().requires_grad_(self.r1 > 0)
        real, fake = self.net(x0, plan), self.net(composite.detach(), plan)
        logits = [judged.logits for judged in real]
        loss = discriminator_loss(logits, [judged.logits for judged in fake], hole, self.kind)
        return loss + self.r1 * r1_penalty(logits, x0) if self.r1 > 0 else loss


class Auxiliary:
    """The auxiliary losses that a config asks for; without any, nothing is built and nothing computed.

    Args:
        run: a run with `auxiliary` and `optim`.
        plan_channels: of the plan that the discriminator is told.
    """

    def __init__(self, run: Any, plan_channels: int, accelerator: Accelerator):
        self.wanted: AuxiliaryConfig = run.auxiliary
        self.accelerator, self.device = accelerator, accelerator.device
        self.perceptual = self.learner = self.judge = None
        if self.wanted.perceptual > 0:
            self.perceptual = load_perceptual(self.wanted.network, self.device).freeze()
        if self.wanted.adversarial > 0:
            net = Discriminator(plan_channels, self.wanted.width).to(self.device)
            options = {**optimizer_options(run), "optimizer": "adamw", "lr": self.wanted.lr, "betas": (0.0, 0.99)}
            self.learner = Learner(net, **options)
            self.judge = Judge(net, self.wanted.kind, self.wanted.r1)
        self.squares: dict[str, Tensor] = {}  # name -> (|low g_diffusion|², |g_k|²), averages over steps
        self._now: dict[str, Tensor] = {}  # those of this step's passes

    def __bool__(self) -> bool:
        return self.perceptual is not None or self.learner is not None

    def rows(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(places of the samples that count, their weights). At least one, so that all processes do the same work."""
        weight = low_noise(t, self.wanted.cutoff)
        places = (weight > 0).nonzero()[:, 0]
        return (places if len(places) else t.argmin()[None]), weight

    def pulls(
        self, x0_hat: Tensor, x0: Tensor, hole: Tensor, plan: Tensor | None, t: Tensor, main: Tensor, step: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses by name, 0-dim, means over the batch; and by the same names the gradients they add at x0_hat.

        Args:
            x0_hat, x0: (B, 3, H, W), x0_hat a leaf; hole: (B, 1, H, W); plan: (B, .., H, W) or None; t: (B,).
            main: the diffusion loss's gradient at x0_hat.
        """
        places, weight = self.rows(t)
        x, truth, where = x0_hat[places], x0[places], hole[places]
        told = None if plan is None else plan[places]
        composite = torch.where(where > 0, x.clamp(-1, 1), truth)
        losses = {}
        if self.perceptual is not None:
            losses["perceptual"] = perceptual_loss(self.perceptual, composite, truth)
        if self.judge is not None and step >= self.wanted.start:
            losses["adversarial"] = self._against(composite, truth, told)
        losses = {name: (weight[places] * loss).sum() / len(t) for name, loss in losses.items()}
        low = (expand(weight, main) * main).square().sum()
        gradients = {}
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, x0_hat, retain_graph=True)
            self._note(name, len(t) ** 2 * torch.stack([low, gradient.square().sum()]))  # of sums, not of means
            gradients[name] = self.strength(name) * gradient
        return {name: loss.detach() for name, loss in losses.items()}, gradients

    def _against(self, composite: Tensor, truth: Tensor, plan: Tensor | None) -> Tensor:
        """What the network pays the discriminator, (B,), feature matching with it."""
        net = self.learner.net.requires_grad_(False)  # its own gradient comes from `judge` alone
        fake = net(composite, plan)
        loss = generator_loss([judged.logits for judged in fake], self.wanted.kind)
        if self.wanted.feature_matching > 0:
            with torch.no_grad():
                real = net(truth, plan)
            features = ([judged.features for judged in one] for one in (fake, real))
            loss = loss + self.wanted.feature_matching * feature_matching(*features)
        net.requires_grad_(True)
        return loss

    def judged(self, judge: nn.Module, x0_hat: Tensor, x0: Tensor, hole: Tensor, plan: Tensor | None, t: Tensor):
        """The discriminator's loss, 0-dim, a mean over the batch. `judge`: as accelerate wraps it."""
        places, weight = self.rows(t)
        composite = torch.where(hole[places] > 0, x0_hat[places].clamp(-1, 1), x0[places])
        told = None if plan is None else plan[places]
        loss = judge(x0[places], composite, hole[places], told)
        return ((weight[places] > 0) * loss).sum() / len(t)

    def strength(self, name: str) -> Tensor | float:
        """weight_k lambda_k; 0 before the first step is over."""
        if name not in self.squares:
            return 0.0
        main, other = self.squares[name]
        return getattr(self.wanted, name) * (main / other.clamp(min=1e-20)).sqrt().clamp(max=1e6)

    def _note(self, name: str, squares: Tensor) -> None:
        self._now[name] = self._now.get(name, 0) + squares.detach()

    def update(self) -> None:
        """Take this step's squares, of all passes and processes, into the averages."""
        for name in sorted(self._now):
            squares = self.accelerator.reduce(self._now[name], "sum")
            if bool((squares > 0).all()):
                old = self.squares.get(name, squares)
                self.squares[name] = MEMORY * old + (1 - MEMORY) * squares
        self._now = {}

    def forget(self) -> None:
        """Leave this step's squares out."""
        self._now = {}
