import pytest
import torch

from coherent_ddrm.denoiser import Bound, DiscreteDenoiser, eps_from_x0, v_from_x0, x0_from_eps, x0_from_v
from coherent_ddrm.losses import v_weight
from coherent_ddrm.rng import keyed_generator, normal
from coherent_ddrm.schedule import SCHEDULES, Flow, VPDiscrete, add_noise, expand, make_schedule


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


LEVELS = VPDiscrete((0.9, 0.6, 0.2, 0.05))


class Oracle:
    """A network that predicts what it is asked for exactly, with a useless learned variance; notes what it is told."""

    def __init__(self, x0, z, prediction):
        self.x0, self.z, self.prediction, self.told = x0, z, prediction, None

    def __call__(self, x_t, timestep, class_labels=None):
        self.told = timestep, class_labels
        alpha_t, sigma_t = LEVELS(expand((timestep + 1) / LEVELS.levels, x_t))
        value = {"epsilon": self.z, "sample": self.x0, "v_prediction": alpha_t * self.z - sigma_t * self.x0}
        return torch.cat([value[self.prediction], torch.full_like(x_t, torch.nan)], dim=1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_discrete_denoiser_finds_x0_and_ignores_the_variance(prediction, rng):
    x0, z = torch.randn(2, 3, 2, 4, 4, generator=rng)
    t = torch.tensor([0.25, 0.6, 1.0])
    net = Oracle(x0, z, prediction)
    denoiser = DiscreteDenoiser(net, LEVELS, prediction, channels=2)
    torch.testing.assert_close(denoiser(add_noise(LEVELS, x0, t, z), t), x0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.told[0], torch.tensor([0.0, 1.4, 3.0]))  # t T - 1
    assert net.told[1] is None


def test_discrete_denoiser_clips_and_lets_gradients_through(rng):
    x0 = torch.tensor([0.5, 3.0]).reshape(1, 2, 1, 1)
    x_t = torch.randn(1, 2, 1, 1, generator=rng).requires_grad_()
    denoiser = DiscreteDenoiser(lambda x, timestep: x0 + 0 * x.detach(), LEVELS, "sample", clip=1.0, channels=2)
    assert denoiser(x_t, torch.ones(1)).flatten().tolist() == [0.5, 1.0]
    eps = DiscreteDenoiser(lambda x, timestep: 0 * x, LEVELS, channels=2)
    (slope,) = torch.autograd.grad(eps(x_t, torch.ones(1)).sum(), x_t)
    torch.testing.assert_close(slope, torch.full_like(slope, 0.05**-0.5))


def test_discrete_denoiser_tells_classes_scales_time_and_keeps_fp32_outside():
    class Net:
        dtype = torch.bfloat16

        def __call__(self, x, timestep, class_labels):
            self.told = x.dtype, timestep, class_labels
            return x

    net, label = Net(), torch.tensor([3])
    denoiser = DiscreteDenoiser(net, LEVELS, "sample", timestep_scale=10, channels=1, labels=5)
    assert Bound(denoiser, {"class_labels": label})(torch.zeros(1, 1, 2, 2), torch.ones(1)).dtype == torch.float32
    assert net.told == (torch.bfloat16, torch.tensor([30.0]), label)
    with pytest.raises(ValueError, match=r"5 classes; give class_labels \(B,\), 0 ... 4"):
        denoiser(torch.zeros(1, 1, 2, 2), torch.ones(1))


def test_discrete_denoiser_refuses_what_it_cannot_do():
    identity = lambda x, timestep: x  # noqa: E731
    with pytest.raises(ValueError, match="unknown prediction 'flow': choose one of epsilon, v_prediction, sample"):
        DiscreteDenoiser(identity, LEVELS, "flow")
    with pytest.raises(ValueError, match="epsilon cannot start at alpha_t = 0"):
        DiscreteDenoiser(identity, VPDiscrete((0.5, 0.0)))
    denoiser, x_t = DiscreteDenoiser(identity, LEVELS, "sample"), torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"one time per picture, \(B,\)"):
        denoiser(x_t, torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="0 classes; leave class_labels out"):
        denoiser(x_t, torch.ones(1), class_labels=torch.ones(1))
    with pytest.raises(ValueError, match="returned 4 channels for a picture of 3"):
        denoiser(x_t.new_zeros(1, 4, 4, 4), torch.ones(1))
