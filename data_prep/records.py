"""What was made: a shard with its record, and all records summed up in OUT/manifest.json."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from coherent_ddrm.shard_writer import ShardWriter
from coherent_ddrm.shards import (
    FORMAT,
    MANIFEST,
    dataset_hash,
    index_of,
    key_of,
    read_json,
    shard_name,
    write_json,
)


@dataclass
class Result:
    """One picture's share of a shard: its members, or why it was left out."""

    row: dict
    members: dict[str, bytes] = field(default_factory=dict)
    skipped: str | None = None
    saliency: str | None = None  # "kept" or "refused"
    largest_id: int = -1


def class_id(row: dict, plan: dict) -> int:
    """The number of a picture's class; -1: it has none."""
    return -1 if row["class"] is None else plan["class_names"].index(row["class"])


def build_shard(out: Path, shard: int, results: Iterable[Result], plan: dict) -> None:
    """Write one shard, its index, then its record, whose presence says that the shard is complete."""
    suffix = "." + plan["options"]["format"]
    skipped, classes, saliency, largest_id = [], Counter(), Counter(), -1
    with ShardWriter(out, shard) as writer:
        for result in results:
            if result.skipped is not None:
                skipped.append({"path": result.row["path"], "reason": result.skipped})
                continue
            row = result.row
            writer.add(key_of(row["path"]), result.members, suffix, class_id(row, plan))
            classes[row["class"] or ""] += 1
            saliency.update([result.saliency] if result.saliency else [])
            largest_id = max(largest_id, result.largest_id)
    record = writer.record() | {"skipped": skipped, "classes": classes, "saliency": saliency, "largest_id": largest_id}
    write_json(out / f"{shard_name(shard)}.json", record | {"plan_sha256": _plan_hash(plan)})


def is_done(out: Path, shard: int, plan: dict) -> bool:
    record, tar = out / f"{shard_name(shard)}.json", out / f"{shard_name(shard)}.tar"
    if not (record.exists() and tar.exists() and index_of(tar).exists()):
        return False
    content = read_json(record)
    return content.get("plan_sha256") == _plan_hash(plan) and tar.stat().st_size == content["bytes"]


def _plan_hash(plan: dict) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def finish(out: Path, shard_count: int, plan: dict) -> dict | None:
    """Write manifest.json if every shard is there, else None. The last rank does it; two write the same bytes."""
    if not all(is_done(out, shard, plan) for shard in range(shard_count)):
        return None
    listed, skipped, classes, saliency, largest_id = [], [], Counter(), Counter(), -1
    for shard in range(shard_count):
        record = read_json(out / f"{shard_name(shard)}.json")
        listed.append({name: record[name] for name in ("name", "samples", "bytes", "sha256", "index_sha256")})
        skipped += record["skipped"]
        classes.update(record["classes"])
        saliency.update(record["saliency"])
        largest_id = max(largest_id, record["largest_id"])
    label_names = plan["label_names"]
    if label_names is None:
        label_names = [f"label {i}" for i in range(largest_id + 1)]
    manifest = {
        "format": FORMAT,
        "split": plan["options"]["split"],
        "resolution": plan["options"]["size"],
        "samples": sum(shard["samples"] for shard in listed),
        "label_names": label_names,
        "class_names": plan["class_names"],
        "class_counts": classes,
        "saliency": saliency,
        "shards": listed,
        "dataset_hash": dataset_hash(listed, label_names, plan["class_names"]),
        "made_with": plan["made_with"],
        "options": plan["options"],
        "inputs": plan["inputs"],
        "skipped_count": len(skipped),
        "skipped": skipped,
    }
    write_json(out / MANIFEST, manifest)
    return manifest
