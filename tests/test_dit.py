"""The diffusion transformer: cached equals full, who sees whom, preconditioning, plain DiT as a special case."""

import pytest
import torch
import torch.nn.functional as F

from coherent_ddrm.launch import activation_bytes
from coherent_ddrm.models.attention import EveryToken, Ragged, attend, hole_sees, known_sees, token_levels
from coherent_ddrm.models.dit import SIZES, DiT, make_dit
from coherent_ddrm.models.ends import Tail, patchify, unpatchify
from coherent_ddrm.models.fill import pull_push

LABELS = 5


def awake(net, seed=0):
    """A network whose zero-initialised gates are open, so that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim < 2 or not p.any():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net.eval()


def tiny(**options):
    torch.manual_seed(0)
    return awake(make_dit("tiny", **{"structure_channels": LABELS, "depth": 4, **options}))


def pictures(size=(64, 64)):
    """Four pictures with different holes: half, box, everything, a corner of 3 pixels."""
    g = torch.Generator().manual_seed(1)
    x0 = torch.rand(4, 3, *size, generator=g) * 2 - 1
    hole = torch.zeros(4, 1, *size)
    hole[0, :, :, : size[1] // 2] = 1
    hole[1, :, 10:50, 20:41] = 1
    hole[2] = 1
    hole[3, :, :3, :3] = 1
    t = torch.tensor([0.9, 0.5, 1.0, 0.2])
    tp = t[:, None, None, None] * hole
    x_t = (1 - tp) * x0 + tp * torch.randn(4, 3, *size, generator=g)
    structure = torch.rand(4, LABELS, *size, generator=g) * 2 - 1
    return x0, hole, t, x_t, structure


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reach": 1},
        {"reach": 0},
        {"tail": 0},
        {"head": False, "fill": False},
        {"patch": 4},
        {"structure_adaln": False},
        {"structure_cross": False},
        {"structure_channels": 0},
        {"schedule": "vp-cosine"},
    ],
    ids=str,
)
@torch.no_grad()
def test_hole_tokens_alone_equal_all_tokens(options):
    """The cache is exact: ragged batches, every switch, far below the 1e-4 that is asked for."""
    net = tiny(**options)
    x0, hole, t, x_t, structure = pictures()
    structure = structure if net.config.structure_channels else None
    full = net(x_t, t, hole, structure)
    cached = net.denoise(x_t, t, net.context(x0, hole, structure))
    assert float(full.std()) > 0.1
    torch.testing.assert_close(cached, full, rtol=0, atol=2e-5)


@torch.no_grad()
def test_cache_without_padding_and_for_other_sizes():
    net = tiny()
    x0, hole, t, x_t, structure = pictures((64, 96))
    for rows in ([0], [0, 0], [2], [3, 3, 3]):  # uniform batches take the path without gathers
        full = net(x_t[rows], t[rows], hole[rows], structure[rows])
        cached = net.denoise(x_t[rows], t[rows], net.context(x0[rows], hole[rows], structure[rows]))
        torch.testing.assert_close(cached, full, rtol=0, atol=2e-5)


@torch.no_grad()
def test_context_never_reads_the_hole():
    net = tiny()
    x0, hole, t, x_t, structure = pictures()
    spoiled = torch.where(hole > 0, torch.full_like(x0, 7.0), x0)
    a, b = net.context(x0, hole, structure), net.context(spoiled, hole, structure)
    torch.testing.assert_close(net.denoise(x_t, t, a), net.denoise(x_t, t, b), rtol=0, atol=0)


@torch.no_grad()
def test_a_time_per_pixel():
    """Times that say what a hole and one time say give the same; a token's own time matters to it."""
    _, hole, t, x_t, _ = pictures()
    net = tiny()
    per_pixel = t[:, None, None, None] * hole
    torch.testing.assert_close(net(x_t, per_pixel), net(x_t, t, hole), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net(x_t, t[:, None, None, None].expand(4, 1, 64, 64)), net(x_t, t), atol=1e-5, rtol=1e-5)
    later = per_pixel.clone()
    later[2, :, :8, :8] = 0.3
    assert (net(x_t, later) - net(x_t, per_pixel))[2, :, :8, :8].abs().max() > 1e-3


