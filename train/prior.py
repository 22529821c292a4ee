"""Train a small unconditional prior on shards, a DDPM in the format of diffusers.

    python train/prior.py --data data/clothing64/train --out runs/prior32 --size 32 --steps 2000

It leaves a plain DDPMPipeline, which any program that knows diffusers reads, and coherent_ddrm.priors.load_prior too.
DDPM, https://arxiv.org/abs/2006.11239 , fitted for short training: x0_hat has the error of eps times 1 / alpha_t, so
the betas end at alpha_t = 0.07 (Stable Diffusion's), not 0.006, and the loss is weighted by 1 / alpha_t², at most 25.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from tqdm import tqdm

from coherent_ddrm.data import batches, open_dataset
from coherent_ddrm.images import to_tensor
from coherent_ddrm.keeper import NonFinite
from coherent_ddrm.launch import readable_errors
from coherent_ddrm.learner import Learner
from coherent_ddrm.rng import keyed_generator, normal


def make_unet(size: int, channels: int) -> UNet2DModel:
    """Three levels of 1, 2 and 4 times `channels`, one residual block each, attention at the lowest (size / 4)."""
    return UNet2DModel(
        sample_size=size,
        block_out_channels=(channels, 2 * channels, 4 * channels),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
    )


def examples(image: torch.Tensor, size: int, rng: list[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 (B, H, W, 3) -> x0 (B, 3, size, size) in [-1, 1], half of them mirrored, and noise z like it."""
    x0 = F.interpolate(to_tensor(image), (size, size), mode="area")
    mirrored = torch.stack([torch.rand(1, 1, 1, generator=g) < 0.5 for g in rng]).to(x0.device)
    return torch.where(mirrored, x0.flip(-1), x0), normal(x0, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of shards")
    parser.add_argument("--out", required=True, type=Path, help="folder for the DDPMPipeline and log.jsonl")
    for name, value in dict(size=32, steps=2000, batch=16, lr=1e-3, seed=0, channels=32).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    parser.add_argument("--init", help="another prior's unet/ folder, to go on from its weights")
    with readable_errors():
        train(parser.parse_args())


def train(run: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(run.seed)  # initial weights; nothing after this draws from ambient state
    net = UNet2DModel.from_pretrained(run.init, use_safetensors=True) if run.init else make_unet(run.size, run.channels)
    net.to(device).train()
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    weight = (1 / scheduler.alphas_cumprod).clamp(max=25).to(device)  # (T,)
    learner = Learner(net, "adamw", run.lr, 0.0, (0.9, 0.99), warmup=100, cooldown=0.5, steps=run.steps, ema=0.995)
    since, losses = time.perf_counter(), []
    run.out.mkdir(parents=True, exist_ok=True)
    steps = islice(batches(open_dataset(run.data), run.batch, run.seed, workers=1), run.steps)
    with open(run.out / "log.jsonl", "w", encoding="utf-8", buffering=1) as log:
        for step, batch in tqdm(steps, total=run.steps, desc="prior"):
            rng = [keyed_generator(run.seed, step, i) for i in range(run.batch)]
            x0, z = examples(torch.as_tensor(batch["image"]).to(device), run.size, rng)
            u = torch.rand((), generator=keyed_generator(run.seed, step))  # one timestep in each of B equal ranges
            share = (torch.arange(run.batch, device=device) + u) / run.batch
            timestep = (share * len(weight)).long().clamp(max=len(weight) - 1)
            learner.set_rate(step)
            with torch.autocast(device.type, torch.bfloat16):
                eps = net(scheduler.add_noise(x0, z, timestep), timestep).sample
            loss = (weight[timestep, None, None, None] * (eps.float() - z) ** 2).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            if not bool((norm + loss.detach()).isfinite()):
                raise NonFinite(f"loss or gradient is not finite at step {step}; lower --lr, now {run.lr:g}")
            learner.optimizers[0].step()
            learner.optimizers[0].zero_grad()
            learner.average(step)
            losses.append(float(loss.detach()))
            if (step + 1) % 50 == 0 or step + 1 == run.steps:
                row = {"step": step + 1, "loss": sum(losses) / len(losses), "seconds": time.perf_counter() - since}
                print(json.dumps(row), file=log)
                losses.clear()
    DDPMPipeline(learner.averaged(), scheduler).save_pretrained(run.out)
    (run.out / "unet" / "diffusion_pytorch_model.safetensors").chmod(0o644)  # else only its owner may read it


if __name__ == "__main__":
    main()
