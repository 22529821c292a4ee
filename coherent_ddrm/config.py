"""Typed configs: plain dataclasses, a YAML file checked in full before any work, overrides on the command line.

A run config has every option of its training script. Unknown keys, wrong types and duplicate keys are errors that name
the key; all of them are listed at once. Only this module knows YAML; library code takes plain keywords.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

STRICT = ConfigDict(extra="forbid")
Run = TypeVar("Run")
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class ConfigError(ValueError):
    """A config that cannot be used; the message lists every fault with its key."""


@dataclass
class DataConfig:
    """Where pictures come from and how they are hidden."""

    __pydantic_config__ = STRICT
    train: str = "data/clothing64/train"
    """Folder of shards (data_prep/build_shards.py)."""
    val: str = "data/clothing64/val"
    """Folder of shards for validation."""
    holes: str = "coherent-train"
    """Maker of training holes, a name of masks.MAKERS."""
    flip: bool = True
    """Mirror half of the pictures."""
    damaged: Share = 0.001
    """Share of the pictures that may be damaged; they are named and left out. One more stops the run."""
    workers: int = 0
    """Threads that read ahead; at 64 px the memory-mapped cache is faster without."""


@dataclass
class OptimConfig:
    """Optimisation. Learning rates warm up linearly, stay, and fall linearly to 0 over the last share of the steps."""

    __pydantic_config__ = STRICT
    optimizer: Literal["adamw", "muon"] = "muon"
    """muon: Muon for the matrices inside the blocks, AdamW for all else."""
    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 200
    """Steps of linear warm-up."""
    cooldown: Share = 0.2
    """Share of the steps over which the rate falls to 0 at the end."""
    clip: float = 1.0
    """Largest gradient norm."""
    steps: Count = 20_000
    """Optimizer steps in all."""
    batch: Count = 64
    """Pictures per optimizer step, over all processes and accumulation steps."""
    accumulate: Count = 1
    """Passes over which the gradient of one step is summed."""
    ema: Share = 0.999
    """Decay of the averaged weights, per step."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: matrix products in bf16 (autocast), weights and optimizer in fp32. auto: bf16 where it is fast."""
    compile: bool = False
    """torch.compile the objective (a minute or two of warm-up)."""
    checkpointing: bool = False
    """Keep the input of each block alone, and compute the block again in the backward pass: a third more work, a
    fraction of the memory (train/diffusion.py, train/joint.py)."""
    shard: bool = False
    """Spread weights, gradients and optimizer over the processes of a machine (FSDP2), for networks that do not fit one
    device (train/diffusion.py)."""


@dataclass
class LogConfig:
    """How often things are written, in steps."""

    __pydantic_config__ = STRICT
    every: Count = 20
    validate: Count = 500
    sheet: Count = 1000
    save: Count = 500
    keep: Count = 2
    """Training checkpoints kept."""


@dataclass
class DiTConfig:
    """The network of stage two: a size of models.dit.SIZES and its switches."""

    __pydantic_config__ = STRICT
    size: str = "demo"
    structure_adaln: bool = True
    structure_cross: bool = True
    cross_every: Count = 2
    one_way: bool = True
    reach: int = 2
    fill: bool = True
    head: bool = True
    tail: int = 32
    data_std: float = 0.45
    schedule: Literal["flow", "vp-cosine", "vp-linear"] = "flow"


@dataclass
class DiffusionObjective:
    """What stage two learns from."""

    __pydantic_config__ = STRICT
    structure: bool = True
    """Condition on the plan at all."""
    drop_structure: Share = 0.1
    """Share of samples without a plan, so that guidance on it works."""
    predictor: str | None = None
    """Folder of a trained structure predictor whose plans are mixed in; None = true plans only."""
    predicted: Share = 0.5
    """Share of samples that see the predictor's plan instead of the true one."""
    prior: Share = 0.15
    """Share of samples with no known pixel (the unconditional prior)."""
    draws: Count = 1
    """Noisy versions of each picture that share one pass of its known tokens."""
    times: Literal["logit-normal", "uniform"] = "logit-normal"
    """How times are drawn, beside those at pure noise."""
    weight: Literal["v", "min-snr"] = "v"
    """Of the squared error at each time: 1 / sigma², or min((alpha / sigma)², 5)."""
    time_mean: float = 0.8
    """Times are sigmoid(mean + std n), n normal; a mean above 0 favours noise, where large holes are decided."""
    time_std: float = 1.2
    pure_noise: Share = 0.1
    """Share of samples at t = 1, which the logit-normal never reaches and where sampling starts."""


