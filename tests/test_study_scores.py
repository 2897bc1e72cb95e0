"""Figures of any studies from tables."""

import json

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from ichpipe.common.classes import CLASSES
from ichpipe.index.cq500_reads import ScanTable, scan_name
from ichpipe.scoring.score_cq500 import score_scans
from ichpipe.stages.cli import cli, main

COUNT = 80


def tables(folder, *, classes=CLASSES, known=1.0, seed=0):
    """Predictions in the form of studies.csv, labels by study; some labels empty."""
    generator = np.random.default_rng(seed)
    true = (generator.random((COUNT, 6)) < 0.3).astype(float)
    true[:, 0] = true[:, 1:].max(axis=1)
    found = np.clip(0.4 * true + 0.6 * generator.random((COUNT, 6)), 0, 1)
    names = [f"T{number}" for number in range(COUNT)]
    studies = pd.DataFrame(found, columns=list(CLASSES)).assign(
        patient_id=[f"P{number}" for number in range(COUNT)], study_uid=names, series_uid=["S" + name for name in names]
    )
    labels = pd.DataFrame(true, columns=list(CLASSES))[list(classes)]
    labels = labels.mask(pd.DataFrame(generator.random(labels.shape) > known, columns=labels.columns))
    studies.sample(frac=1, random_state=1).to_csv(folder / "studies.csv", index=False)
    labels.assign(study_uid=names).sample(frac=1, random_state=2).to_csv(folder / "labels.csv", index=False)
    return true, found, labels


def scored(folder, *options, said=""):
    arguments = ["score", str(folder / "studies.csv"), str(folder / "labels.csv"), "--format", "studies", *options]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert said in result.stderr
    return json.loads(result.stdout)


def error_of(folder, capsys, *options):
    with pytest.raises(SystemExit) as stop:
        main(["score", str(folder / "studies.csv"), str(folder / "labels.csv"), "--format", "studies", *options])
    assert stop.value.code == 1
    return capsys.readouterr().err


def test_with_all_labels_known_the_figures_are_those_of_scans(tmp_path):
    true, found, _ = tables(tmp_path)
    result = scored(tmp_path)
    names = pd.Index([scan_name(number) for number in range(COUNT)])
    frames = [pd.DataFrame(values, index=names, columns=list(CLASSES)) for values in (found, true)]
    expected = score_scans(
        *(ScanTable("t", frame, {}) for frame in frames), bootstrap_samples=1000, confidence=0.95, seed=0
    )
    assert result["weighted_log_loss"] == pytest.approx(expected["weighted_log_loss"])
    for name in CLASSES:
        assert result["auc"][name]["value"] == pytest.approx(expected["auc"][name]["value"])
        assert result["auc"][name]["n_positive"] == expected["auc"][name]["n_positive"]
        assert result["auc"][name]["ci_low"] < result["auc"][name]["value"] < result["auc"][name]["ci_high"]
        for kind in ("log_loss", "brier", "calibration_error"):
            assert result[kind][name] == pytest.approx(expected[kind][name])
        assert result["delong"][name] == pytest.approx(expected["delong"][name])


def test_each_class_is_scored_where_it_is_known(tmp_path):
    true, found, labels = tables(tmp_path, known=0.7)
    result = scored(tmp_path)
    for column, name in enumerate(CLASSES[1:], 1):
        known = labels[name].notna().to_numpy()
        assert result["auc"][name]["n_positive"] == int(true[known, column].sum())
        assert result["auc"][name]["n_negative"] == int((true[known, column] == 0).sum())
        assert result["brier"][name] == pytest.approx(np.square(found[known, column] - true[known, column]).mean())
    assert 0 < result["n_studies_with_all_labels"] < COUNT


def test_a_class_without_labels_has_no_figures(tmp_path):
    tables(tmp_path, classes=("any",))
    result = scored(tmp_path)
    assert result["weighted_log_loss"] is None
    assert result["auc"]["any"]["value"] > 0.5
    for name in CLASSES[1:]:
        assert result["auc"][name]["value"] is result["log_loss"][name] is result["delong"][name] is None


def test_what_does_not_match_is_counted_or_filled(tmp_path):
    tables(tmp_path)
    studies = pd.read_csv(tmp_path / "studies.csv").sort_values("study_uid")
    studies.iloc[5:].to_csv(tmp_path / "studies.csv", index=False)
    result = scored(tmp_path)
    assert (result["n_studies"], result["predictions"]["n_studies_without_prediction"]) == (COUNT - 5, 5)
    assert scored(tmp_path, "--missing", "0.5")["n_studies"] == COUNT


