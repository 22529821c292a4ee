"""Stage two: the transformer learns to denoise the hole, given the known pixels and a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from coherent_ddrm.config import ConfigError, DiffusionRun, optimizer_options
from coherent_ddrm.data import DecodedCache, ShardDataset
from coherent_ddrm.examples import Examples, draw_times, example_settings, make_examples
from coherent_ddrm.images import to_uint8
from coherent_ddrm.launch import as_it_is, check_run, start_from
from coherent_ddrm.learner import Learner
from coherent_ddrm.losses import diffusion_loss, hole_mean, min_snr_weight, v_weight
from coherent_ddrm.models.dit import DiT, InContext, make_dit
from coherent_ddrm.models.structure import StructurePredictor, decode_structure, encode_structure, predict_plan
from coherent_ddrm.operators import Inpainting, Observation
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.samplers import Coherent, sample
from coherent_ddrm.schedule import add_noise, expand, time_grid
from coherent_ddrm.sharding import shard
from coherent_ddrm.sheets import contact_sheet, plan_preview
from coherent_ddrm.tasks.auxiliary import Auxiliary
from coherent_ddrm.training import Task
from coherent_ddrm.validation import FixedSet
from coherent_ddrm.weights import load_network

VALIDATION_TIMES = (0.2, 0.4, 0.6, 0.8, 1.0)


class Objective(nn.Module):
    """From clean pictures to x0_hat, so that data parallelism and compilation wrap all that needs a gradient."""

    def __init__(self, net: DiT, draws: int):
        super().__init__()
        self.net, self.draws = net, draws

    def forward(
        self, x0: Tensor, hole: Tensor, t: Tensor, z: Tensor, structure: Tensor | None, drop: Tensor | None
    ) -> Tensor:
        """x0, hole: (B, ...); t: (B draws,), z: (B draws, C, H, W), picture by picture -> x0_hat (B draws, C, H, W)."""
        x0_all, hole_all = (v.repeat_interleave(self.draws, dim=0) for v in (x0, hole))
        x_t = add_noise(self.net.schedule, x0_all, expand(t, x0_all) * hole_all, z)
        if self.draws == 1:
            return self.net(x_t, t, hole, structure, drop).float()
        context = self.net.context(x0, hole, structure, drop, draws=self.draws, cached=self.net.config.one_way)
        return self.net.denoise(x_t, t, context).float()


def load_predictor(folder: str | None, device: torch.device) -> StructurePredictor | None:
    """The frozen predictor of stage one, from its folder, or None. ConfigError if there is no such folder."""
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise ConfigError(f"objective.predictor {folder}: no such folder; name the export/ of train/structure.py")
    return load_network(StructurePredictor, Path(folder)).to(device).eval().requires_grad_(False)


def sees_predicted(examples: Examples, share: float, none: Tensor) -> Tensor:
    """(B,) bool, who sees the predictor's plan."""
    return (examples.choice[:, 2] < share) & ~none


@torch.no_grad()
def make_plan(
    examples: Examples, predictor: StructurePredictor | None, num_labels: int, predicted: float, drop: float
) -> tuple[Tensor | None, Tensor | None]:
    """The plan each sample sees, (B, 1 + L, H, W), and who sees none, (B,) bool. Prior samples never see one."""
    if not num_labels:
        return None, None
    plan = encode_structure(examples.edges, examples.segmentation, num_labels)
    all_hole = examples.hole.flatten(1).all(dim=1)
    none = (examples.choice[:, 1] < drop) | all_hole
    rows = sees_predicted(examples, predicted, none).nonzero()[:, 0]  # nobody else's plan is worth predicting
    if predictor is not None and len(rows):
        plan[rows] = predict_plan(predictor, examples.x0[rows], examples.hole[rows], steps=1).to(plan.dtype)
    return plan, none