@dataclass
class AuxiliaryConfig:
    """Losses beside the diffusion loss, on x0_hat at low noise. Weight 1 pulls as strongly as the diffusion loss."""

    __pydantic_config__ = STRICT
    perceptual: Weight = 0.0
    """Weight of the high-receptive-field perceptual loss; 0 costs nothing."""
    network: str = "runs/clothing_64_perceptual/export"
    """Its features: an export of train/perceptual.py, or a timm model with its own weights."""
    adversarial: Weight = 0.0
    """Weight of the adversarial loss with its feature matching; 0 costs nothing."""
    kind: Literal["non_saturating", "hinge"] = "non_saturating"
    feature_matching: Weight = 1.0
    """Beside the adversarial loss of a patch."""
    r1: Weight = 0.001
    """Gradient penalty of the discriminator."""
    width: Count = 48
    """Channels of the discriminator's first layer."""
    lr: float = 2e-4
    """The discriminator's learning rate; it rises and falls as the network's."""
    start: Annotated[int, Field(ge=0)] = 200
    """Steps in which the discriminator learns alone."""
    cutoff: Share = 0.5
    """Time from which on these losses do not count; below they grow smoothly."""


@dataclass
class DiffusionRun:
    """train/diffusion.py"""

    __pydantic_config__ = STRICT
    out: str = "runs/diffusion"
    seed: int = 0
    init: str | None = None
    """Folder of exported weights to start from (fine-tuning), such as checkpoints/clothing-64/...; None = random."""
    data: DataConfig = field(default_factory=DataConfig)
    model: DiTConfig = field(default_factory=DiTConfig)
    objective: DiffusionObjective = field(default_factory=DiffusionObjective)
    auxiliary: AuxiliaryConfig = field(default_factory=AuxiliaryConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass
class StructureConfig:
    """The network of stage one."""

    __pydantic_config__ = STRICT
    encoder: str = "pvt_v2_b0"
    decoder_dim: int = 64
    schedule: Literal["flow", "vp-cosine", "vp-linear"] = "flow"


@dataclass
class StructureObjective:
    """What stage one learns from."""

    __pydantic_config__ = STRICT
    known_weight: Share = 0.1
    """Weight of known pixels in every loss; hidden ones weigh 1."""
    edges: float = 1.0
    segmentation: float = 1.0
    pure_noise: Share = 0.3
    """Share of samples at t = 1, the time at which the mean plan is read off."""


@dataclass
class StructureRun:
    """train/structure.py"""

    __pydantic_config__ = STRICT
    out: str = "runs/structure"
    seed: int = 0
    init: str | None = None
    """Folder of exported weights to start from (fine-tuning), such as checkpoints/clothing-64/...; None = random."""
    data: DataConfig = field(default_factory=DataConfig)
    model: StructureConfig = field(default_factory=StructureConfig)
    objective: StructureObjective = field(default_factory=StructureObjective)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass
class JointRun(DiffusionRun):
    """train/joint.py: the keys of train/diffusion.py, and those of stage one."""

    __pydantic_config__ = STRICT
    out: str = "runs/joint"
    structure_init: str | None = None
    """Folder of exported weights of stage one to start from; None = random."""
    structure_weight: Weight = 1.0
    """Of stage one's own loss, beside what flows back from stage two."""
    structure_model: StructureConfig = field(default_factory=StructureConfig)
    structure: StructureObjective = field(default_factory=StructureObjective)


@dataclass
class ClassifierConfig:
    """The network that tells classes, for guidance."""

    __pydantic_config__ = STRICT
    network: str = "small"
    """A name of classifier.NETWORKS, or of any timm model."""
    timed: bool = False
    """Learn on noisy pictures and be told their time."""


@dataclass
class ClassifierObjective:
    """What the classifier learns from."""

    __pydantic_config__ = STRICT
    smoothing: Share = 0.1
    """Label smoothing."""
    erased: Share = 0.5
    """Share of samples whose hole, or all but their hole, is white, as guidance shows a region."""
    softened: Share = 0.5
    """Share of samples that are blurred and noisy, as predictions on the way are."""


@dataclass
class ClassifierRun:
    """train/classifier.py"""

    __pydantic_config__ = STRICT
    out: str = "runs/classifier"
    seed: int = 0
    init: str | None = None
    """Folder of exported weights to start from (fine-tuning); None = random."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    objective: ClassifierObjective = field(default_factory=ClassifierObjective)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass
class PerceptualConfig:
    """The network whose features stage two is compared by."""

    __pydantic_config__ = STRICT
    network: str = "small"
    """A name of models.perceptual.NETWORKS, or of a timm model that can be dilated."""


@dataclass
class PerceptualObjective:
    """What the features are learned from: LaMa segments; classes help where maps are few or rough."""

    __pydantic_config__ = STRICT
    segmentation: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the segmentation maps; 0 = shards without."""
    classes: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the class labels; 0 = shards without."""
    smoothing: Share = 0.1
    """Label smoothing, of the classes."""


@dataclass
class PerceptualRun:
    """train/perceptual.py"""

    __pydantic_config__ = STRICT
    out: str = "runs/perceptual"
    seed: int = 0
    init: str | None = None
    """Folder of exported weights to start from (fine-tuning); None = random."""
    data: DataConfig = field(default_factory=DataConfig)
    model: PerceptualConfig = field(default_factory=PerceptualConfig)
    objective: PerceptualObjective = field(default_factory=PerceptualObjective)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)


def optimizer_options(run: DiffusionRun | StructureRun | ClassifierRun | PerceptualRun) -> dict:
    """The part of a run's `optim` that training.Learner takes."""
    names = ("optimizer", "lr", "weight_decay", "betas", "warmup", "cooldown", "steps", "ema")
    return {name: getattr(run.optim, name) for name in names}


# ---------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, which plain YAML resolves silently to the last one."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen: set = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise ConfigError(f"{key!r} stands twice (line {key_node.start_mark.line + 1}); keep one")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_config(kind: type[Run], path: str | Path) -> Run:
    """The YAML file as a checked `kind`. Raises ConfigError: the file, each faulty key and what is wrong with it."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    return check_config(kind, values or {}, str(path))


def check_config(kind: type[Run], values: dict, source: str) -> Run:
    """Plain values as a checked `kind`; `source` is named in errors."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        faults = [f"{source}: {_fault(kind, fault)}" for fault in error.errors()]
        raise ConfigError("\n".join(faults)) from None


def _fault(kind: type, fault: dict) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] not in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key}: {fault['msg']} (got {fault['input']!r})"
    near = difflib.get_close_matches(key, _keys(kind), n=1)
    return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")


