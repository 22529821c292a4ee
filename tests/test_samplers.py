"""Samplers against closed forms: a Gaussian prior with its exact denoiser, and oracles that know the picture."""

import pytest
import torch

from coherent_ddrm.denoiser import Bound
from coherent_ddrm.operators import Inpainting, Observation
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.samplers import DDIM, DDNM, Coherent, sample
from coherent_ddrm.schedule import SCHEDULES, Flow, make_schedule, time_grid, travel_path


class GaussianPrior:
    """Exact denoiser of x0 ~ N(mean, spread²), independent pixels."""

    def __init__(self, schedule, mean=0.3, spread=0.5):
        self.schedule, self.mean, self.spread = schedule, mean, spread

    def __call__(self, x_t, t):
        alpha_t, sigma_t = self.schedule(t[:, None, None, None])
        gain = alpha_t * self.spread**2 / (alpha_t**2 * self.spread**2 + sigma_t**2)
        return self.mean + gain * (x_t - alpha_t * self.mean)


class Oracle:
    """A denoiser that knows the answer."""

    schedule = Flow()

    def __init__(self, x0):
        self.x0 = x0

    def __call__(self, x_t, t):
        return self.x0


def start(batch, side=32):
    rng = [keyed_generator(0, i) for i in range(batch)]
    return normal(torch.zeros(batch, 3, side, side), rng), rng


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_samples_a_gaussian(name):
    """Deterministic only: noise replaced in DDNM's way (eta > 0) is no exact sampler, it shrinks the spread."""
    x_1, rng = start(4)
    sampler = DDIM(GaussianPrior(make_schedule(name)))
    x0 = sample(sampler, x_1, time_grid(200), rng)
    assert sampler.nfe == 200
    assert float(x0.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(x0.std()) == pytest.approx(0.5, rel=0.04)


def test_ddim_error_falls_with_the_step():
    """At eta = 0 the exact flow maps x_1 to mean + spread x_1: first order in the step size, known constant."""
    x_1, rng = start(1)
    exact = 0.3 + 0.5 * x_1
    results = [sample(DDIM(GaussianPrior(Flow())), x_1, time_grid(n), rng) for n in (50, 100)]
    error = [float((x0 - exact).abs().max()) for x0 in results]
    assert 1.8 < error[0] / error[1] < 2.2


@pytest.mark.parametrize("eta", [0.0, 0.2, 0.85, 1.0])
def test_ddim_marginal_with_an_oracle(eta):
    """x_s - alpha_s x0 must be N(0, sigma_s²) after a step, whatever eta."""
    x0 = torch.full((8, 3, 64, 64), 0.4)
    rng = [keyed_generator(1, i) for i in range(8)]
    t, s = 0.6, 0.5
    x_t = (1 - t) * x0 + t * normal(x0, rng)
    residual = DDIM(Oracle(x0), eta).step(x_t, t, s, rng) - (1 - s) * x0
    assert float(residual.std()) / s == pytest.approx(1, abs=0.01) and abs(float(residual.mean())) < 0.01


@pytest.mark.parametrize("sampler", [DDIM, Coherent])
def test_travel_keeps_the_marginal(sampler):
    x0 = torch.full((8, 3, 64, 64), 0.4)
    rng = [keyed_generator(2, i) for i in range(8)]
    args = (Observation(x0, Inpainting(torch.ones(8, 1, 64, 64))),) if sampler is Coherent else ()
    x_t = 0.7 * x0 + 0.3 * normal(x0, rng)
    residual = sampler(Oracle(x0), *args).travel(x_t, 0.3, 0.5, rng) - 0.5 * x0
    assert float(residual.std()) / 0.5 == pytest.approx(1, abs=0.01)


def half_hole(batch=2, side=32):
    hole = torch.zeros(batch, 1, side, side)
    hole[:, :, :, side // 2 :] = 1
    return hole


@pytest.mark.parametrize("method", [DDNM, Coherent])
@pytest.mark.parametrize("travel", [False, True])
def test_known_pixels_come_back_to_the_bit(method, travel):
    x_1, rng = start(2)
    y, hole = torch.rand(2, 3, 32, 32) * 2 - 1, half_hole()
    times = travel_path(time_grid(20), 5, 2) if travel else time_grid(20)
    x0 = sample(method(GaussianPrior(Flow()), Observation(y, Inpainting(hole))), x_1, times, rng)
    assert torch.equal(x0 * (1 - hole), y * (1 - hole))
    inside = x0[hole.expand_as(x0) > 0]
    assert float(inside.mean()) == pytest.approx(0.3, abs=0.06)


def test_coherent_gives_clean_known_pixels_to_the_denoiser():
    y, hole, seen = torch.rand(2, 3, 32, 32) * 2 - 1, half_hole(), []

    class Spy(Oracle):
        def __call__(self, x_t, t):
            seen.append(x_t)
            return self.x0

    x_1, rng = start(2)
    sample(Coherent(Spy(y), Observation(y, Inpainting(hole)), eta=0.5), x_1, travel_path(time_grid(10), 2, 2), rng)
    assert all(torch.equal(x_t * (1 - hole), y * (1 - hole)) for x_t in seen)


@pytest.mark.parametrize("method", [DDNM, Coherent])
def test_a_picture_does_not_depend_on_its_batch(method):
    y, hole = torch.rand(4, 3, 32, 32), half_hole(4)
    x_1, rng = start(4)
    together = sample(method(GaussianPrior(Flow()), Observation(y, Inpainting(hole)), eta=0.5), x_1, time_grid(5), rng)
    rng = [keyed_generator(0, 2)]
    x_1 = normal(torch.zeros(1, 3, 32, 32), rng)
    alone = sample(
        method(GaussianPrior(Flow()), Observation(y[2:3], Inpainting(hole[2:3])), eta=0.5), x_1, time_grid(5), rng
    )
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=0)


def test_callback_may_replace_and_sees_every_move():
    x_1, rng = start(1)
    moves = []

    def callback(i, s, x_s):
        moves.append((i, s))
        return torch.zeros_like(x_s) if s == 0 else None

    x0 = sample(DDIM(GaussianPrior(Flow())), x_1, time_grid(4), rng, callback)
    assert moves == [(0, 0.75), (1, 0.5), (2, 0.25), (3, 0)] and not x0.any()


def test_inpainting_operator_identities(rng):
    x, y = torch.randn(2, 2, 3, 8, 8, generator=rng)
    operator = Inpainting(torch.rand(2, 1, 8, 8, generator=rng) > 0.5)
    assert torch.equal(operator.A(operator.pinv(operator.A(x))), operator.A(x))
    torch.testing.assert_close((operator.A(x) * y).sum(), (x * operator.At(y)).sum())
    torch.testing.assert_close(operator.Ut(operator.A(x)), operator.S * operator.Vt(x))
    projected = operator.project(x, operator.A(y))
    assert torch.equal(operator.A(projected), operator.A(y)) and torch.equal(operator.project(projected, y), projected)
    assert torch.equal(projected - operator.A(projected), x - operator.A(x)), "the null space was touched"


def test_bound_network_is_a_denoiser_for_samplers():
    x_1, rng = start(1)
    assert sample(DDIM(Bound(GaussianPrior(Flow()), {})), x_1, time_grid(2), rng).shape == x_1.shape
