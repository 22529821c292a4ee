"""`coherent-ddrm <verb>`. A mistake of the user's ends in one line `error: ...` and exit code 2, nothing half-written.

torch is imported by the work itself, after all that can be checked without it, so `--help` and most errors answer at
once. Other exceptions are faults of the program and keep their traceback.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from coherent_ddrm import __version__
from coherent_ddrm.errors import UserError
from coherent_ddrm.images import ImageError
from coherent_ddrm.study.commands import add_study

if TYPE_CHECKING:
    import torch

    from coherent_ddrm.export import Facts
    from coherent_ddrm.pipeline import CoherentInpaintPipeline

SAMPLER_NAMES = ("coherent", "ddnm")  # those of scene.py, which imports torch; a test compares
MISTAKES = (UserError, ImageError, OSError)  # what a user can cause and mend: arguments, files, disks


class Parser(argparse.ArgumentParser):
    """argparse that raises its complaint as a UserError, where argparse itself prints usage lines and exits."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code: 0, 2 for a mistake of the user's, 130 when interrupted."""
    try:
        words = sys.argv[1:] if argv is None else list(argv)
        args = build_parser().parse_args(words)
        args.words = words
        return args.run(args)
    except MISTAKES as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """All verbs. Each sets `run`, a function of the parsed arguments that returns the exit code."""
    parser = Parser(prog="coherent-ddrm", description="Fill large holes in pictures.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_inpaint(verbs)
    _add_restore(verbs)
    _add_methods(verbs)
    _add_finetune(verbs)
    _add_evaluate(verbs)
    _add_demo(verbs)
    add_study(verbs, positive, natural)
    return parser


def _add_inpaint(verbs: Any) -> None:
    verb = verbs.add_parser(
        "inpaint",
        help="fill the hole of one picture, or of a folder of pictures",
        description="Fill the white part of MASK in IMAGE. Known pixels come back exactly, at the picture's own size. "
        "Give two folders to fill many pictures; masks are matched by name.",
    )
    verb.add_argument("image", metavar="IMAGE", help="picture, or folder of pictures")
    verb.add_argument("mask", metavar="MASK", help="mask, white = fill, or folder of masks")
    verb.add_argument(
        "-o", "--output", required=True, metavar="OUT", help="picture or folder to write; a JSON goes beside"
    )
    verb.add_argument(
        "--candidates", type=positive, default=1, metavar="K", help="results per picture: OUT-1, OUT-2, ..."
    )
    verb.add_argument("--sampler", default="coherent", metavar="NAME", help=" or ".join(SAMPLER_NAMES))
    verb.add_argument(
        "--structure", metavar="PNG", help="edge map to follow, as --save-structure writes it; folder: folder"
    )
    verb.add_argument("--save-structure", metavar="PNG", help="write the planned edges, and .segmentation.png beside")
    verb.add_argument(
        "--structure-steps", type=positive, default=1, metavar="N", help="above 1: one plan per candidate"
    )
    verb.add_argument(
        "--structure-scale", type=float, default=1.0, metavar="S", help="above 1: follow the plan more (default 1)"
    )
    verb.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="results computed together (default 8)"
    )
    verb.add_argument(
        "--resample", type=positive, default=1, metavar="R", help="passes over the middle of the way (default 1)"
    )
    _add_common(verb)
    verb.set_defaults(run=inpaint)


def _add_restore(verbs: Any) -> None:
    verb = verbs.add_parser(
        "restore",
        help="undo a degradation with any method and any diffusion prior",
        description="Restore IMAGE, the measurement y = A x + noise, or a folder of them. With --degrade, IMAGE is "
        "clean; it is brought to the prior's size and measured first. `coherent-ddrm methods` lists what there is.",
    )
    verb.add_argument("image", metavar="IMAGE", help="picture, or folder of pictures")
    verb.add_argument("-o", "--output", required=True, metavar="OUT", help="picture or folder; a JSON goes beside")
    verb.add_argument("--operator", required=True, metavar="SPEC", help='such as "super_resolution:4"')
    verb.add_argument("--sampler", default="ddnm", metavar="NAME", help="default: ddnm")
    verb.add_argument("--prior", metavar="DIR_OR_NAME", help="our checkpoint, a diffusers folder or Hub name")
    verb.add_argument("--mask", metavar="MASK", help="for inpainting: white = missing; file, or folder matched by name")
    verb.add_argument("--sigma-y", type=float, default=0.0, metavar="S", help="noise of y on the [-1, 1] scale")
    verb.add_argument("--degrade", action="store_true", help="IMAGE is clean; measure it first")
    verb.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the sampler, such as eta=0.5"
    )
    verb.add_argument("--classifier", metavar="DIR_OR_NAME", help="for --show: a folder, or a timm model")
    verb.add_argument(
        "--show",
        action="append",
        default=[],
        metavar="CLASS[=MASK]",
        help="what the classifier shall see in the hole, or in the white of MASK; may be repeated",
    )
    verb.add_argument("--guidance-scale", type=float, default=20.0, metavar="S", help="strength of --show (default 20)")
    verb.add_argument("--class-label", type=natural, metavar="N", help="for a prior that has classes")
    verb.add_argument("--class-scale", type=float, default=1.0, metavar="S", help="classifier-free guidance on it")
    verb.add_argument("--null-label", type=natural, metavar="N", help="the label for any class, for --class-scale")
    verb.add_argument("--candidates", type=positive, default=1, metavar="K", help="results per picture")
    verb.add_argument("--steps", type=positive, metavar="N", help="default: the method's")
    verb.add_argument(
        "--shift", type=float, metavar="S", help="above 1: more steps at high noise (default: the prior's)"
    )
    verb.add_argument("--seed", type=natural, metavar="N", help="same seed, same result (drawn unless given)")
    verb.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda if there is one)"
    )
    verb.set_defaults(run=restore)


