"""Operators: adjoint, pseudo-inverse, spectral form by their definitions, against dense matrices and known answers."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from coherent_ddrm.operators import (
    JPEG,
    OPERATORS,
    AveragePooling,
    Bicubic,
    Blur,
    Clipping,
    Colourisation,
    Composition,
    CompressedSensing,
    Denoising,
    Inpainting,
    LinearOperator,
    Observation,
    Operator,
    Quantisation,
    SpectralOperator,
    kernels,
    make_operator,
    size_from_y,
)
from coherent_ddrm.operators.composition import least_squares
from coherent_ddrm.operators.transforms import dct, hartley, idct, walsh_hadamard


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def hole(batch, size, seed=5):
    return (noise(batch, 1, *size, seed=seed) > 0.3).float()


SPECTRAL = {
    "inpainting": lambda size: Inpainting(hole(2, size)),
    "average pooling 2": lambda size: AveragePooling(2),
    "average pooling 4": lambda size: AveragePooling(4),
    "bicubic 2": lambda size: Bicubic(2, size),
    "bicubic 4": lambda size: Bicubic(4, size),
    "colourisation": lambda size: Colourisation((0.299, 0.587, 0.114)),
    "colourisation, a weight 0": lambda size: Colourisation((1.0, -0.5, 0.0)),
    "blur gaussian": lambda size: Blur(kernels.gaussian(1.5), size),
    "blur motion": lambda size: Blur(kernels.motion(7, 30), size),
    "blur uniform": lambda size: Blur(kernels.uniform(5), size),
    "blur per sample": lambda size: Blur(noise(2, 1, 4, 7), size),
    "blur beyond the picture": lambda size: Blur(kernels.anisotropic(9, 1, 20), size),
    "compressed sensing 2.5": lambda size: CompressedSensing(2.5, size),
    "compressed sensing 20": lambda size: CompressedSensing(20, size, seed=3),
    "denoising": lambda size: Denoising(),
}
COMPOSED = {
    "pool of a blur": lambda size: Composition(AveragePooling(2), Blur(kernels.motion(3, 40), size)),
    "hole in a reduced grey picture": lambda size: Composition(
        Inpainting(hole(2, (size[0] // 2, size[1] // 2))), Bicubic(2, size), Colourisation()
    ),
}
SIZES = [(16, 16), (8, 32), (24, 12)]


def cases(*tables):
    return [
        pytest.param(make, size, id=f"{name}-{size[0]}x{size[1]}")
        for table in tables
        for name, make in table.items()
        for size in SIZES
        if not (name.startswith("compressed") and size == (24, 12))
    ]


every_linear = pytest.mark.parametrize("make, size", cases(SPECTRAL, COMPOSED))
every_spectral = pytest.mark.parametrize("make, size", cases(SPECTRAL))


def close(a, b, atol=1e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# The identities, in double precision; what operators hold is fp32, so 1e-6.


@every_linear
def test_adjoint(make, size):
    operator, x = make(size), noise(2, 3, *size)
    y = noise(*operator.A(x).shape, seed=1)
    assert operator.At(y).shape == x.shape
    close((operator.A(x) * y).sum(), (x * operator.At(y)).sum(), 1e-5)


@every_linear
def test_linear_and_each_sample_on_its_own(make, size):
    operator, x, other = make(size), noise(2, 3, *size), noise(2, 3, *size, seed=1)
    close(operator.A(2 * x - other), 2 * operator.A(x) - operator.A(other))
    x_0 = torch.stack([x[0], torch.zeros_like(x[0])])
    assert torch.equal(operator.A(x_0)[0], operator.A(x)[0]) and not operator.A(x_0)[1].any()


@every_linear
def test_pseudo_inverse_is_penrose(make, size):
    """All four conditions: A A⁺ A = A, A⁺ A A⁺ = A⁺, and A A⁺ and A⁺ A symmetric."""
    operator, x = make(size), noise(2, 3, *size)
    A, pinv = operator.A, operator.pinv
    y = noise(*A(x).shape, seed=1)
    scale = float(pinv(y).abs().max())
    close(A(pinv(A(x))), A(x), 1e-5)
    close(pinv(A(pinv(y))), pinv(y), 1e-5 * max(scale, 1))
    x_2, y_2 = noise(2, 3, *size, seed=2), noise(*y.shape, seed=3)
    close((A(pinv(y)) * y_2).sum(), (y * A(pinv(y_2))).sum(), 1e-4)
    close((pinv(A(x)) * x_2).sum(), (x * pinv(A(x_2))).sum(), 1e-4)


@every_linear
def test_projection(make, size):
    """It satisfies the measurement, does nothing twice, and leaves the null space alone."""
    operator, x, truth = make(size), noise(2, 3, *size), noise(2, 3, *size, seed=1)
    y = operator.A(truth)
    projected = operator.project(x, y)
    close(operator.A(projected), y, 1e-5)
    close(operator.project(projected, y), projected, 1e-4)
    close(projected - operator.pinv(operator.A(projected)), x - operator.pinv(operator.A(x)), 1e-4)


@every_linear
def test_gradients(make, size):
    """The vector-Jacobian product of A is At, that of A⁺ is (A⁺)ᵀ."""
    operator, x = make(size), noise(2, 3, *size).requires_grad_()
    y = operator.A(x)
    v = noise(*y.shape, seed=1)
    (gradient,) = torch.autograd.grad(y, x, v)
    close(gradient, operator.At(v), 1e-5)
    y = y.detach().requires_grad_()
    w = noise(2, 3, *size, seed=2)
    (gradient,) = torch.autograd.grad(operator.pinv(y), y, w)
    close((gradient * v).sum(), (w * operator.pinv(v)).sum(), 1e-3)


@every_linear
def test_single_precision(make, size):
    """What samplers run: A A⁺ A = A far below half an 8-bit level (4e-3)."""
    operator, x = make(size), noise(2, 3, *size).float().clamp(-1, 1)
    y = operator.A(x)
    assert y.dtype == operator.At(y).dtype == operator.pinv(y).dtype == operator.project(x, y).dtype == torch.float32
    close(operator.A(operator.pinv(y)), y, 2e-5)


@every_spectral
def test_spectral_form_is_the_forward_form(make, size):
    operator, x = make(size), noise(2, 3, *size)
    y, S = operator.A(x), operator.S
    c = noise(*y.shape, seed=1)
    assert S.dtype == torch.float32 and bool((S >= 0).all())
    assert torch.broadcast_shapes(S.shape, y.shape) == y.shape
    close(operator.U(S * operator.Vt(x)), y)
    close(operator.V(S * operator.Ut(c)), operator.At(c))
    close(operator.Vt(operator.replace(x, c)), operator.Vt(operator.V(c)))
    close(operator.replace(x, operator.Vt(x)), x)


@every_spectral
def test_u_is_orthogonal_and_v_has_orthonormal_columns(make, size):
    operator, x = make(size), noise(2, 3, *size)
    c, d = noise(*operator.A(x).shape, seed=1), noise(*operator.A(x).shape, seed=2)
    close(operator.Ut(operator.U(c)), c)
    close(operator.U(operator.Ut(c)), c)
    close((operator.U(c) * d).sum(), (c * operator.Ut(d)).sum(), 1e-5)
    close(operator.Vt(operator.V(c)), c * (operator.S > 0), 1e-5)
    close((operator.V(c) * x).sum(), (c * operator.Vt(x)).sum(), 1e-4)


DENSE = {
    **{name: make for name, make in SPECTRAL.items() if "per sample" not in name and name != "inpainting"},
    "inpainting": lambda size: Inpainting(hole(1, size)),
    "blur with an even kernel": lambda size: Blur(noise(4, 6), size, cutoff=0.2),
    "blur, nothing cut": lambda size: Blur(torch.tensor([[0.1, 0.7, 0.2]]), size, cutoff=0),
}


def dense(operator, shape):
    """The matrix of A, from unit vectors."""
    unit = torch.eye(int(np.prod(shape)), dtype=torch.float64).reshape(-1, *shape)
    return torch.cat([operator.A(x[None]).flatten()[:, None] for x in unit], 1)


@pytest.mark.parametrize("size", [(8, 8), (4, 16)])
@pytest.mark.parametrize("name", DENSE)
def test_against_the_dense_matrix(name, size):
    operator, shape = DENSE[name](size), (3 if "colour" in name else 1, *size)
    matrix = dense(operator, shape)
    y = operator.A(noise(1, *shape))
    singular = operator.S.double().expand(y.shape).flatten().sort(descending=True).values
    close(singular, torch.linalg.svdvals(matrix), 1e-6)
    pinv = torch.linalg.pinv(matrix, rtol=1e-5)
    v = noise(*y.shape, seed=1)
    close(operator.pinv(v).flatten(), pinv @ v.flatten(), 1e-5 * float(pinv.norm()))


# Known answers


def test_transforms_against_their_matrices():
    n, k = torch.arange(8.0, dtype=torch.float64), torch.arange(8.0, dtype=torch.float64)[:, None]
    cosine = torch.cos(torch.pi * (2 * n + 1) * k / 16) / torch.where(k == 0, 8, 4).double().sqrt()
    x = noise(3, 8)
    close(dct(x), x @ cosine.T, 1e-12)
    close(idct(dct(x)), x, 1e-12)
    close(idct(x), x @ cosine, 1e-12)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(3):
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    close(walsh_hadamard(x), x @ hadamard / 8**0.5, 1e-12)
    angle = 2 * torch.pi * (n[:, None, None, None] * n[:, None] / 8 + n[None, :6, None, None] * n[:6] / 6)
    picture = noise(8, 6)
    close(hartley(picture), ((angle.cos() + angle.sin()) * picture).sum((-2, -1)) / 48**0.5, 1e-12)
    close(hartley(hartley(picture)), picture, 1e-12)


def test_average_pooling_is_the_mean_of_blocks():
    x = noise(2, 3, 12, 6)
    close(AveragePooling(3).A(x), x.reshape(2, 3, 4, 3, 2, 3).mean((3, 5)), 1e-12)


@pytest.mark.parametrize("factor", [2, 3, 4, 5, 8, 16])
def test_bicubic_is_that_of_torch_and_pil(factor):
    size = (6 * factor, 9 * factor)
    x = noise(1, 1, *size).clamp(-1, 1)
    y = Bicubic(factor, size).A(x)
    inner = (..., slice(2, -2), slice(2, -2))
    close(y[inner], F.interpolate(x, scale_factor=1 / factor, mode="bicubic", antialias=True)[inner])
    pil = Image.fromarray(x[0, 0].float().numpy()).resize((9, 6), Image.BICUBIC)
    close(y[0, 0][inner], torch.from_numpy(np.array(pil)).double()[inner])


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_bicubic_does_not_mix_opposite_edges(factor):
    size = (6 * factor, 9 * factor)
    smooth = F.interpolate(noise(1, 3, 5, 5).clamp(-1, 1), size=size, mode="bilinear")
    reference = F.interpolate(smooth, scale_factor=1 / factor, mode="bicubic", antialias=True)
    assert float((Bicubic(factor, size).A(smooth) - reference).abs().max()) < 0.06
    one_edge = torch.zeros(1, 1, *size)
    one_edge[..., 0] = 1
    assert not Bicubic(factor, size).A(one_edge)[..., -2:].abs().gt(1e-6).any()


@pytest.mark.parametrize("shape", [(3, 5), (4, 2), (9, 20)])
def test_blur_is_the_circular_convolution(shape):
    kernel, x = noise(*shape, seed=1), noise(2, 3, 8, 12)
    direct = sum(
        kernel[i, j] * x.roll((i - shape[0] // 2, j - shape[1] // 2), (-2, -1))
        for i in range(shape[0])
        for j in range(shape[1])
    )
    close(Blur(kernel, (8, 12), cutoff=0).A(x), direct, 1e-5)


def test_blur_cuts_its_own_spectrum():
    """Off the full convolution by at most the cut-off, and the spectral form knows it."""
    kernel, x = kernels.uniform(9), noise(1, 1, 32, 36)
    cut, full = Blur(kernel, (32, 36)), Blur(kernel, (32, 36), cutoff=0)
    assert int((cut.S == 0).sum()) > 400 and float(cut.S[cut.S > 0].min()) >= 3e-2 and float(cut.S.max()) <= 1 + 1e-6
    error = (cut.A(x) - full.A(x)).norm()
    assert 0 < float(error) < 3e-2 * float(x.norm())
    assert float(cut.pinv(full.A(x)).norm()) < 1.01 * float(x.norm()) < float(full.pinv(full.A(x)).norm()) * 1.5


def test_blur_takes_a_kernel_per_sample():
    pair, x = torch.stack([kernels.uniform(5), 0.01 * kernels.gaussian(1, 5)])[:, None], noise(2, 3, 16, 12)
    both = Blur(pair, (16, 12))
    for b in range(2):
        close(both.A(x)[b], Blur(pair[b, 0], (16, 12)).A(x)[b], 1e-12)
        close(both.pinv(x)[b], Blur(pair[b, 0], (16, 12)).pinv(x)[b], 1e-9)


def test_colourisation_is_a_weighted_sum():
    x = noise(2, 3, 4, 6)
    close(Colourisation().A(x), x.mean(1, keepdim=True))
    assert float(Colourisation().S) == pytest.approx(3**-0.5)


def test_compressed_sensing_keeps_what_its_seed_says():
    x, size = noise(1, 2, 16, 32), (16, 32)
    first, again, other = (CompressedSensing(4, size, seed).A(x) for seed in (0, torch.Generator().manual_seed(0), 1))
    assert first.shape == (1, 2, 128) and torch.equal(first, again) and not torch.equal(first, other)
    assert CompressedSensing(20, size).A(x).shape[-1] == round(512 / 20)
    constant = CompressedSensing(4, size).A(torch.ones(1, 1, *size)).square()  # its energy is spread over all rows
    assert float(constant.sum()) == pytest.approx(128, rel=0.4) and float(constant.max()) < 20


def test_inpainting_and_denoising_keep_what_is_known_to_the_bit():
    x, y = noise(2, 3, 8, 8).float(), noise(2, 3, 8, 8, seed=1).float()
    operator = Inpainting(hole(2, (8, 8)))
    projected = operator.project(x, operator.A(y))
    assert torch.equal(operator.A(projected), operator.A(y))
    assert torch.equal(projected - operator.A(projected), x - operator.A(x))
    assert torch.equal(Denoising().project(x, y), y)


def test_only_y_is_known():
    """Nothing but y and a spec: the size follows, and the smallest picture that agrees with y is found."""
    y = noise(1, 3, 6, 8).clamp(-1, 1)
    spec = "bicubic:4"
    observation = Observation(y, make_operator(spec, size_from_y(spec, y.shape)))
    x = observation.operator.project(torch.zeros(1, 3, 24, 32, dtype=torch.float64), observation.y)
    close(observation.operator.A(x), y)


# Compositions


def test_composition_has_the_true_pseudo_inverse():
    """Against the dense one, where the product of the parts' pseudo-inverses is far off; rank-deficient, too."""
    size = (8, 8)
    blur, pool = Blur(kernels.motion(3, 40), size), AveragePooling(2)
    composition = Composition(pool, blur)
    matrix = dense(composition, (1, *size))
    y = noise(1, 1, 4, 4)
    true = (torch.linalg.pinv(matrix) @ y.flatten()).reshape(1, 1, *size)
    close(composition.pinv(y), true, 1e-5)
    assert float((blur.pinv(pool.pinv(y)) - true).norm() / true.norm()) > 0.1
    deficient = Composition(Colourisation((1.0,)), Inpainting(hole(1, size)), Denoising(), Inpainting(hole(1, size, 6)))
    matrix = dense(deficient, (1, *size))
    y = noise(1, 1, *size)  # not in the range of A
    close(deficient.pinv(y).flatten(), torch.linalg.pinv(matrix) @ y.flatten(), 1e-5)


