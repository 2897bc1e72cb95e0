import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc, average_precision_score, log_loss, roc_auc_score

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.scoring.bootstrap import Estimate, Ranking, draw_patients, percentile_interval
from ichpipe.scoring.metrics import curves, paired_difference, score, weighted_log_loss

SETTINGS = {"bootstrap_samples": 200, "confidence": 0.95, "seed": 0}


def example(patients=40, per_patient=5, seed=0):
    """Labels and informative probabilities; values are rounded, so that there are ties."""
    generator = np.random.default_rng(seed)
    rows = patients * per_patient
    labels = (generator.random((rows, 6)) < 0.3).astype(float)
    labels[:, 0] = labels[:, 1:].max(axis=1)
    probabilities = np.clip(0.3 * labels + generator.random((rows, 6)), 0.02, 0.98).round(2)
    patient = np.repeat([f"P{number}" for number in range(patients)], per_patient)
    return labels, probabilities, patient, np.char.add(patient, "-series")


def test_one_half_everywhere_scores_ln_2():
    labels = example()[0]
    assert weighted_log_loss(labels, np.full(labels.shape, 0.5)) == pytest.approx(0.693147, abs=5e-7)


def test_hand_arithmetic_with_any_twice_and_divisor_seven():
    # any right at 0.8, one subtype right at 0.6, four subtypes right at 0.9:
    # (2 * -ln 0.8 + -ln 0.6 + 4 * -ln 0.9) / 7 = (0.446287 + 0.510826 + 0.421442) / 7 = 0.196936
    labels, probabilities = [[1, 1, 0, 0, 0, 0]], [[0.8, 0.6, 0.1, 0.1, 0.1, 0.1]]
    assert weighted_log_loss(labels, probabilities) == pytest.approx(0.196936, abs=1e-6)


def test_divisor_is_seven_where_six_would_pass_for_a_score():
    # The paper's code once divided by 6: 0.07507 for what is 0.06434.
    labels, probabilities, _, _ = example()
    per_class = [log_loss(labels[:, c], probabilities[:, c], labels=[0, 1]) for c in range(6)]
    by_seven = (2 * per_class[0] + sum(per_class[1:])) / 7
    assert weighted_log_loss(labels, probabilities) == pytest.approx(by_seven)
    assert weighted_log_loss(labels, probabilities) < 0.9 * by_seven * 7 / 6


def test_certain_and_wrong_is_clipped_as_in_the_competition():
    labels, probabilities = np.zeros((1, 6)), np.ones((1, 6))
    assert weighted_log_loss(labels, probabilities) == pytest.approx(-math.log(1e-15), rel=1e-3)
    assert weighted_log_loss(labels, labels) == pytest.approx(0.0, abs=1e-14)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(range(6)))
def test_moving_a_probability_away_from_its_label_never_helps(seed, column):
    labels, probabilities, _, _ = example(patients=4, seed=seed)
    worse = probabilities.copy()
    worse[0, column] = abs(labels[0, column] - max(0.981, abs(worse[0, column] - labels[0, column])))
    assert weighted_log_loss(labels, worse) > weighted_log_loss(labels, probabilities)


@pytest.mark.real_data
def test_constant_prevalence_on_real_labels(real_data):
    parts = [real_data / f"tables/rsna/stage1_train_part{part}.csv.gz" for part in range(4)]
    labels = pd.concat([pd.read_csv(path) for path in parts])[list(CLASSES)].to_numpy(dtype=float)
    prevalence = labels.mean(axis=0)
    entropy = -(prevalence * np.log(prevalence) + (1 - prevalence) * np.log(1 - prevalence))
    loss = weighted_log_loss(labels, np.tile(prevalence, (len(labels), 1)))
    assert loss == pytest.approx((2 * entropy[0] + entropy[1:].sum()) / 7, rel=1e-9)
    assert loss == pytest.approx(0.232, abs=0.002)  # over all eight parts 0.23196


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30))
def test_auc_with_multiplicities_is_the_auc_of_repeated_rows(seed, levels):
    generator = np.random.default_rng(seed)
    labels, patient = generator.integers(2, size=60), generator.integers(8, size=60)
    labels[:2] = 0, 1
    scores = generator.integers(levels, size=60) / levels
    counts = np.hstack(list(draw_patients(8, 20, seed)))
    expected = []
    for row in counts.T.astype(int):
        rows = np.repeat(np.arange(60), row[patient])
        mixed = 0 < labels[rows].sum() < len(rows)
        expected.append(roc_auc_score(labels[rows], scores[rows]) if mixed else np.nan)
    ranking = Ranking(labels, scores, patient)
    np.testing.assert_allclose(ranking.resample(counts), expected, atol=1e-12)
    assert ranking.value == pytest.approx(roc_auc_score(labels, scores))


