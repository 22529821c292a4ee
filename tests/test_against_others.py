"""Our methods beside independent implementations: the same small network, the same noise, step for step.

deepinv and diffusers differ from the papers in places; each test says where, and how the difference is taken out.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import RePaintScheduler

from coherent_ddrm.operators import Blur, Inpainting, Observation, kernels
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.samplers import DDRM, DPS, DiffPIR, RePaint
from coherent_ddrm.schedule import VPDiscrete, expand

deepinv = pytest.importorskip("deepinv", reason="pip install -e .[dev]")

SIDE, BATCH = 16, 2
WEIGHT = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(0)) / 5


class VarianceExploding:
    """alpha = 1, sigma = t."""

    def __call__(self, t):
        return torch.ones_like(t), t


def denoise(x, sigma):
    """A smooth x0_hat of x = x0 + sigma z, for sigma (B, 1, 1, 1): a shrinkage plus a small convolution."""
    shrunk = x / (1 + sigma**2)
    return 0.9 * torch.tanh(shrunk + 0.2 * torch.tanh(F.conv2d(shrunk, WEIGHT, padding=1)))


class Net:
    """`denoise` as our denoiser for a schedule."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, x_t, t):
        alpha_t, sigma_t = self.schedule(expand(t, x_t))
        return denoise(x_t / alpha_t, sigma_t / alpha_t)


