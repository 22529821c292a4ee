"""Intervals, scores and agreement against known values; the analysis against raters whose preference is known."""

import json
from math import log

import numpy as np
import pytest
from study_raters import Judge, make_study

from coherent_ddrm.cli import main
from coherent_ddrm.errors import UserError
from coherent_ddrm.study import report
from coherent_ddrm.study.analysis import Rule, Vote, agreement, analyse
from coherent_ddrm.study.answers import Answer, Answers
from coherent_ddrm.study.questions import sheet
from coherent_ddrm.study.statistics import bradley_terry, guesser_passes, krippendorff, resampled, wilson


@pytest.mark.parametrize(
    "wins, trials, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_of_newcombe_1998(wins, trials, low, high):
    """Table I, method 3, of Newcombe, Two-sided confidence intervals for the single proportion."""
    assert wilson(wins, trials) == pytest.approx((low, high), abs=6e-5)


def test_wilson_is_symmetric_and_knows_nothing_of_nothing():
    low, high = wilson(3, 10)
    assert wilson(7, 10) == pytest.approx((1 - high, 1 - low)) and wilson(0, 0) == (0, 1)


def test_bradley_terry_of_two_is_the_log_odds():
    scores = bradley_terry(np.array([[0, 30], [10, 0]]))
    assert scores[0] - scores[1] == pytest.approx(log(30.5 / 10.5)) and scores.sum() == pytest.approx(0)
    exact = bradley_terry(np.array([[0, 30], [10, 0]]), prior=0)
    assert exact[0] - exact[1] == pytest.approx(log(3))


def test_bradley_terry_returns_the_scores_that_made_the_wins():
    true = np.array([1.2, 0.4, -0.1, -1.5])
    chance = 1 / (1 + np.exp(true[None] - true[:, None]))
    wins = 1e4 * chance * (1 - np.eye(4))
    assert bradley_terry(wins, prior=0) == pytest.approx(true, abs=1e-9)
    assert bradley_terry(np.stack([wins, wins.T]), prior=0)[1] == pytest.approx(-true, abs=1e-9)


def test_bradley_terry_is_the_maximum_of_the_likelihood():
    """Against sklearn's logistic regression without penalty, half a win on each side as weighted rows."""
    linear = pytest.importorskip("sklearn.linear_model")
    wins = np.array([[0, 9, 4, 20], [3, 0, 0, 6], [5, 2, 0, 8], [0, 1, 2, 0]], float)
    rows, weights = [], []
    for i, j in zip(*np.nonzero(1 - np.eye(4)), strict=True):
        rows.append(np.eye(4)[i] - np.eye(4)[j])
        weights.append(wins[i, j] + 0.5)
    both, target = np.array(rows + [-row for row in rows]), np.repeat([1, 0], len(rows))
    fit = linear.LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=10_000)
    fit.fit(both, target, np.tile(weights, 2))
    assert bradley_terry(wins) == pytest.approx(fit.coef_[0] - fit.coef_[0].mean(), abs=1e-5)


def test_a_method_that_never_wins_has_a_finite_score():
    wins = np.array([[0, 50, 50], [50, 0, 50], [0, 0, 0]])
    scores = bradley_terry(wins)
    assert np.isfinite(scores).all() and scores[0] == pytest.approx(scores[1]) and -4 < scores[2] < -2
    assert np.isfinite(bradley_terry(1000 * wins)).all() and bradley_terry(np.zeros((3, 3))) == pytest.approx(0)


def test_krippendorff_of_the_textbook():
    """Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), example C: nominal alpha 0.743."""
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    units = [[value for value in unit if value is not None] for unit in zip(*observers, strict=True)]
    assert krippendorff(units) == pytest.approx(0.743, abs=5e-4)
    assert np.isnan(krippendorff([[1], [2]])) and krippendorff([[1, 1], [2, 2]]) == 1


