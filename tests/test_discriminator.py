"""The adversarial game against formulas, brute force and analytic discriminators."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coherent_ddrm.adversarial import (
    discriminator_loss,
    fake_patches,
    feature_matching,
    generator_loss,
    r1_penalty,
)
from coherent_ddrm.losses import low_noise
from coherent_ddrm.models.discriminator import Discriminator


def network(**options) -> Discriminator:
    torch.manual_seed(0)
    return Discriminator(**{"width": 8, **options})


def pictures(count=2, side=32, channels=3, seed=0):
    shape = (count, channels, *((side, side) if isinstance(side, int) else side))
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---- network ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "expected"), [((64, 64), [(16, 16), (8, 8)]), ((37, 50), [(9, 12), (4, 6)])])
def test_shapes_at_every_scale(side, expected):
    net, x = network(plan_channels=5), pictures(side=side)
    judged = net(x, pictures(side=side, channels=5))
    assert [j.logits.shape for j in judged] == [(2, 1, *size) for size in expected]
    assert [len(j.features) for j in judged] == [3, 3]
    three = network(halvings=3, scales=3)(pictures(side=64))
    assert [j.logits.shape[-1] for j in three] == [8, 4, 2]


def test_a_sample_does_not_depend_on_its_batch():
    """In train mode, in which a norm over the batch would tie them; and a forward pass changes no state."""
    net, x, plan = network(plan_channels=4).train(), pictures(4), pictures(4, channels=4, seed=1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    alone = [net(x[i : i + 1], plan[i : i + 1]) for i in range(4)]
    for scale, together in enumerate(net(x, plan)):
        torch.testing.assert_close(torch.cat([a[scale].logits for a in alone]), together.logits)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_logit_sees_its_patch_alone():
    """26 pixels at full size: a change on the far side of the picture does not move it."""
    net, x = network(), pictures(1, 64)
    changed = x.clone()
    changed[..., 40:] = 0
    moved = net(x)[0].logits != net(changed)[0].logits  # (1, 1, 16, 16), cell j spans pixels 4 j to 4 j + 3
    reached = [4 * j + 1.5 + 13 > 40 for j in range(16)]  # its middle, and half of 26
    assert moved[0, 0].any(dim=0).tolist() == reached


def test_the_plan_is_judged_too():
    net, x = network(plan_channels=4), pictures()
    a, b = (net(x, pictures(channels=4, seed=seed)) for seed in (1, 2))
    assert all((p.logits - q.logits).abs().max() > 1e-3 for p, q in zip(a, b, strict=True))
    for plan in (None, pictures(channels=3), pictures(channels=4, side=16)):
        with pytest.raises(ValueError, match=r"plan has shape .* made for \(2, 4, 32, 32\)"):
            net(x, plan)
    with pytest.raises(ValueError, match="no plan"):
        network()(x, pictures(channels=4))
    with pytest.raises(ValueError, match="sides of 8 px or more"):
        network()(pictures(side=7))
    with pytest.raises(ValueError, match="halvings is 0"):
        Discriminator(halvings=0)


def test_size_and_file(tmp_path):
    assert 0.3e6 < sum(p.numel() for p in Discriminator(plan_channels=22).parameters()) < 0.7e6
    net, x, plan = network(plan_channels=4), pictures(), pictures(channels=4)
    net.save_pretrained(tmp_path)
    loaded = Discriminator.from_pretrained(tmp_path)
    assert torch.equal(loaded(x, plan)[1].logits, net(x, plan)[1].logits)


def test_it_finds_the_hole():
    """Smooth truth, noise in the hole: after a few steps patches at the hole are held to be fake, others real."""
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    hole = torch.zeros(8, 1, 32, 32)
    hole[..., 4:16, 8:20] = 1
    for step in range(120):
        truth = F.interpolate(pictures(8, 4, seed=step), size=(32, 32), mode="bilinear").requires_grad_()
        composite = torch.where(hole > 0, pictures(8, seed=1000 + step), truth.detach())
        real, fake = ([j.logits for j in net(x)] for x in (truth, composite))
        loss = discriminator_loss(real, fake, hole) + 0.001 * r1_penalty(real, truth)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    logits, touched = fake[0].detach(), fake_patches(hole, (8, 8)) > 0
    assert logits[touched].mean() < -1 and logits[~touched].mean() > 2 and real[0].mean() > 2


# ---- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (4, 8), (5, 7), (32, 30)])
def test_a_patch_that_touches_the_hole_is_fake(size):
    hole = torch.zeros(3, 1, 32, 30)
    hole[0, 0, 5, 9] = 1  # one pixel, which the nearest of every eighth would miss
    hole[1, 0, 10:20, 29:] = 1
    hole[2] = (torch.rand(1, 32, 30, generator=torch.Generator().manual_seed(0)) < 0.02).float()
    (h, w), (H, W) = size, hole.shape[-2:]
    expected = torch.zeros(3, 1, h, w)
    for b in range(3):
        for i in range(h):
            for j in range(w):
                rows = range(i * H // h, math.ceil((i + 1) * H / h))
                columns = range(j * W // w, math.ceil((j + 1) * W / w))
                expected[b, 0, i, j] = any(hole[b, 0, y, x] for y in rows for x in columns)
    assert torch.equal(fake_patches(hole, size), expected)
    assert expected[0].sum() >= 1


def test_losses_are_the_papers():
    real, fake = (
        [torch.tensor([[0.3, -2.0], [1.7, 0.0]])[None, None]],
        [torch.tensor([[2.0, -0.5], [0.1, -3.0]])[None, None]],
    )
    hole = torch.zeros(1, 1, 4, 4)
    hole[..., 1, 2] = 1  # the patch above on the right alone
    softplus = lambda v: math.log(1 + math.exp(v))  # noqa: E731
    relu = lambda v: max(v, 0.0)  # noqa: E731
    a, b, m = real[0].flatten().tolist(), fake[0].flatten().tolist(), [0, 1, 0, 0]
    wanted = {
        "non_saturating": (
            sum(softplus(-p) + k * softplus(q) + (1 - k) * softplus(-q) for p, q, k in zip(a, b, m, strict=True)) / 4,
            sum(softplus(-q) for q in b) / 4,
        ),
        "hinge": (
            sum(relu(1 - p) + k * relu(1 + q) + (1 - k) * relu(1 - q) for p, q, k in zip(a, b, m, strict=True)) / 4,
            -sum(b) / 4,
        ),
    }
    for kind, (judge, net) in wanted.items():
        assert float(discriminator_loss(real, fake, hole, kind)) == pytest.approx(judge, abs=1e-6)
        assert float(generator_loss(fake, kind)) == pytest.approx(net, abs=1e-6)
    with pytest.raises(ValueError, match="unknown adversarial loss 'wgan': choose one of non_saturating, hinge"):
        generator_loss(fake, "wgan")


@pytest.mark.parametrize("kind", ["non_saturating", "hinge"])
def test_one_value_per_sample_and_a_mean_over_scales(kind):
    sizes, hole = [(8, 8), (4, 4)], torch.zeros(3, 1, 32, 32)
    hole[1:, :, :9] = 1
    real, fake = (
        [torch.randn(3, 1, *size, generator=torch.Generator().manual_seed(i)) for size in sizes] for i in (0, 1)
    )
    for loss in (lambda r, f, h: discriminator_loss(r, f, h, kind), lambda r, f, h: generator_loss(f, kind)):
        together = loss(real, fake, hole)
        assert together.shape == (3,)
        for b in range(3):
            one = [[x[b : b + 1] for x in scales] for scales in (real, fake)]
            torch.testing.assert_close(loss(*one, hole[b : b + 1])[0], together[b])
        scales = [loss([r], [f], hole) for r, f in zip(real, fake, strict=True)]
        torch.testing.assert_close(together, (scales[0] + scales[1]) / 2)


def test_r1_of_a_quadratic_discriminator():
    """logits = a x² per pixel, then 3 x on a second scale: the gradient is 2 a x + 3."""
    x, a = pictures(2, 4).requires_grad_(), torch.tensor(1.5, requires_grad=True)
    penalty = r1_penalty([a * x**2, 3 * x], x)
    torch.testing.assert_close(penalty, ((2 * 1.5 * x + 3) ** 2).flatten(1).sum(dim=1).detach())
    (gradient,) = torch.autograd.grad(penalty.sum(), a)  # d/da sum (2 a x + 3)² = sum 4 x (2 a x + 3)
    torch.testing.assert_close(gradient, (4 * x * (3 * x + 3)).sum().detach())
    with pytest.raises(ValueError, match=r"call x.requires_grad_\(\)"):
        r1_penalty([a * x.detach() ** 2], x.detach())


def test_feature_matching():
    """Layers of unlike size count alike; the truth's features get no gradient."""
    fake = [[torch.ones(2, 3, 4, 4)], [torch.zeros(2, 1, 2, 2), torch.full((2, 5, 1, 1), 3.0)]]
    real = [[torch.zeros(2, 3, 4, 4)], [torch.zeros(2, 1, 2, 2), torch.full((2, 5, 1, 1), 1.0)]]
    fake[0][0][1] = 2.0
    fake[0][0].requires_grad_(), real[0][0].requires_grad_()
    value = feature_matching(fake, real)
    torch.testing.assert_close(value.detach(), torch.tensor([(1 + 0 + 4) / 3, (4 + 0 + 4) / 3]))
    value.sum().backward()
    assert fake[0][0].grad.any() and real[0][0].grad is None
    with pytest.raises(ValueError):
        feature_matching(fake, real[:1])


