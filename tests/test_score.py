"""``score --format rsna``: tables in every form, joined by name; what does not match is said."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from score_kit import KAGGLE, error, long_rows, make, score, write_long, write_slices, write_wide

from ichpipe.common.classes import CLASSES, SUBTYPES
from ichpipe.scoring import metrics
from ichpipe.scoring.heldout_predictions import LABELS, make_table, write_table
from ichpipe.stages.cli import cli

RSNA = ("--format", "rsna")
NONE = {"value": None, "ci_low": None, "ci_high": None}


def write_gzip(table, path):
    return write_wide(table, path.with_suffix(".csv.gz"))


def write_parquet(table, path):
    table.to_parquet(path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


FORMS = {"long": write_long, "wide": write_wide, "gz": write_gzip, "slices": write_slices, "parquet": write_parquet}


@pytest.fixture
def tables():
    return make()


@pytest.fixture
def paths(tables, tmp_path):
    """Labels as Kaggle's long table, predictions as a wide one."""
    labels, predictions = tables
    return write_wide(predictions, tmp_path / "p.csv"), write_long(labels, tmp_path / "l.csv")


def loss_by_hand(labels, predictions):
    y, p = (table.set_index("sop_uid").sort_index() for table in (labels, predictions))
    each = -(y[list(CLASSES)] * np.log(p[list(CLASSES)]) + (1 - y[list(CLASSES)]) * np.log(1 - p[list(CLASSES)]))
    return (2 * each["any"].mean() + each[list(SUBTYPES)].mean().sum()) / 7


@pytest.mark.parametrize("labels_form", FORMS)
@pytest.mark.parametrize("predictions_form", FORMS)
def test_every_form_gives_the_figures_of_hand_arithmetic(tables, tmp_path, predictions_form, labels_form):
    labels, predictions = tables
    paths = FORMS[predictions_form](predictions, tmp_path / "p.csv"), FORMS[labels_form](labels, tmp_path / "l.csv")
    found, said = score(*paths, *RSNA)
    assert found["weighted_log_loss"] == pytest.approx(loss_by_hand(labels, predictions), abs=1e-12)
    assert (found["n_slices"], found["n_excluded"]) == (60, 0)
    assert found["auc"]["any"]["n_positive"] == labels["any"].sum()
    assert said == ""


@pytest.mark.parametrize("order", [CLASSES, KAGGLE, CLASSES[::-1]])
def test_shuffled_class_order_changes_nothing_though_by_position_it_would(tables, tmp_path, order):
    labels, predictions = tables
    shuffled = write_wide(predictions, tmp_path / "p.csv", list(order))
    found, _ = score(shuffled, write_wide(labels, tmp_path / "l.csv"), *RSNA)
    assert found["weighted_log_loss"] == pytest.approx(loss_by_hand(labels, predictions))
    for name in CLASSES:
        y, p = (table.set_index("sop_uid")[name].sort_index() for table in (labels, predictions))
        assert found["log_loss"][name] == pytest.approx(-np.log(np.where(y == 1, p, 1 - p)).mean())
    if list(order) != KAGGLE:
        misread = predictions.rename(columns=dict(zip(order, KAGGLE, strict=True)))
        assert abs(loss_by_hand(labels, misread) - found["weighted_log_loss"]) > 0.01


def test_order_of_rows_changes_nothing_not_even_the_intervals(tables, tmp_path):
    labels, predictions = tables
    first, _ = score(write_wide(predictions, tmp_path / "p.csv"), write_long(labels, tmp_path / "l.csv"), *RSNA)
    mixed = [table.sample(frac=1, random_state=5) for table in (predictions, labels)]
    second, _ = score(write_wide(mixed[0], tmp_path / "p.csv"), write_long(mixed[1], tmp_path / "l.csv"), *RSNA)
    assert first == second


def test_one_half_everywhere_scores_ln_2(tables, tmp_path):
    labels, predictions = tables
    predictions[list(CLASSES)] = 0.5
    found, _ = score(write_long(predictions, tmp_path / "p.csv"), write_long(labels, tmp_path / "l.csv"), *RSNA)
    assert found["weighted_log_loss"] == pytest.approx(0.693147, abs=5e-7)
    assert found["auc"]["any"]["value"] == 0.5
    assert found["calibration_error"]["any"] == pytest.approx(abs(0.5 - labels["any"].mean()))


