"""DeLong's variance and test, beside the formula pair by pair, the bootstrap, and normal theory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from ichpipe.scoring.bootstrap import Ranking, percentile_interval, resample
from ichpipe.scoring.roc import areas, compare, interval


def cases(seed, n=120, levels=12, models=2):
    """Labels, and scores of models that agree with them and with each other; rounded, so that there are ties."""
    generator = np.random.default_rng(seed)
    labels = (generator.random(n) < 0.35).astype(int)
    labels[:4] = 0, 0, 1, 1
    shared = generator.normal(size=n)
    own = generator.normal(size=(n, models))
    return labels, np.round((labels[:, None] + shared[:, None] + own) * levels / 6)


def pair_by_pair(labels, scores):
    """The definition: every positive against every negative (DeLong et al. 1988, equations 4 to 6)."""
    positives, negatives = scores[labels == 1], scores[labels == 0]
    wins = (positives[:, None] > negatives[None]) + 0.5 * (positives[:, None] == negatives[None])
    auc, by_positive, by_negative = wins.mean(axis=(0, 1)), wins.mean(axis=1), wins.mean(axis=0)
    m, n = len(positives), len(negatives)
    s10 = (by_positive - auc).T @ (by_positive - auc) / (m - 1)
    s01 = (by_negative - auc).T @ (by_negative - auc) / (n - 1)
    return auc, s10 / m + s01 / n


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(5, 80), st.integers(1, 40), st.integers(1, 4))
def test_ranks_give_what_pairs_give(seed, n, levels, models):
    labels, scores = cases(seed, n, levels, models)
    aucs, found_covariance = areas(labels, scores)
    auc, covariance = pair_by_pair(labels, scores)
    np.testing.assert_allclose(aucs, auc, atol=1e-12)
    np.testing.assert_allclose(found_covariance, covariance, atol=1e-12)
    assert aucs[0] == pytest.approx(roc_auc_score(labels, scores[:, 0]))


def test_hand_arithmetic():
    # Positives 3, 1; negatives 2, 0: of four pairs (1, 2) is lost. By positive 1 and 1/2, by negative 1/2 and 1:
    # each has variance 1/8, so the AUC has 1/8 / 2 + 1/8 / 2 = 1/8.
    aucs, covariance = areas([1, 1, 0, 0], np.array([[3], [1], [2], [0]]))
    assert aucs.tolist() == [0.75]
    assert covariance.tolist() == [[0.125]]
    assert interval([1, 1, 0, 0], [3, 1, 2, 0])["ci_high"] == 1.0  # cut


def test_standard_error_and_difference_are_those_of_the_bootstrap():
    labels, scores = cases(3, n=600)
    case = np.arange(len(labels))
    rankings = [Ranking(labels, scores[:, model], case) for model in range(2)]
    first, second = resample([ranking.resample for ranking in rankings], len(labels), 4000, seed=0)
    assert interval(labels, scores[:, 0])["standard_error"] == pytest.approx(first.std(), rel=0.06)
    found = compare(labels, scores[:, 0], scores[:, 1])
    low, high = percentile_interval(first - second, 0.95)
    width = found["ci_high"] - found["ci_low"]
    assert width == pytest.approx(high - low, rel=0.08)
    assert found["ci_low"] == pytest.approx(low, abs=0.06 * width)
    # Models that agree: without their covariance the interval would be wider.
    apart = np.hypot(*(interval(labels, scores[:, model])["standard_error"] for model in range(2)))
    assert width < 0.9 * 2 * 1.96 * apart


def test_p_value_is_uniform_where_the_models_are_equally_good():
    drawn = [cases(seed, n=150) for seed in range(400)]
    p_values = np.array([compare(labels, *scores.T)["p_value"] for labels, scores in drawn])
    assert np.mean(p_values < 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.05)


def test_interval_covers_the_true_area_as_often_as_it_says():
    # Normal scores one standard deviation apart: AUC = Phi(1 / sqrt 2) = .7602
    generator, covered = np.random.default_rng(0), 0
    for _ in range(400):
        labels = np.repeat([0, 1], [80, 60])
        found = interval(labels, generator.normal(size=140) + labels)
        covered += found["ci_low"] < 0.760250 < found["ci_high"]
    assert covered / 400 == pytest.approx(0.95, abs=0.03)


def test_direction_and_symmetry():
    labels, scores = cases(1)
    better = scores[:, 0] + 3 * labels
    found, turned = compare(labels, better, scores[:, 0]), compare(labels, scores[:, 0], better)
    assert found["difference"] == pytest.approx(found["auc"] - found["auc_against"])
    assert found["difference"] > 0 < found["z"]
    assert found["p_value"] == pytest.approx(turned["p_value"])
    assert found["ci_low"] == pytest.approx(-turned["ci_high"])
    assert compare(labels, better, scores[:, 0], 0.5)["ci_low"] > found["ci_low"]


def test_equal_scores_do_not_differ():
    labels, scores = cases(1)
    found = compare(labels, scores[:, 0], scores[:, 0])
    assert (found["difference"], found["z"], found["p_value"]) == (0.0, None, 1.0)
    assert found["ci_low"] == found["ci_high"] == 0.0


@pytest.mark.parametrize("positives", [0, 1, 19, 20])
def test_too_few_of_one_kind_have_no_variance(positives):
    labels = np.arange(20) < positives
    scores = np.random.default_rng(0).random(20)
    assert areas(labels, scores[:, None]) is None
    assert interval(labels, scores) is None
    assert set(compare(labels, scores, scores[::-1]).values()) == {None}
