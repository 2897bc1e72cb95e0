"""The whole recipe on a tiny phantom, through the front door: files, columns, equalities and errors."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import PROGRAM, set_options

from ichpipe.common.classes import CLASSES
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.index.slice_index import read_index
from ichpipe.inference import predictor


def test_the_contract_s_files_are_there(run):
    names = """index/slices.parquet index/rejected.csv index/summary.json slice-cnn/model.safetensors
        slice-cnn/record.json embeddings.zarr sequence/paper/model.safetensors sequence/paper/record.json
        sequence/gru-logits/model.safetensors
        finetuned/model.safetensors finetuned/record.json metrics/evaluate.json plots/ladder.png plots/study.png
        predictions/slice_cnn.parquet predictions/sequence-paper.parquet predictions/finetuned.parquet"""
    assert [name for name in names.split() if not (run.artifacts / name).exists()] == []


def test_nothing_to_resume_is_left_behind(run):
    files = [path.name for path in (run.artifacts / ".resume").rglob("*") if path.is_file()]
    assert files == ["headers-000000.parquet"]  # what `prepare` need not read again


def test_evaluate_json_follows_the_contract(run):
    metrics = json.loads(run.metrics())
    assert set(metrics["sequence"]) == {"paper", "gru-logits", "floor"}
    for model in (metrics["slice_cnn"], metrics["finetuned"], *metrics["sequence"].values()):
        assert 0 < model["weighted_log_loss"] < 5
        assert set(model["log_loss"]) == set(model["auc"]) == set(model["study_auc"]) == set(CLASSES)
        assert set(model["auc"]["any"]) >= {"value", "ci_low", "ci_high", "n_positive"}
        assert model["weighted_log_loss"] == pytest.approx(
            (sum(model["log_loss"].values()) + model["log_loss"]["any"]) / 7
        )


def test_every_model_is_scored_on_the_same_patients_and_none_of_them_is_trained_on(run, index):
    tables = [pd.read_parquet(path) for path in sorted((run.artifacts / "predictions").glob("*.parquet"))]
    assert len(tables) == 5
    for table in tables[1:]:
        assert table["sop_uid"].tolist() == tables[0]["sop_uid"].tolist()
    others = index.loc[index["split"] != "test", "patient_id"]
    assert not set(tables[0]["patient_id"]) & set(others)
    assert index.groupby("patient_id")["split"].nunique().max() == 1


@pytest.mark.slow
def test_a_second_run_gives_byte_identical_metrics(run, tmp_path):
    again = run.fresh(tmp_path / "two").whole()
    assert again.metrics() == run.metrics()


def test_a_store_made_again_gives_byte_identical_metrics(branch):
    before = branch.metrics()
    shutil.rmtree(branch.artifacts / "embeddings.zarr")
    branch.steps("extract", "fit-sequence", "finetune", "evaluate")
    assert branch.metrics() == before


@pytest.mark.slow
def test_models_of_another_split_are_not_scored(branch, capsys):
    """The patients held out now may be those that the models were trained on."""
    before = branch.metrics()
    branch.steps((*set_options("prepare.seed=5"), "prepare"))
    message = branch.error(capsys, "evaluate")
    assert "another index" in message
    assert "ichpipe fit-slices" in message
    assert branch.metrics() == before
    branch.steps("prepare", "evaluate")  # the old split, byte by byte
    assert branch.metrics() == before


@pytest.mark.slow
def test_a_sequence_model_of_other_embeddings_is_neither_joined_nor_scored(branch, capsys):
    branch.steps((*set_options("fit-slices.seed=9", "fit-slices.epochs=1"), "fit-slices"), "extract")
    for command in ("finetune", "evaluate"):
        message = branch.error(capsys, command)
        assert "another embedding store" in message
        assert "fit-sequence --arm paper" in message
    branch.steps("fit-sequence")
    message = branch.error(capsys, "evaluate")
    assert "another slice CNN and another sequence model" in message
    branch.steps("finetune", "evaluate")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.slow
def test_a_file_that_was_cut_since_prepare_is_named(run, tmp_path, capsys, workers):
    other = run.fresh(tmp_path / "cut", tmp_path / "data")
    shutil.copytree(run.data, other.data)
    other.steps("prepare")
    for path in other.data.rglob("*.dcm"):
        path.write_bytes(path.read_bytes()[:3000])
    message = other.error(capsys, "fit-slices", "--workers", workers)
    assert message.count(".dcm") == 1
    assert "truncated" in message


def test_a_torn_history_is_named(branch, capsys):
    history = branch.artifacts / "slice-cnn" / "history.json"
    history.write_text(history.read_text()[:40])
    assert f"{history} is not complete JSON" in branch.error(capsys, "evaluate")


def test_a_last_batch_of_one_small_slice_is_trained_on(run, index, tmp_path):
    n_train = int((index["split"] == "train").sum())
    size = next(size for size in range(2, n_train) if n_train % size == 1)
    other = run.fresh(tmp_path / "small")
    small = set_options("prepare.size_px=32", f"fit-slices.batch_size={size}", "fit-slices.epochs=1")
    other.steps((*small, "prepare"), (*small, "fit-slices"))


def test_an_output_that_can_not_be_made_is_one_message(run, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    message = run.error(capsys, "predict", run.data, "--out", tmp_path / "file" / "out")
    assert "Not a directory" in message
    assert str(tmp_path / "file") in message


@pytest.mark.parametrize("command", ["finetune", "evaluate"])
def test_models_of_another_split_are_never_scored_or_trained_on(branch, capsys, command):
    """Patients held out now may be among those that the old models were trained on."""
    seed = set_options("prepare.seed=5")
    branch.steps((*seed, "prepare"))
    message = branch.error(capsys, *seed, command)
    assert "was trained on another index" in message
    assert "ichpipe fit-" in message


@pytest.mark.parametrize(
    ("delete", "command", "remedy"),
    [
        ("index", "fit-slices", "prepare"),
        ("slice-cnn", "extract", "fit-slices"),
        ("embeddings.zarr", "fit-sequence", "extract"),
        ("slice-cnn", "finetune", "fit-slices"),
        ("sequence", "finetune", "fit-sequence"),
        ("finetuned", "export", "finetune"),
        ("sequence", "evaluate", "fit-sequence"),
        ("finetuned/model.safetensors", "evaluate", "finetune"),
        ("finetuned/predictions.parquet", "evaluate", "finetune"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_makes_it(branch, capsys, delete, command, remedy):
    path = branch.artifacts / delete
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    message = branch.error(capsys, command)
    assert delete in message
    assert remedy in message


@pytest.mark.parametrize("folder_stays", [True, False])
def test_without_a_fine_tuned_model_the_others_are_scored(branch, folder_stays):
    """What is there is scored as before; what is not there is said, and nothing of a former model stays."""
    before = json.loads(branch.metrics())
    shutil.rmtree(branch.artifacts / "finetuned")
    if folder_stays:
        (branch.artifacts / "finetuned").mkdir()
    result = branch("evaluate")
    assert result.exit_code == 0, result.output
    assert "fine-tuned: not scored and not calibrated" in result.output
    assert "ichpipe finetune" in result.output
    after = json.loads(branch.metrics())
    assert after.pop("finetuned") is after.pop("calibration") is None
    assert set(before["paired"]) - set(after["paired"]) == {
        "finetuned against slice_cnn", "finetuned against sequence-paper",
    }  # fmt: skip
    before["paired"] = {name: before["paired"][name] for name in after["paired"]}
    assert after == {name: before[name] for name in after}
    for stale in ("predictions/finetuned.parquet", "plots/reliability.json", "plots/reliability.png"):
        assert not (branch.artifacts / stale).exists()
    assert not list((branch.artifacts / "finetuned").glob("*"))
    assert "finetuned" not in (branch.artifacts / "plots" / "roc.json").read_text()
    assert branch("compare").exit_code == 0
    assert branch("report", "--gpu", "cpu").exit_code == 0
    page = (branch.artifacts / "report" / "index.html").read_text()
    assert "The fine-tuned model was not scored" in page
    assert "fine-tuned</" not in page  # in no table and no legend


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["fit-sequence", "--arm", "papr"], "arms are paper, gru-logits"),
        (["fit-slices", "--gpu", "gpu7"], "write auto, cpu, a number"),
        (["fit-slices", "--gpu", "99"], "no GPU 99"),
        (["--set", "fit-slices.backbone=resnet51", "fit-slices"], "resnet51"),
        (["--set", "fit-slices.pretrained=nowhere.pth", "fit-slices"], "nowhere.pth"),
        (["extract", "--scheduler", "tcp://127.0.0.1:1"], "no Dask scheduler"),
    ],
)
def test_bad_input_gives_one_message(branch, capsys, monkeypatch, arguments, part):
    monkeypatch.setattr("ichpipe.features.dask_client.CONNECT_SECONDS", 1)
    if "extract" in arguments:
        shutil.rmtree(branch.artifacts / "embeddings.zarr")
    assert part in branch.error(capsys, *arguments)


def test_wrong_usage_exits_with_2(run):
    assert run("prepaer").exit_code == 2
    assert run("phantom").exit_code == 2


@pytest.fixture
def folder_of_one_series(index, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    uid = index.loc[index["split"] == "test", "series_uid"].iloc[0]
    rows = index[index["series_uid"] == uid]
    for number, path in enumerate(rows["path"].sample(frac=1, random_state=0)):
        shutil.copy(path, folder / f"{number}")  # no extension, file names out of order
    return folder, rows


def test_predict_equals_evaluate_and_lists_what_it_left_out(run, folder_of_one_series, tmp_path):
    folder, rows = folder_of_one_series
    (folder / "notes.txt").write_text("no image")
    result = run("predict", folder, "--out", tmp_path / "out", "--kaggle", tmp_path / "out" / "submission.csv")
    assert result.exit_code == 0, result.output
    slices = pd.read_csv(tmp_path / "out" / "slices.csv")
    identifiers = ["patient_id", "study_uid", "series_uid", "sop_uid", "slice_index", "position_mm"]
    assert list(slices.columns) == [*identifiers, *CLASSES]
    assert slices["sop_uid"].tolist() == rows["sop_uid"].tolist()
    assert slices["position_mm"].is_monotonic_increasing
    scored = pd.read_parquet(run.artifacts / "predictions" / "finetuned.parquet").set_index("sop_uid")
    np.testing.assert_allclose(slices[list(CLASSES)], scored.loc[slices["sop_uid"], list(CLASSES)], atol=2e-6)
    studies = pd.read_csv(tmp_path / "out" / "studies.csv")
    assert list(studies.columns) == ["patient_id", "study_uid", "series_uid", "n_slices", *CLASSES]
    np.testing.assert_allclose(studies[list(CLASSES)].iloc[0], slices[list(CLASSES)].max(), atol=2e-6)
    rejected = pd.read_csv(tmp_path / "out" / "rejected.csv")
    assert [Path(path).name for path in rejected["path"]] == ["notes.txt"]
    submission = pd.read_csv(tmp_path / "out" / "submission.csv")
    assert list(submission.columns) == ["ID", "Label"]
    first = rows["sop_uid"].min()
    order = ["epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any"]
    assert submission["ID"].head(6).tolist() == [f"{first}_{name}" for name in order]
    label = submission.set_index("ID")["Label"]
    assert label[f"{first}_any"] == slices.set_index("sop_uid").loc[first, "any"]


def test_a_submission_that_lacks_a_slice_is_refused_and_tables_are_kept(run, folder_of_one_series, tmp_path, capsys):
    _, rows = folder_of_one_series
    folder = tmp_path / "kaggle"
    folder.mkdir()
    for path, uid in zip(rows["path"], rows["sop_uid"], strict=True):
        shutil.copy(path, folder / f"{uid}.dcm")
    victim = sorted(folder.iterdir())[3]
    victim.write_bytes(victim.read_bytes()[:-100])
    target = tmp_path / "out" / "submission.csv"
    arguments = ["predict", folder, "--out", tmp_path / "out", "--kaggle", target]
    message = run.error(capsys, *arguments)
    assert f"1 slices of the submission have no prediction: {victim.stem} (truncated: " in message
    assert "--missing 0.5" in message
    assert not target.exists()
    assert len(pd.read_csv(tmp_path / "out" / "slices.csv")) == len(rows) - 1
    assert run(*arguments, "--missing", 0.25).exit_code == 0
    label = pd.read_csv(target).set_index("ID")["Label"]
    assert len(label) == 6 * len(rows)
    assert (label[[f"{victim.stem}_{name}" for name in CLASSES]] == 0.25).all()
    assert run("predict", folder, "--out", tmp_path / "out", "--missing", 0.25).exit_code == 2


def test_one_series_of_a_study_is_predicted_unless_all_are_asked_for(run, folder_of_one_series, tmp_path):
    folder, rows = folder_of_one_series
    with quiet_pydicom():
        for path in list(folder.iterdir())[: len(rows) // 2]:  # the same slices once more, under another series
            dataset = pydicom.dcmread(path)
            dataset.SOPInstanceUID, dataset.SeriesInstanceUID = f"{dataset.SOPInstanceUID}9", "1.2.3.99"
            dataset.save_as(folder / f"again-{path.name}")
    predict = ("predict", folder, "--out")
    run.steps((*predict, tmp_path / "one"), (*predict, tmp_path / "all", "--all-series"))
    assert len(pd.read_csv(tmp_path / "one" / "studies.csv")) == 1
    assert len(pd.read_csv(tmp_path / "all" / "studies.csv")) == 2
    series = pd.read_csv(tmp_path / "one" / "series.csv").set_index("series_uid")
    assert series["chosen"].to_dict() == {rows["series_uid"].iloc[0]: True, "1.2.3.99": False}
    assert set(pd.read_csv(tmp_path / "one" / "slices.csv")["sop_uid"]) == set(rows["sop_uid"])


def test_a_prediction_that_is_not_a_number_is_left_out_and_said(run, folder_of_one_series, tmp_path, monkeypatch):
    folder, rows = folder_of_one_series
    before = predictor.classify_twice

    def overflow(*arguments, **options):
        logits, cnn_logits, bad = before(*arguments, **options)
        logits = logits.clone()
        logits[2, 3] = np.nan
        return logits, cnn_logits, bad

    monkeypatch.setattr(predictor, "classify_twice", overflow)
    assert run("predict", folder, "--out", tmp_path).exit_code == 0
    assert pd.read_csv(tmp_path / "slices.csv")["sop_uid"].tolist() == rows["sop_uid"].drop(rows.index[2]).tolist()
    assert pd.read_csv(tmp_path / "rejected.csv")["reason"].tolist() == ["its prediction is not a number"]


def test_the_study_score_is_a_parameter(run, folder_of_one_series, tmp_path):
    folder, _ = folder_of_one_series
    assert run("--set", "evaluate.study_score=mean", "predict", folder, "--out", tmp_path).exit_code == 0
    slices, studies = pd.read_csv(tmp_path / "slices.csv"), pd.read_csv(tmp_path / "studies.csv")
    np.testing.assert_allclose(studies[list(CLASSES)].iloc[0], slices[list(CLASSES)].mean(), atol=1e-8)


def test_a_head_in_thin_slices_scores_like_the_same_head_in_thick_ones(run, folder_of_one_series, tmp_path):
    thick, rows = folder_of_one_series
    thin = tmp_path / "thin"
    thin.mkdir()
    parts = 4
    for path in thick.iterdir():
        for part in range(parts):
            with quiet_pydicom():
                dataset = pydicom.dcmread(path)
                x, y, z = map(float, dataset.ImagePositionPatient)
                dataset.ImagePositionPatient = [x, y, z + (part - (parts - 1) / 2) * 5.0 / parts]
                dataset.SOPInstanceUID = f"{dataset.SOPInstanceUID}{part}"
                dataset.save_as(thin / f"{path.name}-{part}")
    run.steps(*(("predict", folder, "--out", tmp_path / f"out-{folder.name}") for folder in (thick, thin)))
    one, other = (pd.read_csv(tmp_path / f"out-{name}" / "studies.csv") for name in ("scans", "thin"))
    assert other["n_slices"][0] == parts * len(rows) == parts * one["n_slices"][0]
    np.testing.assert_allclose(other[list(CLASSES)], one[list(CLASSES)], atol=5e-4)  # windows end within slices


def test_a_zip_archive_is_predicted_like_its_folder(run, folder_of_one_series, tmp_path):
    folder, _ = folder_of_one_series
    packed = shutil.make_archive(str(tmp_path / "scan"), "zip", folder)
    run.steps(*(("predict", path, "--out", tmp_path / name) for name, path in (("folder", folder), ("zip", packed))))
    for name in ("slices.csv", "studies.csv"):
        assert (tmp_path / "folder" / name).read_bytes() == (tmp_path / "zip" / name).read_bytes()


def test_predict_without_a_usable_file_is_an_error(run, tmp_path, capsys):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.txt").write_text("no image")
    assert "none of 1 files" in run.error(capsys, "predict", tmp_path / "scans", "--out", tmp_path / "out")


@pytest.mark.slow
def test_one_command_gives_the_same_and_trains_nothing_twice(run, tmp_path):
    folder = next(path for path in (run.data / "dicom").rglob("*.dcm")).parent
    other, out = run.fresh(tmp_path / "one"), tmp_path / "out"
    once = ("run", "--predict", folder, "--out", out)
    printed = other(*once)
    assert printed.exit_code == 0, printed.output
    assert other.metrics() == run.metrics()
    assert len(pd.read_csv(out / "studies.csv")) > 0
    lost = other.artifacts / "sequence" / "gru-logits" / "model.safetensors"
    lost.unlink()
    others = list(other.artifacts.rglob("model.safetensors"))
    times = [path.stat().st_mtime_ns for path in others]
    other.steps("run")
    assert lost.exists()
    assert [path.stat().st_mtime_ns for path in others] == times
    assert other.metrics() == run.metrics()


def test_run_refuses_half_of_a_prediction_before_it_trains(branch, tmp_path):
    half = branch("run", "--out", tmp_path / "out")
    assert half.exit_code == 2
    assert "--predict and --out belong together" in half.output
    absent = branch("run", "--predict", tmp_path / "none", "--out", tmp_path / "out")
    assert absent.exit_code == 2
    assert "none does not exist" in absent.output


@pytest.mark.slow
def test_cross_validation_scores_every_patient_once_and_goes_on_where_it_was(run, index, tmp_path):
    small = set_options("fit-slices.epochs=1", "sequence.paper.epochs=1", "sequence.gru-logits.epochs=1")
    whole = (*small, "cross-validate")
    other = run.fresh(tmp_path / "cv").steps(whole)
    root = other.artifacts / "cv"
    table = pd.read_parquet(root / "predictions" / "finetuned.parquet")
    assert sorted(table["sop_uid"]) == sorted(index["sop_uid"])
    for number in (0, 1):
        fold = root / f"fold-{number}"
        splits = read_index(fold / "index" / "slices.parquet")
        scored = pd.read_parquet(fold / "predictions" / "finetuned.parquet")
        assert not set(scored["patient_id"]) & set(splits.loc[splits["split"] != "test", "patient_id"])
    arms = json.loads((root / "compare" / "arms.json").read_text())
    assert [row["arm"] for row in arms["arms"]] == ["paper", "gru-logits", "floor"]
    assert arms["n_slices"] == len(index)
    assert all(warning.startswith("AUC is not defined of ") for warning in arms["warnings"])
    metrics = (root / "metrics" / "evaluate.json").read_bytes()
    weights = root / "fold-0" / "slice-cnn" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    other.steps(whole)
    assert weights.stat().st_mtime_ns == before
    assert (root / "metrics" / "evaluate.json").read_bytes() == metrics
    arm = root / "fold-1" / "sequence" / "gru-logits" / "model.safetensors"
    kept = [path for path in (root / "fold-1").rglob("model.safetensors") if path != arm]
    times = [path.stat().st_mtime_ns for path in kept]
    before_arm = arm.read_bytes()
    other.steps((*small, *set_options("sequence.gru-logits.hidden=6"), "cross-validate", "--arms-only"))
    assert arm.read_bytes() != before_arm
    assert [path.stat().st_mtime_ns for path in kept] == times  # one changed arm is all that is trained again
    data = tmp_path / "less"  # other data under the same parameters: fitted anew
    shutil.copytree(run.data, data)
    (data / Path(index["path"].iloc[0]).relative_to(run.data)).unlink()
    other.point_to(data)
    other.steps(whole)
    assert weights.stat().st_mtime_ns > before
    assert len(pd.read_parquet(root / "predictions" / "finetuned.parquet")) == len(index) - 1


@pytest.mark.soak
def test_cross_validation_out_of_fold_ends_with_its_scores(run, index, tmp_path):
    """Each fold's scores are of embeddings by the networks of that fold, which are others in every one."""
    small = set_options("prepare.folds=3", "fit-slices.folds=3", "fit-slices.epochs=1", "sequence.paper.epochs=1")
    root = run.fresh(tmp_path / "cv").steps((*small, "cross-validate")).artifacts / "cv"
    assert json.loads((root / "metrics" / "evaluate.json").read_text())["folds"][2]["n_slices"] > 0
    for name in ("slice_cnn", "sequence-paper", "finetuned"):
        assert sorted(pd.read_parquet(root / "predictions" / f"{name}.parquet")["sop_uid"]) == sorted(index["sop_uid"])


@pytest.mark.slow
def test_a_killed_fit_resumes_to_byte_identical_weights(run, tmp_path):
    fit = (*set_options("fit-slices.epochs=4"), "fit-slices")
    whole = run.fresh(tmp_path / "whole").steps("prepare", fit)
    killed = run.fresh(tmp_path / "killed").steps("prepare")
    process = subprocess.Popen([*PROGRAM, *killed.arguments(*fit)])
    checkpoint = killed.artifacts / ".resume" / "fit-slices.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists(), "the run ended before it could be killed"
    assert not (killed.artifacts / "slice-cnn" / "model.safetensors").exists()
    resumed = killed(*fit)
    assert resumed.exit_code == 0
    assert "going on after epoch" in resumed.output  # starting anew would give the same bytes
    for name in ("model.safetensors", "history.json"):
        model, expected = (each.artifacts / "slice-cnn" / name for each in (killed, whole))
        assert model.read_bytes() == expected.read_bytes()