def test_each_resample_draws_as_many_patients_as_there_are():
    counts = np.hstack(list(draw_patients(11, 300, seed=3)))
    assert counts.shape == (11, 300)
    assert set(counts.sum(axis=0)) == {11}
    assert counts.mean() == 1.0
    assert abs(counts.mean(axis=1) - 1.0).max() < 0.3
    assert not (counts[:, 0] == counts[:, 1]).all()


def test_one_patient_is_not_drawn():
    assert list(draw_patients(1, 300, seed=3)) == []


def test_the_roc_curve_has_few_steps_where_neighbours_are_alike():
    # 0 0 | 1 1 | a tie of both | 1: four steps, two negatives below three positives and so on.
    ranking = Ranking(np.array([0, 0, 1, 1, 0, 1, 1]), np.array([1, 2, 3, 4, 5, 5, 6.0]), np.zeros(7, dtype=int))
    assert (ranking.n_positive, ranking.n_negative) == (4, 3)
    assert ranking.value == pytest.approx((2 + 2 + 2.5 + 3) / 12)


def test_without_series_there_is_no_study_auc():
    labels, probabilities, patients, _ = example()
    found = score(labels, probabilities, patients, None, **SETTINGS)["study_auc"]
    assert set(found) == set(CLASSES)
    assert all(set(values.values()) == {None} for values in found.values())


def test_score_agrees_with_scikit_learn():
    labels, probabilities, patients, series = example()
    found = score(labels, probabilities, patients, series, **SETTINGS)
    by_series = pd.DataFrame(np.hstack([labels, probabilities])).groupby(series).max().to_numpy()
    for column, name in enumerate(CLASSES):
        y, p = labels[:, column], probabilities[:, column]
        assert found["log_loss"][name] == pytest.approx(log_loss(y, p))
        assert found["auc"][name]["value"] == pytest.approx(roc_auc_score(y, p))
        assert found["auc"][name]["n_positive"] == y.sum()
        y, p = by_series[:, column], by_series[:, 6 + column]
        if 0 < y.sum() < len(y):
            assert found["study_auc"][name]["value"] == pytest.approx(roc_auc_score(y, p))
        assert found["study_auc"][name]["n_positive"] == y.sum()


def test_score_is_json_and_the_same_for_the_same_seed():
    arrays = example()
    first = score(*arrays, **SETTINGS)
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    assert first == score(*arrays, **SETTINGS)
    assert first["weighted_log_loss_ci"] != score(*arrays, **{**SETTINGS, "seed": 1})["weighted_log_loss_ci"]


def test_order_of_rows_does_not_matter():
    arrays = example()
    shuffle = np.random.default_rng(1).permutation(len(arrays[0]))
    first, second = score(*arrays, **SETTINGS), score(*(values[shuffle] for values in arrays), **SETTINGS)
    assert first["auc"] == second["auc"]
    assert first["study_auc"] == second["study_auc"]
    assert first["weighted_log_loss_ci"] == pytest.approx(second["weighted_log_loss_ci"])


def test_intervals_hold_the_value_and_grow_with_confidence():
    arrays = example()
    narrow, wide = (score(*arrays, **{**SETTINGS, "confidence": c}) for c in (0.5, 0.99))
    low, high = wide["weighted_log_loss_ci"]
    assert low < narrow["weighted_log_loss_ci"][0] < narrow["weighted_log_loss"] < narrow["weighted_log_loss_ci"][1]
    assert narrow["weighted_log_loss_ci"][1] < high
    for name in CLASSES:
        assert wide["auc"][name]["ci_low"] < wide["auc"][name]["value"] < wide["auc"][name]["ci_high"]


def test_patients_are_resampled_not_slices():
    # Ten copies of every slice of a patient hold no news: the interval must not shrink.
    labels, probabilities, patients, series = example(per_patient=1)
    once = score(labels, probabilities, patients, series, **SETTINGS)
    copies = [np.repeat(values, 10, axis=0) for values in (labels, probabilities, patients, series)]
    many = score(*copies, **SETTINGS)
    assert many["weighted_log_loss_ci"] == pytest.approx(once["weighted_log_loss_ci"])
    assert many["auc"]["any"]["ci_low"] == pytest.approx(once["auc"]["any"]["ci_low"])


