import math
from itertools import pairwise

import pytest
import torch

from coherent_ddrm.schedule import SCHEDULES, VPDiscrete, VPLinear, add_noise, make_schedule, time_grid, travel_path


@pytest.mark.parametrize("name", SCHEDULES)
def test_ends_and_monotone(name):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha_t, sigma_t = make_schedule(name)(t)
    assert alpha_t[0] == pytest.approx(1, abs=1e-12) and sigma_t[0] == pytest.approx(0, abs=1e-12)
    assert alpha_t[-1] < 0.01 and sigma_t[-1] > 0.99
    assert (alpha_t.diff() < 0).all() and (sigma_t.diff() >= 0).all()


@pytest.mark.parametrize("name", ["vp-cosine", "vp-linear"])
def test_variance_preserving(name):
    alpha_t, sigma_t = make_schedule(name)(torch.linspace(0, 1, 50, dtype=torch.float64))
    torch.testing.assert_close(alpha_t**2 + sigma_t**2, torch.ones(50, dtype=torch.float64))


def test_vp_linear_is_ddpm_in_the_limit():
    """prod(1 - beta_i / n) of the discrete chain with 100,000 steps."""
    n = 100_000
    beta = torch.linspace(0.1, 20, n, dtype=torch.float64) / n
    product = torch.log1p(-beta).cumsum(0).exp()
    alpha_t, _ = VPLinear()(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(alpha_t**2, product[[n // 4 - 1, n // 2 - 1, 3 * n // 4 - 1]], rtol=1e-3, atol=0)


def test_add_noise_per_sample_and_per_pixel():
    x0, z = torch.full((2, 1, 2, 2), 2.0), torch.full((2, 1, 2, 2), 10.0)
    schedule = make_schedule("flow")
    assert add_noise(schedule, x0, torch.tensor([0.0, 0.5]), z)[:, 0, 0, 0].tolist() == [2.0, 6.0]
    hole = torch.tensor([[0.0, 1.0], [0.0, 0.0]]).expand(2, 1, 2, 2)
    assert add_noise(schedule, x0, 0.25 * hole, z)[0, 0].tolist() == [[2.0, 4.0], [2.0, 2.0]]


def test_unknown_schedule_names_the_known():
    with pytest.raises(ValueError, match=r"'karras'.*flow, vp-cosine, vp-linear"):
        make_schedule("karras")


def test_time_grid():
    assert time_grid(4) == [1, 0.75, 0.5, 0.25, 0]
    shifted = time_grid(4, shift=3)
    assert shifted[0] == 1 and shifted[-1] == 0 and shifted[2] == pytest.approx(0.75)
    with pytest.raises(ValueError, match="steps is 0"):
        time_grid(0)


@pytest.mark.parametrize(
    ("steps", "length", "repeats", "nfe"), [(100, 10, 2, 150), (100, 10, 3, 200), (100, 10, 5, 300), (50, 5, 2, 75)]
)
def test_travel_path_costs_what_the_table_says(steps, length, repeats, nfe):
    path = travel_path(time_grid(steps), length, repeats)
    assert sum(s < t for t, s in pairwise(path)) == nfe
    assert path[0] == 1 and path[-1] == 0
    assert all(math.isclose(t - s, 1 / steps, abs_tol=1e-9) for t, s in pairwise(path) if s < t)


def test_travel_path_with_one_repeat_is_the_grid():
    assert travel_path(time_grid(20), 5, 1) == time_grid(20)


def ddpm_levels(steps=1000):
    """DDPM's linear alphas_cumprod."""
    return torch.cumprod(1 - torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64), dim=0)


@pytest.mark.parametrize("steps", [100, 1000, 4000])
def test_discrete_levels_are_hit_in_fp32(steps):
    """t = k / T computed in fp32 is level k and timestep k - 1 exactly, whatever T."""
    table = ddpm_levels(steps)
    schedule = VPDiscrete(tuple(table.tolist()))
    t = torch.arange(steps + 1, dtype=torch.float32) / steps
    alpha_t, sigma_t = schedule(t)
    assert alpha_t.dtype == torch.float32 and alpha_t[0] == 1 and sigma_t[0] == 0 and schedule.levels == steps
    torch.testing.assert_close(alpha_t[1:], table.sqrt().float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(sigma_t[1:], (1 - table).sqrt().float(), rtol=1e-6, atol=0)
    assert torch.equal(schedule.timestep(t), torch.arange(-1, steps).clamp(min=0).float())
    assert schedule.timestep(torch.tensor([0.25 / steps, 2.5 / steps])).tolist() == pytest.approx([0, 1.5], abs=1e-4)


def test_discrete_between_levels_is_the_continuous_schedule():
    """A constant beta between levels: with 1,000 levels all but VPLinear, which has its T -> infinity."""
    t = torch.linspace(0, 1, 3331, dtype=torch.float64)
    alpha_t, sigma_t = VPDiscrete(tuple(ddpm_levels().tolist()))(t)
    expected = VPLinear()(t)
    torch.testing.assert_close(alpha_t, expected[0], rtol=6e-2, atol=0)  # 1000 steps differ from the limit by 5 %
    torch.testing.assert_close(alpha_t**2 + sigma_t**2, torch.ones_like(t))
    assert (alpha_t.diff() < 0).all() and (sigma_t.diff() > 0).all()
    halves = VPDiscrete((0.81, 0.25))(torch.tensor([0.25, 0.75], dtype=torch.float64))[0]
    torch.testing.assert_close(halves, torch.tensor([0.9**0.5, (0.9 * 0.5) ** 0.5], dtype=torch.float64))


def test_discrete_takes_a_time_per_pixel_and_compares_by_value():
    schedule, t = VPDiscrete((0.81, 0.25)), torch.tensor([0.0, 0.5, 1.0, 0.5]).reshape(1, 1, 2, 2)
    assert schedule(t)[0].flatten().tolist() == pytest.approx([1, 0.9, 0.5, 0.9])
    assert schedule(torch.tensor(0.5))[0].shape == () and schedule(t.bfloat16())[0].dtype == torch.float32
    assert schedule == VPDiscrete((0.81, 0.25)) and schedule != VPDiscrete((0.81, 0.24))


def test_discrete_with_zero_terminal_snr():
    alpha_t, sigma_t = VPDiscrete((0.81, 0.25, 0.0))(torch.tensor([2 / 3, 5 / 6, 0.99, 1.0]))
    assert alpha_t.tolist() == pytest.approx([0.5, 0.25, 0.015, 0], rel=1e-4) and alpha_t[-1] == 0 and sigma_t[-1] == 1
    assert sigma_t.isfinite().all() and (sigma_t.diff() > 0).all()


@pytest.mark.parametrize("values", [(), (1.0, 0.5), (0.5, 0.6), (0.5, -0.1), (0.5, 0.0, 0.0), (0.5, math.nan)])
def test_discrete_refuses_what_is_no_table_of_levels(values):
    with pytest.raises(ValueError, match="alphas_cumprod must fall"):
        VPDiscrete(values)
