"""Join the exports of both stages into a checkpoint folder for the pipeline.

    python train/export.py runs/clothing_64_structure runs/clothing_64 -o checkpoints/clothing-64 [--steps 20]
    python train/export.py runs/clothing_64_joint -o checkpoints/clothing-64

Newest saved weights of each run are taken, averaged; a finished run is not needed. A README.md in the folder stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from coherent_ddrm.config import ConfigError, DiffusionRun, JointRun, StructureRun, check_config
from coherent_ddrm.data import open_dataset
from coherent_ddrm.launch import readable_errors
from coherent_ddrm.models.dit import make_dit
from coherent_ddrm.models.structure import StructurePredictor
from coherent_ddrm.pipeline import CoherentInpaintPipeline
from coherent_ddrm.run_folder import newest_weights


def averaged_weights(run: Path, kind: type, name: str = "ema") -> tuple[object, dict, int]:
    """(config, averaged weights, step) of the newest training checkpoint of a run."""
    try:
        config = check_config(kind, yaml.safe_load((run / "config.yaml").read_text()), str(run / "config.yaml"))
    except OSError as error:
        raise ConfigError(f"{run}: no run of train/ ({error.strerror})") from None
    (weights,), step = newest_weights(run, (name,))
    return config, weights, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="those of train/structure.py and train/diffusion.py, or one")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--steps", type=int, default=20, help="default number of sampling steps")
    parser.add_argument("--shift", type=float, default=1.0, help="default time grid: above 1, more steps at high noise")
    options = parser.parse_args()
    with readable_errors():
        if len(options.runs) > 2:
            raise ConfigError(f"{len(options.runs)} runs; give that of each stage, or one of train/joint.py")
        if len(options.runs) == 2:
            one, one_weights, one_step = averaged_weights(options.runs[0], StructureRun)
            two, two_weights, two_step = averaged_weights(options.runs[1], DiffusionRun)
            model = one.model
        else:
            two, two_weights, two_step = averaged_weights(options.runs[0], JointRun)
            _, one_weights, one_step = averaged_weights(options.runs[0], JointRun, "structure-ema")
            model = two.structure_model
        source = open_dataset(two.data.train)
        predictor = StructurePredictor(num_labels=source.num_labels, **vars(model))
        predictor.load_state_dict(one_weights, strict=True)
        net = make_dit(**vars(two.model), structure_channels=predictor.channels)
        net.load_state_dict(two_weights, strict=True)
        grid = {"steps": options.steps, "shift": options.shift}
        pipe = CoherentInpaintPipeline(net, predictor, source.resolution, source.label_names, **grid)
        pipe.save_pretrained(options.output)
        print(f"{options.output}: stage one after {one_step} steps, stage two after {two_step}")


if __name__ == "__main__":
    main()