def test_certain_and_wrong_is_clipped_as_in_the_competition(tables, tmp_path):
    labels, predictions = tables
    predictions = labels.assign(**{name: 1 - labels[name] for name in CLASSES})
    found, _ = score(write_long(predictions, tmp_path / "p.csv"), write_long(labels, tmp_path / "l.csv"), *RSNA)
    assert found["weighted_log_loss"] == pytest.approx(-math.log(1e-15), rel=1e-3)


def test_table_of_evaluate_scores_as_evaluate_does(tables, tmp_path):
    labels, predictions = tables
    index = labels.assign(split="test", slice_index=0, position_mm=0.0).sort_values("sop_uid", ignore_index=True)
    values = predictions.set_index("sop_uid").loc[index["sop_uid"], list(CLASSES)].to_numpy()
    table = make_table(index, values)
    write_table(table, tmp_path / "finetuned.parquet")
    found, _ = score(tmp_path / "finetuned.parquet", tmp_path / "finetuned.parquet", *RSNA)
    groups = index["patient_id"].to_numpy(), index["series_uid"].to_numpy()
    expected = metrics.score(table[LABELS].to_numpy(), values, *groups, bootstrap_samples=40, confidence=0.95, seed=0)
    assert {name: found[name] for name in expected} == json.loads(json.dumps(expected))
    assert found["resampled_by"] == "patient_id"


def test_widest_group_named_for_every_slice_is_resampled(tables, tmp_path):
    labels, predictions = tables
    long, wide = write_long(labels, tmp_path / "l.csv"), write_wide(predictions, tmp_path / "w.csv")
    by_patient, _ = score(write_slices(predictions, tmp_path / "p.csv"), long, *RSNA)
    assert (by_patient["resampled_by"], by_patient["n_groups"], by_patient["n_studies"]) == ("patient_id", 6, 12)
    assert by_patient["study_auc"]["epidural"]["value"] is not None
    from_labels, _ = score(wide, write_slices(labels, tmp_path / "ls.csv"), *RSNA)
    assert from_labels["auc"] == by_patient["auc"]
    unnamed = predictions.assign(patient_id="", study_uid="")
    by_series, _ = score(write_slices(unnamed, tmp_path / "p.csv"), long, *RSNA)
    assert (by_series["resampled_by"], by_series["n_groups"]) == ("series_uid", 12)
    by_slice, _ = score(wide, long, *RSNA)
    assert (by_slice["resampled_by"], by_slice["n_groups"], by_slice["n_studies"]) == ("slice", 60, None)
    assert by_slice["auc"]["any"]["value"] == by_patient["auc"]["any"]["value"]
    assert by_slice["auc"]["any"]["ci_low"] != by_patient["auc"]["any"]["ci_low"]
    assert by_slice["study_auc"]["any"] == {**NONE, "n_positive": None}


def test_a_class_without_positives_has_null(tables, tmp_path):
    labels, predictions = tables
    labels["epidural"] = 0
    labels["any"] = labels[list(SUBTYPES)].max(axis=1)
    found, _ = score(write_slices(predictions, tmp_path / "p.csv"), write_long(labels, tmp_path / "l.csv"), *RSNA)
    assert found["auc"]["epidural"] == {**NONE, "n_positive": 0}
    assert found["study_auc"]["epidural"] == {**NONE, "n_positive": 0}
    assert found["average_precision"]["epidural"] is None
    assert found["log_loss"]["epidural"] > 0


def test_missing_prediction_is_an_error_and_filled_only_if_asked(tables, tmp_path, capsys):
    labels, predictions = tables
    gone = sorted(predictions["sop_uid"][:3])
    paths = write_wide(predictions[3:], tmp_path / "p.csv"), write_long(labels, tmp_path / "l.csv")
    message = error(capsys, *paths, *RSNA)
    assert "3 of 60 labelled slices" in message
    assert gone[0] in message
    assert "--missing" in message
    found, said = score(*paths, *RSNA, "--missing", "0.5")
    filled = predictions.copy()
    filled.loc[:2, list(CLASSES)] = 0.5
    assert found["weighted_log_loss"] == pytest.approx(loss_by_hand(labels, filled))
    report = found["predictions"]
    assert (report["n_slices_without_prediction"], report["filled_with"]) == (3, 0.5)
    assert report["first_of_slices_without_prediction"] == gone[0]
    assert "3 labelled slices have no prediction" in said
    assert "scored as 0.5" in said


