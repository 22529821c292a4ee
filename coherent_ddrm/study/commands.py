"""`coherent-ddrm study create | serve | export | import | analyse`. Imports nothing heavy: --help is instant."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coherent_ddrm.errors import UserError

Number = Callable[[str], int]  # argparse types of the command line


def add_study(verbs: Any, positive: Number, natural: Number) -> None:
    """Add `study` and its verbs to the command line."""
    study = verbs.add_parser(
        "study", help="ask people which of two results is better", description="A user study; see docs/study.md."
    )
    steps = study.add_subparsers(dest="step", required=True, metavar="STEP")
    _add_create(steps, positive, natural)
    _add_serve(steps, positive, natural)
    verb = steps.add_parser("export", help="write the study as files that open without a server")
    verb.add_argument("study", metavar="STUDY", help="folder that `create` made")
    verb.add_argument("-o", "--output", required=True, metavar="DIR", help="new folder; open its index.html")
    verb.add_argument("--sheets", type=positive, default=100, metavar="N", help="lists of questions (default 100)")
    verb.set_defaults(run=export)
    verb = steps.add_parser("import", help="take in answers that raters of an export sent")
    verb.add_argument("study", metavar="STUDY", help="folder that `create` made")
    verb.add_argument("files", nargs="+", metavar="JSON", help="answer files; giving one again does no harm")
    verb.set_defaults(run=import_answers)
    verb = steps.add_parser("analyse", help="preference rates, scores, agreement, raters")
    verb.add_argument("study", metavar="STUDY", help="folder that `create` made")
    verb.add_argument("-o", "--output", metavar="DIR", help="for results.md and results.json (default: STUDY)")
    verb.add_argument(
        "--allow-wrong",
        type=natural,
        metavar="N",
        help="failed catch trials forgiven on a whole sheet, and as large a part of fewer (default: as many as let a "
        "guesser pass in 5 %% or less; none at the least)",
    )
    verb.add_argument(
        "--include-untested", action="store_true", help="count those, too, who left before they met a catch trial"
    )
    verb.set_defaults(run=analyse)


def _add_create(steps: Any, positive: Number, natural: Number) -> None:
    verb = steps.add_parser("create", help="make a study from folders of pictures, matched by name")
    verb.add_argument("--truth", required=True, metavar="DIR", help="original pictures")
    verb.add_argument("--masks", required=True, metavar="DIR", help="masks, white = hole")
    verb.add_argument(
        "--results", required=True, action="append", metavar="NAME=DIR", help="a method's pictures; two or more times"
    )
    verb.add_argument("-o", "--output", required=True, metavar="STUDY", help="new folder; answers will be in it, too")
    verb.add_argument("--questions", type=positive, default=20, metavar="N", help="per rater (default 20)")
    verb.add_argument("--catch", type=natural, default=5, metavar="N", help="catch trials per rater (default 5)")
    verb.add_argument("--seed", type=natural, default=0, metavar="N", help="of order and sides (default 0)")
    verb.add_argument("--title", metavar="TEXT", help="head of the page")
    verb.add_argument("--prompt", metavar="TEXT", help="the question that is asked")
    verb.set_defaults(run=create)


def _add_serve(steps: Any, positive: Number, natural: Number) -> None:
    verb = steps.add_parser("serve", help="serve the study's page; the same command again goes on")
    verb.add_argument("study", metavar="STUDY", help="folder that `create` made")
    verb.add_argument("--host", default="127.0.0.1", help="0.0.0.0: reachable from other machines (default 127.0.0.1)")
    verb.add_argument("--port", type=natural, default=8000, metavar="N", help="default 8000")
    verb.add_argument("--max-raters", type=positive, default=1000, metavar="N", help="with an answer (default 1000)")
    verb.set_defaults(run=serve)


def create(args: argparse.Namespace) -> int:
    """Check all pictures and write the study."""
    from coherent_ddrm.study.create import PROMPT, TITLE, Sources, parse_results
    from coherent_ddrm.study.create import create as make

    sources = Sources(Path(args.truth), Path(args.masks), parse_results(args.results))
    study = make(
        sources,
        Path(args.output),
        questions=args.questions,
        catches=args.catch,
        seed=args.seed,
        title=args.title or TITLE,
        prompt=args.prompt or PROMPT,
    )
    comparisons = len(study.pairs) * len(study.pictures)
    print(
        f"{args.output}: {len(study.methods)} methods on {len(study.pictures)} pictures, {comparisons} comparisons; "
        f"all are asked once by {-(-comparisons // study.questions)} raters"
    )
    return 0


def serve(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C."""
    if args.port > 65535:
        raise UserError(f"--port {args.port}: ports go to 65535")
    try:
        from coherent_ddrm.study.server import serve as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "anyio"):
            raise
        raise UserError(f"{error.name} is missing; install it with: pip install 'coherent-ddrm[study]'") from error
    run(Path(args.study), args.host, args.port, args.max_raters)
    return 0


def export(args: argparse.Namespace) -> int:
    """Write the static page."""
    from coherent_ddrm.study.static_export import INDEX
    from coherent_ddrm.study.static_export import export as write

    count = write(Path(args.study), Path(args.output), args.sheets)
    print(f"{Path(args.output) / INDEX}: {args.sheets} sheets, {count} pictures")
    return 0


def import_answers(args: argparse.Namespace) -> int:
    """Merge answer files."""
    from coherent_ddrm.study.answer_files import import_files

    new = import_files(Path(args.study), [Path(file) for file in args.files])
    print(f"{args.study}: {new} new answers from {len(args.files)} files")
    return 0


def analyse(args: argparse.Namespace) -> int:
    """Print the scores, write all results."""
    from coherent_ddrm.study import report
    from coherent_ddrm.study.analysis import analyse as work

    results = work(Path(args.study), args.allow_wrong, args.include_untested)
    files = report.write(results, Path(args.output or args.study))
    print(report.methods_table(results))
    kept = results["answers"]["raters_kept"]
    print(f"{', '.join(map(str, files))}: {kept} of {results['answers']['raters']} raters kept")
    return 0
