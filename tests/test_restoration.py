"""The restoration pipeline: any method, operator and prior; pictures larger than the prior; what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_hole, make_mask, make_picture

from coherent_ddrm.errors import CheckpointError, UserError
from coherent_ddrm.models.dit import make_dit
from coherent_ddrm.operators import AveragePooling, Blur, Inpainting, kernels, make_operator
from coherent_ddrm.priors import DiTPrior
from coherent_ddrm.restoration import RestorationPipeline, option_defaults
from coherent_ddrm.samplers import RESTORERS
from coherent_ddrm.schedule import Flow, VPLinear

SIDE = 32


class GaussianPrior:
    """x0 ~ N(0.1, 0.4²), exact."""

    channels, labels, shift, multiple = 3, 0, 1.0, 1

    def __init__(self, schedule=None, resolution=SIDE):
        self.schedule, self.resolution, self.largest = schedule or Flow(), resolution, 0

    def __call__(self, x_t, t):
        self.largest = max(self.largest, *x_t.shape[-2:])
        alpha_t, sigma_t = self.schedule(t[:, None, None, None])
        return 0.1 + alpha_t * 0.16 / (alpha_t**2 * 0.16 + sigma_t**2) * (x_t - alpha_t * 0.1)


@pytest.fixture
def pipe():
    return RestorationPipeline(GaussianPrior())


def levels(x):
    """[-1, 1] -> 8-bit, as floats."""
    return ((x + 1) * 127.5).round().clamp(0, 255)


@pytest.mark.parametrize("spec", ["super_resolution:4", "bicubic:2", "colourisation", "blur:uniform:3", "denoising"])
@pytest.mark.parametrize("sampler", ["ddrm", "ddnm", "ddnm_plus", "hybrid", "diffpir", "ilvr"])
def test_the_measurement_is_kept(pipe, spec, sampler):
    out = pipe(make_picture(SIDE, SIDE), spec, sampler, degrade=True, num_inference_steps=5, generator=0)
    assert out.residual < 3e-5 and out.images[0].size == (SIDE, SIDE) and out.nfe >= 5


def test_y_alone_gives_what_degrading_gave(pipe):
    """A measured picture handed in by itself, as tensor or as an 8-bit picture, and the seed decide the result."""
    picture, options = make_picture(SIDE, SIDE), dict(sampler="ddnm", num_inference_steps=4, output_type="pt")
    first = pipe(picture, "super_resolution:4", degrade=True, generator=[3], **options)
    again = pipe(first.y, "super_resolution:4", generator=[3], **options)
    assert torch.equal(first.images, again.images)
    small = Image.fromarray(levels(first.y)[0].byte().permute(1, 2, 0).numpy())
    coarse = pipe(small, "super_resolution:4", generator=3, **options)
    assert float((coarse.images - first.images).abs().max()) < 0.02


def test_candidates_and_batches(pipe):
    pictures = [make_picture(SIDE, SIDE, seed=s) for s in range(2)]
    options = dict(degrade=True, num_inference_steps=3, output_type="pt")
    both = pipe(pictures, "bicubic:4", generator=[5, 6], candidates=2, **options)
    alone = pipe(pictures[1], "bicubic:4", generator=6, candidates=2, **options)
    assert torch.equal(both.images[2:], alone.images) and both.seeds == [(5, 0), (5, 1), (6, 0), (6, 1)]
    assert not torch.equal(both.images[0], both.images[1])


def test_noise_is_added_once_and_known(pipe):
    picture = make_picture(SIDE, SIDE)
    clean = pipe(picture, "denoising", "ddnm_plus", degrade=True, num_inference_steps=2, generator=0)
    noisy = pipe(picture, "denoising", "ddnm_plus", degrade=True, sigma_y=0.3, num_inference_steps=2, generator=0)
    assert float((noisy.y - clean.y).std()) == pytest.approx(0.3, rel=0.05) and noisy.residual is None


@pytest.mark.parametrize("sampler", RESTORERS)
def test_inpainting_with_every_method(sampler):
    torch.manual_seed(0)
    net = make_dit("tiny").eval()
    pipe = RestorationPipeline(DiTPrior(net, SIDE))
    picture, hole = make_picture(SIDE, SIDE), make_hole(SIDE, SIDE)
    out = pipe(picture, "inpainting", sampler, make_mask(hole), degrade=True, num_inference_steps=2, generator=0)
    same = (np.asarray(out.images[0]) == np.asarray(picture)).all(axis=-1)
    if sampler in ("dps", "pigdm", "copaint", "copaint_tt"):
        assert np.isfinite(out.residual)
    else:
        assert same[~hole].all() and out.residual == 0


@pytest.mark.parametrize(("spec", "sampler"), [("super_resolution:4", "ddnm"), ("colourisation", "hybrid")])
def test_pictures_larger_than_the_prior(pipe, spec, sampler):
    """Window by window: never more than the prior's size at once, and still exact."""
    y = make_operator(spec, (SIDE, SIDE)).A(torch.rand(1, 3, SIDE + 24, 2 * SIDE) * 2 - 1)
    out = pipe(y, spec, sampler, num_inference_steps=3, generator=0, output_type="pt")
    assert out.images.shape == (1, 3, SIDE + 24, 2 * SIDE) and out.residual < 1e-5
    assert pipe.prior.largest == SIDE and out.nfe == 3 * 9  # three steps in three by three windows