def test_one_missing_class_of_the_long_form_is_named(tables, tmp_path, capsys):
    labels, predictions = tables
    rows = [row for row in long_rows(predictions) if not row.startswith(f"{predictions['sop_uid'][7]}_subdural")]
    paths = write_long(None, tmp_path / "p.csv", rows), write_long(labels, tmp_path / "l.csv")
    message = error(capsys, *paths, *RSNA)
    assert f"1 of 60 labelled slices, first of them {predictions['sop_uid'][7]} (subdural)" in message
    found, _ = score(*paths, *RSNA, "--missing", "0.25")
    filled = predictions.copy()
    filled.loc[7, "subdural"] = 0.25
    assert found["weighted_log_loss"] == pytest.approx(loss_by_hand(labels, filled))


def test_tables_of_other_slices_are_an_error_even_with_a_value_to_fill(tables, tmp_path, capsys):
    labels, predictions = tables
    strange = predictions.assign(sop_uid="X" + predictions["sop_uid"])
    paths = write_wide(strange, tmp_path / "p.csv"), write_long(labels, tmp_path / "l.csv")
    assert "belong together" in error(capsys, *paths, *RSNA, "--missing", "0.5")


def test_predictions_without_label_are_counted_and_not_scored(tables, tmp_path):
    labels, predictions = tables
    known = labels[5:]
    found, said = score(write_wide(predictions, tmp_path / "p.csv"), write_long(known, tmp_path / "l.csv"), *RSNA)
    rest = predictions[predictions["sop_uid"].isin(known["sop_uid"])]
    assert found["weighted_log_loss"] == pytest.approx(loss_by_hand(known, rest))
    assert found["predictions"]["n_slices_without_label"] == 5
    assert "5 slices have no label" in said


def test_slices_without_known_labels_are_left_out_and_counted(tables, tmp_path):
    labels, predictions = tables
    unknown = labels.astype(dict.fromkeys(CLASSES, float))
    unknown.loc[:3, "subdural"] = np.nan
    paths = write_wide(predictions, tmp_path / "p.csv"), write_parquet(unknown, tmp_path / "l")
    found, said = score(*paths, *RSNA)
    assert (found["n_slices"], found["n_excluded"]) == (56, 4)
    assert "4 slices left out" in said
    long = write_long(None, tmp_path / "l.csv", long_rows(labels)[:-1])  # the last slice lacks its `any`
    assert score(paths[0], long, *RSNA)[0]["n_excluded"] == 1


def test_any_that_is_not_the_maximum_makes_a_slice_unknown(tables, tmp_path):
    labels, predictions = tables
    labels.loc[4, list(CLASSES)] = [0, 1, 0, 0, 0, 0]
    for write in (write_long, write_wide):
        found, said = score(write_wide(predictions, tmp_path / "p.csv"), write(labels, tmp_path / "l.csv"), *RSNA)
        assert found["labels"]["n_inconsistent_any_slices"] == found["n_excluded"] == 1
        assert labels["sop_uid"][4] in said


@pytest.mark.parametrize("write", [write_long, write_wide])
@pytest.mark.parametrize("which", ["predictions", "labels"])
def test_rows_that_repeat_are_counted_and_rows_that_contradict_are_refused(tables, tmp_path, capsys, write, which):
    labels, predictions = tables
    changed = predictions if which == "predictions" else labels
    paths = {"predictions": tmp_path / "p.csv", "labels": tmp_path / "l.csv"}
    write_wide(predictions, paths["predictions"])
    write_long(labels, paths["labels"])
    once, _ = score(*paths.values(), *RSNA)

    repeated = pd.concat([changed, changed[10:12]])
    rows = long_rows(changed) + long_rows(changed[10:12])
    write_long(None, paths[which], rows) if write is write_long else write_wide(repeated, paths[which])
    found, said = score(*paths.values(), *RSNA)
    count = 12 if write is write_long else 2
    assert found["weighted_log_loss"] == once["weighted_log_loss"]
    assert found[which]["n_duplicate_rows"] == count
    assert f"{which}: {count} rows repeat" in said

    other = changed[10:11].assign(subdural=1 - changed["subdural"][10])
    rows = long_rows(changed) + long_rows(other)
    write_long(None, paths[which], rows) if write is write_long else write_wide(
        pd.concat([changed, other]), paths[which]
    )
    message = error(capsys, *paths.values(), *RSNA)
    assert "contradicts another row" in message
    assert changed["sop_uid"][10] in message
    assert str(paths[which]) in message