def test_interval_of_the_mean_is_about_that_of_normal_theory():
    labels, probabilities, patients, series = example(patients=400, per_patient=1)
    low, high = score(labels, probabilities, patients, series, **{**SETTINGS, "bootstrap_samples": 2000})[
        "weighted_log_loss_ci"
    ]
    each = [weighted_log_loss(labels[row : row + 1], probabilities[row : row + 1]) for row in range(400)]
    assert high - low == pytest.approx(2 * 1.96 * np.std(each) / math.sqrt(400), rel=0.1)


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.5, 0.41, 0.59), "+0.500 [+0.410, +0.590]"),
        (Estimate(-0.0001, -0.1), "+0.000"),
        (Estimate(None, 0.1, 0.2), "not defined"),
    ],
)
def test_an_estimate_is_text_and_json(estimate, text):
    assert estimate.text(3, "+") == text
    assert estimate.text(3) == text.replace("+", "")
    assert Estimate.from_json(json.loads(json.dumps(estimate.to_json()))) == estimate


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_a_class_with_one_kind_of_label_has_no_auc(constant):
    labels, probabilities, patients, series = example()
    labels[:, 3] = constant
    found = score(labels, probabilities, patients, series, **SETTINGS)
    expected = {"value": None, "ci_low": None, "ci_high": None}
    assert found["auc"][CLASSES[3]] == {**expected, "n_positive": int(constant * len(labels))}
    assert found["study_auc"][CLASSES[3]]["value"] is None
    assert found["log_loss"][CLASSES[3]] > 0
    assert not [row for row in curves(labels, probabilities)["roc"] if row["class"] == CLASSES[3]]


def test_one_positive_patient_has_an_interval_but_a_rarer_one_among_two_kinds_has_none():
    # The one positive patient is in 1 - 1/e = 63 % of the resamples: an interval over those.
    labels, probabilities, patients, series = example()
    labels[:, 2], labels[0, 2] = 0, 1
    assert score(labels, probabilities, patients, series, **SETTINGS)["auc"][CLASSES[2]]["ci_low"] is not None
    # Two patients, one of each kind: half of the resamples are of one kind, the seed decides on which side.
    values = np.array([0.5, np.nan, np.nan])
    assert percentile_interval(values, 0.95) is None
    assert percentile_interval(values[:2], 0.95) == [0.5, 0.5]


def test_one_patient_has_values_and_no_intervals():
    labels, probabilities, patients, series = example(patients=1, per_patient=30)
    found = score(labels, probabilities, patients, series, **SETTINGS)
    assert found["weighted_log_loss_ci"] is None
    assert found["auc"]["any"]["value"] is not None
    assert found["auc"]["any"]["ci_low"] is None


def test_rows_without_labels_are_left_out_and_counted():
    labels, probabilities, patients, series = example()
    labels[5:10, 4] = np.nan  # the five slices of the second patient
    labels[12, 0] = np.nan  # one slice of the third: its series leaves the study scores whole
    keep = ~np.isnan(labels).any(axis=1)
    found = score(labels, probabilities, patients, series, **SETTINGS)
    rest = score(labels[keep], probabilities[keep], patients[keep], series[keep], **SETTINGS)
    assert (found["n_slices"], found["n_excluded"]) == (194, 6)
    assert found["auc"] == rest["auc"]
    assert weighted_log_loss(labels, probabilities) == rest["weighted_log_loss"]
    whole = ~np.isin(series, series[[5, 12]])
    assert found["study_auc"]["epidural"]["n_positive"] == sum(
        labels[whole][series[whole] == name, 1].max() for name in set(series[whole])
    )


def test_difference_of_a_model_with_itself_is_nothing():
    labels, probabilities, patients, _ = example()
    found = paired_difference(labels, probabilities, probabilities, patients, **SETTINGS)
    assert set(found) == {"weighted_log_loss", "auc_any"}
    for value in found.values():
        assert value == {"value": 0.0, "ci_low": 0.0, "ci_high": 0.0}


