"""Guidance against closed forms: quadratic classifiers whose gradient is known; the two stages of GuidPaint."""

import math

import pytest
import torch

from coherent_ddrm.denoiser import eps_from_x0, v_from_x0
from coherent_ddrm.guidance import (
    PIXEL_VARIANCE,
    ClassifierFree,
    ClassifierGuided,
    guide_class,
    guide_structure,
    natural_spectrum,
)
from coherent_ddrm.models.dit import InContext, make_dit
from coherent_ddrm.operators import Inpainting, Observation
from coherent_ddrm.operators.average_pooling import AveragePooling
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.samplers import sample
from coherent_ddrm.samplers.guidpaint import GuidPaint, candidates_at_switch, refine
from coherent_ddrm.schedule import SCHEDULES, Flow, VPCosine, make_schedule, time_grid

SIDE = 16
T = torch.tensor([0.7, 0.4])


class Shrink:
    """x0_hat = gain x_t + offset; counts its calls, and refuses to be differentiated."""

    per_pixel_time = True

    def __init__(self, gain=0.5, offset=0.0, schedule=None):
        self.gain, self.offset, self.schedule, self.calls = gain, offset, schedule or Flow(), 0

    def __call__(self, x_t, t):
        assert not x_t.requires_grad and not torch.is_grad_enabled()
        self.calls += 1
        return self.gain * x_t + self.offset


