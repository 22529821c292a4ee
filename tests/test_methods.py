"""The method zoo against closed forms: oracles that know the picture, exact Gaussian denoisers, published counts."""

from itertools import pairwise

import pytest
import torch

from coherent_ddrm.operators import Inpainting, Observation, Operator, SpectralOperator
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.samplers import (
    DDRM,
    DPMPP,
    DPS,
    ILVR,
    PLAIN,
    RAD,
    RESTORERS,
    CoPaint,
    CoPaintTT,
    DDNMPlus,
    DiffPIR,
    Heun,
    Hybrid,
    PiGDM,
    RePaint,
    sample,
)
from coherent_ddrm.samplers.rad import pixel_time
from coherent_ddrm.samplers.repaint import repaint_levels
from coherent_ddrm.schedule import SCHEDULES, Flow, make_schedule, time_grid

SIDE, BATCH = 64, 12
VALUES = (0.0, 0.05, 0.3, 1.0)  # singular values: nothing, too little, enough late, enough early
SIGMA_Y = 0.2


class Diagonal(SpectralOperator):
    """A x = S x with S in four bands of columns."""

    def __init__(self):
        self.S = torch.tensor(VALUES).repeat_interleave(SIDE // len(VALUES)).expand(1, 1, SIDE, SIDE)

    def A(self, x):
        return self.S * x

    At = A


class Oracle:
    """Knows the answer; its gradient with respect to x_t is 0."""

    per_pixel_time = True

    def __init__(self, x0, schedule):
        self.x0, self.schedule = x0, schedule

    def __call__(self, x_t, t):
        return self.x0 + 0 * x_t


class GaussianPrior:
    """Exact denoiser of x0 ~ N(mean, spread²), independent pixels; any kind of time."""

    per_pixel_time = True

    def __init__(self, schedule, mean=0.3, spread=0.5):
        self.schedule, self.mean, self.spread = schedule, mean, spread

    def gain(self, t):
        alpha_t, sigma_t = self.schedule(t)
        return alpha_t * self.spread**2 / (alpha_t**2 * self.spread**2 + sigma_t**2)

    def __call__(self, x_t, t):
        t = t[:, None, None, None] if t.ndim == 1 else t
        return self.mean + self.gain(t) * (x_t - self.schedule(t)[0] * self.mean)


def picture(batch=BATCH, side=SIDE):
    x0 = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(7)) * 1.6 - 0.8
    return x0, [keyed_generator(0, i) for i in range(batch)]