def _add_methods(verbs: Any) -> None:
    verb = verbs.add_parser("methods", help="list samplers, operators and what they need")
    verb.add_argument("--markdown", action="store_true", help="the whole page, docs/methods.md")
    verb.set_defaults(run=methods)


def _add_finetune(verbs: Any) -> None:
    verb = verbs.add_parser(
        "finetune",
        help="teach a checkpoint your own pictures",
        description="Make a checkpoint for `inpaint` out of another one and a folder of 50 to 5,000 pictures. Some are "
        "held out, and scored before and after. The same command again goes on where it was stopped.",
    )
    verb.add_argument("pictures", metavar="PICTURES", help="folder of pictures; sub-folders count")
    verb.add_argument("-o", "--output", required=True, metavar="OUT", help="folder for the checkpoint")
    verb.add_argument("--lora", type=positive, metavar="RANK", help="learn adapters of this rank, such as 8 (peft)")
    verb.add_argument("--no-merge", action="store_true", help="keep the old weights in OUT, adapters in OUT/lora alone")
    verb.add_argument("--steps", type=positive, default=500, metavar="N", help="of each stage (default 500)")
    verb.add_argument("--checkpoint", metavar="DIR", help="checkpoint to start from (default: the shipped one)")
    verb.add_argument(
        "--segmentation",
        default="saliency",
        metavar="HOW",
        help="saliency, labels:DIR (maps named as the pictures, with the checkpoint's ids) or none",
    )
    verb.add_argument(
        "--label", metavar="NAME", help="with saliency: what the pictures show (default: what the checkpoint sees)"
    )
    verb.add_argument("--holdout", type=float, default=0.15, metavar="SHARE", help="not trained on (default 0.15)")
    verb.add_argument("--seed", type=natural, default=0, metavar="N", help="same seed, same weights (default 0)")
    verb.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda if there is one)"
    )
    verb.set_defaults(run=finetune)


def _add_evaluate(verbs: Any) -> None:
    verb = verbs.add_parser(
        "evaluate",
        help="score methods on the same pictures, holes and noise, and write a report",
        description="Fill holes in the pictures of DATA by every method, score them, write report.html, results.json, "
        "results.md and scores.csv. The same command again goes on. `accelerate launch` shares the work out.",
    )
    verb.add_argument("--data", required=True, metavar="DIR", help="folder of pictures, or of shards")
    verb.add_argument("-o", "--output", required=True, metavar="REPORT", help="folder for pictures and report")
    verb.add_argument(
        "--masks", metavar="A,B,...", help="kinds of holes, or NAME=FOLDER of masks (default: lama-thick,half)"
    )
    verb.add_argument(
        "--methods",
        default="",
        metavar="A,B,...",
        help="coherent, samplers, biharmonic; options behind colons: repaint:jump_length=2. The others are tested "
        "against the first (default: coherent,ddnm; with --results: none)",
    )
    verb.add_argument("--no-baselines", action="store_true", help="without telea and navier-stokes, else always there")
    verb.add_argument(
        "--results",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="score what another program made of REPORT/given and REPORT/holes: DIR/KIND/NAME.png; may be repeated",
    )
    verb.add_argument("--protocol", metavar="NAME[:PICTURES]", help="a published one: holes, size, count, scores")
    verb.add_argument("--checkpoint", metavar="DIR", help="our checkpoint, or any prior (default: the shipped one)")
    verb.add_argument("--count", type=positive, metavar="N", help="pictures, spread over the data (default: all)")
    verb.add_argument("--size", type=positive, metavar="PX", help="default: the protocol's or the checkpoint's")
    verb.add_argument("--candidates", type=positive, default=1, metavar="K", help="results per hole, for diversity")
    verb.add_argument(
        "--scores",
        metavar="A,B,...",
        help="beside those that are always there: lpips_alex, lpips_vgg, fid, kid, p_ids, u_ids, pd-NAME, fid-NAME, "
        "fid_infinity-NAME, kid-NAME; slow ones: foreground_iou, segmentation_iou, reinpaint_known, reinpaint_invented "
        "(default: all but the slow ones; NAME clothing)",
    )
    verb.add_argument(
        "--reinpaint", default="coherent", metavar="METHOD", help="inpaints again, for these (default: coherent)"
    )
    verb.add_argument("--weights", metavar="DIR", help="folder with the weights of LPIPS and Inception")
    verb.add_argument("--offline", action="store_true", help="never try to fetch weights of scores")
    verb.add_argument("--steps", type=positive, metavar="N", help="of every method (default: each one's own)")
    verb.add_argument("--shift", type=float, metavar="S", help="of every method's times (default: each one's own)")
    verb.add_argument("--batch-size", type=positive, default=16, metavar="N", help="default 16")
    verb.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the networks (default fp32)")
    verb.add_argument("--seed", type=natural, default=0, metavar="N", help="of holes and noise (default 0)")
    verb.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda if there is one)"
    )
    verb.set_defaults(run=evaluate)


