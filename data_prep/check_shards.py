"""Verify a folder of shards against its manifest: every byte, every sample, every picture accounted for.

    python data_prep/check_shards.py OUT            sizes, hashes, index, each sample's checksum and members
    python data_prep/check_shards.py OUT --decode   and decodes every sample

Prints one line per problem. Exit code 0: sound; 1: problems; 2: the folder cannot be checked.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from coherent_ddrm.shards import (
    BLOCK,
    MANIFEST,
    DataError,
    check_sizes,
    dataset_hash,
    index_of,
    read_index,
    read_manifest,
    row_key,
    sha256_of,
    split_sample,
)


def check_folder(folder: Path, decode: bool = False, workers: int = 1) -> Iterator[str]:
    """One line for each problem found; none for a sound folder. Raises DataError when there is no usable manifest."""
    manifest = read_manifest(folder)
    yield from check_manifest(folder, manifest)
    sound = True
    with ThreadPoolExecutor(workers) as pool:
        for problems in pool.map(lambda shard: list(check_shard(folder, manifest, shard)), manifest["shards"]):
            sound = sound and not problems
            yield from problems
    if decode and sound:
        yield from check_pictures(folder)


def check_manifest(folder: Path, manifest: dict) -> Iterator[str]:
    """The manifest's own sums, and shards it does not know."""
    shards = manifest["shards"]
    if manifest["dataset_hash"] != dataset_hash(shards, manifest["label_names"], manifest["class_names"]):
        yield f"{MANIFEST}: its dataset_hash does not follow from its shards and names"
    if manifest["samples"] != sum(shard["samples"] for shard in shards):
        yield f"{MANIFEST}: {manifest['samples']} samples, but its shards hold {sum(s['samples'] for s in shards)}"
    pictures, left_out = manifest["inputs"]["pictures"], len(manifest["skipped"])
    if pictures != manifest["samples"] + left_out:
        yield f"{MANIFEST}: {pictures} pictures went in, {manifest['samples']} samples and {left_out} left out came out"
    known = {shard["name"] for shard in shards}
    for path in sorted(folder.glob("shard-*.tar")):
        if path.name not in known:
            yield f"{path.name}: not in {MANIFEST}"


def check_shard(folder: Path, manifest: dict, shard: dict) -> Iterator[str]:
    """One shard, in constant memory: sizes, hashes, then each sample through the index."""
    name, tar = shard["name"], folder / shard["name"]
    try:
        check_sizes(folder, shard)
    except DataError as error:
        yield str(error).removeprefix(f"{folder}{os.sep}")
    if not tar.exists() or not index_of(tar).exists():
        return
    if sha256_of(tar) != shard["sha256"]:
        yield f"{name}: its sha256 is not the manifest's"
    if sha256_of(index_of(tar)) != shard["index_sha256"]:
        yield f"{index_of(tar).name}: its sha256 is not the manifest's"
    try:
        rows = read_index(index_of(tar))
    except DataError as error:
        yield str(error)
        return
    if len(rows) != shard["samples"]:
        yield f"{index_of(tar).name}: {len(rows)} samples, the manifest says {shard['samples']}"
    yield from check_samples(tar, rows, manifest)


def check_samples(tar: Path, rows: np.ndarray, manifest: dict) -> Iterator[str]:
    wanted = {"image", "edges", "json"}
    if manifest["options"]["segmentation"] != "none":
        wanted.add("segmentation")
    end, seen = 0, set()
    with open(tar, "rb") as file:
        for number, row in enumerate(rows):
            place = f"{tar.name}, sample {number}"
            try:
                key = row_key(row, tar.stat().st_size)
                file.seek(int(row["offset"]))
                members = split_sample(file.read(int(row["length"])), row)
            except DataError as error:
                yield f"{place} ({row['key'].decode('ascii', 'replace')}): {error}"
                continue
            missing = wanted - set(members)
            if missing:
                yield f"{place} ({key}): without {', '.join(sorted(missing))}"
            if key in seen:
                yield f"{place}: the key {key} was there before"
            if row["offset"] != end and number:
                yield f"{place} ({key}): bytes before it belong to no sample"
            if row["class_id"] >= len(manifest["class_names"]) or row["class_id"] < -1:
                yield f"{place} ({key}): class {row['class_id']}, but there are {len(manifest['class_names'])}"
            seen.add(key)
            end = int(row["offset"] + row["length"])
        file.seek(int(rows[-1]["offset"] + rows[-1]["length"]) if len(rows) else 0)
        if file.read(2 * BLOCK + 1) != bytes(2 * BLOCK):
            yield f"{tar.name}: after the last sample comes something other than the end of a tar"


def check_pictures(folder: Path) -> Iterator[str]:
    """Every sample decodes, has the manifest's size, and only ids that have a name."""
    from coherent_ddrm.dataset import IGNORE, ShardDataset

    dataset = ShardDataset(folder)
    for i in range(len(dataset)):
        try:
            ids = dataset.read(i).segmentation
        except DataError as error:
            yield str(error)
            continue
        unknown = ids[(ids != IGNORE) & (ids >= dataset.num_labels)]
        if unknown.size:
            yield f"{dataset.key(i)}: label {unknown[0]}, but there are {dataset.num_labels} label names"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, metavar="OUT", help="a folder made by build_shards.py")
    p.add_argument("--decode", action="store_true", help="decode every sample as well")
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads (all cores)")
    args = p.parse_args(argv)
    try:
        count = 0
        for problem in check_folder(args.folder, args.decode, max(1, args.workers)):
            count += 1
            print(problem)
        manifest = read_manifest(args.folder)
    except (DataError, OSError) as error:
        print(f"check_shards: {error}", file=sys.stderr)
        return 2
    what = f"{manifest['samples']} samples in {len(manifest['shards'])} shards, {len(manifest['skipped'])} left out"
    print(f"{args.folder}: {what}: " + (f"{count} problems." if count else "sound."))
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