def half_hole(batch=BATCH, side=SIDE):
    hole = torch.zeros(batch, 1, side, side)
    hole[..., side // 2 :] = 1
    return hole


def walk(sampler, times, rng, like):
    """Every (s, x_s) of a walk, the first included."""
    seen = []
    z = normal(like, rng)
    seen.append((times[0], sampler.start(z, times[0])))
    sample(sampler, z, times, rng, lambda i, s, x_s: seen.append((s, x_s)))
    return seen


def spread_of(x_s, x0, alpha_s, bands=4):
    """Standard deviation and mean of x_s - alpha_s x0 in each band of columns."""
    residual = (x_s - alpha_s * x0).unflatten(-1, (bands, -1)).transpose(-2, -1)
    return residual.flatten(0, -2).std(dim=0), residual.flatten(0, -2).mean(dim=0)


# ---- the oracle marginal: x_s ~ N(alpha_s x0, sigma_s²) on every branch ----------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("method", "eta", "eta_b"),
    [(DDRM, 0.2, 1.0), (DDRM, 0.85, 1.0), (DDRM, 0.85, 0.6), (DDNMPlus, 0.2, 1.0), (DDNMPlus, 0.85, 1.0)],
)
def test_oracle_marginal_with_noise(method, schedule, eta, eta_b):
    schedule, operator = make_schedule(schedule), Diagonal()
    x0, rng = picture()
    y = operator.A(x0) + SIGMA_Y * normal(x0, [keyed_generator(9, i) for i in range(BATCH)])
    options = {"eta_b": eta_b} if method is DDRM else {}
    sampler = method(Oracle(x0, schedule), Observation(y, operator, SIGMA_Y), eta=eta, **options)
    times = [1.0, 0.9, 0.6, 0.3, 0.12, 0.04]
    z = normal(x0, rng)
    x_t, branches = sampler.start(z, 1.0), set()
    for t, s in pairwise(times):
        x_t = sampler.step(x_t, t, s, rng)
        alpha_s, sigma_s = (float(v) for v in schedule(torch.tensor(s)))
        std, mean = spread_of(x_t, x0, alpha_s)
        torch.testing.assert_close(std / sigma_s, torch.ones(4), atol=0.015, rtol=0)
        torch.testing.assert_close(mean / sigma_s, torch.zeros(4), atol=0.02, rtol=0)
        branches |= {(v > 0) + (v > 0 and sigma_s * v >= alpha_s * SIGMA_Y) for v in VALUES}
    assert branches == {0, 1, 2}, "the test must visit every branch"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (RePaint, {"jump_length": 2, "jump_samples": 2}),
        (Hybrid, {"eta": 0.2, "length": 2}),
        (Hybrid, {"length": 2, "repeats": 3}),
        (DDNMPlus, {"length": 2, "repeats": 2}),
        (DDNMPlus, {"length": 2, "repeats": 2, "renoise": "marginal"}),
        (DDRM, {"eta": 0.2}),
        (ILVR, {}),
        (DiffPIR, {"zeta": 0.2}),
    ],
)
def test_oracle_marginal_without_noise(method, options, schedule):
    """At sigma_y = 0, known and hole pixels, also after each travel back."""
    schedule = make_schedule(schedule)
    x0, rng = picture()
    hole = half_hole()
    sampler = method(Oracle(x0, schedule), Observation(x0 * (1 - hole), Inpainting(hole)), **options)
    seen = walk(sampler, sampler.times(8), rng, x0)
    assert sampler.nfe == sum(s < t for (t, _), (s, _) in pairwise(seen))
    for s, x_s in seen[:-1]:
        alpha_s, sigma_s = (float(v) for v in schedule(torch.tensor(s)))
        std, mean = spread_of(x_s, x0, alpha_s, bands=2)
        if 0 < s < 1 or (s == 1 and method is DDRM):
            torch.testing.assert_close(std / sigma_s, torch.ones(2), atol=0.012, rtol=0)
            torch.testing.assert_close(mean / sigma_s, torch.zeros(2), atol=0.012, rtol=0)
    torch.testing.assert_close(seen[-1][1], x0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rad_noises_each_pixel_to_its_own_time(schedule):
    """Steps are deterministic: with an oracle x_s = alpha x0 + sigma z with the z it started from, pixel by pixel."""
    schedule = make_schedule(schedule)
    x0, rng = picture(2, 16)
    amount = torch.linspace(0, 1, 16).expand(2, 1, 16, 16)
    observation = Observation(x0, Inpainting((amount > 0).float()))
    z = normal(x0, rng)
    for phases in (1, 2):
        sampler = RAD(Oracle(x0, schedule), observation, amount, phases=phases)
        alpha_1, sigma_1 = schedule(sampler._time(1.0))
        x_t = alpha_1 * x0 + sigma_1 * z
        assert phases == 2 or torch.equal(sampler.start(z, 1.0), x_t)
        for t, s in pairwise([1.0, 0.8, 0.5, 0.2, 0.05]):
            x_t = sampler.step(x_t, t, s, rng)
            alpha_s, sigma_s = schedule(sampler._time(s))
            torch.testing.assert_close(x_t, alpha_s * x0 + sigma_s * z, atol=2e-4, rtol=0)
        if phases == 1:
            assert torch.equal(x_t[..., 0], x0[..., 0])


def test_rad_times():
    schedule = make_schedule("vp-linear")
    m = torch.tensor([0.0, 0.25, 0.5, 1.0]).reshape(1, 1, 1, 4)
    last = torch.log(schedule(torch.tensor(1.0))[0] ** 2)
    for u in (0.0, 0.3, 1.0):
        progress = torch.log(schedule(torch.tensor(u))[0] ** 2) / last
        nu_m = m * -torch.expm1(last)
        expected = {1: (1 - nu_m) ** progress, 2: (1 - nu_m) * (torch.exp(last) / (1 - nu_m)) ** progress}
        for phase in (1, 2):
            signal = schedule(pixel_time(schedule, m, u, phase))[0] ** 2
            torch.testing.assert_close(signal, expected[phase], atol=2e-4, rtol=2e-3)
    assert pixel_time(Flow(), m, 0.3)[0, 0, 0, [0, 3]].tolist() == [0, pytest.approx(0.3)]
    assert pixel_time(Flow(), m, 0.3, phase=2)[0, 0, 0, [0, 3]].tolist() == [pytest.approx(0.3), 1]


def test_rad_refuses_a_network_with_one_time():
    denoiser = Oracle(torch.zeros(1, 3, 8, 8), Flow())
    denoiser.per_pixel_time = False
    with pytest.raises(ValueError, match="one time per picture"):
        RAD(denoiser, Observation(torch.zeros(1, 3, 8, 8), Inpainting(torch.ones(1, 1, 8, 8))))


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "length", "samples", "nfe"),
    [(250, 10, 10, 2410), (250, 10, 2, 490), (250, 5, 5, 1230), (100, 10, 3, 280), (100, 10, 2, 190), (100, 1, 1, 100)],
)
def test_repaint_schedule(steps, length, samples, nfe):
    levels = repaint_levels(steps, length, samples)
    assert sum(a > b for a, b in pairwise(levels)) == nfe
    assert levels[0] == steps and levels[-1] == 0 and all(abs(a - b) == 1 for a, b in pairwise(levels))
    if nfe == 2410:
        assert len(levels) - 1 == 4570