def test_composition_does_not_depend_on_the_batch():
    composition = make_operator("blur:gaussian:1+super_resolution:2", (16, 16))
    y = noise(3, 3, 8, 8).float() * torch.tensor([1.0, 1e-3, 0.0]).reshape(3, 1, 1, 1)
    together = composition.pinv(y)
    for b in range(3):
        torch.testing.assert_close(composition.pinv(y[b : b + 1])[0], together[b], rtol=1e-6, atol=0)
    assert not together[2].any()


def test_least_squares_stops_when_told_and_shows_nan():
    calls = []

    def A(x):
        calls.append(1)
        return 2 * x

    y = noise(2, 3, 4, 4)
    close(least_squares(A, lambda y: 2 * y, y, 1e-6, 100), y / 2, 1e-12)
    assert len(calls) <= 8
    y[1, 0, 0, 0] = torch.nan
    x = least_squares(A, lambda y: 2 * y, y, 1e-6, 20)
    close(x[0], y[0] / 2, 1e-12)
    assert x[1].isnan().any() and least_squares(A, lambda y: 2 * y, y[1:], 1e-6, 20).isnan().any()


def test_a_chain_applies_its_parts_in_turn():
    x = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    chain = make_operator("blur:uniform:3+super_resolution:2+clipping:3+quantisation:4", (32, 64))
    expected = Clipping(3).A(AveragePooling(2).A(Blur(kernels.uniform(3), (32, 64)).A(x)))
    assert torch.equal(chain.to("cpu").A(x), Quantisation(4).A(expected)) and not isinstance(chain, LinearOperator)
    assert size_from_y("blur:uniform:3+super_resolution:2+jpeg:10", (1, 3, 16, 32)) == (32, 64)