def test_agreement_does_not_depend_on_the_order_of_the_methods():
    rng = np.random.default_rng(0)
    votes = []
    for rater in range(12):
        for picture in range(8):
            a, b = sorted(rng.permutation(3)[:2])
            winner, loser = (a, b) if rng.random() < 0.9 else (b, a)  # the lower index nearly always wins
            votes.append(Vote(rater, picture, winner, loser, True))
    swapped = [Vote(v.rater, v.picture, 2 - v.winner, 2 - v.loser, True) for v in votes]
    first, second = agreement(votes), agreement(swapped)
    assert first["alpha"] == pytest.approx(second["alpha"]) and 0.4 < first["alpha"] < 0.9
    coin = [Vote(v.rater, v.picture, *rng.permutation([v.winner, v.loser]).tolist(), True) for v in votes]
    assert abs(agreement(coin)["alpha"]) < 0.25


def test_rule_of_the_catch_trials():
    assert guesser_passes(3, 0) == 1 / 8 and guesser_passes(5, 1) == 6 / 32 and guesser_passes(0, 0) == 1
    assert [Rule(12).allowed(met) for met in (0, 1, 3, 5, 8, 12)] == [0, 0, 0, 0, 1, 2]
    assert [Rule(5, allow_wrong=2).allowed(met) for met in range(6)] == [0, 0, 0, 1, 1, 2]  # two fifths of those met
    assert [Rule(5, allow_wrong=0).allowed(met) for met in range(6)] == [0] * 6
    assert all(Rule(5, allow_wrong=9).allowed(met) >= met for met in range(6))


def test_bootstrap_draws_raters():
    drawn = resampled(7, 500)
    assert drawn.shape == (500, 7) and (drawn.sum(1) == 7).all() and (drawn == resampled(7, 500)).all()


# -- the whole analysis ------------------------------------------------------------------------------------------------

TRUE = (0.9, 0.3, -0.2, -1.0)


def answer_some(folder, study, number, judge, count=None):
    """A judge answers sheet `number`, or its first `count` questions, straight into the database."""
    asked = enumerate(sheet(study, number)[:count])
    given = [Answer(i, q.left, q.right, judge.choose(q.left, q.right), 1500) for i, q in asked]
    Answers(folder).merge(f"judge {number}", number, given)


def answer_all(folder, study, judges):
    """Every judge answers a whole sheet."""
    for number, judge in enumerate(judges):
        answer_some(folder, study, number, judge)


