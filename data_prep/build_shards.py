"""Turn a folder tree of pictures into shards: pictures, soft edges and segmentation maps, ready for training.

    python data_prep/build_shards.py IMAGES OUT --size 64 --segmentation saliency --classes classes.csv
    torchrun --nproc-per-node 4 data_prep/build_shards.py IMAGES OUT ...      (or an array job: rank r makes shards s
                                                                               with s mod W = r)

A run that was stopped continues when it is started again. A picture that cannot be used is left out and listed, with
the reason, in OUT/manifest.json. The same pictures and options give the same bytes, whatever the number of processes.
"""

import argparse
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from inputs import Listing
from plan import INPUTS, PLAN, Options, make_plan, options_from
from ranks import rank_and_world
from records import build_shard, finish, is_done
from workers import InProcess, Workers

from coherent_ddrm.shards import MANIFEST, DataError, shard_name


def build(args: argparse.Namespace) -> int:
    """Make this rank's share of the shards; returns the exit code."""
    out = args.out
    rank, world = rank_and_world(args)
    if not args.images.is_dir():
        raise DataError(f"{args.images}: no such folder of pictures.")
    if out.resolve().is_relative_to(args.images.resolve()):
        raise DataError(f"{out} lies inside {args.images}: the shards would become pictures of the next run.")
    options = options_from(args)
    out.mkdir(parents=True, exist_ok=True)
    if args.overwrite:
        if world > 1:
            raise DataError(
                "--overwrite with several ranks: one would delete what another wrote. Delete the folder instead."
            )
        clear(out)
    plan = make_plan(args, options)
    listing = Listing(out / INPUTS, options.samples_per_shard)
    mine = list(range(rank, listing.shards, world))
    missing = [shard for shard in mine if not is_done(out, shard, plan)]
    if missing:
        make_shards(args, options, plan, listing, missing, f"rank {rank} of {world}")
    manifest = finish(out, listing.shards, plan)
    if manifest is None:
        print(f"rank {rank} of {world}: {len(mine)} shards done; the last rank to finish writes {MANIFEST}.")
        return 0
    report(out, manifest)
    return 0 if manifest["samples"] else 1


def clear(out: Path) -> None:
    """Remove an earlier build, and only what a build writes."""
    for pattern in ("shard-[0-9]*", ".shard-[0-9]*.tmp-*", ".inputs.jsonl.tmp-*", MANIFEST, PLAN, INPUTS):
        for path in out.glob(pattern):
            path.unlink()


def make_shards(
    args: argparse.Namespace, options: Options, plan: dict, listing: Listing, missing: list[int], name: str
) -> None:
    from samples import start_maker  # late: --help needs neither OpenCV nor tqdm
    from tqdm import tqdm

    for shard in missing:  # what a killed run left behind
        for path in args.out.glob(f".{shard_name(shard)}.*.tmp-*"):
            path.unlink()
    start = partial(start_maker, args.images, options, plan)
    workers = Workers(args.workers, start) if args.workers else InProcess(start)
    total = sum(listing.count(shard) for shard in missing)
    try:
        with tqdm(total=total, unit="picture", desc=name, disable=True if args.quiet else None) as progress:
            for shard in missing:
                results = counted(workers.results(listing.rows(shard)), progress)
                build_shard(args.out, shard, results, plan)
    finally:
        workers.close()


def counted(results: Iterator, progress) -> Iterator:
    for result in results:
        progress.update()
        yield result


def report(out: Path, manifest: dict) -> None:
    print(f"{out}: {manifest['samples']} samples of {manifest['resolution']} px in {len(manifest['shards'])} shards.")
    inputs = manifest["inputs"]
    if manifest["saliency"]:
        kept, refused = manifest["saliency"].get("kept", 0), manifest["saliency"].get("refused", 0)
        print(f"saliency: {kept} kept, {refused} refused (their segmentation is all 'ignore').")
    if manifest["skipped_count"]:
        reasons = Counter(entry["reason"].split(" (")[0][:60] for entry in manifest["skipped"])
        common = reasons.most_common(1)[0][0]
        print(f"left out: {manifest['skipped_count']} pictures, listed in {MANIFEST}; most often: {common}")
    for count, what in (
        (inputs["other_files"], "files that are no pictures"),
        (len(inputs["folders_not_entered"]), "folders, linked or unreadable"),
        (inputs["csv_rows_without_picture"], "lines of the CSV without a picture"),
    ):
        if count:
            print(f"not used: {count} {what}.")


def natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} must be 0 or more")
    return number


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be 1 or more")
    return number


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", type=Path, metavar="IMAGES", help="a folder of pictures; sub-folders count")
    p.add_argument("out", type=Path, metavar="OUT", help="the folder for shards")
    p.add_argument("--size", type=positive, default=256, help="side of the square pictures, in pixels (256)")
    p.add_argument(
        "--fit", choices=("crop", "stretch", "pad"), default="crop", help="how a picture becomes square (crop)"
    )
    p.add_argument(
        "--format", choices=("png", "webp", "jpg"), default="png", help="of the pictures; webp is lossless (png)"
    )
    p.add_argument("--quality", type=positive, default=95, help="of jpg (95)")
    p.add_argument("--min-size", type=positive, help="leave out pictures whose short side is below this (SIZE)")
    p.add_argument("--max-pixels", type=positive, default=89_478_485, help="leave out pictures above this (89 million)")
    p.add_argument(
        "--segmentation", default="saliency", metavar="HOW", help="labels:DIR, saliency, model:NAME or none (saliency)"
    )
    p.add_argument(
        "--ignore-label", type=int, action="append", default=[], help="an id of the label maps to ignore; repeatable"
    )
    p.add_argument(
        "--classes", type=Path, metavar="CSV", help="class and caption of each picture, by its path under IMAGES"
    )
    p.add_argument("--image-column", default="image")
    p.add_argument("--label-column", default="label")
    p.add_argument("--caption-column", default="caption")
    p.add_argument(
        "--label-names", type=Path, help="manifest.json of the training split, or a text file with one name a line"
    )
    p.add_argument("--split", help="name of this split (the name of OUT)")
    p.add_argument("--samples-per-shard", type=positive, default=1000)
    p.add_argument(
        "--workers", type=natural, default=len(os.sched_getaffinity(0)), help="processes (all cores); 0: none"
    )
    p.add_argument("--rank", type=int, help="this machine's number, if no launcher sets it")
    p.add_argument("--world", type=int, help="how many machines")
    p.add_argument("--overwrite", action="store_true", help="remove what an earlier run wrote in OUT")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return build(args)
    except (DataError, OSError) as error:
        print(f"build_shards: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("build_shards: stopped; the same command continues.", file=sys.stderr)
        return 130


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # a cluster's notice: tidy up as after Ctrl-C
    sys.exit(main())
