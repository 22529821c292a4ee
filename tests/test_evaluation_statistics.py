"""Intervals, paired tests and bins of an evaluation, against closed forms and hand-made examples."""

import numpy as np
import pytest
from scipy import stats

from coherent_ddrm.evaluation.statistics import AREA_BINS, area_bin, difference, holm, interval, sign_flip
from coherent_ddrm.evaluation.tables import bins, differences, markdown, summaries


def test_interval_is_that_of_a_normal_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = interval(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(400)
    assert found.mean == pytest.approx(values.mean()) and found.count == 400
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_interval_covers_the_true_mean_19_times_in_20():
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        found = interval(generator.exponential(1.0, 80), seed)
        covered += found.low <= 1.0 <= found.high
    assert 88 <= covered <= 100


@pytest.mark.parametrize(
    ("values", "mean", "count"), [([np.nan, 2.0, 4.0], 3.0, 2), ([5.0], 5.0, 1), ([1.0, 1.0], 1.0, 2)]
)
def test_interval_of_few_equal_or_missing_values(values, mean, count):
    found = interval(np.array(values))
    assert found.mean == mean and found.count == count
    assert np.isnan(found.low) if count == 1 else found.low <= mean <= found.high
    assert np.isnan(interval(np.array([np.nan])).mean)


def test_paired_difference_sees_what_an_unpaired_one_cannot():
    """A difference far below the spread between pictures, but the same on all of them."""
    generator = np.random.default_rng(0)
    pictures = generator.normal(20, 5, 60)
    better = pictures + 0.3 + 0.1 * generator.normal(size=60)
    found = difference(better, pictures)
    assert found.low < found.mean < found.high and found.mean == pytest.approx(0.3, abs=0.05)
    assert found.p <= 2e-4 and stats.ttest_ind(better, pictures).pvalue > 0.5
    assert found.p == pytest.approx(stats.ttest_rel(better, pictures).pvalue, abs=1e-3)


def test_paired_difference_by_chance():
    generator = np.random.default_rng(3)
    noise = generator.normal(size=40)
    found = difference(noise, np.zeros(40))
    assert found.p == pytest.approx(stats.ttest_1samp(noise, 0).pvalue, abs=0.03)
    assert difference(noise, noise).p == 1.0


@pytest.mark.parametrize("count", [12, 101])
def test_sign_flips_are_those_of_scipy(count):
    apart = np.random.default_rng(count).normal(0.2, 1, count)
    theirs = stats.permutation_test(
        (apart,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=99_999,
        rng=np.random.default_rng(0),
    )
    assert sign_flip(apart) == pytest.approx(theirs.pvalue, abs=0.012) and 0.01 < theirs.pvalue < 0.9
    assert sign_flip(apart + 5) == pytest.approx(2 / 2**count, abs=1e-3)  # all signs as they are, or all flipped


def test_holm_on_its_textbook_example():
    """Four p-values, adjusted: 4 x .005, 3 x .01 kept in order, 2 x .03, 1 x .04 raised to .06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(
    ("share", "name"), [(0.0, "0-10"), (0.1, "0-10"), (0.1001, "10-20"), (0.6, "50-60"), (0.61, ">60"), (1.0, ">60")]
)
def test_bins_of_the_missing_share(share, name):
    assert area_bin(share) == name and name in AREA_BINS


def rows(method, mask, values, candidates=1, area="0-10"):
    facts = dict(method=method, mask=mask, area=area, nfe=5, seconds=0.1, memory=None, hole_hash="", hole_share=0.05)
    return [
        dict(facts, key=f"p{i}", candidate=k, psnr_hole=value)
        for i, value in enumerate(values)
        for k in range(candidates)
    ]


def test_tables_count_pictures_not_candidates():
    """Two candidates of a picture are no two samples: the interval is that of the pictures."""
    once, twice = (summaries(rows("a", "half", [1.0, 2.0, 4.0], k))[0] for k in (1, 2))
    assert once["scores"] == twice["scores"] and twice["pictures"] == 3


def test_tables_of_two_methods():
    data = rows("a", "half", [10.0, 12.0, 14.0]) + rows("b", "half", [11.0, 13.0, 15.0]) + rows("a", "box", [1, 2, 3])
    tested = differences(data, "a", ["psnr_hole"])
    assert [(row["method"], row["mask"], row["mean"]) for row in tested] == [("b", "half", 1.0)]
    areas = bins(data)
    assert [(row["method"], row["results"], row["scores"]["psnr_hole"]) for row in areas] == [
        ("a", 6, 7.0),
        ("b", 3, 13.0),
    ]
    text = markdown(summaries(data), ["psnr_hole"], {"psnr_hole": "PSNR"})
    assert "**half**, 3 pictures" in text and "| b | 13.00 ±" in text