class Validation:
    """Scores and sheets on fixed pictures, with the predictor's plan where there is one, else the true one."""

    best = "val_loss"

    def __init__(self, data: FixedSet, num_labels: int, predictor: StructurePredictor | None):
        self.data, self.plan = data, None
        if num_labels:
            self.plan = encode_structure(data.edges, data.segmentation, num_labels)
        if num_labels and predictor is not None:
            plans = [predict_plan(predictor, data.x0[rows], data.hole[rows], steps=1) for rows in data.slices()]
            self.plan = torch.cat(plans)

    @torch.no_grad()
    def scores(self, net: DiT) -> dict[str, float]:
        """In the hole: v-weighted loss and squared error of x0_hat over the times; PSNR of one step from t = 1."""
        data = self.data
        error = torch.zeros(len(VALIDATION_TIMES), len(data))
        for i, t in enumerate(VALIDATION_TIMES):
            for rows in data.slices():
                x0, hole = data.x0[rows], data.hole[rows]
                x_t = add_noise(net.schedule, x0, t * hole, data.z[rows])
                plan = None if self.plan is None else self.plan[rows]
                x0_hat = net(x_t, torch.full((len(x0),), t, device=x0.device), hole, plan)
                error[i, rows] = hole_mean((x0_hat.float().clamp(-1, 1) - x0) ** 2, hole).cpu()
        weight = v_weight(net.schedule(torch.tensor(VALIDATION_TIMES))[1])[:, None]
        psnr = -10 * (error[-1] / 4).log10()
        values = {"val_loss": (weight * error).mean(), "val_mse": error.mean(), "val_psnr": psnr.mean()}
        return {name: float(value) for name, value in values.items()}

    @torch.no_grad()
    def sheet(self, net: DiT, steps: int = 25, count: int = 12) -> np.ndarray:
        """Input, plan, one step, result, truth; uint8 picture."""
        x0, hole, z = (v[:count] for v in (self.data.x0, self.data.hole, self.data.z))
        plan = None if self.plan is None else self.plan[:count]
        denoiser = InContext(net, net.context(x0, hole, plan, cached=net.config.one_way))
        rng = [keyed_generator(3, i) for i in range(len(x0))]
        result = sample(Coherent(denoiser, Observation(x0, Inpainting(hole))), normal(x0, rng), time_grid(steps), rng)
        one_step = denoiser(torch.where(hole > 0, z, x0), torch.ones(len(x0), device=x0.device))
        columns = [to_uint8(v.float().clamp(-1, 1)) for v in (x0 * (1 - hole), one_step, result, x0)]
        titles = ["input", "one step", f"{steps} steps", "truth"]
        if plan is not None:
            columns.insert(1, plan_preview(*(v.cpu().numpy() for v in decode_structure(plan))))
            titles.insert(1, "plan")
        return contact_sheet([list(row) for row in zip(*columns, strict=True)], titles)