def _add_demo(verbs: Any) -> None:
    verb = verbs.add_parser("demo", help="inpaint a few shipped photographs and write a sheet")
    verb.add_argument("-o", "--output", default="demo", metavar="DIR", help="folder for sheet.png (default: demo)")
    verb.add_argument("--pictures", metavar="DIR", help="name.jpg with name.hole.png (default: the shipped ones)")
    verb.add_argument("--sampler", default="coherent", metavar="NAME", help=" or ".join(SAMPLER_NAMES))
    _add_common(verb)
    verb.set_defaults(run=demo, seed=0)


def _add_common(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--seed", type=natural, metavar="N", help="same seed, same result (inpaint draws one by default)")
    verb.add_argument("--steps", type=positive, metavar="N", help="network evaluations (default: the checkpoint's)")
    verb.add_argument("--checkpoint", metavar="DIR", help="checkpoint folder (default: the shipped one)")
    verb.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda if there is one)"
    )


def positive(text: str) -> int:
    """A whole number from 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def natural(text: str) -> int:
    """A whole number from 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


# -- verbs -------------------------------------------------------------------------------------------------------------


def inpaint(args: argparse.Namespace) -> int:
    """Check every input, then load the network, then work."""
    from tqdm import tqdm

    from coherent_ddrm import jobs

    facts = check_common(args)
    todo = jobs.list_jobs(args)
    if args.sampler == "ddnm" and (args.structure or args.save_structure):
        raise UserError("sampler ddnm takes no plan; leave --structure and --save-structure out")
    if facts.labels == 0 and (args.structure or args.save_structure):
        raise UserError(f"{args.checkpoint} takes no plan; leave --structure and --save-structure out")
    if not facts.planner and args.save_structure:
        raise UserError(f"{args.checkpoint} has no structure predictor; leave --save-structure out")
    warnings = [line for job in todo for line in jobs.check(job, facts)]
    pipe = load_pipeline(args)
    args.seed = secrets.randbits(31) if args.seed is None else args.seed
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    start = time.perf_counter()
    batches = -(-len(todo) // max(1, args.batch_size // args.candidates))
    total = batches * (args.steps or pipe.config.steps)
    with tqdm(total=total, desc=f"pictures: {len(todo)}", unit="step") as bar, memory_limits():
        nfe = max(output.nfe for output in jobs.run(todo, pipe, args, bar))
    written = [jobs.numbered(todo[0].output, k, args.candidates) for k in range(args.candidates)]
    where = ", ".join(map(str, written)) if len(todo) == 1 else f"{len(todo)} pictures in {Path(args.output)}"
    print(f"{where}: {time.perf_counter() - start:.2f} seconds, nfe {nfe}, seed {args.seed}")
    return 0


def restore(args: argparse.Namespace) -> int:
    """Check files, load the prior, work through the pictures."""
    from tqdm import tqdm

    from coherent_ddrm import restore_jobs
    from coherent_ddrm.export import default_checkpoint

    options = restore_jobs.parse_options(args.option)
    todo = restore_jobs.list_jobs(args)
    if bool(args.show) != bool(args.classifier):
        raise UserError("--show CLASS and --classifier go together; give both or neither")
    options["show"] = restore_jobs.read_show(args.show)
    args.prior = str(args.prior or default_checkpoint())
    args.seed = secrets.randbits(31) if args.seed is None else args.seed
    from coherent_ddrm.restoration import RestorationPipeline

    quiet()
    device = usable_device(args.device)
    pipe = RestorationPipeline.from_prior(args.prior, device)
    if args.classifier:
        from coherent_ddrm.classifier import load_classifier

        options["classifier"] = load_classifier(args.classifier, device)
    with warnings.catch_warnings(record=True) as told:
        for job in todo:
            restore_jobs.restore(job, pipe, args, options, check_only=True)
    for line in dict.fromkeys(str(one.message) for one in told if one.category is UserWarning):
        print(f"warning: {line}", file=sys.stderr)
    start, nfe = time.perf_counter(), 0
    with memory_limits("--candidates"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # said already
        for job in tqdm(todo, desc="pictures", unit="picture", disable=len(todo) == 1):
            nfe = max(nfe, restore_jobs.run(job, pipe, args, options).nfe)
    where = str(todo[0].output) if len(todo) == 1 else f"{len(todo)} pictures in {args.output}"
    print(f"{where}: {time.perf_counter() - start:.2f} seconds, nfe {nfe}, seed {args.seed}")
    return 0


def methods(args: argparse.Namespace) -> int:
    """Print what there is."""
    from coherent_ddrm.methods import listing, page

    print(page() if args.markdown else listing(), end="" if args.markdown else "\n")
    return 0


def finetune(args: argparse.Namespace) -> int:
    """Check everything, train, export, and say what it brought."""
    from coherent_ddrm.finetune import FineTune, carry_out, examine, table

    names = ("pictures", "output", "checkpoint", "lora", "steps", "segmentation", "label", "seed", "holdout")
    job = examine(FineTune(**{name: getattr(args, name) for name in names}, merge=not args.no_merge))
    quiet()
    report = carry_out(job, usable_device(args.device))
    print(table(report))
    print(f"{args.output}: {report['seconds']['all']:.0f} seconds, seed {args.seed}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Check what is asked for, fill, score, report."""
    import importlib.util

    for module, package in {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "jinja2": "jinja2"}.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(f"evaluate needs {package}; install it with: pip install 'coherent-ddrm[evaluate]'")
    from coherent_ddrm.evaluation.asked import understand

    wanted = understand(args)
    quiet()
    wanted.device = str(usable_device(args.device))
    from coherent_ddrm.evaluation.evaluate import evaluate as carry_out

    with memory_limits("--batch-size"):
        report = carry_out(wanted)
    if report is not None:
        print(f"{report}; tables in results.md, all scores in scores.csv")
    return 0


def demo(args: argparse.Namespace) -> int:
    """Inpaint the shipped photographs and draw them on one sheet."""
    from coherent_ddrm.demo import find_pairs, write_sheet

    check_common(args)
    pairs = find_pairs(None if args.pictures is None else Path(args.pictures))
    output = write_sheet(pairs, load_pipeline(args), args, Path(args.output) / "sheet.png")
    print(f"{Path(args.output) / 'sheet.png'}: {output.seconds:.2f} seconds, nfe {output.nfe}")
    return 0


def check_common(args: argparse.Namespace) -> Facts:
    """What can be wrong before torch is there: the sampler's name, the checkpoint's files. Fills in the checkpoint."""
    from coherent_ddrm.export import default_checkpoint, read_facts, verify_manifest

    if args.sampler not in SAMPLER_NAMES:
        raise UserError(f"unknown sampler {args.sampler!r}: choose one of {', '.join(SAMPLER_NAMES)}")
    args.checkpoint = str(args.checkpoint or default_checkpoint())
    verify_manifest(Path(args.checkpoint))
    return read_facts(Path(args.checkpoint))


@contextmanager
def memory_limits(flags: str = "--batch-size or --candidates") -> Iterator[None]:
    """Turns a full accelerator into advice."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"the device ran out of memory; lower {flags}") from error


def load_pipeline(args: argparse.Namespace) -> CoherentInpaintPipeline:
    """The checkpoint on the device, silent. UserError for a device that is not there."""
    from coherent_ddrm.pipeline import CoherentInpaintPipeline

    quiet()
    pipe = CoherentInpaintPipeline.from_pretrained(args.checkpoint).to(usable_device(args.device))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quiet() -> None:
    """No chatter of diffusers'."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def usable_device(name: str) -> torch.device:
    """The device called `name`, tried out. UserError if it is not there."""
    import torch

    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}); try --device cpu") from error
    return device


if __name__ == "__main__":
    sys.exit(main())
