"""Stage one: maps to plans and back, one step and many, and a network that learns."""

import pytest
import torch

from coherent_ddrm.models.structure import StructurePredictor, decode_structure, encode_structure, predict_plan
from coherent_ddrm.rng import keyed_generator
from coherent_ddrm.schedule import SCHEDULES, add_noise, make_schedule
from coherent_ddrm.structure_losses import edge_loss, region_weight, segmentation_loss

LABELS = 3


def network(seed: int = 0, **options) -> StructurePredictor:
    torch.manual_seed(seed)
    return StructurePredictor(num_labels=LABELS, **options).eval()


def scene(count: int, height: int = 64, width: int = 64) -> tuple[torch.Tensor, ...]:
    """Bright squares on dark ground with their outlines: picture, hole, edges, segmentation."""
    picture, edges = torch.full((count, 3, height, width), -0.6), torch.zeros(count, height, width, dtype=torch.uint8)
    segmentation, hole = torch.zeros_like(edges), torch.zeros(count, 1, height, width)
    for b in range(count):
        top, left, side = 4 + 3 * b, 6 + 2 * b, 20
        box = (slice(top, top + side), slice(left, left + side))
        edges[b][box] = 255
        edges[b, top + 1 : top + side - 1, left + 1 : left + side - 1] = 0
        picture[b][(slice(None), *box)] = 0.2 + 0.15 * b
        segmentation[b][box] = 1 + b % 2
    hole[:, :, height // 4 : height // 2, width // 4 : width // 2] = 1
    return picture, hole, edges, segmentation


def keys(*seeds: int) -> list[torch.Generator]:
    return [keyed_generator(seed) for seed in seeds]


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (45, 70)])
def test_shapes_and_ranges(size):
    net, (picture, hole, *_) = network(), scene(2, *size)
    s_t = torch.randn(2, net.channels, *size, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 0.7])
    edge, segmentation = net.logits(s_t, t, picture, hole)
    assert edge.shape == (2, 1, *size) and segmentation.shape == (2, LABELS, *size)
    s0_hat = net(s_t, t, picture, hole)
    assert s0_hat.shape == (2, 1 + LABELS, *size) and s0_hat.abs().max() <= 1
    torch.testing.assert_close((s0_hat[:, 1:] + 1).sum(dim=1), torch.full((2, *size), 2.0))


def test_light_and_independent_of_the_batch():
    net, (picture, hole, *_) = network(), scene(3)
    assert 3e6 < sum(p.numel() for p in net.parameters()) < 4.5e6
    s_t, t = (
        torch.randn(3, net.channels, 64, 64, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.2, 0.5, 0.9]),
    )
    alone = net(s_t[1:2], t[1:2], picture[1:2], hole[1:2])
    torch.testing.assert_close(net.train()(s_t, t, picture, hole)[1:2], alone, atol=1e-5, rtol=1e-4)


def test_hole_pixels_are_not_read_and_the_noisy_map_is():
    net, (picture, hole, *_) = network(), scene(1)
    s_t, t = torch.randn(1, net.channels, 64, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5])
    other = torch.where(hole > 0, torch.full_like(picture, float("nan")), picture)
    assert torch.equal(net(s_t, t, picture, hole), net(s_t, t, other, hole))
    assert (net(s_t, t, picture, hole) - net(-s_t, t, picture, hole)).abs().mean() > 0.1


def test_encode_and_decode_are_inverse():
    g = torch.Generator().manual_seed(0)
    edges = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(2, 1, 1)
    segmentation = torch.randint(0, LABELS, (2, 16, 16), generator=g).byte()
    segmentation[0, :3] = 255
    plan = encode_structure(edges, segmentation, LABELS)
    assert plan.shape == (2, 1 + LABELS, 16, 16) and plan.min() == -1 and plan.max() == 1
    assert (plan[0, 1:, :3] == 0).all() and (plan[0, 0] == plan[1, 0]).all()
    assert all(torch.equal(a, b) for a, b in zip(decode_structure(plan), (edges, segmentation), strict=True))
    with pytest.raises(ValueError, match="id 7"):
        encode_structure(edges, torch.full_like(segmentation, 7), LABELS)