@pytest.mark.parametrize(
    ("steps", "length", "repeats", "nfe"),
    [(100, 10, 2, 150), (100, 10, 3, 200), (100, 10, 5, 300), (50, 5, 1, 50), (50, 5, 2, 75), (50, 5, 4, 125)],
)
def test_hybrid_counts(steps, length, repeats, nfe):
    times = Hybrid(Oracle(torch.zeros(1), Flow()), blind(1, 8), length=length, repeats=repeats).times(steps)
    assert sum(a > b for a, b in pairwise(times)) == nfe


def blind(batch, side):
    """Nothing is known."""
    return Observation(torch.zeros(batch, 3, side, side), Inpainting(torch.ones(batch, 1, side, side)))


@pytest.mark.parametrize("name", RESTORERS)
def test_travel_once_is_no_travel_and_a_picture_is_its_own(name):
    """One pass over the grid by default; the same seed gives the same picture in a batch of 1 and of 3."""
    x0, rng = picture(3, 16)
    hole = half_hole(3, 16)
    results = []
    for rows in (slice(0, 3), slice(1, 2)):
        rng = [keyed_generator(4, i) for i in range(3)][rows]
        observation = Observation((x0 * (1 - hole))[rows], Inpainting(hole[rows]))
        sampler = RESTORERS[name](GaussianPrior(Flow()), observation)
        results.append(sample(sampler, normal(x0[rows], rng), sampler.times(11), rng))
    torch.testing.assert_close(results[0][1:2], results[1], rtol=0, atol=0)


# ---- exactness -------------------------------------------------------------------------------------------------------

EXACT = ("coherent", "ddrm", "ddnm", "ddnm_plus", "repaint", "hybrid", "rad", "diffpir", "ilvr")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", EXACT)
def test_known_pixels_to_the_bit_and_the_rest_from_the_prior(name, schedule):
    x0, rng = picture(2, 32)
    hole = half_hole(2, 32)
    sampler = RESTORERS[name](GaussianPrior(make_schedule(schedule)), Observation(x0 * (1 - hole), Inpainting(hole)))
    result = sample(sampler, normal(x0, rng), sampler.times(30), rng)
    assert torch.equal(result * (1 - hole), x0 * (1 - hole))
    inside = result[hole.expand_as(result) > 0]
    assert float(inside.mean()) == pytest.approx(0.3, abs=0.06) and 0.3 < float(inside.std()) < 0.6