def test_composition_refuses_what_is_not_linear():
    with pytest.raises(ValueError, match="JPEG is not linear"):
        Composition(JPEG(50), AveragePooling(2))
    with pytest.raises(ValueError, match="no parts"):
        Composition()


# Not linear


def test_jpeg_is_near_a_real_codec():
    """Its error to the codec's picture is a fraction of what the codec itself does to the picture."""
    smooth = F.interpolate(0.4 * noise(1, 3, 4, 6).float(), size=(64, 96), mode="bicubic").clamp(-1, 1)
    pixels = ((smooth[0] + 1) * 127.5).round().byte()
    x = pixels / 127.5 - 1
    for quality in (5, 10):
        file = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        real = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 127.5 - 1
        y = JPEG(quality).A(x[None])[0]
        assert float((y - real).abs().mean()) < 0.3 * float((x - real).abs().mean())


def test_jpeg_has_a_quality_per_sample_and_a_gradient():
    x = (
        F.interpolate(0.4 * noise(1, 3, 4, 6).float(), size=(16, 24), mode="bicubic")
        .repeat(2, 1, 1, 1)
        .requires_grad_()
    )
    y = JPEG(torch.tensor([5.0, 95.0])).A(x)
    error = (y - x).detach().square().mean((1, 2, 3))
    assert float(error[0]) > 3 * float(error[1])
    torch.testing.assert_close(y[1:], JPEG(95).A(x[1:]))
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0.1