@torch.no_grad()
def test_a_number_expanded_to_a_batch_is_that_time():
    x0, hole, _, x_t, structure = pictures()
    net = tiny()
    for cached in (True, False):
        context = net.context(x0, hole, structure, cached=cached)
        one = net.denoise(x_t, torch.tensor([0.4]).expand(4), context)
        torch.testing.assert_close(one, net.denoise(x_t, torch.full((4,), 0.4), context), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_draws_share_the_known_pass():
    net = tiny()
    x0, hole, t, x_t, structure = pictures()
    drop = torch.tensor([True, False, False, True])
    one = net.denoise(x_t, t, net.context(x0, hole, structure, drop))
    twice = x_t.repeat_interleave(2, dim=0)
    two = net.denoise(twice, t.repeat_interleave(2), net.context(x0, hole, structure, drop, draws=2))
    torch.testing.assert_close(two, one.repeat_interleave(2, dim=0), rtol=0, atol=2e-5)


@torch.no_grad()
def test_known_pixels_pass_and_the_untrained_network_fills_smoothly():
    net = make_dit("tiny", structure_channels=LABELS)
    x0, hole, _, x_t, structure = pictures()
    at_noise = net(torch.where(hole > 0, torch.randn_like(x0), x0), torch.ones(4), hole, structure)
    torch.testing.assert_close(at_noise, pull_push(x0, 1 - hole), rtol=0, atol=1e-6)
    clean = net(x0, torch.zeros(4), hole, structure)
    torch.testing.assert_close(clean, x0, rtol=0, atol=1e-6)
    out = tiny()(x_t, torch.full((4,), 0.5), hole, structure)
    torch.testing.assert_close(out * (1 - hole), x0 * (1 - hole), rtol=0, atol=1e-6)


@torch.no_grad()
def test_one_way_and_bidirectional_differ_only_by_the_policy():
    """With no known token there is no policy left: both are the same network."""
    one_way, both = tiny(), tiny(one_way=False)
    both.load_state_dict(one_way.state_dict())
    x0, hole, t, x_t, structure = pictures()
    torch.testing.assert_close(one_way(x_t[2:3], t[2:3]), both(x_t[2:3], t[2:3]), rtol=0, atol=1e-6)
    assert not torch.allclose(one_way(x_t, t, hole, structure)[0], both(x_t, t, hole, structure)[0], atol=1e-3)
    with pytest.raises(ValueError, match="one-way"):
        both.context(x0, hole)


class PlainDiT:
    """An independent DiT read from the same weights: every token sees every token, each has its own time."""

    def __init__(self, net):
        self.w, self.c = net.state_dict(), net.config

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def patches(self, x):
        return F.unfold(x, self.c.patch, stride=self.c.patch).transpose(1, 2)

    def __call__(self, x_t, t, hole):
        c, s = self.c, self.c.data_std
        sigma = t.view(-1, 1, 1, 1) * hole  # per pixel: known ones are clean
        alpha = 1 - sigma
        scale = (alpha**2 * s**2 + sigma**2).sqrt()
        known = 1 - hole
        h = self.linear(self.patches(x_t / scale), "embed_noisy")
        h = h + self.linear(self.patches(torch.cat([x_t * known, known], 1)), "embed_static")
        is_hole = self.patches(hole).amax(-1)  # (B, N): 0 for tokens whose pixels are all known
        time = t[:, None] * is_hole  # per token
        angle = 1000 * time[..., None] * torch.exp(-torch.arange(128) / 128 * torch.log(torch.tensor(10000.0)))
        emb = self.linear(torch.cat([angle.cos(), angle.sin()], -1), "time.mlp.0")
        emb = F.silu(self.linear(F.silu(emb), "time.mlp.2"))  # (B, N, dim)
        for i in range(c.depth):
            h = self.block(h, emb, f"blocks.{i}", x_t.shape[-1] // c.patch)
        shift, gain = self.linear(emb, "final_modulation").chunk(2, -1)
        raw = self.linear(self.norm(h) * (1 + gain) + shift, "final").transpose(1, 2)
        raw = F.fold(raw, x_t.shape[-2:], c.patch, stride=c.patch)
        return alpha * s**2 / scale**2 * x_t + s * sigma / scale * raw

    def norm(self, x):
        return x * torch.rsqrt((x**2).mean(-1, keepdim=True) + 1e-6)

    def block(self, h, emb, name, side):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.linear(emb, f"{name}.modulation").chunk(6, -1)
        x = self.norm(h) * (1 + scale1) + shift1
        q = self.heads(self.linear(x, f"{name}.attention.q"))
        k, v = (self.heads(part) for part in self.linear(x, f"{name}.attention.kv").chunk(2, -1))
        q = self.turn(self.norm(q) * self.w[f"{name}.attention.q_scale"], side)
        k = self.turn(self.norm(k) * self.w[f"{name}.attention.k_scale"], side)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + gate1 * self.linear(out, f"{name}.attention.proj")
        up, gate = self.linear(self.norm(h) * (1 + scale2) + shift2, f"{name}.gate_up").chunk(2, -1)
        return h + gate2 * self.linear(F.silu(gate) * up, f"{name}.down")

    def heads(self, x):
        return x.view(*x.shape[:2], self.c.heads, -1).transpose(1, 2)

    def turn(self, x, side):
        """Rotary positions as complex numbers."""
        quarter = x.shape[-1] // 4
        frequency = 100.0 ** (-torch.arange(quarter) / quarter)
        row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
        angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], -1)
        half = x.shape[-1] // 2
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1)