@dataclass
class Pass:
    """What one pass shows the network: B pictures, B draws times and noises."""

    x0: Tensor  # (B, 3, H, W)
    hole: Tensor  # (B, 1, H, W)
    t: Tensor  # (B draws,)
    z: Tensor  # (B draws, 3, H, W)
    plan: Tensor | None  # (B, 1 + L, H, W)
    none: Tensor | None  # (B,) bool, who sees no plan
    beside: dict[str, Tensor] = field(default_factory=dict)  # losses of other networks that the plan hangs on, 0-dim

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.x0, self.hole, self.t, self.z, self.plan, self.none

    def all(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x0, hole, the plan as the discriminator is told it), a row for each draw."""
        draws = len(self.t) // len(self.x0)
        plan = self.plan
        if plan is not None:
            plan = torch.where(expand(self.none, plan), torch.zeros_like(plan), plan).detach()
        return tuple(
            v if v is None or draws == 1 else v.repeat_interleave(draws, dim=0) for v in (self.x0, self.hole, plan)
        )


class DiffusionTask(Task):
    """The transformer, and where the config asks for them a perceptual network and a discriminator.

    Args:
        adapt: makes of the transformer, its first weights loaded, what learns: `lora.add_adapter`, or all of it.
    """

    def __init__(
        self,
        run: DiffusionRun,
        source: ShardDataset | DecodedCache,
        accelerator: Accelerator,
        adapt: Callable[[nn.Module], nn.Module] = as_it_is,
    ):
        self.num_labels = source.num_labels if run.objective.structure else 0
        self.predictor = load_predictor(run.objective.predictor if self.num_labels else None, accelerator.device)
        check_run(run, source, self.predictor)
        channels = 1 + self.num_labels if self.num_labels else 0
        net = make_dit(**asdict(run.model), structure_channels=channels).to(accelerator.device)
        net, objective = adapt(start_from(net, run.init)), Objective(net, run.objective.draws)
        if run.optim.checkpointing:
            net.enable_gradient_checkpointing()
        if run.optim.shard and run.optim.optimizer == "muon":
            raise ConfigError("optim.optimizer muon needs whole matrices; with optim.shard take adamw")
        if run.optim.shard:
            shard(objective, net, accelerator.mixed_precision == "bf16", run.optim.compile)
        learner = Learner(net, **optimizer_options(run))
        self.objective, self.auxiliary = run.objective, Auxiliary(run, channels, accelerator)
        learners, objectives = {"transformer": learner}, [objective]
        if self.auxiliary.learner is not None:
            learners["discriminator"] = self.auxiliary.learner
            objectives.append(self.auxiliary.judge)
        super().__init__(learners, objectives, accelerator)
        self.bare = objectives[0]
        self.settings = example_settings(run) | dict(prior=run.objective.prior, draws=run.objective.draws)

    def loss_of(self, part: dict, step: int, places: Sequence[int]) -> Tensor:
        shown = self.show(self.examples(part, step, places))
        with self.accelerator.autocast():
            x0_hat = self.objectives[0](*shown.inputs)
        return self.diffusion(x0_hat, shown) + sum(shown.beside.values())

    def backward(self, part: dict, step: int, places: Sequence[int], look: bool) -> dict[str, Tensor]:
        """Every loss is a gradient at x0_hat; their sum goes back through the network once."""
        shown = self.show(self.examples(part, step, places))
        with self.accelerator.autocast():
            x0_hat = self.objectives[0](*shown.inputs)
        losses, pulls = self.pull(x0_hat.detach(), shown, step)
        if look:
            losses |= self.last_layer(shown, pulls)
        losses |= {name: loss.detach() for name, loss in shown.beside.items()}
        self.accelerator.backward((x0_hat * sum(pulls.values())).sum() + sum(shown.beside.values()))
        if self.auxiliary.learner is not None:
            losses["discriminator"] = self.teach(x0_hat.detach(), shown)
        return losses

    def pull(self, x0_hat: Tensor, shown: Pass, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(losses, gradients at x0_hat) by name; "loss" is the diffusion loss."""
        leaf = x0_hat.requires_grad_()
        loss = self.diffusion(leaf, shown)
        (main,) = torch.autograd.grad(loss, leaf)
        losses, pulls = {"loss": loss.detach()}, {"diffusion": main}
        if self.auxiliary:
            x0, hole, plan = shown.all()
            more = self.auxiliary.pulls(leaf, x0, hole, plan, shown.t, main, step)
            losses, pulls = losses | more[0], pulls | more[1]
        return losses, pulls

    def teach(self, x0_hat: Tensor, shown: Pass) -> Tensor:
        """Add the discriminator's gradient; its loss."""
        x0, hole, plan = shown.all()
        loss = self.auxiliary.judged(self.objectives[1], x0_hat, x0, hole, plan, shown.t)
        self.accelerator.backward(loss)
        return loss.detach()

    def last_layer(self, shown: Pass, pulls: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each loss's gradient norm at the last layer's weight: one more pass, not compiled, at logged steps alone."""
        weight = self.main.net.last_layer
        if not weight.requires_grad or self.main.spread:  # frozen, beside an adapter; or in pieces
            return {}
        with self.accelerator.autocast():
            x0_hat = self.bare.forward(*shown.inputs)
        rows = [torch.autograd.grad((x0_hat * g).sum(), weight, retain_graph=True)[0] for g in pulls.values()]
        return {f"norm_{name}": row.float().norm() for name, row in zip(pulls, rows, strict=True)}

    def update(self, step: int) -> None:
        super().update(step)
        self.auxiliary.update()

    def zero_grad(self) -> None:
        super().zero_grad()
        self.auxiliary.forget()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return super().tensors() | ({"balance": self.auxiliary.squares} if self.auxiliary.squares else {})

    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        super().load(tensors)
        balance = tensors.get("balance", {})
        self.auxiliary.squares = {name: value.to(self.accelerator.device) for name, value in balance.items()}

    # -- parts ---------------------------------------------------------------------------------------------------------

    def examples(self, part: dict, step: int, places: Sequence[int]) -> Examples:
        return make_examples(part, step=step, places=places, **self.settings).to(self.accelerator.device)

    def show(self, examples: Examples) -> Pass:
        """Times, noise and plans for some examples."""
        wanted = self.objective
        uniform = wanted.times == "uniform"
        t = draw_times(examples, None if uniform else (wanted.time_mean, wanted.time_std), wanted.pure_noise)
        with self.accelerator.autocast():
            plan, none = make_plan(examples, self.predictor, self.num_labels, wanted.predicted, wanted.drop_structure)
        return Pass(examples.x0, examples.hole, t, examples.noise(wanted.draws), plan, none)

    def diffusion(self, x0_hat: Tensor, shown: Pass) -> Tensor:
        """The diffusion loss, a mean over the pass."""
        x0, hole, _ = shown.all()
        alpha_t, sigma_t = self.main.net.schedule(shown.t)
        weight = v_weight(sigma_t) if self.objective.weight == "v" else min_snr_weight(alpha_t, sigma_t)
        return diffusion_loss(x0_hat, x0, hole, weight).mean()