def test_positive_difference_means_the_second_is_better():
    labels, worse, patients, series = example()
    better = np.clip(0.7 * labels + 0.3 * worse, 0.01, 0.99)
    found = paired_difference(labels, worse, better, patients, **SETTINGS)
    first, second = (score(labels, p, patients, series, **SETTINGS) for p in (worse, better))
    gain = first["weighted_log_loss"] - second["weighted_log_loss"]
    assert found["weighted_log_loss"]["value"] == pytest.approx(gain)
    assert found["auc_any"]["value"] == pytest.approx(second["auc"]["any"]["value"] - first["auc"]["any"]["value"])
    assert found["weighted_log_loss"]["ci_low"] > 0
    assert found["auc_any"]["ci_low"] > 0
    reverse = paired_difference(labels, better, worse, patients, **SETTINGS)
    assert reverse["auc_any"]["ci_high"] == pytest.approx(-found["auc_any"]["ci_low"])
    assert reverse["weighted_log_loss"]["ci_low"] == pytest.approx(-found["weighted_log_loss"]["ci_high"])


def test_pairing_makes_the_interval_narrower_than_the_two_apart():
    labels, worse, patients, series = example()
    better = np.clip(worse + 0.01 * (2 * labels - 1), 0.01, 0.99)
    paired = paired_difference(labels, worse, better, patients, **SETTINGS)["weighted_log_loss"]
    low, high = score(labels, worse, patients, series, **SETTINGS)["weighted_log_loss_ci"]
    assert paired["ci_high"] - paired["ci_low"] < (high - low) / 3


def test_difference_without_positives_has_no_auc():
    labels, probabilities, patients, _ = example()
    found = paired_difference(np.zeros_like(labels), probabilities, probabilities / 2, patients, **SETTINGS)
    assert found["auc_any"] == {"value": None, "ci_low": None, "ci_high": None}
    assert found["weighted_log_loss"]["ci_low"] > 0


@pytest.mark.parametrize("max_points", [200, 2000])
def test_curves_keep_their_area_when_thinned(max_points):
    generator = np.random.default_rng(0)
    labels = (generator.random((5000, 6)) < 0.05).astype(float)
    probabilities = 1 / (1 + np.exp(-(generator.normal(size=(5000, 6)) + 2 * labels - 3)))
    found = curves(labels, probabilities, max_points=max_points)
    for column, name in enumerate(CLASSES):
        rows = [row for row in found["roc"] if row["class"] == name]
        assert len(rows) <= max_points
        assert (rows[0]["fpr"], rows[0]["tpr"], rows[0]["threshold"]) == (0.0, 0.0, None)
        assert (rows[-1]["fpr"], rows[-1]["tpr"]) == (1.0, 1.0)
        area = auc([row["fpr"] for row in rows], [row["tpr"] for row in rows])
        assert area == pytest.approx(roc_auc_score(labels[:, column], probabilities[:, column]), abs=0.005)
        rows = [row for row in found["precision_recall"] if row["class"] == name]
        assert len(rows) <= max_points
        area = auc([row["recall"] for row in rows], [row["precision"] for row in rows])
        expected = average_precision_score(labels[:, column], probabilities[:, column])
        assert area == pytest.approx(expected, abs=0.01)
    json.dumps(found, allow_nan=False)


def test_calibration_bins_add_up_to_the_data():
    labels, probabilities, _, _ = example()
    probabilities[0], probabilities[1] = 0.0, 1.0
    rows = curves(labels, probabilities)["calibration"]
    for column, name in enumerate(CLASSES):
        mine = [row for row in rows if row["class"] == name]
        assert sum(row["n"] for row in mine) == len(labels)
        assert sum(row["n"] * row["observed"] for row in mine) == pytest.approx(labels[:, column].sum())
        assert sum(row["n"] * row["predicted"] for row in mine) == pytest.approx(probabilities[:, column].sum())
        assert all(row["n"] > 0 for row in mine)


@pytest.mark.parametrize(
    ("labels", "probabilities", "message"),
    [
        (np.zeros((2, 6)), np.zeros((2, 5)), "must both be"),
        (np.zeros(6), np.zeros(6), "must both be"),
        (np.full((2, 6), np.nan), np.zeros((2, 6)), "none of 2 rows"),
        (np.full((2, 6), 0.5), np.zeros((2, 6)), "neither 0 nor 1"),
        (np.zeros((2, 6)), np.full((2, 6), 1.5), "not logits"),
        (np.zeros((2, 6)), np.full((2, 6), np.nan), "no probability of class any"),
    ],
)
def test_wrong_values_are_refused(labels, probabilities, message):
    with pytest.raises(DataError, match=message):
        weighted_log_loss(labels, probabilities)


def test_identifiers_must_be_one_per_slice():
    labels, probabilities, patients, series = example()
    with pytest.raises(DataError, match="patients"):
        score(labels, probabilities, patients[:-1], series, **SETTINGS)
    with pytest.raises(DataError, match="series"):
        score(labels, probabilities, patients, series[:-1], **SETTINGS)