def test_out_holds_what_is_printed_and_never_a_table(paths, tmp_path, capsys):
    target = tmp_path / "deep" / "m.json"
    found, _ = score(*paths, *RSNA, "--out", target)
    assert json.loads(target.read_text()) == found
    assert [path.name for path in target.parent.iterdir()] == ["m.json"]
    before = paths[0].read_bytes()
    assert "one of the tables" in error(capsys, *paths, *RSNA, "--out", paths[0])
    assert paths[0].read_bytes() == before
    paths[1].write_text("ID,Label\nx,1\n")
    error(capsys, *paths, *RSNA, "--out", tmp_path / "other.json")
    assert not (tmp_path / "other.json").exists()


def test_an_option_for_scans_is_wrong_usage_with_slices(paths):
    done = CliRunner().invoke(cli, ["score", *map(str, paths), *RSNA, "--pool", "max"])
    assert done.exit_code == 2
    assert "--format cq500" in done.stderr


def test_against_is_the_paired_bootstrap_and_positive_where_predictions_are_better(tables, tmp_path):
    labels, worse = tables
    truth = write_slices(labels, tmp_path / "l.csv")
    aligned = labels.set_index("sop_uid").loc[worse["sop_uid"], list(CLASSES)].to_numpy()
    better = worse.assign(**dict(zip(CLASSES, (0.7 * aligned + 0.3 * worse[list(CLASSES)]).to_numpy().T, strict=True)))
    files = write_wide(better, tmp_path / "b.csv"), write_long(worse, tmp_path / "w.csv")
    found, _ = score(files[0], truth, *RSNA, "--against", files[1])
    gain = loss_by_hand(labels, worse) - loss_by_hand(labels, better)
    assert found["against"]["weighted_log_loss"]["value"] == pytest.approx(gain, rel=1e-4)
    assert found["against"]["weighted_log_loss"]["ci_low"] > 0 < found["against"]["auc_any"]["value"]
    reverse, _ = score(files[1], truth, *RSNA, "--against", files[0])
    assert reverse["against"]["weighted_log_loss"]["ci_high"] < 0


def test_the_bootstrap_is_that_of_the_parameters(paths):
    first, _ = score(*paths, *RSNA)
    assert (first["bootstrap_samples"], first["confidence"], first["seed"]) == (40, 0.95, 0)
    done = CliRunner().invoke(cli, ["--set", "evaluate.seed=1", "score", *map(str, paths), *RSNA])
    second = json.loads(done.stdout)
    assert (second["bootstrap_samples"], second["seed"]) == (1000, 1)
    assert first["auc"]["any"]["ci_low"] != second["auc"]["any"]["ci_low"]


@pytest.mark.real_data
def test_real_stage_1_labels_one_half_and_prevalence(real_data, tmp_path):
    parts = [pd.read_csv(real_data / f"tables/rsna/stage1_train_part{part}.csv.gz") for part in range(4)]
    labels = pd.concat(parts, ignore_index=True)
    labels.to_csv(tmp_path / "l.csv.gz", index=False)
    half = labels.assign(**dict.fromkeys(CLASSES, 0.5)).sample(frac=1, random_state=0)
    half.to_csv(tmp_path / "half.csv", index=False)
    found, said = score(tmp_path / "half.csv", tmp_path / "l.csv.gz", *RSNA)
    assert found["weighted_log_loss"] == pytest.approx(0.693147, abs=5e-7)
    assert (found["n_slices"], said) == (337_129, "")

    # By hand: counts of positives, entropy of each prevalence, weights 2, 1, 1, 1, 1, 1 over 7.
    total = 0.0
    for name in CLASSES:
        share = int(labels[name].sum()) / 337_129
        entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
        total += (2 if name == "any" else 1) * entropy
        half[name] = share
    half.to_csv(tmp_path / "prevalence.csv", index=False)
    found, _ = score(tmp_path / "prevalence.csv", tmp_path / "l.csv.gz", *RSNA)
    assert found["weighted_log_loss"] == pytest.approx(total / 7, rel=1e-12)
    assert found["weighted_log_loss"] == pytest.approx(0.23196, abs=0.0005)  # 0.23196 is that of all eight parts
    assert max(found["calibration_error"].values()) < 1e-9


@pytest.mark.real_data
def test_real_slices_in_kaggles_own_table(real_data):
    path = real_data / "rsna_real_slices" / "stage_2_train.csv"
    found, _ = score(path, path, *RSNA)
    assert found["n_slices"] == 5
    assert found["weighted_log_loss"] == pytest.approx(0.0, abs=1e-14)