def test_clipping_clips():
    x = torch.tensor([-1.0, -0.2, 0.0, 0.3, 0.8]).reshape(1, 1, 1, 5).expand(2, -1, -1, -1).clone().requires_grad_()
    y = Clipping(torch.tensor([2.0, 1.0])).A(x)
    torch.testing.assert_close(y[0].flatten(), torch.tensor([-1.0, -0.4, 0.0, 0.6, 1.0]))
    torch.testing.assert_close(y[1], x[1])
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient[0].flatten().tolist() == [0, 2, 2, 2, 0]


def test_quantisation_rounds_and_lets_gradients_pass():
    x = (noise(2, 3, 32, 32).float() * 0.5).requires_grad_()
    y = Quantisation(torch.tensor([2, 5])).A(x)
    assert y[0].unique().tolist() == [-1, 1] and y[1].unique().tolist() == [-1, -0.5, 0, 0.5, 1]
    assert torch.equal(Quantisation(5).A(y[1:]), y[1:])
    assert float((y[1] - x[1].clamp(-1, 1)).detach().abs().max()) <= 0.25 + 1e-6
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, (x.abs() <= 1).float())


# Kernels


def test_kernels_sum_to_one_and_are_centred():
    for kernel in (kernels.gaussian(1.3), kernels.anisotropic(3, 1, 70, 9), kernels.motion(6, 20), kernels.uniform(7)):
        assert float(kernel.sum()) == pytest.approx(1, abs=1e-6) and float(kernel.min()) >= 0
        close(kernel, kernel.flip(0, 1))
        assert kernel.shape[0] % 2 == kernel.shape[1] % 2 == 1


