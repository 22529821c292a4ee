"""Distances of sets: FID against closed forms, scipy and torchmetrics; KID against torchmetrics; SVM scores."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from coherent_ddrm.errors import UserError
from coherent_ddrm.metrics import discriminative_scores, fid, fid_infinity, kid, score_sets
from coherent_ddrm.metrics.kernel import Kid


def normal(count: int, dimensions: int, seed: int) -> Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(count: int, dimensions: int, seed: int) -> Tensor:
    """Vectors whose mean is 0 and whose covariance is the identity, exactly."""
    x = normal(count, dimensions, seed)
    x = x - x.mean(dim=0)
    factor = torch.linalg.cholesky(torch.cov(x.T))
    return torch.linalg.solve_triangular(factor, x.T, upper=False).T


def scipy_fid(a: Tensor, b: Tensor) -> float:
    s1, s2 = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
    root = scipy.linalg.sqrtm(s1 @ s2).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + s1.trace() + s2.trace() - 2 * root.trace())


def test_fid_of_gaussians_in_closed_form():
    s, r = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 1.0, 0.5]).double()
    shift = torch.tensor([0.3, -1.0, 2.0]).double()
    real, fake = whitened(50, 3, 0) * s, whitened(70, 3, 1) * r + shift
    assert fid(real, fake) == pytest.approx(float((shift**2).sum() + ((s - r) ** 2).sum()), abs=1e-10)


def test_fid_equals_scipys_and_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Same(nn.Module):
        num_features = 16

        def forward(self, x: Tensor) -> Tensor:
            return x

    real, fake = normal(200, 16, 0) @ normal(16, 16, 2), normal(150, 16, 1) @ normal(16, 16, 3) + 0.2
    assert fid(real, fake) == pytest.approx(scipy_fid(real, fake), rel=1e-9)
    theirs = FrechetInceptionDistance(feature=Same()).set_dtype(torch.float64)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    assert fid(real, fake) == pytest.approx(float(theirs.compute()), rel=1e-6)
    assert fid(real.float(), fake.float()) == pytest.approx(fid(real, fake), rel=1e-5)


def test_fid_of_singular_covariances_is_exact():
    basis = torch.linalg.qr(normal(60, 5, 4)).Q  # (60, 5)
    real, fake = normal(40, 5, 0), 2 * normal(30, 5, 1)
    assert fid(real @ basis.T, fake @ basis.T) == pytest.approx(fid(real, fake), abs=1e-9)
    few = normal(10, 60, 2)
    assert fid(few, few) == pytest.approx(0, abs=1e-9)
    u, v = torch.tensor([3.0, 0, 0, 0]).double(), torch.tensor([2.0, 2.0, 0, 0]).double()
    lines = torch.stack([u, -u]), torch.stack([v, -v])  # covariances 2 uuᵀ and 2 vvᵀ, of rank one
    assert fid(*lines) == pytest.approx(2 * (9 + 8 - 2 * abs(float(u @ v))), abs=1e-10)


def test_fid_infinity_takes_the_bias_out():
    real, fake = normal(600, 64, 0), normal(600, 64, 1)
    biased, (value, spread, (least, most)) = fid(real, fake), fid_infinity(real, fake)
    assert biased > 2 and abs(value) < 0.15 * biased and 0 < spread < 1 and (least, most) == (150, 600)
    shifted = fake + 0.5  # 64 x 0.25
    assert fid_infinity(real, shifted).value == pytest.approx(16, abs=1.5)
    assert fid(real, shifted) > 18
    assert fid_infinity(real, fake) == fid_infinity(real, fake)
    with pytest.raises(UserError, match="127 and 600 pictures: this distance needs 128"):
        fid_infinity(real[:127], fake)  # 2 of each of 64 dimensions
    assert fid_infinity(real, real, paired=True).value == pytest.approx(0, abs=1e-9)
    assert fid_infinity(real, real).value < -0.1


@pytest.mark.filterwarnings("ignore:Metric `Kernel")
def test_kid_equals_torchmetrics_on_the_same_subsets():
    from torchmetrics.image.kid import KernelInceptionDistance

    real, fake = normal(90, 12, 0), 1.2 * normal(80, 12, 1) + 0.1
    ours = kid(real, fake, subsets=20, seed=3)
    theirs = KernelInceptionDistance(feature=nn.Identity(), subsets=20, subset_size=40)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        mean, std = theirs.compute()
    assert ours == Kid(pytest.approx(float(mean), rel=1e-9), pytest.approx(float(std), rel=1e-9), 40)
    torch.randn(7)
    assert kid(real, fake, subsets=20, seed=3) == ours  # no ambient randomness
    with pytest.raises(UserError):
        kid(real[:3], fake)


def test_kid_of_pairs_is_that_of_strangers():
    """Results that are their own truths: 0, where subsets that hold pairs give far less."""
    real = normal(100, 8, 0)
    assert kid(real, real).value < -4 * abs(kid(real, real, paired=True).value) < 0.0
    values = [kid(normal(100, 8, i), normal(100, 8, i) + 0.4, paired=True).value for i in range(8)]
    strangers = [kid(normal(100, 8, i), normal(100, 8, 50 + i) + 0.4).value for i in range(8)]
    assert np.mean(values) == pytest.approx(np.mean(strangers), rel=0.25) and np.mean(strangers) > 0.1
    with pytest.raises(ValueError, match="no pairs"):
        kid(real, real[:90], paired=True)


def test_kid_is_the_unbiased_discrepancy():
    real, fake = normal(60, 5, 0), 1.5 * normal(60, 5, 1)
    kernel = lambda a, b: (a @ b.T / 5 + 1) ** 3  # noqa: E731
    off = lambda k: (k.sum() - k.trace()) / (60 * 59)  # noqa: E731
    exact = off(kernel(real, real)) + off(kernel(fake, fake)) - 2 * kernel(real, fake).mean()
    assert kid(real, fake, subsets=2000).value == pytest.approx(float(exact), rel=0.03)


def phi(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("distance", [0.0, 1.5])
def test_svm_scores_of_two_gaussians(distance):
    """Two unit Gaussians this far apart: the best line errs with Φ(-δ / 2), an unpaired result wins with Φ(-δ / √2)."""
    real, fake = normal(10_000, 3, 0), normal(10_000, 3, 1)
    fake[:, 0] += distance
    p_ids, u_ids = discriminative_scores(real, fake)
    assert u_ids == pytest.approx(phi(-distance / 2), abs=0.012)
    assert p_ids == pytest.approx(phi(-distance / math.sqrt(2)), abs=0.02)


def test_p_ids_is_of_pairs():
    """A result a hair less real than its own truth never wins its pair, though U-IDS sees no difference."""
    real = normal(10_000, 3, 0)
    fake = real - torch.tensor([0.02, 0, 0]).double()
    p_ids, u_ids = discriminative_scores(real, fake)
    assert p_ids == 0 and u_ids > 0.48


def test_svm_scores_of_few_pictures_are_refused():
    with pytest.raises(UserError, match="9999 pictures: P-IDS and U-IDS collapse to 0"):
        discriminative_scores(normal(9_999, 2, 0), normal(9_999, 2, 1))
    with pytest.raises(ValueError, match="in pairs"):
        discriminative_scores(normal(10, 2, 0), normal(11, 2, 1))


def test_score_sets_leaves_out_what_would_mislead():
    real, fake = {"clothing": normal(1200, 16, 0)}, {"clothing": normal(1200, 16, 1)}
    few = lambda count, dimensions: ({"clothing": x["clothing"][:count, :dimensions]} for x in (real, fake))  # noqa: E731
    wanted = ["psnr", "fid", "fid-clothing", "fid_infinity-clothing", "kid-clothing", "p_ids-clothing"]
    scores, notes = score_sets(wanted, *few(300, 16))
    assert set(scores) == {
        base + spread + "-clothing" for base in ("kid", "fid_infinity") for spread in ("", "_spread")
    }
    assert len(notes) == 2 and "left out: fid-clothing: 300 pictures" in notes[0] and "left out: p_ids-" in notes[1]
    scores, notes = score_sets(["fid-clothing"], real, fake)
    assert scores == {"fid-clothing": fid(real["clothing"], fake["clothing"])} and not notes
    narrow = {"narrow": normal(300, 60, 0)}
    assert "some of the bias may be left" in score_sets(["fid_infinity-narrow"], narrow, narrow)[1][0]
    wide = normal(1100, 1100, 2)
    both = {"wide": wide, "inception": wide}
    scores, notes = score_sets(["fid", "fid-wide"], both, both, published_at=[1100])
    assert list(scores) == ["fid"] and scores["fid"] < 1e-9 and "comparable at this count alone" in notes[0]
    assert "1101 or more" in score_sets(["fid-wide"], {"wide": wide}, {"wide": wide})[1][0]
    wide = wide[:, :120]
    scores, notes = score_sets(["fid-wide"], {"wide": wide}, {"wide": wide})
    assert scores["fid-wide"] == pytest.approx(0, abs=1e-9) and "comparable at this count alone" in notes[0]


def test_score_sets_names_the_svm_scores():
    real = normal(10_000, 2, 0)
    fake = real - torch.tensor([0.5, 0]).double()  # never more real than its own truth, though often told wrongly
    scores, notes = score_sets(["u_ids", "p_ids"], {"inception": real}, {"inception": fake})
    assert scores["p_ids"] == 0 and 0.3 < scores["u_ids"] < 0.5 and not notes
