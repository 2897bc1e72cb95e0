"""Calibration: fitted on validation alone, monotone, never sure, kept beside the model as plain JSON."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from sklearn.metrics import roc_auc_score

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError, WeightsError
from ichpipe.common.files import digest_of_file
from ichpipe.report.calibration_report import calibration_scores, calibration_text
from ichpipe.scoring.calibration import Calibration, fit_calibration, read_calibration, write_calibration
from ichpipe.scoring.heldout_predictions import LABELS, SLICE_COLUMNS
from ichpipe.scoring.metrics import class_log_loss


def cases(n=4000, *, temperature=1.0, seed=0, patients=80):
    """Labels drawn with known probabilities, and what a network says whose logits are ``temperature`` too large."""
    random = np.random.default_rng(seed)
    true = random.normal(-1.0, 2.0, (n, len(CLASSES)))
    labels = (random.random(true.shape) < expit(true)).astype(np.float64)
    return labels, expit(true * temperature), np.array([f"P{row % patients}" for row in range(n)], dtype=object)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_hidden_in_the_data_is_found(temperature):
    found = fit_calibration(*cases(20_000, temperature=temperature), "temperature", "x")
    assert found.as_they_are == {}
    for name in CLASSES:
        assert found.temperature[name] == pytest.approx(temperature, rel=0.05)


def test_temperature_by_hand():
    found = Calibration(method="temperature", model_sha256="x", temperature={"any": 2.0})
    values = np.full((1, len(CLASSES)), 0.9)
    assert found.apply(values)[0, 0] == pytest.approx(3 / 4)  # odds 9 to 1, to the power 1/2: 3 to 1
    assert found.apply(values)[0, 1:].tolist() == [0.9] * 5


def test_temperature_changes_no_auc():
    labels, probabilities, patients = cases(temperature=2.5)
    after = fit_calibration(labels, probabilities, patients, "temperature", "x").apply(probabilities)
    assert not np.allclose(after, probabilities)
    for column in range(len(CLASSES)):
        before, now = (roc_auc_score(labels[:, column], one[:, column]) for one in (probabilities, after))
        assert now == before


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_what_is_fitted_on_some_patients_helps_on_others(method):
    labels, probabilities, patients = cases(temperature=3.0)
    calibration = fit_calibration(labels, probabilities, patients, method, "x")
    others = cases(temperature=3.0, seed=1)[:2]
    scores, _ = calibration_scores(*others, calibration)
    assert scores["after"]["weighted_log_loss"] < scores["before"]["weighted_log_loss"] - 0.1
    for name in CLASSES:
        assert scores["after"]["calibration_error"][name] < scores["before"]["calibration_error"][name]


def test_isotonic_rises_and_never_says_0_or_1():
    labels, probabilities, patients = cases(500, patients=100)
    probabilities[:, 0] = np.where(labels[:, 0] == 1, 0.9, 0.1)  # no error: 0 and 1 without the bound
    found = fit_calibration(labels, probabilities, patients, "isotonic", "x")
    grid = np.repeat(np.linspace(0, 1, 1001)[:, None], len(CLASSES), axis=1)
    after = found.apply(grid)
    assert (np.diff(after, axis=0) >= 0).all()
    assert after[0, 0] == pytest.approx(1 / 502)
    assert after[-1, 0] == pytest.approx(501 / 502)
    assert after.min() >= 1 / 502 - 1e-12
    assert after.max() <= 501 / 502 + 1e-12


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_probabilities_of_0_and_1_stay_inside(method):
    calibration = fit_calibration(*cases(temperature=3.0), method, "x")
    after = calibration.apply(np.repeat([[0.0], [1.0]], len(CLASSES), axis=1))
    assert ((after > 0) & (after < 1)).all()


def test_a_class_with_too_little_stays_bit_by_bit_as_it_was_and_says_why():
    labels, probabilities, patients = cases()
    labels[:, 1] = 0
    labels[:9, 1] = 1
    labels[:, 2] = 0
    labels[np.isin(patients, ["P0", "P1"]), 2] = 1
    labels[:, 3] = 1
    found = fit_calibration(labels, probabilities, patients, "temperature", "x")
    assert found.as_they_are == {
        "epidural": "9 positive slices, fewer than 10",
        "intraparenchymal": "positive slices of 2 patients, fewer than 5",
        "intraventricular": "0 negative slices, fewer than 10",
    }
    after = found.apply(probabilities)
    assert (after[:, 1:4] == probabilities[:, 1:4]).all()
    assert (after[:, 0] != probabilities[:, 0]).any()


def test_none_changes_nothing():
    labels, probabilities, patients = cases(200)
    found = fit_calibration(labels, probabilities, patients, "none", "x")
    assert (found.apply(probabilities) == probabilities).all()
    assert "not calibrated" in calibration_text(calibration_scores(labels, probabilities, found)[0])


def test_every_slice_below_a_subtype_is_counted():
    labels, probabilities, patients = cases(100)
    probabilities[:, 0], probabilities[:, 1:] = 0.5, 0.4
    probabilities[:25, 3] = 0.6
    scores, _ = calibration_scores(labels, probabilities, fit_calibration(labels, probabilities, patients, "none", "x"))
    assert scores["before"]["any_below_subtype"] == 0.25


def test_text_fits_80_columns():
    labels, probabilities, patients = cases()
    labels[:, 2:4] = 0
    labels[np.isin(patients, ["P0", "P1"]), 3] = 1
    calibration = fit_calibration(labels, probabilities, patients, "temperature", "x")
    assert set(calibration.as_they_are) == {"intraparenchymal", "intraventricular"}
    text = calibration_text(calibration_scores(*cases(seed=1)[:2], calibration)[0])
    assert max(map(len, text.splitlines())) <= 80
    assert all(name in text for name in CLASSES)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


@pytest.mark.parametrize("method", ["none", "temperature", "isotonic"])
def test_what_is_read_is_what_was_written(folder, method):
    made = fit_calibration(*cases(400), method, digest_of_file(folder / "model.safetensors"))
    write_calibration(folder, made)
    assert read_calibration(folder) == made
    values = cases(50, seed=2)[1]
    assert (read_calibration(folder).apply(values) == made.apply(values)).all()


def test_nothing_beside_the_model_is_none(folder):
    assert read_calibration(folder) is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "not complete JSON"),
        ('{"method": "platt", "model_sha256": "x"}', "method"),
        ('{"method": "none", "model_sha256": "x"}', "another model"),
        ('{"method": "none", "model_sha256": "x", "unknown": 1}', "unknown"),
    ],
)
def test_a_file_that_is_damaged_or_of_another_model_is_refused(folder, text, complaint):
    (folder / "calibration.json").write_text(text)
    with pytest.raises(Exception, match=complaint) as caught:
        read_calibration(folder)
    assert "calibration.json" in str(caught.value)


@pytest.mark.slow
def test_evaluate_fits_on_validation_alone_and_changes_no_other_score(run, tmp_path):
    table = pd.read_parquet(run.artifacts / "finetuned" / "predictions.parquet")
    val = table[table["split"] == "val"]
    again = fit_calibration(
        val[LABELS].to_numpy(float),
        val[list(CLASSES)].to_numpy(float),
        val["patient_id"].to_numpy(object),
        "temperature",
        digest_of_file(run.artifacts / "finetuned" / "model.safetensors"),
    )
    assert read_calibration(run.artifacts / "finetuned") == again
    assert not set(val["patient_id"]) & set(table.loc[table["split"] == "test", "patient_id"])
    metrics = json.loads(run.metrics())
    assert metrics["calibration"]["before"]["weighted_log_loss"] == pytest.approx(
        metrics["finetuned"]["weighted_log_loss"]
    )
    other = run.copy(tmp_path / "other")
    assert other("--set", "evaluate.calibration=none", "evaluate").exit_code == 0
    plain = json.loads(other.metrics())
    assert plain.pop("calibration")["method"] == "none"
    assert metrics.pop("calibration")["method"] == "temperature"
    assert plain == metrics
    assert read_calibration(other.artifacts / "finetuned").method == "none"
    assert (run.artifacts / "plots" / "reliability.png").stat().st_size > 10_000
    steps = {row["step"] for row in json.loads((run.artifacts / "plots" / "reliability.json").read_text())}
    assert steps == {"before", "after"}


def test_another_model_under_an_old_calibration_is_not_calibrated_in_silence(folder):
    write_calibration(folder, fit_calibration(*cases(50), "none", digest_of_file(folder / "model.safetensors")))
    (folder / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(WeightsError, match="ichpipe evaluate"):
        read_calibration(folder)


def two_models(n=4000, seed=0):
    """Labels, probabilities of a model that is worse at ``epidural`` than its slice CNN, theirs, and patients."""
    labels, true, patients = cases(n, seed=seed)
    random = np.random.default_rng(seed + 100)
    model, of_cnn = (expit(logit(true) + random.normal(0, 1.5, true.shape)) for _ in range(2))
    model[:, 1] = expit(random.normal(-1.0, 2.0, n))
    return labels, model, of_cnn, patients


def blended(shares, method="none"):
    return Calibration(method=method, model_sha256="x", blend=dict.fromkeys(CLASSES, shares))


def test_a_share_of_1_is_the_model_and_of_0_the_slice_cnn_bit_by_bit():
    _, model, of_cnn, _ = two_models(200)
    assert (blended(1.0).apply(model, of_cnn) == model).all()
    assert (blended(0.0).apply(model, of_cnn) == of_cnn).all()


def test_the_blend_is_the_weighted_mean_of_the_logits():
    _, model, of_cnn, _ = two_models(200)
    mixed = blended(0.25).apply(model, of_cnn)
    np.testing.assert_allclose(logit(mixed), 0.25 * logit(model) + 0.75 * logit(of_cnn), atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_blend_is_never_worse_on_the_split_it_was_fitted_on(seed):
    labels, model, of_cnn, patients = two_models(seed=seed)
    fitted = fit_calibration(labels, model, patients, "none", "x", of_cnn)
    before, after = (class_log_loss(labels, values) for values in (model, fitted.apply(model, of_cnn)))
    assert all(after[name] <= before[name] for name in CLASSES)
    assert fitted.blend["epidural"] < 0.3  # the model knows nothing of it
    assert 0.4 < fitted.blend["any"] < 0.6  # two equally good ones
    others = two_models(seed=seed + 10)
    assert class_log_loss(others[0], fitted.apply(*others[1:3]))["any"] < class_log_loss(*others[:2])["any"]


def test_the_blend_stands_before_the_temperature():
    labels, model, of_cnn, patients = two_models()
    alone = fit_calibration(labels, model, patients, "none", "x", of_cnn)
    both = fit_calibration(labels, model, patients, "temperature", "x", of_cnn)
    assert both.blend == alone.blend
    afterwards = fit_calibration(labels, alone.apply(model, of_cnn), patients, "temperature", "x")
    assert both.temperature == afterwards.temperature
    assert (both.apply(model, of_cnn) == afterwards.apply(alone.apply(model, of_cnn))).all()


def test_a_class_with_too_few_patients_is_not_blended():
    labels, model, of_cnn, patients = two_models()
    labels[:, 1] = np.isin(patients, ["P0", "P1"])
    fitted = fit_calibration(labels, model, patients, "temperature", "x", of_cnn)
    assert set(fitted.blend) == set(CLASSES) - {"epidural"}
    assert (fitted.apply(model, of_cnn)[:, 1] == model[:, 1]).all()


def test_a_blend_without_the_slice_cnn_is_an_error_that_names_the_command():
    _, model, _, _ = two_models(20)
    with pytest.raises(DataError, match="ichpipe finetune"):
        blended(0.5).apply(model)


def test_the_text_names_the_shares_and_the_aucs():
    labels, model, of_cnn, patients = two_models()
    fitted = fit_calibration(labels, model, patients, "none", "x", of_cnn)
    text = calibration_text(calibration_scores(labels, model, fitted, of_cnn)[0])
    assert max(map(len, text.splitlines())) <= 80
    assert f"epidural is {fitted.blend['epidural']:.2f} model" in text


def test_a_file_without_a_blend_is_what_it_was_and_one_with_it_comes_back(folder):
    mark = digest_of_file(folder / "model.safetensors")
    write_calibration(folder, fit_calibration(*cases(400), "temperature", mark))
    assert "blend" not in json.loads((folder / "calibration.json").read_text())
    labels, model, of_cnn, patients = two_models(400)
    made = fit_calibration(labels, model, patients, "temperature", mark, of_cnn)
    write_calibration(folder, made)
    assert read_calibration(folder) == made
    document = made.model_dump(mode="json") | {"blend": {"any": 1.5}}
    (folder / "calibration.json").write_text(json.dumps(document))
    with pytest.raises(WeightsError, match=r"blend\.any"):
        read_calibration(folder)


@pytest.mark.slow
def test_predict_blends_as_evaluate_does(branch, tmp_path):
    branch.steps(("--set", "evaluate.blend=true", "evaluate"))
    folder = branch.artifacts / "finetuned"
    calibration = read_calibration(folder)
    assert calibration.blend == {}  # no class has enough patients
    fixed = calibration.model_copy(update={"blend": dict.fromkeys(CLASSES, 0.5)})
    write_calibration(folder, fixed)
    table = pd.read_parquet(folder / "predictions.parquet")
    table = table[table["split"] == "test"]
    result = branch("predict", branch.data / "dicom", "--out", tmp_path)
    assert "share of the slice CNN: any 0.50, epidural 0.50" in " ".join(result.output.split())
    joined = table.merge(pd.read_csv(tmp_path / "slices.csv"), on="sop_uid", suffixes=("", "_predicted"))
    expected = fixed.apply(joined[list(CLASSES)].to_numpy(), joined[SLICE_COLUMNS].to_numpy())
    np.testing.assert_allclose(joined[[f"{name}_predicted" for name in CLASSES]], expected, rtol=1e-6, atol=1e-9)
    document = json.loads((tmp_path / "predictions.json").read_text())
    assert document["calibration"]["blend"] == dict.fromkeys(CLASSES, 0.5)