def _keys(kind: type, prefix: str = "") -> list[str]:
    keys = []
    for f in dataclasses.fields(kind):
        keys.append(prefix + f.name)
        if dataclasses.is_dataclass(f.default_factory):
            keys += _keys(f.default_factory, f"{prefix}{f.name}.")
    return keys


def config_hash(config: object) -> str:
    """Short hash of the resolved values."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode()).hexdigest()[:16]


def dump_config(config: object) -> str:
    """The resolved config as YAML that `read_config` reads back."""
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config))), sort_keys=False)


# ---------------------------------------------------------------------------------------------- command line


@dataclass
class Invocation:
    """What a training script was asked to do, beside its config."""

    dry_run: bool = False
    """Build everything, print parameters, memory and steps, and stop."""


def parse_run(kind: type[Run], argv: Sequence[str] | None = None) -> tuple[Run, Invocation]:
    """`--config FILE [--dry-run] [--any.key value]` -> (config, invocation). A fault is one line and exit code 2."""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        path = _take_config(argv)
        default = read_config(kind, path) if path else kind()
        invocation = Invocation(dry_run="--dry-run" in argv)
        argv = [word for word in argv if word != "--dry-run"]
        usage = f"{kind.__doc__} --config FILE [--dry-run], and any key below"
        plain = (tyro.conf.FlagConversionOff,)  # --key True, as in YAML, not --key / --no-key
        config = tyro.cli(kind, args=argv, default=default, description=usage, config=plain)
        return check_config(kind, dataclasses.asdict(config), "command line"), invocation
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _take_config(argv: list[str]) -> str | None:
    for i, word in enumerate(argv):
        if word.startswith("--config="):
            return argv.pop(i).split("=", 1)[1]
        if word == "--config":
            if i + 1 == len(argv):
                raise ConfigError("--config needs a YAML file")
            argv.pop(i)
            return argv.pop(i)
    return None