def test_large_inpainting_keeps_what_is_known(pipe):
    picture, hole = make_picture(48, 70), make_hole(48, 70)
    out = pipe(picture, "inpainting", "repaint", make_mask(hole), num_inference_steps=4, generator=0, jump_length=2)
    assert (np.asarray(out.images[0]) == np.asarray(picture))[~hole].all()


def test_options_reach_the_method(pipe):
    y = torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    run = lambda **o: pipe(y, "denoising", "ddnm_plus", sigma_y=0.5, num_inference_steps=4, generator=0, **o)  # noqa: E731
    assert not np.array_equal(np.asarray(run(eta=0.1).images[0]), np.asarray(run(eta=0.9).images[0]))
    assert run(length=2, repeats=2).nfe == 8
    assert list(option_defaults(RESTORERS["copaint_tt"])) == [
        "repeats", "gradient_steps", "rate", "weight", "shrink", "tries", "length",
    ]  # fmt: skip
    assert list(option_defaults(RESTORERS["ilvr"])) == []


def test_callback_and_classes():
    class Classes(GaussianPrior):
        labels = 3

        def __call__(self, x_t, t, class_labels):
            return super().__call__(x_t, t) * 0 + class_labels[:, None, None, None] / 4

    pipe, y, seen = RestorationPipeline(Classes(VPLinear())), torch.zeros(2, 3, 8, 8), []
    out = pipe(
        y, "super_resolution:4", "ilvr", num_inference_steps=3, generator=0, candidates=2, class_labels=[1, 2],
        output_type="pt", callback_on_step_end=lambda i, s, x_s: seen.append((i, x_s.shape)),
    )  # fmt: skip
    assert [i for i, _ in seen] == [0, 1, 2] and seen[0][1] == (4, 3, SIDE, SIDE)
    one = lambda **o: pipe(y[:1], "super_resolution:4", num_inference_steps=3, generator=0, output_type="pt", **o)  # noqa: E731
    guided, plain = one(class_labels=[1], class_scale=2.0, null_label=0), one(class_labels=[2])
    assert torch.equal(guided.images, plain.images) and (guided.nfe, plain.nfe) == (6, 3)  # 0 + 2 (1 / 4 - 0) = 2 / 4
    with pytest.raises(UserError, match="class_scale 2 needs class_labels and null_label"):
        one(class_labels=[1], class_scale=2.0)
    with pytest.raises(UserError, match="class_labels are"):
        pipe(y, "super_resolution:4", class_labels=[1, 3])
    with pytest.raises(UserError, match="knows 3 classes"):
        pipe(y, "super_resolution:4")
    assert len(out.images) == 4