@pytest.mark.parametrize("name", [n for n in RESTORERS if n not in ("coherent", "rad", "repaint")])
def test_methods_that_need_no_inpainting_take_any_spectral_operator(name):
    x0, rng = picture(1)
    sampler = RESTORERS[name](GaussianPrior(Flow()), Observation(Diagonal().A(x0), Diagonal()))
    result = sample(sampler, normal(x0, rng), sampler.times(12), rng)
    if name in EXACT:
        assert float((Diagonal().A(result) - Diagonal().A(x0)).abs().max()) < 2e-6


def test_operators_that_a_method_cannot_use_are_refused():
    class Forward(Operator):
        def A(self, x):
            return x.clamp(-0.5, 0.5)

    y = torch.zeros(1, 3, 8, 8)
    for name, method in RESTORERS.items():
        if name in ("dps", "copaint", "copaint_tt"):
            assert method(GaussianPrior(Flow()), Observation(y, Forward()))
        else:
            with pytest.raises(ValueError, match=f"{method.__name__} .*Forward"):
                method(GaussianPrior(Flow()), Observation(y, Forward()))


# ---- one step against the formula ------------------------------------------------------------------------------------


def one_step(method, sigma_y=0.0, t=0.6, s=0.5, **options):
    """x_t, the step's result with oracle noise switched off where the method allows, and what the formulas need."""
    x0, rng = picture(2)
    operator, prior = Diagonal(), GaussianPrior(Flow())
    y = operator.A(x0)
    x_t = 0.4 * x0 + 0.6 * normal(x0, rng)
    sampler = method(prior, Observation(y, operator, sigma_y), **options)
    x_s = sampler.step(x_t, t, s, [keyed_generator(3, i) for i in range(2)])
    x0_hat = prior(x_t, torch.full((2,), t))
    return x_t, x_s, x0_hat, y, operator.S, float(prior.gain(torch.tensor(t)))


