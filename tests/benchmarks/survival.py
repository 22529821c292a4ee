"""A run that is killed again and again ends with the weights of one that is not: python tests/benchmarks/survival.py

SIGKILL at random moments, while it starts, trains, validates or writes a checkpoint; then the same command to the end,
and the sha256 over all weights, averages and optimizer states of both runs.
"""

import argparse
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from training_runs import ROOT, arguments, disc_shards

OPTIONS = ["--model.size", "tiny", "--optim.warmup", "1", "--auxiliary.adversarial", "0.2", "--auxiliary.width", "8"]
OPTIONS += ["--log.save", "5", "--log.validate", "50", "--log.sheet", "1000", "--optim.cooldown", "0.5"]


def start(out: Path, shards: Path, steps: int) -> subprocess.Popen:
    words = arguments(out, shards, *OPTIONS, "--optim.steps", str(steps))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train" / "diffusion.py"), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def digest(out: Path, steps: int) -> str:
    """Over names and bytes of every tensor of the last checkpoint."""
    total = hashlib.sha256()
    for file in sorted((out / "checkpoints" / f"step-{steps:08d}").glob("*.safetensors")):
        for name, value in sorted(load_file(file).items()):
            total.update(f"{file.name} {name} {value.dtype} {value.shape}".encode() + value.tobytes())
    return total.hexdigest()


def done_steps(out: Path) -> int:
    saved = sorted((out / "checkpoints").glob("step-*"))
    return int(saved[-1].name[-8:]) if saved else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        shards = disc_shards(Path(folder))
        killed, straight = Path(folder) / "killed", Path(folder) / "straight"
        begin = time.perf_counter()
        start(straight, shards, options.steps).wait()
        whole = time.perf_counter() - begin
        print(f"not killed: {digest(straight, options.steps)} ({whole:.0f} seconds)", flush=True)
        for kill in range(options.kills):
            before, process = done_steps(killed), start(killed, shards, options.steps)
            working = rng.random() < 0.8  # else at any moment of its start
            while working and process.poll() is None and done_steps(killed) == before:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.1 * whole / options.kills if working else 0.3 * whole))
            ended = process.poll() is not None
            process.kill()
            process.wait()
            print(f"kill {kill + 1}: step {before} -> {done_steps(killed)}{', had ended' if ended else ''}", flush=True)
        start(killed, shards, options.steps).wait()
        one, two = digest(straight, options.steps), digest(killed, options.steps)
        print(f"killed {options.kills} times: {two}: {'the same' if one == two else 'DIFFERENT'}")
        raise SystemExit(one != two)


if __name__ == "__main__":
    main()
