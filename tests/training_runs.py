"""Made-up shards, and the training scripts run on them in this process, for the tests of training."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from accelerate.state import AcceleratorState
from PIL import Image

ROOT = Path(__file__).parent.parent


def disc_shards(root: Path, count: int = 24) -> Path:
    """Coloured discs at 32 px with true labels."""
    (root / "images").mkdir()
    (root / "labels").mkdir()
    y, x = np.mgrid[:32, :32]
    generator = np.random.default_rng(0)
    for i in range(count):
        inside = (x - generator.integers(10, 22)) ** 2 + (y - generator.integers(10, 22)) ** 2 < 64
        picture = np.where(inside[..., None], generator.integers(0, 256, 3), generator.integers(0, 256, 3))
        Image.fromarray(picture.astype(np.uint8)).save(root / "images" / f"{i:02d}.png")
        Image.fromarray(inside.astype(np.uint8)).save(root / "labels" / f"{i:02d}.png")
    command = [sys.executable, ROOT / "data_prep" / "build_shards.py", root / "images", root / "shards", "--size", "32"]
    subprocess.run([*command, "--segmentation", f"labels:{root / 'labels'}", "--workers", "1"], check=True, cwd=ROOT)
    return root / "shards"


def arguments(out, shards, *options):
    data = ["--data.train", shards, "--data.val", shards, "--out", out]
    data += ["--optim.batch", "8", "--optim.precision", "fp32"]
    log = ["--log.every", "1", "--log.validate", "4", "--log.sheet", "4", "--log.save", "2"]
    return [str(word) for word in [*data, *log, *options]]


def train(script, out, shards, *options):
    """Run a training script in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    spec = importlib.util.spec_from_file_location(f"train_{script}", ROOT / "train" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(arguments(out, shards, *options))


def rows(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
