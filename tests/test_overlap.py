"""The paper's split from files to figures: patients on both sides are not trained on, and scored apart."""

import json

import pandas as pd
import pytest

from ichpipe.index.slice_index import read_index
from ichpipe.params.schema import EvaluateParams
from ichpipe.scoring.model_ladder import ladder_text, score_all


@pytest.fixture(scope="module")
def stage1(run, index, tmp_path_factory):
    """The tiny run, its test set named by a table that holds one series of a patient who has two."""
    patients = index.drop_duplicates("series_uid").groupby("patient_id")["series_uid"].agg(list)
    twice = patients[patients.str.len() > 1]
    assert len(twice)
    once = patients[patients.str.len() == 1]
    labels = index.groupby("series_uid")["any"].max()
    sick, healthy = ([uids[0] for uids in once if labels[uids[0]] == state] for state in (1.0, 0.0))
    tested = [twice.iloc[0][0], *sick[:2], *healthy[:2]]
    folder = tmp_path_factory.mktemp("stage1")
    table = folder / "test.csv"
    index.loc[index["series_uid"].isin(tested), ["sop_uid"]].to_csv(table, index=False)
    other = run.fresh(folder / "run")
    text = other.params.read_text().replace("prepare: {", f"prepare: {{split: stage1, test_slices: {table}, ")
    other.params.write_text(text)
    return other.whole(), twice.index[0]


@pytest.mark.slow
def test_nothing_is_learned_from_a_patient_who_is_scored(stage1):
    run, patient = stage1
    index = read_index(run.artifacts / "index/slices.parquet")
    assert index.loc[index["patient_id"] == patient, "split"].isin(["train", "val"]).sum() == 0
    left_out = int(index["split"].isna().sum())
    assert left_out > 0
    summary = json.loads((run.artifacts / "index/summary.json").read_text())
    tested = index[(index["patient_id"] == patient) & (index["split"] == "test")]
    assert summary["overlap"] == {
        "patients": 1, "slices_left_out_of_training": left_out, "slices_in_test": len(tested)
    }  # fmt: skip
    assert summary["test_slices_without_file"] == 0


def test_models_are_scored_with_and_without(stage1):
    run, patient = stage1
    metrics = json.loads(run.metrics())
    table = pd.read_parquet(run.artifacts / "predictions/finetuned.parquet")
    assert metrics["overlap"] == {"patients": 1, "slices_in_test": int((table["patient_id"] == patient).sum())}
    for model in (metrics["slice_cnn"], metrics["finetuned"], *metrics["sequence"].values()):
        assert model["without_overlap"]["n_slices"] == model["n_slices"] - metrics["overlap"]["slices_in_test"]
        assert model["without_overlap"]["weighted_log_loss"] != model["weighted_log_loss"]
    ladder = (run.artifacts / "metrics/ladder.txt").read_text()
    model = metrics["finetuned"]
    without, both = model["without_overlap"]["weighted_log_loss"], model["weighted_log_loss"]
    assert f"fine-tuned {without:.4f} (with {both:.4f})" in ladder
    assert f"without the 1 patients ({metrics['overlap']['slices_in_test']} slices)" in ladder


def test_without_overlap_nothing_is_said_of_it(run):
    metrics = json.loads(run.metrics())
    assert "overlap" not in metrics
    assert "without_overlap" not in metrics["finetuned"]


def test_cross_validation_refuses_the_split(stage1, capsys):
    run, _ = stage1
    assert "prepare.split must be patient-kfold" in run.error(capsys, "cross-validate")


@pytest.fixture
def scored(run):
    """Tables of predictions, parameters and arm: the arguments of `score_all`."""
    tables = {path.stem: pd.read_parquet(path) for path in sorted((run.artifacts / "predictions").glob("*.parquet"))}
    arm = next(name for name in tables if name.startswith("sequence-")).removeprefix("sequence-")
    return tables, EvaluateParams(bootstrap_samples=10), arm


def test_patients_who_are_not_scored_are_no_overlap(scored):
    assert score_all(*scored, frozenset({"nobody"})) == score_all(*scored)


def test_a_ladder_without_anybody_left_says_so(scored):
    metrics = score_all(*scored, frozenset(scored[0]["finetuned"]["patient_id"]))
    assert metrics["finetuned"]["without_overlap"] is None
    assert "(not trained on): nobody is left" in ladder_text(metrics)