def test_dps_step():
    _, x_s, x0_hat, y, S, gain = one_step(DPS, scale=0.7)
    residual = y - S * x0_hat
    gradient = -gain * S * residual / residual.flatten(1).norm(dim=1)[:, None, None, None]
    without = one_step(DPS, scale=0.0)[1]
    torch.testing.assert_close(x_s - without, -0.7 * gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("sigma_y", [0.0, 0.2])
def test_pigdm_step(sigma_y):
    x_t, x_s, x0_hat, y, S, gain = one_step(PiGDM, sigma_y, eta=0.0)
    r2 = 0.6**2 / (0.4**2 + 0.6**2)
    g = gain * torch.where(S > 0, r2 * S / (r2 * S**2 + sigma_y**2), torch.zeros_like(S)) * (y - S * x0_hat)
    expected = 0.5 * x0_hat + 0.5 * (x_t - 0.4 * x0_hat) / 0.6 + 0.4 * g
    torch.testing.assert_close(x_s, expected, atol=1e-6, rtol=1e-5)


def test_diffpir_step():
    x_t, x_s, x0_hat, y, S, _ = one_step(DiffPIR, 0.2, zeta=0.0, strength=5.0)
    rho = 5 * 0.2**2 * 0.4**2 / 0.6**2
    x0_hat = (S * y + rho * x0_hat) / (S**2 + rho)  # the minimum of |y - S x|² + rho |x - x0_hat|²
    torch.testing.assert_close(x_s, 0.5 * x0_hat + 0.5 * (x_t - 0.4 * x0_hat) / 0.6, atol=1e-6, rtol=1e-5)


def test_copaint_step():
    """One descent with the full rate, then DDIM; a rate far too large is backed off until the objective falls."""
    t, gain = 0.6, float(GaussianPrior(Flow()).gain(torch.tensor(0.6)))
    x_t, x_s, x0_hat, y, S, _ = one_step(CoPaint, gradient_steps=1)
    rate = 0.02 * 0.4 * 1.012 ** (250 * (1 - t))
    x = x_t + rate * 2 * gain * S * (y - S * x0_hat)
    moved = 0.3 + gain * (x - 0.4 * 0.3)
    torch.testing.assert_close(x_s, 0.5 / 0.6 * x + (0.5 - 0.4 * 0.5 / 0.6) * moved, atol=1e-5, rtol=1e-5)
    never = one_step(CoPaint, gradient_steps=1, rate=1e9, tries=3)[1]
    assert torch.equal(never, one_step(CoPaint, gradient_steps=0)[1])


def test_copaint_shrinks_a_rate_that_is_too_large():
    x0, rng = picture(2, 16)
    x_t, seen = 0.5 * x0 + 0.5 * normal(x0, rng), []

    class Spy(GaussianPrior):
        def __call__(self, x_t, t):
            seen.append((x_t.detach(), super().__call__(x_t, t).detach()))
            return super().__call__(x_t, t)

    sampler = CoPaint(Spy(Flow()), Observation(x0, Inpainting(torch.zeros(2, 1, 16, 16))), gradient_steps=1, rate=4.0)
    sampler.step(x_t, 0.5, 0.4, ())
    objective = [((x0 - x0_hat) ** 2).flatten(1).sum(dim=1) for _, x0_hat in seen]
    assert len(seen) > 3 and bool((objective[1] > objective[0]).all()) and bool((objective[-1] < objective[0]).all())
    assert not torch.equal(seen[-1][0], x_t)


def test_copaint_backs_off_each_picture_by_itself():
    """A picture that fits badly does not change what another does."""
    x0, _ = picture(2, 16)
    y = x0.clone()
    y[1] *= 100
    x_t = 0.5 * x0
    for rate in (0.02, 2.0):
        steps = []
        for rows in (slice(0, 2), slice(0, 1)):
            observation = Observation(y[rows], Inpainting(torch.zeros(2, 1, 16, 16)[rows]))
            steps.append(CoPaint(GaussianPrior(Flow()), observation, rate=rate).step(x_t[rows], 0.5, 0.4, ()))
        torch.testing.assert_close(steps[0][:1], steps[1], rtol=0, atol=0)


def test_copaint_with_travel_counts():
    sampler = CoPaintTT(GaussianPrior(Flow()), blind(1, 8))
    assert sum(a > b for a, b in pairwise(sampler.times(50))) == 50 + 5 * 10
    assert sampler.repeats == 2


# ---- plain samplers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", [Heun, DPMPP])
def test_second_order(method, schedule):
    """On a Gaussian's exact flow: four times the steps, nearly a sixteenth of the error (first order: a quarter)."""
    x0, rng = picture(1)
    z = normal(x0, rng)
    schedule = make_schedule(schedule)
    prior, errors = GaussianPrior(schedule), []
    alpha_1, sigma_1 = (float(v) for v in schedule(torch.tensor(1.0)))
    exact = 0.3 + 0.5 * (z - alpha_1 * 0.3) / (0.25 * alpha_1**2 + sigma_1**2) ** 0.5
    for steps in (80, 320):
        sampler = method(prior)
        result = sample(sampler, z, sampler.times(steps), rng)
        errors.append(float((result - exact).square().mean().sqrt()))
        assert sampler.nfe == (2 * steps - 1 if method is Heun else steps)
    assert errors[0] / errors[1] > 6.5 and errors[0] < 0.006


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm_variance(schedule):
    """Ancestral sampling of an oracle keeps the marginal; of a Gaussian it converges to it."""
    schedule = make_schedule(schedule)
    x0, rng = picture()
    for s, x_s in walk(PLAIN["ddpm"](Oracle(x0, schedule)), time_grid(5), rng, x0)[1:-1]:
        alpha_s, sigma_s = (float(v) for v in schedule(torch.tensor(s)))
        std, _ = spread_of(x_s, x0, alpha_s)
        torch.testing.assert_close(std / sigma_s, torch.ones(4), atol=0.015, rtol=0)
    result = sample(PLAIN["ddpm"](GaussianPrior(schedule)), normal(x0, rng), time_grid(200), rng)
    assert float(result.std()) == pytest.approx(0.5, rel=0.04) and float(result.mean()) == pytest.approx(0.3, abs=0.02)


def test_a_state_that_is_not_finite_is_named():
    class Broken(Oracle):
        def __call__(self, x_t, t):
            return self.x0 / (float(t[0]) - 0.5) * 0

    x0, rng = picture(1, 8)
    with pytest.raises(FloatingPointError, match=r"DDPM.*after move 6 of 10 \(t 0.5 -> 0.4\)"):
        sample(PLAIN["ddpm"](Broken(x0, Flow())), normal(x0, rng), time_grid(10), rng)