class Quadratic:
    """log p = -|x - label|² / 2, so the gradient is label - x."""

    def __init__(self):
        self.seen = []

    def log_prob(self, x, labels, t=None):
        assert t is None
        self.seen.append(x.detach())
        labels = torch.as_tensor(labels, dtype=x.dtype).expand(len(x))
        return -(x - labels[:, None, None, None]).square().flatten(1).sum(dim=1) / 2


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def picture(batch=2, seed=0):
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def half(batch=1):
    hole = torch.zeros(batch, 1, SIDE, SIDE)
    hole[..., SIDE // 2 :] = 1
    return hole


# ---- classifier-free -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "calls"), [(0, (0, 1)), (1, (1, 0)), (2.5, (1, 1))])
def test_classifier_free_mixes_and_evaluates_what_it_needs(scale, calls):
    x_t, conditional, unconditional = picture(), Shrink(0.5, 0.1), Shrink(0.3, -0.2)
    guided = ClassifierFree(conditional, unconditional, scale)
    expected = (1 - scale) * (0.3 * x_t - 0.2) + scale * (0.5 * x_t + 0.1)
    torch.testing.assert_close(guided(x_t, T), expected)
    assert (conditional.calls, unconditional.calls) == calls
    if scale in (0, 1):
        assert torch.equal(guided(x_t, T), (unconditional, conditional)[scale](x_t, T))
    assert guided.schedule is conditional.schedule and guided.per_pixel_time
    unconditional.per_pixel_time = False
    assert not guided.per_pixel_time


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("convert", [eps_from_x0, v_from_x0])
def test_guiding_x0_is_guiding_eps_and_v(schedule, convert):
    x_t, level = picture(), make_schedule(schedule)(torch.tensor(0.6))
    conditional, unconditional = Shrink(0.5, 0.1), Shrink(0.3, -0.2)
    mixed = convert(x_t, ClassifierFree(conditional, unconditional, 3.0)(x_t, T), *level)
    c, u = (convert(x_t, denoiser(x_t, T), *level) for denoiser in (conditional, unconditional))
    torch.testing.assert_close(mixed, u + 3.0 * (c - u), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cached", [True, False])
def test_guiding_the_plan(cached):
    """The helper is the network with and without its plan, and holds what both share once."""
    torch.manual_seed(0)
    net = make_dit("tiny", structure_channels=3).eval()
    for weight in net.parameters():
        weight.add_(0.05 * torch.randn_like(weight))
    x, hole, plan = picture(1), half(), picture(1, seed=1)
    y = torch.where(hole > 0, torch.zeros_like(x), x)
    x_t = torch.where(hole > 0, picture(2, seed=2), y)
    guided = guide_structure(net, y, hole, plan, 2.0, draws=2, cached=cached)
    both = [InContext(net, net.context(y, hole, p, draws=2, cached=cached))(x_t, T) for p in (None, plan)]
    assert not torch.allclose(*both)
    torch.testing.assert_close(guided(x_t, T), both[0] + 2 * (both[1] - both[0]), atol=1e-5, rtol=1e-5)
    assert guided.conditional.context.fill is guided.unconditional.context.fill


def test_guiding_the_class():
    class Classes(Shrink):
        def __call__(self, x_t, t, class_labels):
            return super().__call__(x_t, t) + class_labels[:, None, None, None]

    guided = guide_class(Classes(), torch.tensor([3, 5]), null=9, scale=2.0)
    gain = guided(picture(), T) - 0.5 * picture()
    torch.testing.assert_close(gain[:, 0, 0, 0], torch.tensor([9 + 2 * (3 - 9.0), 9 + 2 * (5 - 9.0)]))


# ---- by a classifier -------------------------------------------------------------------------------------------------


def guide(targets, **options):
    return ClassifierGuided(Shrink(), Quadratic(), targets, **{"scale": 1.0, "iterations": 1, **options})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_white_covariance_is_r2(schedule):
    """One label per picture; x0_hat + scale r² (label - x0_hat), each picture at its own time."""
    x_t, labels = picture(), torch.tensor([1, 3])
    alpha_t, sigma_t = make_schedule(schedule)(T)
    guided = guide([(None, labels)], scale=0.3, covariance="white")
    guided.denoiser.schedule = make_schedule(schedule)
    share = (0.3 * sigma_t**2 / (alpha_t**2 + sigma_t**2))[:, None, None, None]
    expected = 0.5 * x_t + share * (labels[:, None, None, None] - 0.5 * x_t)
    torch.testing.assert_close(guided(x_t, T), expected)
    assert guided.denoiser.calls == 1 and guided.schedule is guided.denoiser.schedule and guided.per_pixel_time


def test_iterations_approach_the_label():
    x_t = picture()
    r2 = (T**2 / ((1 - T) ** 2 + T**2))[:, None, None, None]
    guided = guide([(None, 1)], covariance="white", iterations=3)
    torch.testing.assert_close(guided(x_t, T), 1 + (1 - r2) ** 3 * (0.5 * x_t - 1))
    assert guided.denoiser.calls == 1 and len(guided.classifier.seen) == 3


def test_natural_covariance_is_the_posterior_of_a_gaussian():
    """A classifier that is linear in x moves x0_hat by C times its slope: N(x0_hat, C) tilted by exp(slope x).

    C is built here from the joint Gaussian of x0 and x_t, as a matrix over pixels.
    """
    n, alpha_t, sigma_t = SIDE * SIDE, 1 - T[0], T[0]
    rows = torch.arange(SIDE)
    basis = torch.cos(math.pi * (rows + 0.5) * rows[:, None] / SIDE)  # (k, pixel), the cosine transform's
    basis = basis / basis.norm(dim=1, keepdim=True)
    basis = torch.einsum("ky,lx->klyx", basis, basis).reshape(n, n)
    spectrum = natural_spectrum(SIDE, SIDE).flatten()
    prior = basis.T @ (spectrum[:, None] * basis)  # covariance of x0
    gain = alpha_t * prior @ torch.linalg.inv(alpha_t**2 * prior + sigma_t**2 * torch.eye(n))
    posterior = prior - gain @ (alpha_t * prior)
    slope = picture(1)

    class Linear:
        def log_prob(self, x, labels, t=None):
            return (slope * x).flatten(1).sum(dim=1)

    x_t = picture(1, seed=1)
    moved = ClassifierGuided(Shrink(), Linear(), [(None, 0)], 2.0, iterations=1)(x_t, T[:1]) - 0.5 * x_t
    torch.testing.assert_close(moved.flatten(2), 2 * slope.flatten(2) @ posterior, atol=1e-5, rtol=1e-4)
    assert float(spectrum.mean()) == pytest.approx(PIXEL_VARIANCE)


@pytest.mark.parametrize("covariance", ["natural", "white"])
def test_no_noise_no_guidance(covariance):
    x_t = picture()
    assert torch.equal(guide([(None, 1)], covariance=covariance)(x_t, torch.zeros(2)), 0.5 * x_t)
    assert guide([(None, 1)], covariance=covariance)(x_t, torch.ones(2)).isfinite().all()


def test_scale_0_and_no_targets_are_the_identity_and_ask_no_classifier():
    x_t = picture()
    for guided in (guide([(None, 1)], scale=0), guide([])):
        assert torch.equal(guided(x_t, T), 0.5 * x_t) and not guided.classifier.seen


def test_the_classifier_sees_a_region_on_white_and_moves_only_that():
    x_t, region = picture(), half()
    guided = guide([(region, 5)], covariance="white")
    moved = guided(x_t, T) - 0.5 * x_t
    (seen,) = guided.classifier.seen
    assert (seen[..., : SIDE // 2] == 1).all() and torch.equal(seen * region, 0.5 * x_t * region)
    assert not moved[..., : SIDE // 2].any() and bool((moved[..., SIDE // 2 :] != 0).all())


@pytest.mark.parametrize("covariance", ["natural", "white"])
def test_known_pixels_do_not_move(covariance):
    x_t = picture()
    moved = guide([(None, 5)], hole=half(), covariance=covariance)(x_t, T) - 0.5 * x_t
    assert not moved[..., : SIDE // 2].any() and bool((moved[..., SIDE // 2 :] != 0).all())


@pytest.mark.parametrize("covariance", ["natural", "white"])
def test_targets_add_up(covariance):
    x_t = picture()
    pairs = [(half(), 5), (1 - half(), torch.tensor([-1, 2])), (None, 3)]
    move = lambda targets: guide(targets, covariance=covariance)(x_t, T) - 0.5 * x_t  # noqa: E731
    torch.testing.assert_close(move(pairs), sum(move([pair]) for pair in pairs), atol=1e-5, rtol=1e-5)


def test_a_timed_classifier_sees_what_is_on_its_way():
    """It is shown x_t itself, variance preserving, with the time at which VP-cosine is as noisy."""
    x_t, seen = picture(), {}

    class Timed:
        timed = True

        def log_prob(self, x, labels, t):
            seen.update(x=x.detach(), t=t)
            return (x * labels).flatten(1).sum(dim=1)

    guided = ClassifierGuided(Shrink(), Timed(), [(None, 2)], 1.0, iterations=1, covariance="white")
    moved = guided(x_t, T) - 0.5 * x_t
    size = torch.hypot(1 - T, T)[:, None, None, None]
    torch.testing.assert_close(seen["x"], x_t / size)
    alpha, sigma = VPCosine()(seen["t"])
    torch.testing.assert_close(sigma / alpha, T / (1 - T))
    share = ((T / size.flatten()) ** 2)[:, None, None, None]
    torch.testing.assert_close(moved, (share * 2 * (1 - T)[:, None, None, None] / size).expand_as(x_t))


def test_a_covariance_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="unknown covariance 'gray': choose natural or white"):
        guide([], covariance="gray")


def test_a_time_per_pixel_counts_as_its_latest():
    x_t, per_pixel = picture(), T[:, None, None, None] * half(2)
    same = [guide([(None, 5)], hole=half())(x_t, t) for t in (T, per_pixel)]
    torch.testing.assert_close(*same)


# ---- GuidPaint -------------------------------------------------------------------------------------------------------


def restorer(rows=slice(None), switch=0.4, clean=False, batch=4):
    """With a denoiser that pulls to 1 early, to -1 late."""
    x0, hole = picture(batch).clamp(-1, 1), half(batch)
    observation = Observation((x0 * (1 - hole))[rows], Inpainting(hole[rows]))
    return GuidPaint(Shrink(0.5, 0.5), observation, Shrink(0.5, -0.5), switch, clean)


def noise(batch=4):
    rng = [keyed_generator(0, i) for i in range(batch)]
    return normal(picture(batch), rng), rng


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("switch", [0.0, 0.37, 0.4, 1.0])
def test_refining_all_is_running_through(switch, clean):
    times = time_grid(10)
    z, rng = noise()
    straight = sample(restorer(switch=switch, clean=clean), z, times, rng)
    z, rng = noise()
    sampler = restorer(switch=switch, clean=clean)
    candidates = candidates_at_switch(sampler, z, times, rng)
    assert torch.equal(refine(sampler, candidates), straight)
    assert torch.equal(refine(restorer([2, 0], switch, clean), candidates.choose([2, 0])), straight[[2, 0]])
    assert torch.equal(straight * (1 - half()), sampler.y), "known pixels"
    assert candidates.previews.shape == straight.shape
    early = sum(t > switch for t in times)
    assert (sampler.denoiser.calls, sampler.plain.calls) == (early, 10 - early + (switch > 0))
    assert sampler.nfe == sampler.denoiser.calls + sampler.plain.calls


def test_one_step_of_each_stage():
    x_t, (z, _) = picture(4, seed=3), noise()
    sampler = restorer()
    s, project = 0.3, lambda x: torch.where(half() > 0, x, sampler.y)
    early = sampler.step(x_t, 0.5, s, [keyed_generator(0, i) for i in range(4)])
    torch.testing.assert_close(early, 0.7 * project(0.5 * x_t + 0.5) + 0.3 * z)
    late = project(0.5 * x_t - 0.5)
    eps = (x_t - 0.6 * late) / 0.4
    torch.testing.assert_close(sampler.step(x_t, 0.4, s, ()), 0.7 * late + 0.3 * eps)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_oracle_marginal(schedule):
    """x_s ~ N(alpha_s x0, sigma_s²) in both stages when the denoiser knows the answer."""
    schedule, x0 = make_schedule(schedule), torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(7))
    hole = torch.zeros(8, 1, 64, 64)
    hole[..., 32:] = 1
    oracle = lambda x_t, t: x0  # noqa: E731
    oracle.schedule = schedule
    rng = [keyed_generator(0, i) for i in range(8)]

    def check(i, s, x_s):
        alpha_s, sigma_s = schedule(torch.tensor(s))
        if s > 0:
            for part in ((x_s - alpha_s * x0) / sigma_s).chunk(2, dim=-1):
                assert float(part.std()) == pytest.approx(1, abs=0.015) and abs(float(part.mean())) < 0.02

    sampler = GuidPaint(oracle, Observation(x0 * (1 - hole), Inpainting(hole)))
    assert torch.equal(sample(sampler, normal(x0, rng), [1.0, 0.8, 0.5, 0.3, 0.1, 0.0], rng, check), x0)


def test_clean_known_pixels_stay_so_and_need_inpainting():
    sampler, (z, rng) = restorer(clean=True), noise()
    check = lambda i, s, x_s: torch.testing.assert_close(x_s * (1 - half()), sampler.y, rtol=0, atol=0)  # noqa: E731
    sample(sampler, z, time_grid(6), rng, check)
    pooled = Observation(torch.zeros(1, 3, 8, 8), AveragePooling(2))
    assert GuidPaint(Shrink(), pooled)
    with pytest.raises(ValueError, match=r"clean=True .* AveragePooling"):
        GuidPaint(Shrink(), pooled, clean=True)


def test_several_candidates_of_one_picture():
    """An observation of one picture serves any number of rows."""
    x0, hole = picture(1), half()
    sampler = GuidPaint(Shrink(), Observation(x0 * (1 - hole), Inpainting(hole)))
    candidates = candidates_at_switch(sampler, *[noise()[0], time_grid(8)], noise()[1])
    chosen = refine(sampler, candidates.choose([3, 1]))
    assert chosen.shape == (2, 3, SIDE, SIDE) and torch.equal(chosen * (1 - hole), sampler.y.expand(2, -1, -1, -1))
