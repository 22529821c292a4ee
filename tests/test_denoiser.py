import pytest
import torch

from coherent_ddrm.denoiser import Bound, eps_from_x0, v_from_x0, x0_from_eps, x0_from_v
from coherent_ddrm.losses import v_weight
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.schedule import SCHEDULES, Flow, make_schedule


@pytest.mark.parametrize("name", SCHEDULES)
def test_conversions_are_inverse_and_mean_what_they_say(name, rng):
    x0, z = torch.randn(2, 5, 3, 4, 4, generator=rng, dtype=torch.float64)
    alpha_t, sigma_t = make_schedule(name)(torch.tensor(0.3, dtype=torch.float64))
    x_t = alpha_t * x0 + sigma_t * z
    torch.testing.assert_close(eps_from_x0(x_t, x0, alpha_t, sigma_t), z)
    torch.testing.assert_close(x0_from_eps(x_t, z, alpha_t, sigma_t), x0)
    v = v_from_x0(x_t, x0, alpha_t, sigma_t)
    torch.testing.assert_close(v, alpha_t * z - sigma_t * x0)
    torch.testing.assert_close(x0_from_v(x_t, v, alpha_t, sigma_t), x0)


def test_v_weight_is_the_squared_sensitivity_of_the_flow_velocity():
    """v = z - x0 with z read off x_t: an error e in x0 is an error e / t in v."""
    t = torch.tensor([0.2, 0.7])
    alpha_t, sigma_t = Flow()(t)
    x_t, x0, e = torch.tensor(0.3), torch.tensor(0.1), torch.tensor(1e-2)
    velocity = lambda x0: eps_from_x0(x_t, x0, alpha_t, sigma_t) - x0  # noqa: E731
    change = (velocity(x0 + e) - velocity(x0)) / e
    torch.testing.assert_close(change**2, v_weight(sigma_t), rtol=1e-4, atol=0)


def test_bound_fills_in_the_condition():
    class Net:
        schedule = Flow()

        def __call__(self, x_t, t, hole):
            return x_t + t[:, None] * hole

    bound = Bound(Net(), {"hole": torch.full((1, 2), 3.0)})
    assert bound(torch.zeros(1, 2), torch.tensor([2.0])).tolist() == [[6.0, 6.0]] and bound.schedule == Flow()


def test_noise_of_a_picture_does_not_depend_on_its_batch():
    like = torch.zeros(4, 3, 8, 8)
    together = normal(like, [keyed_generator(7, i) for i in range(4)])
    alone = normal(like[:1], [keyed_generator(7, 2)])
    assert torch.equal(together[2:3], alone) and not torch.equal(together[0], together[1])
    with pytest.raises(ValueError, match="3 generators for a batch of 4"):
        normal(like, [keyed_generator(7, i) for i in range(3)])


def test_keys_are_not_concatenated():
    a, b = (torch.rand(4, generator=keyed_generator(*key)) for key in [(1, 23), (12, 3)])
    assert not torch.equal(a, b)
    for one, other in [((1, 5), (1, 5, 0)), ((2**32 + 5, 7), (5, 1, 7))]:
        a, b = (torch.rand(4, generator=keyed_generator(*key)) for key in (one, other))
        assert not torch.equal(a, b), f"{one} and {other} give the same numbers"