def test_two_series_of_a_study_are_pooled_only_if_asked(tmp_path, capsys):
    tables(tmp_path)
    studies = pd.read_csv(tmp_path / "studies.csv")
    again = studies.assign(series_uid="again", **dict.fromkeys(CLASSES, 0.0))
    pd.concat([studies, again]).to_csv(tmp_path / "studies.csv", index=False)
    assert "names one study_uid a second time" in error_of(tmp_path, capsys)
    one, mean = scored(tmp_path, "--pool", "max"), scored(tmp_path, "--pool", "mean")
    studies.to_csv(tmp_path / "studies.csv", index=False)
    assert one["brier"] == scored(tmp_path)["brier"] != mean["brier"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s, labels: (s, labels.rename(columns={"study_uid": "sop_uid"})), "labels are by sop_uid, not by study"),
        (lambda s, labels: (s.drop(columns="study_uid"), labels), "lacks study_uid; studies.csv of predict"),
        (lambda s, labels: (s.assign(any=1.5), labels), "line 2: column any is no probability"),
        (lambda s, labels: (s, labels.assign(study_uid="X" + labels["study_uid"])), "no prediction for any study_uid"),
    ],
)
def test_wrong_tables_are_named(tmp_path, capsys, change, complaint):
    tables(tmp_path)
    studies, labels = change(pd.read_csv(tmp_path / "studies.csv"), pd.read_csv(tmp_path / "labels.csv"))
    studies.to_csv(tmp_path / "studies.csv", index=False)
    labels.to_csv(tmp_path / "labels.csv", index=False)
    assert complaint in error_of(tmp_path, capsys)


def give_patients(folder, patients):
    studies = pd.read_csv(folder / "studies.csv", dtype={"patient_id": str}).sort_values("study_uid")
    studies.assign(patient_id=patients).to_csv(folder / "studies.csv", index=False)


@pytest.mark.parametrize("studies_each", [2, 5, "one pair", "some without a PatientID"])
def test_patients_with_several_studies_have_no_interval_of_independent_cases(tmp_path, studies_each):
    """DeLong's and Clopper and Pearson's intervals would be too narrow; the bootstrap draws patients."""
    tables(tmp_path)
    numbers = np.arange(COUNT) // (studies_each if isinstance(studies_each, int) else 1)
    if not isinstance(studies_each, int):
        numbers[1] = numbers[0]
    patients = [f"P{number}" for number in numbers]
    if studies_each == "some without a PatientID":
        patients[-3:] = [""] * 3
    give_patients(tmp_path, patients)
    result = scored(tmp_path, said="no DeLong and no exact intervals of 6 classes")
    assert result["resampled_by"] == "patient_id"
    for name in CLASSES:
        assert result["delong"][name] is None
        assert "patients with several studies" in result["no_exact_intervals"][name]
        assert result["auc"][name]["ci_low"] < result["auc"][name]["value"] < result["auc"][name]["ci_high"]
        for point in result["operating_points"][name].values():
            assert point["sensitivity_ci"] is point["specificity_ci"] is None
            assert 0 <= point["sensitivity"] <= 1


def test_a_class_that_is_known_of_one_study_each_keeps_its_intervals(tmp_path):
    tables(tmp_path)
    give_patients(tmp_path, [f"P{number // 2}" for number in range(COUNT)])
    labels = pd.read_csv(tmp_path / "labels.csv").sort_values("study_uid").astype(object)
    labels.loc[np.arange(COUNT) % 2 == 1, "subdural"] = None
    labels.to_csv(tmp_path / "labels.csv", index=False)
    result = scored(tmp_path)
    assert result["delong"]["subdural"] is not None
    assert set(result["no_exact_intervals"]) == set(CLASSES) - {"subdural"}


def test_without_patients_it_is_said_that_studies_are_drawn(tmp_path):
    tables(tmp_path)
    pd.read_csv(tmp_path / "studies.csv").drop(columns="patient_id").to_csv(tmp_path / "studies.csv", index=False)
    result = scored(tmp_path)
    assert result["resampled_by"] == "study_uid"
    assert result["delong"]["any"]
    assert result["no_exact_intervals"] == {}
