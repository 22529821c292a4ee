"""What there is: every sampler and operator, told from its own docstring and signature. Makes docs/methods.md."""

from __future__ import annotations

import inspect
import sys
from itertools import pairwise

import torch

from coherent_ddrm import priors
from coherent_ddrm.operators import OPERATORS, Inpainting, LinearOperator, Observation, Operator, SpectralOperator
from coherent_ddrm.samplers import PLAIN, RESTORERS, Restorer, Sampler
from coherent_ddrm.schedule import Flow

NEEDS = {
    Operator: "any degradation that can be applied, linear or not; a network that can be differentiated",
    LinearOperator: "a linear degradation with its pseudo-inverse",
    SpectralOperator: "a linear degradation with its singular values",
    Inpainting: "a hole",
}
EVALUATIONS = {  # of the network, in one step down
    "heun": "2, the last 1",
    "copaint": "2 to 11 per gradient step, and 1; 2 gradients",
    "copaint_tt": "2 to 11 per gradient step, and 1; 2 gradients",
    "dps": "1, and its gradient",
    "pigdm": "1, and its gradient",
}


class _Nothing:
    """A denoiser for counting."""

    schedule = Flow()
    per_pixel_time = True


def make(name: str) -> Sampler:
    """The method with its defaults, on an empty picture."""
    if name in PLAIN:
        return PLAIN[name](_Nothing())
    return RESTORERS[name](_Nothing(), Observation(torch.zeros(1, 1, 1, 1), Inpainting(torch.ones(1, 1, 1, 1))))


def steps_down(name: str, steps: int | None = None) -> int:
    """How many steps down the method takes for `steps` (its default) of the grid, resampling included."""
    sampler = make(name)
    return sum(s < t for t, s in pairwise(sampler.times(steps or sampler.default_steps)))


def options(method: type[Sampler]) -> dict[str, object]:
    """Keyword arguments beside denoiser and observation, with their defaults."""
    parameters = inspect.signature(method).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.kind is not p.VAR_KEYWORD}


def summary(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def listing() -> str:
    """The lines that `coherent-ddrm methods` prints."""
    lines = ["samplers (restore a measurement):"]
    lines += [_line(name, method) for name, method in RESTORERS.items()]
    lines += ["", "samplers (from noise, no measurement):"]
    lines += [_line(name, method) for name, method in PLAIN.items()]
    lines += ["", "operators, NAME[:ARGUMENT...], joined by + in the order of application:"]
    for name, entry in OPERATORS.items():
        spec = ":".join([name, *(f"{default:g}" for default in entry.arguments.values())])
        lines.append(f"  {spec:26s} {entry.help}")
    lines += [
        "",
        "priors: our checkpoint; a folder or Hub name with a diffusers UNet2DModel; a guided-diffusion checkpoint in",
        "safetensors. Update rules, papers, defaults: docs/methods.md",
    ]
    return "\n".join(lines)


def _line(name: str, method: type[Sampler]) -> str:
    need = ""
    if issubclass(method, Restorer):
        need = f"; needs {NEEDS[method.needs].split(';')[0]}, {method.network}"
        need += "; uses sigma_y" if method.knows_noise else ""
    return f"  {name:11s} {method.default_steps:4d} steps  {summary(inspect.getmodule(method).__doc__)}{need}"


def page() -> str:
    """docs/methods.md."""
    parts = [
        "# Methods",
        "Made from the docstrings by `coherent-ddrm methods --markdown`; do not edit. "
        "x_t = alpha_t x0 + sigma_t z with t from 1 (noise) to 0 (data); s < t is the next time, x0_hat the network's "
        "prediction, z standard normal. A is the degradation, A⁺ its pseudo-inverse, A = U diag(S) Vᵀ, "
        "y = A x0 + sigma_y n, ȳ = S⁺ Uᵀ y.",
    ]
    for title, methods in (("Restoring a measurement", RESTORERS), ("From noise", PLAIN)):
        parts.append(f"## {title}")
        parts += [_section(name, method) for name, method in methods.items()]
    parts.append("## Operators")
    rows = ["| name | arguments and defaults | |", "|---|---|---|"]
    for name, entry in OPERATORS.items():
        arguments = ", ".join(f"{key} {value:g}" for key, value in entry.arguments.items())
        rows.append(f"| `{name}` | {arguments} | {entry.help} |")
    parts.append("\n".join(rows))
    parts += ["## Priors", inspect.cleandoc(priors.__doc__)]
    return "\n\n".join(parts) + "\n"


def _section(name: str, method: type[Sampler]) -> str:
    doc = inspect.cleandoc(inspect.getmodule(method).__doc__)
    title, *rest = doc.split("\n\n")
    facts = [f"- class `{method.__name__}`: {summary(method.__doc__)}"]
    chosen = ", ".join(f"{key} {value}" for key, value in options(method).items())
    facts += [f"- options and defaults: {chosen}"] if chosen else []
    count = EVALUATIONS.get(name, "1")
    facts.append(f"- steps: {method.default_steps}, {steps_down(name)} moves down; evaluations in each: {count}")
    if issubclass(method, Restorer):
        facts.append(f"- needs {NEEDS[method.needs]}; {method.network}")
        facts.append("- uses sigma_y" if method.knows_noise else "- takes y as free of noise")
    body = "\n\n".join(f"```text\n{block}\n```" for block in ["\n\n".join(rest)] if block)
    return "\n\n".join(part for part in (f"### {name}", " ".join(title.split()), body, "\n".join(facts)) if part)


if __name__ == "__main__":
    sys.stdout.write(page())
