"""Scores of pictures in pairs, against scikit-image and against pictures whose score is known by hand."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from coherent_ddrm.metrics import (
    METRICS,
    changed,
    describe,
    l1,
    measurement_error,
    network_of,
    psnr,
    score_pairs,
    seam,
    sharpness,
    ssim,
)
from coherent_ddrm.metrics.sources import FILES
from coherent_ddrm.operators import AveragePooling, Inpainting


def noisy_pair(height: int = 40, width: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (H, W, 3): a smooth picture with noise, and the picture."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    truth = 127 + 90 * np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 9)], axis=2)
    noise = 25 * generator.standard_normal(truth.shape)
    return np.clip(truth + noise, 0, 255).astype(np.uint8), truth.astype(np.uint8)


def tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()


def rectangle(height: int, width: int, rows: slice, columns: slice) -> Tensor:
    hole = torch.zeros(1, 1, height, width, dtype=torch.bool)
    hole[..., rows, columns] = True
    return hole


def skimage_ssim(a: np.ndarray, b: np.ndarray) -> tuple[float, np.ndarray]:
    return structural_similarity(
        a / 255,
        b / 255,
        data_range=1,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )


def test_psnr_ssim_l1_equal_scikit_image():
    x, truth = noisy_pair()
    scores = score_pairs(tensor(x), tensor(truth), rectangle(40, 48, slice(8, 30), slice(10, 48)))
    assert float(scores["psnr"]) == pytest.approx(peak_signal_noise_ratio(truth, x, data_range=255), abs=1e-4)
    assert float(scores["l1"]) == pytest.approx(np.abs(x / 255.0 - truth / 255.0).mean(), abs=1e-6)
    whole, full = skimage_ssim(x, truth)
    assert float(scores["ssim"]) == pytest.approx(whole, abs=1e-5)
    inside = (slice(8, 30), slice(10, 48))
    assert float(scores["psnr_hole"]) == pytest.approx(
        peak_signal_noise_ratio(truth[inside], x[inside], data_range=255), abs=1e-4
    )
    assert float(scores["l1_hole"]) == pytest.approx(np.abs(x[inside] / 255.0 - truth[inside] / 255.0).mean(), abs=1e-6)
    assert float(scores["ssim_hole"]) == pytest.approx(full[8:30, 10:43].mean(), abs=1e-5)


def test_float64_ssim_equals_scikit_image_closely():
    x, truth = noisy_pair()
    a, b = (tensor(v).double() / 255 for v in (x, truth))
    assert float(ssim(a, b)) == pytest.approx(skimage_ssim(x, truth)[0], abs=1e-9)
    assert float(psnr(a, a)) == pytest.approx(100)


def test_a_picture_does_not_depend_on_its_batch():
    x, truth = (tensor(v) for v in noisy_pair())
    hole = rectangle(40, 48, slice(20, 40), slice(0, 48))
    alone = score_pairs(x, truth, hole)
    batch = score_pairs(torch.cat([truth, x]), torch.cat([truth, truth]), torch.cat([hole, hole]))
    for name, value in alone.items():
        assert batch[name].shape == (2,) and describe(name) in METRICS.values(), name
        torch.testing.assert_close(batch[name][1:], value, msg=name)


def test_an_equal_picture_has_the_best_scores():
    _, truth = noisy_pair()
    scores = score_pairs(tensor(truth), tensor(truth), rectangle(40, 48, slice(20, 40), slice(0, 48)))
    best = dict(psnr=100, ssim=1, l1=0, seam=0, sharpness=1, edge_f1=1, changed=0, psnr_hole=100, ssim_hole=1)
    for name, value in best.items():
        assert float(scores[name]) == pytest.approx(value, abs=1e-5), name


def test_without_a_hole_its_scores_are_no_numbers():
    x, truth = (tensor(v) for v in noisy_pair())
    scores = score_pairs(x, truth, torch.zeros(1, 1, 40, 48))
    nan = {name for name, value in scores.items() if value.isnan().any()}
    assert nan == {
        *("psnr_hole", "ssim_hole", "l1_hole", "seam", "sharpness", "surround_agreement", "mirror_agreement")
    }
    corner = rectangle(40, 48, slice(0, 4), slice(0, 4))  # no window of SSIM is centred there
    assert score_pairs(x, truth, corner)["ssim_hole"].isnan().all()


@pytest.mark.parametrize(
    "result, hole",
    [
        (torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.zeros(32, 32)),
        (torch.zeros(1, 1, 32, 32, dtype=torch.uint8), torch.zeros(1, 1, 32, 32)),
    ],
)
def test_other_shapes_and_floats_are_refused(result, hole):
    with pytest.raises(ValueError, match=r"uint8|hole"):
        score_pairs(result, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), hole)


def test_seam_counts_the_step_at_the_border_alone():
    truth = torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    hole = torch.zeros(2, 1, 8, 10)
    hole[0, :, :, 5:] = 1
    pairs = 3 * 8 + 2 * 7  # across and beside the border, and along its two columns
    value = seam(truth + 0.25 * hole, truth, hole)
    torch.testing.assert_close(value[:1], torch.tensor([0.25 * 8 / pairs]))
    assert seam(truth, truth, hole)[0] == 0
    assert value[1].isnan() and seam(truth, truth, torch.ones_like(hole)).isnan().all()  # no border: nothing to praise


def test_a_planted_seam_raises_seam_more_than_the_same_error_far_from_it():
    truth = tensor(noisy_pair()[1])
    hole = rectangle(40, 48, slice(20, 40), slice(0, 48))
    brighter = torch.where(hole, truth.float() * 0.8 + 30, truth.float()) / 255  # a step along the whole border
    deep = truth.float() / 255
    deep[..., 30:, :] = brighter[..., 30:, :]  # the same step, ten rows inside
    truth = truth.float() / 255
    assert float(seam(brighter, truth, hole)) > 0.01
    assert float(seam(deep, truth, hole)) == 0


def test_sharpness_is_the_ratio_of_gradients():
    truth = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    hole = torch.zeros(2, 1, 12, 12)
    hole[..., 4:10, 4:10] = 1
    torch.testing.assert_close(sharpness(truth * 0.5, truth, hole), torch.full((2,), 0.5))
    ramp = torch.arange(12.0).expand(1, 3, 12, 12)
    both = ramp + torch.arange(12.0)[:, None]  # a slope of one both ways: sqrt 2 steep
    torch.testing.assert_close(sharpness(both, ramp, hole[:1]), torch.tensor([2.0**0.5]))
    x = truth.clone()
    x[..., :4, :], x[..., 11:, :], x[..., :4], x[..., 11:] = 0, 0, 0, 0  # differences reach one pixel beyond the hole
    torch.testing.assert_close(sharpness(x, truth, hole), torch.ones(2))


def test_a_flat_truth_has_no_sharpness():
    noise = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    truth = torch.full_like(noise, 255)
    truth[1, :, 8, 8] = 253  # nearly flat
    truth[2] = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    value = score_pairs(noise, truth, torch.ones(3, 1, 16, 16))["sharpness"]
    assert value[:2].isnan().all() and float(value[2]) == pytest.approx(1, abs=0.1)
    ramp = torch.arange(16.0).expand(1, 3, 16, 16) / 255
    hole = torch.ones(1, 1, 16, 16)
    assert sharpness(ramp, 0.9 * ramp, hole).isnan() and sharpness(ramp, 1.1 * ramp, hole).isfinite()


def test_changed_counts_values_of_known_pixels():
    _, truth = noisy_pair()
    result, hole = tensor(truth).clone(), rectangle(40, 48, slice(20, 40), slice(0, 48))
    result[..., 25, :] ^= 1
    assert int(changed(result, tensor(truth), hole)) == 0
    result[0, 1, 3, 4] ^= 1
    result[0, :, 7, 8] ^= 255
    assert int(changed(result, tensor(truth), hole)) == 4


def test_measurement_error_is_the_largest_one():
    x = tensor(noisy_pair()[1]).repeat(2, 1, 1, 1)
    hole = rectangle(40, 48, slice(20, 40), slice(0, 48)).repeat(2, 1, 1, 1)
    operator = Inpainting(hole)
    y = operator.A(x.double() / 127.5 - 1)
    x[0, 2, 4, 5] += 3
    x[:, 0, 30, 5] += 9  # in the hole: not measured
    torch.testing.assert_close(measurement_error(x, y, operator), torch.tensor([3 / 127.5, 0]).double())
    pooled = AveragePooling(4)
    y = pooled.A(x.double() / 127.5 - 1)
    x[1, 0, 9, 9] -= 8
    expected = torch.tensor([0, 8 / 127.5 / 16]).double()
    torch.testing.assert_close(measurement_error(x, y, pooled), expected, atol=1e-8, rtol=0)


def test_names_of_scores():
    assert network_of("psnr_hole") is None and network_of("kid") == "inception"
    assert network_of("pd-clothing_hole") == "clothing" and network_of("lpips_vgg_hole") == "lpips_vgg"
    assert describe("fid_infinity-clothing").better == "lower" and describe("psnr_hole").unit == "dB"
    for wrong in ("fid_hole", "psnr-clothing", "pd", "fid-", "nothing", "seam_hole"):
        with pytest.raises(ValueError, match="unknown score"):
            describe(wrong)


def test_l1_of_a_part():
    x, truth = (tensor(v).float() / 255 for v in noisy_pair())
    where = rectangle(40, 48, slice(0, 10), slice(0, 48))
    torch.testing.assert_close(l1(x, truth, where), (x - truth)[..., :10, :].abs().mean()[None])


def test_the_page_tells_which_way_is_better():
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    words = {"higher": "higher", "lower": "lower", "1": "one", "the truth's": "truth", "none": "none"}
    rows = [line.strip("|").split("|") for line in page.replace(r"\|", "").splitlines() if line.startswith("| `")]
    told = {}
    for cells in (row for row in rows if len(row) == 4):
        for name in re.findall(r"`([a-z0-9_-]+)(?:-NETWORK)?`", cells[0]):
            told[name] = words[cells[3].strip()]
    assert {name: way for name, way in told.items() if name in METRICS} == {n: m.better for n, m in METRICS.items()}


def test_the_page_tells_every_score_and_file():
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text()
    for name in METRICS:
        assert f"`{name}" in page, name
    for url in FILES.values():
        assert f"`{url.rpartition('/')[2]}`" in page
