"""Brier score, calibration error, average precision; sensitivity and specificity at a point."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, brier_score_loss

from ichpipe.common.classes import CLASSES
from ichpipe.scoring.metrics import BINS, average_precision, brier, calibration_error, reliability
from ichpipe.scoring.roc import operating_points, proportion_interval


def example(seed=0, n=400):
    generator = np.random.default_rng(seed)
    labels = (generator.random((n, 6)) < 0.3).astype(float)
    return labels, np.clip(0.3 * labels + generator.random((n, 6)) * 0.8, 0, 1).round(2)


def test_calibration_error_by_hand():
    # Two bins: 0.2 and 0.4 with one positive, |0.6 - 1| = 0.4; 0.5 and 1.0 with one positive, |1.5 - 1| = 0.5.
    found = calibration_error(np.array([0.0, 1, 0, 1]), np.array([0.2, 0.4, 0.5, 1.0]), bins=2)
    assert found == pytest.approx((0.4 + 0.5) / 4)


def test_calibration_error_is_the_weighted_gap_of_each_bin():
    labels, found = (values[:, 0] for values in example())
    place = np.digitize(found, np.arange(1, BINS) / BINS)
    gaps = [
        (place == b).mean() * abs(found[place == b].mean() - labels[place == b].mean())
        for b in range(BINS)
        if (place == b).any()
    ]
    assert calibration_error(labels, found) == pytest.approx(sum(gaps))


def test_prevalence_everywhere_is_calibrated_and_one_half_is_not():
    labels = np.array([1.0] * 3 + [0.0] * 7)
    assert calibration_error(labels, np.full(10, 0.3)) == pytest.approx(0.0, abs=1e-15)
    assert calibration_error(labels, np.full(10, 0.5)) == pytest.approx(0.2)
    assert calibration_error(labels, 1 - labels) == 1.0


def test_brier_and_average_precision_agree_with_scikit_learn():
    labels, probabilities = example()
    found = reliability(labels, probabilities)
    for column, name in enumerate(CLASSES):
        y, p = labels[:, column], probabilities[:, column]
        assert found["brier"][name] == pytest.approx(brier_score_loss(y, p))
        assert found["average_precision"][name] == pytest.approx(average_precision_score(y, p))
        assert found["calibration_error"][name] == calibration_error(y, p)
    assert found["calibration_bins"] == 15


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_no_average_precision_of_one_kind_of_label(constant):
    labels = np.full(5, constant)
    assert average_precision(labels, np.linspace(0, 1, 5)) is None
    assert brier(labels, np.full(5, 0.5)) == 0.25


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(1, 30), st.sampled_from([0.5, 0.8, 0.9, 0.95, 1.0]))
def test_points_are_those_a_search_over_all_thresholds_finds(seed, n, levels, wanted):
    generator = np.random.default_rng(seed)
    labels, scores = generator.integers(2, size=n), generator.integers(levels + 1, size=n) / levels
    labels[:2] = 0, 1
    found = operating_points(labels, scores, wanted=wanted)
    tried = [
        (threshold, (scores[labels == 1] >= threshold).mean(), (scores[labels == 0] < threshold).mean())
        for threshold in [*np.unique(scores), np.inf]
    ]
    high = max(one for one in tried if one[1] >= wanted - 1e-9)
    low = min(one for one in tried if one[2] >= wanted - 1e-9)
    for name, (threshold, sensitivity, specificity) in (("high_sensitivity", high), ("high_specificity", low)):
        point = found[name]
        assert (point["sensitivity"], point["specificity"]) == pytest.approx((sensitivity, specificity))
        assert point["threshold"] == (threshold if np.isfinite(threshold) else None)


def test_nine_of_ten_is_nine_tenths_whatever_the_binary_digits():
    labels = np.array([1] * 130 + [0] * 130)
    scores = np.concatenate([np.arange(130), np.arange(130) - 117]) / 300
    found = operating_points(labels, scores)
    assert found["high_sensitivity"]["sensitivity"] == 117 / 130
    assert found["high_specificity"]["specificity"] == 117 / 130


def test_no_point_without_positives():
    assert set(operating_points(np.zeros(4), np.arange(4)).values()) == {None}
    assert set(operating_points(np.ones(4), np.arange(4)).values()) == {None}


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (7, 7), (3, 10), (194, 205)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_exact_interval_is_that_of_scipy(successes, trials, confidence):
    expected = binomtest(successes, trials).proportion_ci(confidence, method="exact")
    assert proportion_interval(successes, trials, confidence) == pytest.approx([expected.low, expected.high])