def test_low_noise_falls_smoothly():
    t = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.41, 1.0])
    expected = [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2, 0, 0, 0]
    torch.testing.assert_close(low_noise(t, 0.4), torch.tensor(expected), atol=1e-6, rtol=0)
    assert not low_noise(t[4:], 0.4).any()  # exactly, so that the loss may be left out
    for cutoff in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"cutoff is {cutoff}"):
            low_noise(t, cutoff)


def test_each_side_learns_its_own(rng):
    """The network's loss pulls fake logits up, the discriminator's pushes those at the hole down and the rest up."""
    net, hole = network(), torch.zeros(1, 1, 32, 32)
    hole[..., :16] = 1
    fake = torch.zeros(1, 1, 8, 8, requires_grad=True)
    (up,) = torch.autograd.grad(generator_loss([fake]).sum(), fake)
    (down,) = torch.autograd.grad(discriminator_loss([fake.detach()], [fake], hole).sum(), fake)
    assert (up < 0).all() and (down[..., :4] > 0).all() and (down[..., 4:] < 0).all()
    x = torch.rand(1, 3, 32, 32, generator=rng).requires_grad_()
    generator_loss([j.logits for j in net.requires_grad_(False)(x)]).sum().backward()
    assert x.grad.any() and all(p.grad is None for p in net.parameters())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules())