def test_a_clean_map_is_nearly_returned_by_the_untrained_network():
    """At t = 0 the evidence outweighs all else: what the map says about each pixel is what comes out."""
    net, (picture, hole, edges, segmentation) = network(), scene(2)
    s0 = encode_structure(edges, segmentation, LABELS)
    found, ids = decode_structure(net(s0, torch.zeros(2), picture, hole))
    assert torch.equal(ids, segmentation) and torch.equal(found > 127, edges > 127)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_does_not_depend_on_the_seed(schedule):
    net, (picture, hole, *_) = network(schedule=schedule), scene(2)
    mean = predict_plan(net, picture, hole)
    assert torch.equal(mean, predict_plan(net, picture, hole, rng=keys(1, 2)))
    torch.testing.assert_close(mean, net(torch.zeros_like(mean), torch.ones(2), picture, hole))
    assert not torch.equal(mean[0], mean[1])


def test_many_steps_follow_the_seed_and_not_the_batch():
    net, (picture, hole, *_) = network(), scene(1)
    batch = (picture.expand(4, -1, -1, -1), hole.expand(4, -1, -1, -1))
    plans = predict_plan(net, *batch, steps=3, rng=keys(1, 2, 3, 2))
    assert (plans[0] - plans[1]).abs().mean() > 0.01
    torch.testing.assert_close(plans[1], plans[3], atol=1e-4, rtol=1e-4)
    alone = predict_plan(net, picture, hole, steps=3, rng=keys(3))
    torch.testing.assert_close(alone[0], plans[2], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="rng"):
        predict_plan(net, *batch, steps=3)


def test_saved_and_loaded_exactly(tmp_path):
    net, (picture, hole, *_) = network(schedule="vp-cosine", decoder_dim=32), scene(1)
    net.save_pretrained(tmp_path)
    again = StructurePredictor.from_pretrained(tmp_path)
    assert again.schedule == net.schedule and again.channels == net.channels
    arguments = (torch.zeros(1, net.channels, 64, 64), torch.tensor([0.4]), picture, hole)
    ours, theirs = net.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.testing.assert_close(
        net(*arguments), again(*arguments), atol=1e-6, rtol=0
    )  # memory alignment: not to the bit


def test_errors_name_the_value():
    net, (picture, hole, *_) = network(), scene(1)
    with pytest.raises(ValueError, match=r"s_t has shape \(1, 9, 64, 64\); it must be \(1, 4, 64, 64\)"):
        net(torch.zeros(1, 9, 64, 64), torch.ones(1), picture, hole)
    with pytest.raises(ValueError, match="batch norm"):
        StructurePredictor(encoder="resnet18")


def loss_of(net: StructurePredictor, t: torch.Tensor, z: torch.Tensor, data: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """(B,)"""
    picture, hole, edges, segmentation = data
    s_t = add_noise(net.schedule, encode_structure(edges, segmentation, LABELS), t, z)
    edge, logits = net.logits(s_t, t, picture, hole)
    weight, alpha_t = region_weight(hole), net.schedule(t)[0]
    return edge_loss(edge, edges[:, None] / 255, weight, 0.5 * alpha_t) + segmentation_loss(
        logits, segmentation, weight
    )


def test_a_gradient_reaches_every_parameter():
    net, data, g = network(), scene(2), torch.Generator().manual_seed(0)
    loss_of(net, torch.tensor([0.3, 0.8]), torch.randn(2, net.channels, 64, 64, generator=g), data).sum().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_it_learns_four_pictures():
    """Loss of the mean plan, in and around the hole, at t = 1 where the map gives nothing away: 1.63 at the start."""
    net, data, g = network().train(), scene(4), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    times, zeros = torch.tensor([1.0, 1.0, 0.9, 0.5]), torch.zeros(4, net.channels, 64, 64)
    with torch.no_grad():
        before = loss_of(net, torch.ones(4), zeros, data).mean()
    for step in range(30):
        z = torch.randn(4, net.channels, 64, 64, generator=g)
        loss = loss_of(net, times.roll(step), z, data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = loss_of(net, torch.ones(4), zeros, data).mean()
    assert before > 1.5 and after < 0.8


def test_the_schedule_is_made_by_name():
    assert network(schedule="vp-linear").schedule == make_schedule("vp-linear")