def spread(kernel, axis):
    """Standard deviation along an axis."""
    n = kernel.shape[axis]
    return float((kernel.double().sum(1 - axis) * (torch.arange(n) - n // 2) ** 2).sum() ** 0.5)


def test_kernels_have_their_shape():
    assert spread(kernels.gaussian(2), 0) == pytest.approx(2, rel=0.02)
    wide = kernels.anisotropic(4, 1, 0)
    assert (spread(wide, 1), spread(wide, 0)) == pytest.approx((4, 1), rel=0.02)
    close(kernels.anisotropic(4, 1, 90), wide.mT)
    assert kernels.gaussian(10, 5).shape == (5, 5)
    line = kernels.motion(9, 0)
    close(line[line.shape[0] // 2, 1:-1], torch.full((9,), 1 / 9))
    close(kernels.motion(9, 90), line.mT)
    assert spread(kernels.motion(8, 0), 1) == pytest.approx(8 / 12**0.5, rel=0.03)
    rising = kernels.motion(9, 45)  # bottom left to top right
    middle = len(rising) // 2
    assert rising[middle - 2, middle + 2] > 0.05 and rising[middle - 2, middle - 2] == 0
    assert torch.equal(kernels.uniform(3), torch.full((3, 3), 1 / 9))


# By name, wrong use, devices


@pytest.mark.parametrize("name", OPERATORS)
def test_every_name_makes_an_operator(name):
    size, x = (32, 64), noise(1, 3, 32, 64).float().clamp(-1, 1)
    operator = make_operator(name, size, hole=hole(1, size) if name == "inpainting" else None)
    assert isinstance(operator, Operator) and operator.A(x).isfinite().all() and OPERATORS[name].help
    if name != "compressed_sensing":
        assert size_from_y(name, operator.A(x).shape) == size
    assert isinstance(operator, LinearOperator) is ("not linear" not in OPERATORS[name].help)


def test_specs_are_read():
    assert make_operator("super_resolution:8", (16, 32)).factor == 8
    close(make_operator("blur:gaussian:10:5", (16, 32)).S, Blur(kernels.gaussian(10, 5), (16, 32)).S)
    close(make_operator("blur:motion:7:45", (16, 32)).S, Blur(kernels.motion(7, 45), (16, 32)).S)
    close(make_operator("blur:anisotropic:3:1:-20:9", (9, 8)).S, Blur(kernels.anisotropic(3, 1, -20, 9), (9, 8)).S)
    assert float(make_operator("jpeg:30", (8, 8)).quality) == 30
    x = noise(1, 3, 16, 32)
    chain = make_operator("blur:uniform:3+super_resolution:2+inpainting", (16, 32), hole=hole(1, (8, 16)))
    by_hand = Inpainting(hole(1, (8, 16))).A(AveragePooling(2).A(Blur(kernels.uniform(3), (16, 32)).A(x)))
    close(chain.A(x), by_hand, 1e-12)
    assert size_from_y("blur:uniform:3+super_resolution:2+bicubic:4", (1, 3, 5, 6)) == (40, 48)
    seeds = [make_operator("compressed_sensing:4", (8, 8), seed=seed).A(noise(1, 1, 8, 8)) for seed in (0, 1)]
    assert not torch.equal(*seeds)


BAD_SPECS = {
    "sharpen:3": "unknown operator 'sharpen'.*choose one of inpainting, super_resolution",
    "blur": "unknown operator 'blur'.*blur:gaussian",
    "blur:box:3": "unknown operator 'blur:box'",
    "super_resolution:4.5": "factor of super_resolution is '4.5'; a whole number",
    "super_resolution:17": "factor is 17; a whole number from 2 to 16",
    "super_resolution:0": "factor is 0; a whole number from 2 to 16",
    "super_resolution:5": "32 x 64; both sides must be multiples of the factor 5",
    "super_resolution:2+bicubic:10": "16 x 32; both sides must be multiples of the factor 10",
    "bicubic:x": "factor of bicubic is 'x'",
    "denoising:1": "'denoising:1' has 1 arguments; denoising is all",
    "blur:uniform:4": "side is 4; an odd",
    "blur:gaussian:-1": "sigma_x is -1.0; .* above 0",
    "blur:gaussian:1000000": "at most|up to 1023",
    "blur:motion:nan:0": "length is nan",
    "compressed_sensing:50": "ratio is 50.0; a number from 2",
    "compressed_sensing:4+super_resolution:2": "put it last",
    "jpeg:0": r"quality is \[0.0\]; numbers from 1 to 100",
    "clipping:-1": "gain is",
    "quantisation:1": "levels is",
    "inpainting": "inpainting needs a hole",
    "": "unknown operator ''",
}


@pytest.mark.parametrize("spec", BAD_SPECS)
def test_bad_specs_name_the_value_and_the_rule(spec):
    with pytest.raises(ValueError, match=BAD_SPECS[spec]):
        make_operator(spec, (32, 64))


def test_wrong_use_is_refused():
    x = torch.zeros(1, 3, 12, 16)
    with pytest.raises(ValueError, match="12 x 16; both sides must be multiples of the factor 8"):
        AveragePooling(8).A(x)
    for operator in (Bicubic(4, (16, 16)), Blur(kernels.uniform(3), (16, 16)), CompressedSensing(4, (16, 16))):
        with pytest.raises(ValueError, match="12 x 16, its operator was made for 16 x 16"):
            operator.A(x)
    with pytest.raises(ValueError, match=r"12 x 16, 192 pixels; .* power of two"):
        CompressedSensing(4, (12, 16))
    with pytest.raises(ValueError, match="3 channels, there are 2 weights"):
        Colourisation((0.5, 0.5)).A(x)
    with pytest.raises(ValueError, match="not all 0"):
        Colourisation((0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"\(3, 3, 3\)"):
        Blur(torch.ones(3, 3, 3), (16, 16))
    with pytest.raises(ValueError, match="all 0 or not finite"):
        Blur(torch.full((3, 3), torch.nan), (16, 16))
    with pytest.raises(ValueError, match="cutoff is 1"):
        Blur(torch.ones(3, 3), (16, 16), cutoff=1)
    with pytest.raises(ValueError, match=r"levels is 2\.5"):
        Quantisation(2.5)
    with pytest.raises(ValueError, match=r"the hole is 12 x 16, .* 6 x 8"):
        make_operator("super_resolution:2+inpainting", (12, 16), hole=torch.ones(1, 1, 12, 16))
    with pytest.raises(ValueError, match="no use for it"):
        make_operator("denoising", (12, 16), hole=torch.ones(1, 1, 12, 16))
    with pytest.raises(ValueError, match="is no picture"):
        size_from_y("compressed_sensing:4", (1, 3, 64))


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("name", [*SPECTRAL, "clipping", "quantisation"])
def test_an_operator_follows_its_input_to_another_device(name, moved):
    """On the meta device, which refuses to mix with tensors of the CPU, as a GPU does."""
    operator = SPECTRAL[name]((8, 16)) if name in SPECTRAL else make_operator(name, (8, 16))
    if moved:
        assert operator.to("meta") is operator
    x = torch.zeros(2, 3, 8, 16, device="meta")
    y = operator.A(x)
    if isinstance(operator, SpectralOperator):
        assert operator.At(y).shape == operator.pinv(y).shape == operator.project(x, y).shape == x.shape
        assert operator.V(operator.Vt(x)).device.type == "meta"


@pytest.mark.gpu
def test_the_same_on_a_gpu():
    size = (16, 16)
    for make in [*SPECTRAL.values(), *COMPOSED.values()]:
        operator, x = make(size), noise(2, 3, *size).float()
        here, there = operator.pinv(operator.A(x)), operator.pinv(operator.A(x.cuda()))
        close(there.cpu(), here, 1e-4)
        close(operator.to("cuda").pinv(operator.A(x.cuda())), there, 1e-5)