PLAIN = dict(structure_channels=0, one_way=False, reach=0, fill=False, head=False, tail=0)


@pytest.mark.parametrize("policy", [None, "one_way", "reach", "fill"])
@torch.no_grad()
def test_without_policies_it_is_a_plain_dit(policy):
    """With real holes and with none; each policy alone makes a difference."""
    net = tiny(**PLAIN | ({} if policy is None else {policy: 1 if policy == "reach" else True}))
    x0, hole, t, x_t, _ = pictures()
    hole[0, :, :, :56] = 1  # far from known tokens, so that the mask update has something to hide
    x_t = torch.where(hole > 0, x_t, x0)
    difference = (net(x_t, t, hole) - PlainDiT(net)(x_t, t, hole)).abs().flatten(1).amax(dim=1)
    assert (difference < 2e-5).tolist() == ([True] * 4 if policy is None else [False, False, True, False])


@torch.no_grad()
def test_structure_dropped_equals_structure_absent():
    net = tiny()
    _, hole, t, x_t, structure = pictures()
    dropped = net(x_t, t, hole, structure, torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(dropped, net(x_t, t, hole), rtol=0, atol=1e-6)
    assert not torch.allclose(dropped, net(x_t, t, hole, structure), atol=1e-3)


def test_every_parameter_learns():
    net = tiny()
    _, hole, t, x_t, structure = pictures()
    net(x_t, t, hole, structure, torch.tensor([True, False, False, False])).square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_saved_and_loaded_is_the_same(tmp_path):
    net = tiny()
    net.save_pretrained(tmp_path)
    again = DiT.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("bad", [{"patch": 6}, {"dim": 64, "heads": 3}], ids=str)
def test_impossible_networks_are_refused(bad):
    with pytest.raises(ValueError, match=r"patch is 6|64 over 3 heads"):
        DiT(**bad)


def test_bad_inputs_name_the_rule():
    net = tiny()
    _, hole, t, x_t, structure = pictures()
    with pytest.raises(ValueError, match="multiples of the patch, 8"):
        net(x_t[..., :60], t, hole[..., :60])
    with pytest.raises(ValueError, match="one per sample"):
        net(x_t, t, hole[:1])
    with pytest.raises(ValueError, match="structure has shape"):
        net(x_t, t, hole, structure[:, :2])
    with pytest.raises(ValueError, match=r"'huge'.*tiny, demo"):
        make_dit("huge")
    assert {"S/4", "B/16", "XL/8"} <= set(SIZES)


# ---- attention and packing -------------------------------------------------------------------------------------------


def test_levels_spread_by_reach():
    known = torch.zeros(2, 1, 8, dtype=torch.bool)
    known[0, 0, 0] = True
    assert token_levels(known, 2)[0].tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    assert token_levels(known, 2)[1].tolist() == [0] * 8, "nothing known: the whole picture is the hole"
    assert token_levels(known, 0)[0].tolist() == [0] * 8


def test_unreached_holes_are_not_read():
    """In the first block a hole token sees known tokens and itself; from its level on it is seen by others."""
    member = torch.tensor([[True, False, False, False]])
    known, hole = Ragged(member), Ragged(~member)
    level = token_levels(member[:, None], 1)
    mask = hole_sees(known, hole, hole.padded(level), block=1)[0].int().tolist()
    assert mask == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]