def test_analysis_recovers_known_scores_and_finds_the_careless(tmp_path, capsys):
    study = make_study(tmp_path, questions=15, catches=5)
    folder = tmp_path / "study"
    judges = [Judge(study, TRUE, seed) for seed in range(40)] + [Judge(study, None, seed) for seed in range(100, 103)]
    answer_all(folder, study, judges)
    assert main(["study", "analyse", str(folder), "-o", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["method"] for row in results["methods"]] == list("ABCD")
    for row, true in zip(results["methods"], TRUE, strict=True):
        low, high = row["score_interval"]
        assert low < true < high and row["score"] == pytest.approx(true, abs=0.35) and high - low < 1
    chance = 1 / (1 + np.exp(-TRUE[0] + TRUE[3]))
    best = next(row for row in results["pairs"] if (row["method"], row["over"]) == ("A", "D"))
    assert best["wilson"][0] < chance < best["wilson"][1] and best["asked"] == 100
    assert [row["rater"] for row in results["raters"] if not row["kept"]] == [41, 42, 43]
    assert results["answers"]["raters_kept"] == 40 and results["answers"]["comparisons"] == 600
    assert 0 < results["agreement"]["alpha"] < 0.6 and results["agreement"]["comparisons_repeated"] == 36
    page = (tmp_path / "out" / "results.md").read_text()
    assert "Excluded: 41, 42, 43." in page and "3.1 %" in page and "| A | " in page
    assert "40 of 43 raters kept" in capsys.readouterr().out


def test_catch_trials_may_be_forgiven(tmp_path):
    study = make_study(tmp_path, questions=15, catches=5)
    answer_all(tmp_path / "study", study, [Judge(study, None, 0)])
    with pytest.raises(UserError, match="--allow-wrong"):
        analyse(tmp_path / "study")
    results = analyse(tmp_path / "study", allow_wrong=5)
    assert results["answers"]["raters_kept"] == 1 and results["rule"]["guesser"] == 1
    assert "Fewer than 10 raters" in report.markdown(results)


def before_a_catch_trial(study, number):
    """How many questions stand before the first catch trial of a sheet."""
    good = {picture.catch.truth for picture in study.pictures if picture.catch}
    return next(i for i, q in enumerate(sheet(study, number)) if {q.left, q.right} & good)


def test_who_left_before_a_catch_trial_is_left_out(tmp_path, capsys):
    study, folder = make_study(tmp_path, questions=15, catches=5), tmp_path / "study"
    answer_all(folder, study, [Judge(study, TRUE, seed) for seed in range(3)])
    early = next(number for number in range(3, 50) if before_a_catch_trial(study, number) > 1)
    answer_some(folder, study, early, Judge(study, None, 4), before_a_catch_trial(study, early))  # rater 4
    last = early + 1
    answer_some(folder, study, last, Judge(study, TRUE, 5), before_a_catch_trial(study, last) + 1)  # rater 5 met one
    assert main(["study", "analyse", str(folder)]) == 0
    results = json.loads((folder / "results.json").read_text())
    assert [row["kept"] for row in results["raters"]] == [True, True, True, False, True]
    assert results["raters"][3]["notes"][0] == "left out: left before a catch trial"
    assert results["answers"]["comparisons"] == 3 * 15 + before_a_catch_trial(study, last)
    page = (folder / "results.md").read_text()
    assert "Nobody was excluded. Left out, as they left before a catch trial: 4." in page
    assert "1 of those who count left before the last catch trial" in page and "up to 50.0 %" in page
    assert "4 of 5 raters kept" in capsys.readouterr().out
    assert main(["study", "analyse", str(folder), "--include-untested"]) == 0
    results = json.loads((folder / "results.json").read_text())
    assert all(row["kept"] for row in results["raters"]) and results["rule"]["guesser_with_fewer"] == 1
    assert results["raters"][3]["notes"][0] == "included: left before a catch trial"


def test_nobody_met_a_catch_trial(tmp_path):
    study = make_study(tmp_path, questions=15, catches=1)
    number = next(number for number in range(50) if before_a_catch_trial(study, number))
    answer_some(tmp_path / "study", study, number, Judge(study, TRUE, 0), 1)
    with pytest.raises(UserError, match="--include-untested"):
        analyse(tmp_path / "study")
    assert analyse(tmp_path / "study", include_untested=True)["answers"]["comparisons"] == 1


def test_a_rater_who_always_presses_one_key_is_noted(tmp_path):
    study = make_study(tmp_path, questions=15, catches=0)
    judge = Judge(study, TRUE, 0)
    judge.choose = lambda left, right: "left"
    answer_all(tmp_path / "study", study, [judge, Judge(study, TRUE, 1)])
    first, second = analyse(tmp_path / "study")["raters"]
    assert "one side only" in first["notes"] and second["notes"] == []


def test_nothing_to_analyse(tmp_path, capsys):
    make_study(tmp_path, questions=3)
    for _ in range(2):  # without a database, then with an empty one
        assert main(["study", "analyse", str(tmp_path / "study")]) == 2
        assert "nobody has answered yet" in capsys.readouterr().err
        Answers(tmp_path / "study")


def test_names_do_not_break_the_page(tmp_path):
    study = make_study(tmp_path, ["a|b", "<i>c"], questions=3)
    answer_all(tmp_path / "study", study, [Judge(study, (1, 0), 0)])
    page = report.markdown(analyse(tmp_path / "study"))
    assert r"a\|b" in page and r"\<i\>c" in page and "<i>" not in page
