"""A training step by number of processes: python tests/benchmarks/processes.py --data SHARDS OUT

The whole loop of train/diffusion.py at the demo size, batch 32, not compiled, in turn, twice; best ten steps of each.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SETTINGS = {
    "1 process of 1 thread": (1, 1, []),
    "1 process of 2 threads": (1, 2, []),
    "2 processes of 1 thread": (2, 1, []),
    "2, checkpointing": (2, 1, ["--optim.checkpointing", "True"]),
    "2, spread": (2, 1, ["--optim.shard", "True"]),
}


def pictures_per_second(out: Path, data: str, processes: int, threads: int, options: list[str]) -> float:
    """Of the best ten steps out of forty."""
    shutil.rmtree(out, ignore_errors=True)
    command = [
        str(Path(sys.executable).parent / "torchrun"),
        "--nproc_per_node",
        str(processes),
        "--rdzv_backend",
        "c10d",
    ]
    command += ["--rdzv_endpoint", "localhost:0", str(ROOT / "train" / "diffusion.py"), "--out", str(out)]
    command += ["--data.train", data, "--data.val", data, "--model.size", "demo", "--optim.optimizer", "adamw"]
    command += ["--optim.batch", "32", "--optim.steps", "40", "--log.every", "10", "--log.validate", "40", *options]
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, env=settings, check=True, capture_output=True)
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return max(row["per_second"] for row in logged if "per_second" in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    best = dict.fromkeys(SETTINGS, 0.0)
    for _ in range(2):
        for name, setting in SETTINGS.items():
            best[name] = max(best[name], pictures_per_second(options.out, options.data, *setting))
    for name, speed in best.items():
        print(f"{name:24s} {32 / speed:.3f} s a step, {speed:.1f} pictures/s")


if __name__ == "__main__":
    main()
