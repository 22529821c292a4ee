"""Join the exports of both stages into a checkpoint folder for the pipeline.

    python train/export.py runs/clothing_64_structure runs/clothing_64 -o checkpoints/clothing-64 [--steps 20]

Newest saved weights of each run are taken, averaged; a finished run is not needed. A README.md in the folder stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from coherent_ddrm.config import ConfigError, DiffusionRun, StructureRun, check_config
from coherent_ddrm.data import open_dataset
from coherent_ddrm.launch import readable_errors
from coherent_ddrm.models.dit import make_dit
from coherent_ddrm.models.structure import StructurePredictor
from coherent_ddrm.pipeline import CoherentInpaintPipeline
from coherent_ddrm.run_folder import newest_weights


def averaged_weights(run: Path, kind: type) -> tuple[object, dict, int]:
    """(config, averaged weights, step) of the newest training checkpoint of a run."""
    try:
        config = check_config(kind, yaml.safe_load((run / "config.yaml").read_text()), str(run / "config.yaml"))
    except OSError as error:
        raise ConfigError(f"{run}: no run of train/ ({error.strerror})") from None
    (weights,), step = newest_weights(run)
    return config, weights, step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("structure", type=Path, help="run folder of train/structure.py")
    parser.add_argument("diffusion", type=Path, help="run folder of train/diffusion.py")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--steps", type=int, default=20, help="default number of sampling steps")
    parser.add_argument("--shift", type=float, default=1.0, help="default time grid: above 1, more steps at high noise")
    options = parser.parse_args()
    with readable_errors():
        one, one_weights, one_step = averaged_weights(options.structure, StructureRun)
        two, two_weights, two_step = averaged_weights(options.diffusion, DiffusionRun)
        source = open_dataset(two.data.train)
        predictor = StructurePredictor(num_labels=source.num_labels, **vars(one.model))
        predictor.load_state_dict(one_weights, strict=True)
        net = make_dit(**vars(two.model), structure_channels=predictor.channels)
        net.load_state_dict(two_weights, strict=True)
        grid = {"steps": options.steps, "shift": options.shift}
        pipe = CoherentInpaintPipeline(net, predictor, source.resolution, source.label_names, **grid)
        pipe.save_pretrained(options.output)
        print(f"{options.output}: stage one after {one_step} steps, stage two after {two_step}")


if __name__ == "__main__":
    main()