def pictures():
    x0 = torch.rand(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 1.6 - 0.8
    hole = torch.zeros(BATCH, 1, SIDE, SIDE)
    hole[..., 5:12, 3:14] = 1
    return x0, hole


def noises(count):
    rng = [keyed_generator(0, i) for i in range(BATCH)]
    return [normal(torch.zeros(BATCH, 3, SIDE, SIDE), rng) for _ in range(count)]


class Replay:
    """Hands out given noise, in order, in place of a random number function of torch."""

    def __init__(self, given, scale=1.0):
        self.given, self.scale = list(given), scale

    def __call__(self, *args, **kwargs):
        return self.scale * self.given.pop(0)


def same_noise(monkeypatch, module, given):
    """Our samplers draw `given`, in order."""
    monkeypatch.setattr(module, "normal", Replay(given))


@pytest.mark.parametrize(("eta", "eta_b"), [(0.85, 1.0), (0.2, 1.0), (0.6, 0.7)])
@pytest.mark.parametrize("sigma_y", [0.05, 0.4])
def test_ddrm_equals_deepinv(monkeypatch, eta, eta_b, sigma_y):
    """deepinv divides all its noise by sqrt(2) (undone here) and adds 1e-6 to singular values (the tolerance)."""
    import coherent_ddrm.samplers.ddrm as ours

    x0, hole = pictures()
    hole = hole[:1]  # deepinv has one mask for a batch
    y = (1 - hole) * (x0 + sigma_y * noises(9)[-1])
    sigmas, z = np.linspace(1, 0, 9), noises(9)
    physics = deepinv.physics.Inpainting(
        (3, SIDE, SIDE), mask=(1 - hole[0]).expand(3, -1, -1), noise_model=deepinv.physics.GaussianNoise(sigma_y)
    )
    monkeypatch.setattr(torch, "randn_like", Replay(z, 2**0.5))
    model = deepinv.sampling.DDRM(lambda x, sigma: denoise(x, torch.tensor(float(sigma))), sigmas, eta, eta_b, eps=1e-6)
    theirs = model(y, physics)

    same_noise(monkeypatch, ours, z[1:])
    observation = Observation(y, Inpainting(hole), sigma_y)
    sampler = DDRM(Net(VarianceExploding()), observation, eta=eta, eta_b=eta_b)
    x_t = sampler.start(z[0], 1.0)
    for t, s in pairwise(sigmas):
        x_t = sampler.step(x_t, float(t), float(s), ())
    torch.testing.assert_close(denoise(x_t, torch.tensor(0.0)), theirs, atol=5e-6, rtol=0)


def test_repaint_equals_diffusers(monkeypatch):
    """diffusers draws one noise for known and missing pixels, and clips x0_hat without its eps: nothing is clipped."""
    import coherent_ddrm.samplers.ddpm as ancestral
    import coherent_ddrm.samplers.repaint as ours

    x0, hole = pictures()
    scheduler = RePaintScheduler(eta=1.0, clip_sample=False)
    scheduler.set_timesteps(10, jump_length=2, jump_n_sample=2)
    scheduler.eta = 1.0
    schedule = VPDiscrete(tuple(scheduler.alphas_cumprod.tolist()))
    sampler = RePaint(Net(schedule), Observation(x0 * (1 - hole), Inpainting(hole)), clip=False)
    x, steps = noises(1)[0], noises(12)
    for timestep, z in zip([900, 700, 500, 300, 100, 0], steps, strict=False):
        t, s = (timestep + 1) / 1000, max(timestep - 100 + 1, 0) / 1000
        x0_hat = sampler.denoiser(x, torch.full((BATCH,), t))
        alpha_t, sigma_t = schedule(torch.tensor(t))
        eps = (x - alpha_t * x0_hat) / sigma_t
        monkeypatch.setattr("diffusers.schedulers.scheduling_repaint.randn_tensor", Replay([z]))
        theirs = scheduler.step(eps, timestep, x, x0, 1 - hole).prev_sample
        same_noise(monkeypatch, ancestral, [z])
        same_noise(monkeypatch, ours, [z])
        x = sampler.step(x, t, s, ())
        torch.testing.assert_close(x, theirs, atol=5e-6, rtol=0)


def test_dps_gradient_equals_deepinv():
    """The same gradient of the same norm. deepinv adds it to the score, so that its solver scales it; the paper, and
    we, subtract it from x_s as it is."""
    x0, _ = pictures()
    kernel = kernels.gaussian(1.5)
    operator = Blur(kernel, (SIDE, SIDE), cutoff=0.0)
    y = operator.A(x0)
    physics = deepinv.physics.BlurFFT((3, SIDE, SIDE), filter=kernel[None, None].expand(1, 3, -1, -1))
    fidelity = deepinv.sampling.DPSDataFidelity(denoiser=lambda x, sigma: denoise(x, sigma))
    x_t = 1.3 * noises(1)[0]
    theirs = fidelity.grad(x_t.clone(), y, physics, torch.tensor(0.6))

    def step(scale):
        sampler = DPS(Net(VarianceExploding()), Observation(y, operator), scale)
        return sampler.step(x_t, 0.6, 0.5, [keyed_generator(5, i) for i in range(BATCH)])

    torch.testing.assert_close(step(0.0) - step(1.0), theirs, atol=1e-6, rtol=1e-4)


def test_diffpir_equals_deepinv(monkeypatch):
    """deepinv's lambda is twice ours: its proximal step minimises |y - A x|² + 2 rho |x - x0_hat|² on pictures in
    [0, 1], whose sigma_y is half of ours, so that rho is a quarter. Its last network call is not used."""
    import coherent_ddrm.samplers.ddim as ours

    x0, _ = pictures()
    kernel, sigma, lambda_, zeta = kernels.gaussian(1.0), 0.1, 6.0, 0.4
    operator = Blur(kernel, (SIDE, SIDE), cutoff=0.0)
    physics = deepinv.physics.BlurFFT((3, SIDE, SIDE), filter=kernel[None, None].expand(1, 3, -1, -1))
    y = operator.A(x0) + 2 * sigma * noises(9)[-1]
    z = noises(8)
    monkeypatch.setattr(torch, "randn_like", Replay(z))
    model = deepinv.sampling.DiffPIR(
        lambda x, s: (denoise(2 * x - 1, 2 * s) + 1) / 2, deepinv.optim.data_fidelity.L2(), sigma, 6, zeta, lambda_
    )
    theirs = 2 * model((y + 1) / 2, physics) - 1
    cumulative = (1 / (1 + model.reduced_alpha_cumprod.double() ** 2)).tolist()
    schedule = VPDiscrete(tuple(cumulative))
    index = [int(model.find_nearest(model.reduced_alpha_cumprod, model.sigmas[i])) for i in model.seq]
    first = model.sigmas[model.seq[0]]
    start = 2 * physics.A_adjoint((y + 1) / 2) - 1 + (first**2 - 4 * sigma**2).sqrt() * z[0]
    x_t = start * model.sqrt_alphas_cumprod[-1]
    same_noise(monkeypatch, ours, z[1:])
    sampler = DiffPIR(Net(schedule), Observation(y, operator, 2 * sigma), strength=lambda_ / 2, zeta=zeta)
    for t, s in pairwise(index):
        x_t = sampler.step(x_t, (t + 1) / 1000, (s + 1) / 1000, ())
    torch.testing.assert_close(x_t, theirs, atol=5e-3, rtol=0)  # deepinv iterates to a tolerance
