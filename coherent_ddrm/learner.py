"""A network while it learns: averaged weights, optimizers, learning rate."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from coherent_ddrm.sharding import is_spread, spread_as, whole


class EMA:
    """Exponential moving average of a network's learning parameters in fp32, by name; frozen ones have none.

    The decay of step n is min(decay, (1 + n) / (10 + n)), so that early averages do not remember the start.
    """

    def __init__(self, net: nn.Module, decay: float):
        self.decay = decay
        self.weights = {n: p.detach().float().clone() for n, p in net.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(net.named_parameters())
        now = [parameters[name].detach().float() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), now, 1 - decay)

    @torch.no_grad()
    def copy_to(self, net: nn.Module) -> None:
        parameters = dict(net.named_parameters())
        for name, weight in self.weights.items():
            parameters[name].copy_(weight)


def make_optimizers(net: nn.Module, name: str, lr: float, weight_decay: float, betas: tuple[float, float]) -> list:
    """[AdamW], or [Muon for the matrices inside `blocks`, AdamW for all else]. lr is the rate of both.

    Muon, https://kellerjordan.github.io/posts/muon/ , with the update scaled to AdamW's size
    (https://arxiv.org/abs/2502.16982), so that one rate and one weight decay serve both.
    """
    parameters = {n: p for n, p in net.named_parameters() if p.requires_grad}
    inside = lambda n, p: name == "muon" and p.ndim == 2 and "blocks." in n and "modulation" not in n  # noqa: E731
    matrices = [p for n, p in parameters.items() if inside(n, p)]
    decayed = [p for n, p in parameters.items() if not inside(n, p) and p.ndim >= 2]
    plain = [p for n, p in parameters.items() if not inside(n, p) and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    if not matrices:
        return [adamw]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def learning_rate(step: int, lr: float, steps: int, warmup: int, cooldown: float) -> float:
    """Linear warm-up, flat, linear fall to 0 over the last `cooldown` share of the steps. `step` counts from 0."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    fall = min(1.0, (steps - step) / max(1.0, cooldown * steps))
    return lr * max(0.0, min(rise, fall))


def flatten_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as named tensors, "parameter.name", in one piece; numbers become 0-dim tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": whole(torch.as_tensor(v).detach()).clone() for i, row in state.items() for k, v in row.items()}


def restore_state(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """The inverse of `flatten_state`; groups and rates stay as they were built."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in flat.items():
        i, key = name.split(".", 1)
        parameter = parameters[int(i)]
        state.setdefault(int(i), {})[key] = spread_as(value, parameter) if value.shape == parameter.shape else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Learner:
    """A network with its averaged weights and optimizers: all that a training checkpoint holds."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: str,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        warmup: int,
        cooldown: float,
        steps: int,
        ema: float,
    ):
        self.net, self.ema = net, EMA(net, ema)
        self.optimizers = make_optimizers(net, optimizer, lr, weight_decay, betas)
        self.rate = 0.0
        self._plan = dict(lr=lr, steps=steps, warmup=warmup, cooldown=cooldown)

    def set_rate(self, step: int) -> None:
        """Give every optimizer the learning rate of `step`."""
        self.rate = learning_rate(step, **self._plan)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate

    def average(self, step: int) -> None:
        """Take the weights after `step` into the average."""
        self.ema.update(self.net, step)

    @property
    def spread(self) -> bool:
        """Whether the network is spread over processes; then all of them must ask for `averaged` and `tensors`, and
        only the first one gets them whole."""
        return is_spread(self.net)

    def averaged(self) -> nn.Module:
        """A copy of the network with the averaged weights, in eval mode."""
        if self.spread:
            return self._averaged_whole()
        net = copy.deepcopy(self.net)
        self.ema.copy_to(net)
        return net.eval()

    def _averaged_whole(self) -> nn.Module:
        weights = {name: whole(value) for name, value in (self.net.state_dict() | self.ema.weights).items()}
        with torch.device("meta"):
            net = type(self.net).from_config(self.net.config)
        net.load_state_dict(weights, strict=True, assign=True)
        first = not any(value.is_meta for value in weights.values())
        return net.to(next(self.net.parameters()).device if first else "meta").eval()

    @property
    def files(self) -> list[str]:
        """The file names of `tensors`."""
        return ["net", "ema", *(f"optimizer-{i}" for i in range(len(self.optimizers)))]

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """File name -> named tensors."""
        files = {"net": self.net.state_dict(), "ema": self.ema.weights}
        files = {name: {key: whole(value) for key, value in group.items()} for name, group in files.items()}
        return files | {f"optimizer-{i}": flatten_state(o) for i, o in enumerate(self.optimizers)}

    def load(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of `tensors`; strict."""
        like, device = self.net.state_dict(), next(self.net.parameters()).device
        net = {name: spread_as(value, like[name]) if name in like else value for name, value in tensors["net"].items()}
        self.net.load_state_dict(net, strict=True)
        ema = tensors["ema"]
        self.ema.weights = {name: spread_as(ema[name].to(device), old) for name, old in self.ema.weights.items()}
        for i, optimizer in enumerate(self.optimizers):
            restore_state(optimizer, tensors[f"optimizer-{i}"])