def test_rows_with_nothing_known_stay_finite():
    tokens = Ragged(torch.tensor([[False, False], [True, True]]))
    q = torch.randn(2, 1, 2, 4)
    assert attend(q, q, q, known_sees(tokens)).isfinite().all()


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_attend_is_softmax_attention(dtype, atol):
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    allowed = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.5
    allowed |= torch.eye(6, dtype=torch.bool)
    score = torch.einsum("bhqd,bhkd->bhqk", q, k) / 8**0.5
    weight = score.exp() * allowed[:, None]
    expected = torch.einsum("bhqk,bhkd->bqhd", weight / weight.sum(dim=-1, keepdim=True), v).flatten(2)
    out = attend(q.to(dtype), k.to(dtype), v.to(dtype), allowed)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, atol=atol, rtol=atol)


@pytest.mark.parametrize("counts", [(3, 1, 0, 4), (2, 2, 2, 2), (4, 4, 4, 4)])
def test_packing_round_trip(counts):
    member = torch.arange(4) < torch.tensor(counts)[:, None]
    member = member[:, torch.tensor([2, 0, 3, 1])]
    x = torch.randn(4, 4, 5)
    tokens = Ragged(member)
    packed = tokens.pack(x)
    assert len(tokens) == sum(counts) and packed.reshape(-1, 5).shape == (sum(counts), 5)
    torch.testing.assert_close(tokens.unpad(tokens.pad(packed)), packed)
    torch.testing.assert_close(tokens.scatter(packed, 4), x * member[..., None])
    per_sample = (packed * 0 + tokens.per_sample(torch.arange(4.0)[:, None])).reshape(-1, 5)[:, 0]
    assert per_sample.tolist() == [float(i) for i, n in enumerate(counts) for _ in range(n)]
    assert EveryToken().pack(x) is x


def test_patches_round_trip():
    x = torch.randn(2, 3, 16, 24)
    assert torch.equal(unpatchify(patchify(x, 8), 8, 16, 24), x)


def test_the_tail_at_some_tokens_equals_the_whole_picture_there():
    tail = Tail(feature_channels=4, pixel_channels=5, width=6, out_channels=3, patch=8)
    torch.nn.init.normal_(tail.conv2.weight)
    member = torch.tensor([[True, False, True, True, False, True], [False, False, True, False, False, False]])
    tokens = Ragged(member)
    features, pixels, static = torch.randn(2, 6, 4 * 64), torch.randn(2, 3, 16, 24), torch.randn(2, 2, 16, 24)
    whole = tail(features * member[..., None], pixels, static)  # (2, 3, 16, 24)
    some = tail.at(tokens, tokens.pack(features), pixels, tail.windows(static, tokens))
    torch.testing.assert_close(some, tokens.pack(patchify(whole, 8)))


# ---- the smooth fill -------------------------------------------------------------------------------------------------


def test_pull_push_keeps_known_and_invents_within_range():
    x = torch.rand(2, 3, 37, 50)
    known = (torch.rand(2, 1, 37, 50) > 0.9).float()
    filled = pull_push(x, known)
    assert torch.equal(filled * known, x * known)
    assert filled.min() >= (x + 9 * (1 - known)).min() - 1e-5 and filled.max() <= (x - 9 * (1 - known)).max() + 1e-5


def test_pull_push_of_a_constant_is_that_constant_and_of_nothing_is_grey():
    known = torch.zeros(2, 1, 16, 16)
    known[0, 0, 3, 5] = 1
    filled = pull_push(torch.full((2, 3, 16, 16), 0.7), known)
    torch.testing.assert_close(filled[0], torch.full((3, 16, 16), 0.7))
    assert not filled[1].any()


@pytest.mark.parametrize("draws", [1, 2])
def test_checkpointing_keeps_less_and_learns_the_same(draws):
    """Blocks computed again in the backward pass: the same gradients, from a fraction of what is kept."""
    x0, hole, t, x_t, structure = pictures()
    t, x_t = t.repeat_interleave(draws), x_t.repeat_interleave(draws, dim=0)

    def gradients(net):
        context = net.context(x0, hole, structure, draws=draws, cached=draws > 1)
        net.denoise(x_t, t, context).square().mean().backward()
        return {name: p.grad for name, p in net.named_parameters()}

    plain, frugal = tiny(), tiny()
    frugal.enable_gradient_checkpointing()
    expected = gradients(plain)
    for name, gradient in gradients(frugal).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)
    kept = [activation_bytes(lambda net=net: net(x0, t[:4], hole, structure)) for net in (plain, frugal)]
    assert kept[1] < 0.5 * kept[0]