Y = torch.zeros(1, 3, 8, 8)
BAD = {
    "unknown sampler": (dict(sampler="magic"), "unknown sampler 'magic'"),
    "unknown operator": (dict(operator="blurr:3"), "unknown operator 'blurr'"),
    "bad argument": (dict(operator="super_resolution:x"), "whole number"),
    "unknown option": (dict(etta=1.0), "no option 'etta'; it has eta"),
    "network without time per pixel": (dict(sampler="rad"), "use our checkpoint"),
    "shift": (dict(shift=0.0), "shift is 0"),
    "steps": (dict(num_inference_steps=0), "whole number from 1"),
    "noise": (dict(sigma_y=-1.0), "sigma_y is -1"),
    "output": (dict(output_type="gif"), "unknown output_type"),
    "no hole": (dict(operator="inpainting"), "needs a hole"),
    "method and operator": (dict(operator="super_resolution:4", sampler="repaint"), "RePaint inpaints"),
    "coherent inpaints": (dict(sampler="coherent"), "time per pixel"),
    "not linear": (dict(operator="clipping:2", image=torch.zeros(1, 3, SIDE, SIDE)), "needs a linear operator"),
    "too small": (dict(operator="denoising"), "enlarge it"),
    "too large": (dict(image=torch.zeros(1, 3, 16, 16), sampler="ddrm"), "choose ddnm or hybrid"),
    "no windows": (dict(image=torch.zeros(1, 3, 64, 64), operator="blur:uniform:3"), "has no windows"),
    "not finite": (dict(image=torch.full((1, 3, 8, 8), torch.nan)), "finite"),
    "mask of another size": (dict(operator="inpainting", mask_image=make_mask(make_hole(9, 9))), "must be alike"),
    "mask that hides nothing": (dict(operator="inpainting", mask_image=np.zeros((8, 8), bool)), "hides nothing"),
    "share": (dict(eta=2), "eta of sampler 'ddnm' is 2; it must be a number from 0 to 1"),
    "word": (dict(eta="much"), "number from 0 to 1"),
    "count": (dict(sampler="hybrid", repeats=1.5), "whole number from 1"),
    "switch": (dict(sampler="guidpaint", clean=7), "true or false"),
    "for programs": (dict(sampler="guidpaint", plain=None), "no option 'plain'"),
    "scale": (dict(guidance_scale=float("nan")), "guidance_scale is nan"),
    "endless shift": (dict(shift=float("inf")), "shift is inf"),
    "y of another shape": (dict(operator="compressed_sensing:4"), "give the size"),
    "colour where grey is": (dict(operator="colourisation", image=make_picture(SIDE, SIDE)), "is it the clean one"),
    "channels of y": (dict(operator="colourisation", image=torch.zeros(1, 3, SIDE, SIDE)), "this operator makes"),
    "no picture": (dict(image=np.zeros((8, 8, 5), np.uint8)), r"shape \(8, 8, 5\)"),
    "watched": (dict(image=torch.zeros(1, 3, 16, 16), callback_on_step_end=print), "a callback cannot look on"),
    "useless mask": (dict(mask_image=make_mask(make_hole(8, 8))), "no use for it"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_named(pipe, name):
    change, message = BAD[name]
    with pytest.raises(UserError, match=message):
        pipe(**{"image": Y, "operator": "super_resolution:4", "num_inference_steps": 2, **change})


def test_a_broken_network_is_the_checkpoints_fault(pipe):
    pipe.prior.__class__ = type("Broken", (GaussianPrior,), {"__call__": lambda self, x_t, t: x_t * torch.nan})
    with pytest.raises(CheckpointError, match="not finite after move 1"):
        pipe(Y, "super_resolution:4", num_inference_steps=2)


def test_operators_may_be_handed_in(pipe):
    hole = torch.zeros(1, 1, SIDE, SIDE)
    hole[..., :9] = 1
    picture = torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    out = pipe(picture, Inpainting(hole), candidates=2, num_inference_steps=2, generator=0)
    assert out.residual == 0 and len(out.images) == 2
    assert pipe(Y, AveragePooling(4), num_inference_steps=2).residual < 1e-5


class Level:
    """log p(label | x) = -|x - level|² / 2: its gradient pulls towards the level, by as much as x is away."""

    def label(self, name):
        return {"bright": 0.9, "dark": -0.9}[name]

    def log_prob(self, x, labels, t=None):
        return -(x - torch.as_tensor(labels)).square().flatten(1).sum(dim=1) / 2


@pytest.mark.parametrize("sampler", ["ddnm", "guidpaint", "dps"])
def test_a_classifier_guides_what_is_hidden(pipe, sampler):
    """Bright on the left, dark on the right; 0 leaves the result alone, known pixels stay."""
    hole = make_hole(SIDE, SIDE, (0.25, 0.0, 1.0, 1.0))
    left, right = np.zeros((2, SIDE, SIDE), bool)
    left[:, : SIDE // 2], right[:, SIDE // 2 :] = True, True
    options = dict(
        operator="inpainting", sampler=sampler, mask_image=make_mask(hole), num_inference_steps=12, generator=0,
        candidates=2, output_type="pt", classifier=Level(),
    )  # fmt: skip
    show = [("bright", make_mask(left)), ("dark", make_mask(right))]
    picture = make_picture(SIDE, SIDE)
    guided = pipe(picture, show=show, guidance_scale=0.3, **options)
    mean = lambda out, half: out.images[..., torch.from_numpy(hole & half)].mean()  # noqa: E731
    means = [mean(guided, half) for half in (left, right)]
    assert means[0] - means[1] > 0.15
    both = pipe(picture, show=["bright"], guidance_scale=0.3, **options)
    assert mean(both, right) > means[1] + 0.1
    alone = pipe(picture, show=show, guidance_scale=0.0, **options)
    options.pop("classifier")
    plain = pipe(picture, **options)
    assert torch.equal(alone.images, plain.images)
    known = torch.from_numpy(~hole)
    given = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.equal(guided.images[..., known], ((given + 1) / 2).expand(2, -1, -1, -1)[..., known])


def test_guidpaint_is_plain_in_its_second_stage():
    """With the switch at 1 nothing is guided."""
    options = dict(
        operator="inpainting", sampler="guidpaint", mask_image=make_mask(make_hole(SIDE, SIDE)), num_inference_steps=6,
        generator=0, output_type="pt",
    )  # fmt: skip
    pipe, picture = RestorationPipeline(GaussianPrior()), make_picture(SIDE, SIDE)
    guided = dict(classifier=Level(), show=["bright"])
    assert torch.equal(
        pipe(picture, switch=1.0, **guided, **options).images, pipe(picture, switch=1.0, **options).images
    )
    assert not torch.equal(pipe(picture, **guided, **options).images, pipe(picture, **options).images)


def test_clean_known_pixels_are_told_to_our_network_alone(pipe):
    torch.manual_seed(0)
    ours = RestorationPipeline(DiTPrior(make_dit("tiny").eval(), resolution=SIDE))
    options = dict(
        operator="inpainting", sampler="guidpaint", mask_image=make_mask(make_hole(SIDE, SIDE)), num_inference_steps=3,
        generator=0, output_type="pt",
    )  # fmt: skip
    picture = make_picture(SIDE, SIDE)
    assert ours(picture, clean=True, **options).residual == 0
    for wrong in (dict(sampler="coherent"), dict(sampler="guidpaint", clean=True)):
        with pytest.raises(UserError, match=r"Coherent inpaints|clean=True keeps known pixels"):
            ours(Y, "super_resolution:4", num_inference_steps=2, **wrong)
    with pytest.raises(UserError, match="'clean' needs a time per pixel"):
        pipe(picture, clean=True, **options)


def test_mistakes_of_guidance_are_named(pipe):
    with pytest.raises(UserError, match="go together"):
        pipe(Y, "super_resolution:4", show=["bright"])
    with pytest.raises(UserError, match="go together"):
        pipe(Y, "super_resolution:4", classifier=Level())
    with pytest.raises(UserError, match="cannot guide window by window"):
        large = torch.zeros(1, 3, 16, 16)
        pipe(large, "super_resolution:4", classifier=Level(), show=["bright"], num_inference_steps=2)


@pytest.mark.parametrize("sampler", RESTORERS)
def test_bf16_networks(sampler):
    """Schedule, projection and result are fp32, the network's products bf16: near the fp32 result, not equal to it."""
    torch.manual_seed(0)
    nets = [make_dit("tiny", structure_channels=0).eval().requires_grad_(False) for _ in range(2)]
    with torch.no_grad():
        for weight in nets[0].parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    nets[1].load_state_dict(nets[0].state_dict())
    priors = [DiTPrior(nets[0], resolution=SIDE), DiTPrior(nets[1].to(torch.bfloat16), resolution=SIDE)]
    options = dict(
        sampler=sampler, mask_image=make_mask(make_hole(SIDE, SIDE)), num_inference_steps=2, generator=0,
        output_type="pt",
    )  # fmt: skip
    if sampler == "guidpaint":
        options["clean"] = True
    fine, low = (RestorationPipeline(p)(make_picture(SIDE, SIDE), "inpainting", **options) for p in priors)
    assert low.images.dtype == torch.float32 and not torch.equal(fine.images, low.images)
    assert float((fine.images - low.images).abs().mean()) < 0.03


def test_candidates_of_several_pictures_with_a_parameter_each(pipe):
    """Row k of candidates belongs to its picture: compositions, kernels per sample, one hole for all."""
    pictures = [make_picture(SIDE, SIDE, seed=i) for i in range(2)]
    masks = [make_mask(make_hole(SIDE, SIDE, box)) for box in ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))]
    options = dict(candidates=2, num_inference_steps=2, generator=0, degrade=True, output_type="pt")
    out = pipe(pictures, "inpainting+colourisation", mask_image=masks, **options)
    assert out.images.shape[0] == 4 and out.residual < 1e-4
    assert pipe(pictures, Blur(two_kernels(), (SIDE, SIDE)), **options).residual < 1e-4
    one = torch.zeros(1, 1, SIDE, SIDE)
    one[..., :8] = 1
    assert pipe(pictures, Inpainting(one), **options).residual == 0


def two_kernels():
    wide = kernels.uniform(5)
    narrow = torch.zeros_like(wide)
    narrow[1:4, 1:4] = kernels.uniform(3)
    return torch.stack([narrow, wide])[:, None]


def test_a_hole_on_the_grid_of_its_part(pipe):
    """Pooled first, hidden then: the mask of the picture is brought to the small grid."""
    mask = make_mask(make_hole(SIDE, SIDE, (0.5, 0.0, 1.0, 1.0)))
    out = pipe(make_picture(SIDE, SIDE), "super_resolution:4+inpainting", mask_image=mask, degrade=True, generator=0)
    assert out.residual < 1e-4 and not out.y[..., 4:, :].any() and out.y[..., :4, :].any()


def test_what_lies_under_a_hole_of_y_is_not_read(pipe):
    """y of a composition that ends with a hole, from a file with some pixel everywhere."""
    y = torch.rand(1, 3, SIDE, SIDE) * 2 - 1
    mask, options = make_mask(make_hole(SIDE, SIDE)), dict(num_inference_steps=3, generator=0, output_type="pt")
    hidden = torch.from_numpy(make_hole(SIDE, SIDE))
    results = [
        pipe(torch.where(hidden, value, y), "blur:uniform:3+inpainting", "dps", mask_image=mask, **options).images
        for value in (0.0, 0.7)
    ]
    assert torch.equal(*results)


def test_noise_that_a_method_does_not_know_is_said(pipe):
    with pytest.warns(
        UserWarning, match="'ddnm' takes y as free of noise; ddrm, ddnm_plus, pigdm, diffpir use sigma_y"
    ):
        pipe(Y, "super_resolution:4", sigma_y=0.1, num_inference_steps=2)


def test_only_checking_evaluates_nothing(pipe):
    calls = []
    pipe.prior.__class__ = type("Counted", (GaussianPrior,), {"__call__": lambda self, x_t, t: calls.append(1)})
    assert pipe(Y, "super_resolution:4", check_only=True) is None and not calls
    with pytest.raises(UserError, match="unknown operator"):
        pipe(Y, "blurr", check_only=True)


def test_windows_without_hole_cost_nothing(pipe):
    hole = np.zeros((2 * SIDE, 2 * SIDE), bool)
    hole[2:6, 2:6] = True
    picture = make_picture(2 * SIDE, 2 * SIDE)
    out = pipe(picture, "inpainting", mask_image=make_mask(hole), num_inference_steps=3, generator=0)
    assert out.nfe == 3 and out.residual == 0
    assert (np.asarray(out.images[0]) == np.asarray(picture))[~hole].all()
