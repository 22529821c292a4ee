"""From the command line to what is asked of an evaluation; everything that can be checked without torch is."""

from __future__ import annotations

import re
import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coherent_ddrm.errors import UserError
from coherent_ddrm.evaluation.protocols import Protocol, describe, find_protocol
from coherent_ddrm.evaluation.setting import Setting
from coherent_ddrm.export import INDEX, default_checkpoint, read_facts

MASKS = ("lama-thick", "half")
METHODS = ("coherent", "ddnm")
ALWAYS = ("telea", "navier-stokes")  # baselines beside every method
SCORES = ("lpips_alex", "lpips_vgg", "fid", "kid", "p_ids", "u_ids")  # those that need a network and can be asked for;
SCORES += ("pd-clothing", "fid-clothing", "fid_infinity-clothing", "kid-clothing")  # the others are always there


@dataclass
class Evaluation:
    """What is asked for."""

    setting: Setting
    methods: tuple[str, ...]
    results: dict[str, Path]  # label -> folder of pictures that another program made
    checkpoint: str
    output: Path
    baselines: tuple[str, ...] = ()  # scored like methods, behind the results
    scores: tuple[str, ...] = SCORES
    weights: Path | None = None  # folder of weights for scores
    steps: int | None = None
    shift: float | None = None
    batch: int = 16
    device: str = "cpu"
    command: str = ""
    download: bool = True
    precision: str = "fp32"
    reinpaint: str = "coherent"  # the method that inpaints again, for reinpaint_known and reinpaint_invented
    published: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


SMALLEST = 16  # pixels; SSIM's windows are 11 wide
SMALLEST_ALEX = 31  # AlexNet's last layers see nothing of smaller pictures


def understand(args: Namespace) -> Evaluation:
    """UserError for what does not fit together."""
    protocol = None if args.protocol is None else find_protocol(args.protocol)
    masks = _words(args.masks) or (tuple(protocol.masks) if protocol else MASKS)
    methods = _words(args.methods) or (() if args.results else METHODS)
    checkpoint = str(args.checkpoint or default_checkpoint())
    size = args.size or (protocol.resolution if protocol else _resolution(checkpoint))
    if size < SMALLEST:
        raise UserError(f"--size {size}: pictures are scored from {SMALLEST} px")
    count = args.count or (max(one.count for one in protocol.data) if protocol else 0)
    resize = protocol.resize if protocol else "crop"
    setting = Setting(str(args.data), masks, size, count, args.seed, args.candidates, resize)
    scores = _words(args.scores) or (_of(protocol) if protocol else SCORES)
    small = ()
    if size < SMALLEST_ALEX and any(name.startswith("lpips_alex") for name in scores):
        scores = tuple(name for name in scores if not name.startswith("lpips_alex"))
        small = (f"left out: lpips_alex: its network takes pictures from {SMALLEST_ALEX} px, these have {size}",)
    results = parse_results(args.results)
    baselines = () if args.no_baselines else tuple(name for name in ALWAYS if name not in (*methods, *results))
    return Evaluation(
        setting,
        methods,
        results,
        checkpoint,
        Path(args.output),
        baselines,
        scores,
        None if args.weights is None else Path(args.weights),
        args.steps,
        args.shift,
        args.batch_size,
        command=shlex.join(["coherent-ddrm", *args.words]),
        download=not args.offline,
        precision=args.precision,
        reinpaint=args.reinpaint,
        published=None if protocol is None else told(protocol, setting),
        notes=(*small, *(() if protocol is None else departures(protocol, setting))),
    )


def told(protocol: Protocol, setting: Setting) -> dict[str, Any]:
    """What a report says of a protocol: its title, how it scores, and, at its own size, what papers report."""
    rows = [asdict(row) for row in protocol.published if row.mask in _kinds(setting)]
    rows = rows if setting.size == protocol.resolution else []
    counts = {data.name: data.count for data in protocol.data}
    return {"name": protocol.name, "title": protocol.title, "text": describe(protocol), "counts": counts, "rows": rows}


def departures(protocol: Protocol, setting: Setting) -> tuple[str, ...]:
    """What is done otherwise than the protocol has it, a sentence each."""
    found = []
    if setting.size != protocol.resolution:
        found.append(
            f"{protocol.name} is at {protocol.resolution} px, this is at {setting.size}: no number of the papers is "
            "comparable, so none is shown"
        )
    if others := [name for name in _kinds(setting) if name not in protocol.masks]:
        found.append(f"{', '.join(others)}: no kind of hole of {protocol.name}")
    return tuple(found)


def _kinds(setting: Setting) -> list[str]:
    """Names of the kinds of holes, also of those that NAME=FOLDER gives."""
    return [text.partition("=")[0] for text in setting.masks]


def parse_results(texts: Sequence[str]) -> dict[str, Path]:
    """["lama=DIR", "other/"] -> folders by label; a folder without a name is called as it is."""
    found: dict[str, Path] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        path = Path(folder if equals else text)
        label = name if equals else path.resolve().name
        if not path.is_dir():
            raise UserError(f"--results {text!r}: {path} is no folder")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label):
            raise UserError(
                f"--results {text!r}: NAME=FOLDER, with a name of letters, digits, '.', '_' and '-', the first one a "
                "letter or digit"
            )
        if label in found:
            raise UserError(f"--results: two folders are called {label!r}; write NAME=FOLDER")
        found[label] = path
    return found


def _of(protocol: Protocol) -> tuple[str, ...]:
    """Those of its scores that need a network."""
    return tuple(name for name in protocol.metrics if name in SCORES)


def _resolution(checkpoint: str) -> int:
    if not (Path(checkpoint) / INDEX).is_file():
        raise UserError(f"--size is needed: {checkpoint} is no checkpoint of ours that would tell it")
    return read_facts(Path(checkpoint)).resolution


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())
