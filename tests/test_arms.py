"""Arms of stage two through the front door: kinds, seeds, averages, mirror images, resuming, and their comparison."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from ichpipe.common.artifacts import Artifacts
from ichpipe.common.classes import CLASSES
from ichpipe.features.embedder import SliceEmbedder, SliceInput, predict_held_out
from ichpipe.features.generations import MIRROR, open_features
from ichpipe.features.sequence_dataset import collect_series, predict_rows
from ichpipe.index.slice_index import read_index
from ichpipe.models.sequence import MovingAverage, SequenceEnsemble
from ichpipe.models.weights import load_end_to_end, load_sequence, load_slice_cnn
from ichpipe.params.schema import load_params

ARMS = """
  transformer: {cell: transformer, hidden: 8, heads: 2, layers: 1, epochs: 1, inputs: [embedding, spacing, position]}
  conv: {cell: conv, hidden: 8, layers: 2, kernel: 5, epochs: 1, inputs: [embedding, logits]}
  second: {cell: lstm, hidden: 8, layers: 2, residual: true, epochs: 1, inputs: [embedding, deltas], skip: [embedding]}
  changed: {cell: gru, hidden: 8, layers: 1, epochs: 2, regularize: {reverse_probability: 0.5, stride2_probability: 0.5,
    crop_slices: 10, feature_noise: 0.1, feature_dropout: 0.1}}
  seeds: {cell: gru, hidden: 8, layers: 1, epochs: 3, seeds: 3, average: {seeds: true, epochs: 2, reversed: true}}
  mirrored: {cell: gru, hidden: 8, layers: 1, epochs: 1, average: {mirrored: true}}
"""


@pytest.fixture(scope="module")
def armed(run, tmp_path_factory):
    """The finished run with arms of every kind, extracted with mirror images, trained."""
    made = run.copy(tmp_path_factory.mktemp("armed"))
    text = made.params.read_text().replace("finetune:", ARMS.strip("\n") + "\nfinetune:")
    made.params.write_text(text.replace("chunk_rows: 100,", "chunk_rows: 100, mirror: true,"))
    return made.steps("extract", "fit-sequence")


def opened(run, arm):
    params, artifacts = load_params(run.params), Artifacts(run.artifacts)
    index = read_index(artifacts.index)
    return params, artifacts, index, open_features(params, artifacts, index, params.sequence[arm])


@pytest.mark.slow
def test_every_kind_is_trained_predicts_and_is_scored(armed):
    other = armed("evaluate")
    assert other.exit_code == 0, other.output
    metrics = json.loads(armed.metrics())
    assert len(metrics["sequence"]) == 9
    assert all(0 < one["weighted_log_loss"] < 2 for one in metrics["sequence"].values())


@pytest.mark.parametrize("arm", ["transformer", "second", "seeds", "mirrored", "floor"])
@pytest.mark.slow
def test_what_is_predicted_is_what_the_model_file_gives(armed, arm):
    _, artifacts, index, features = opened(armed, arm)
    model = load_sequence(artifacts.sequence(arm))
    test = index[index["split"] == "test"].reset_index(drop=True)
    wanted = predict_rows(model, collect_series(features, test), len(test), torch.device("cpu"))
    assert armed("evaluate").exit_code == 0
    found = pd.read_parquet(armed.artifacts / "predictions" / f"sequence-{arm}.parquet")
    assert found["sop_uid"].tolist() == test["sop_uid"].tolist()
    np.testing.assert_allclose(found[list(CLASSES)].to_numpy(), wanted, atol=1e-6)


def test_the_kind_of_model_is_what_was_asked_for(armed):
    artifacts = Artifacts(armed.artifacts)
    many = load_sequence(artifacts.sequence("seeds"))
    assert isinstance(many, SequenceEnsemble)
    assert (many.spec.members, many.spec.reversed) == (6, True)  # three seeds, the last two epochs of each
    assert isinstance(load_sequence(artifacts.sequence("floor")), MovingAverage)


def test_seeds_differ_and_each_is_recorded(armed):
    table = pd.read_parquet(armed.artifacts / "sequence" / "seeds" / "predictions.parquet")
    assert sorted(table["seed"].unique()) == [0, 1, 2]
    parts = [part[list(CLASSES)].to_numpy() for _, part in table.groupby("seed")]
    assert not np.allclose(parts[0], parts[1])
    record = json.loads((armed.artifacts / "sequence" / "seeds" / "record.json").read_text())
    assert [one["seed"] for one in record["seeds"]] == [0, 1, 2]


def test_one_more_seed_leaves_the_others_as_they_are(armed, tmp_path):
    other = armed.copy(tmp_path)
    other.params.write_text(armed.params.read_text())
    assert other("--set", "sequence.gru-logits.seeds=3", "fit-sequence", "--arm", "gru-logits").exit_code == 0
    before, after = (
        pd.read_parquet(one.artifacts / "sequence" / "gru-logits" / "predictions.parquet") for one in (armed, other)
    )
    assert sorted(after["seed"].unique()) == [0, 1, 2]
    pd.testing.assert_frame_equal(after[after["seed"] < 2].reset_index(drop=True), before)


def test_mirrored_rows_are_the_mirror_images_embedded(armed):
    _, artifacts, index, features = opened(armed, "mirrored")
    cnn = load_slice_cnn(artifacts.slice_cnn)
    for split in ("train", "test"):
        rows = index[index["split"] == split]
        rows = rows[rows["series_uid"] == rows["series_uid"].iloc[0]]
        (series,) = collect_series(features, rows.reset_index(drop=True))
        cached = series.sources[-1]["embedding"].double().numpy()
        inputs = [SliceInput(*row) for row in rows[["path", "series_uid", "file_digest"]].itertuples(index=False)]
        wanted, _ = SliceEmbedder(cnn, torch.device("cpu"), 50, MIRROR)(inputs)
        plain, _ = SliceEmbedder(cnn, torch.device("cpu"), 50)(inputs)
        np.testing.assert_allclose(cached, wanted, rtol=2.0**-10, atol=1e-4)
        assert not np.allclose(cached, plain, atol=1e-2)


@pytest.mark.slow
def test_mirrored_from_the_cache_equals_mirrored_from_the_images(armed):
    _, artifacts, index, _ = opened(armed, "mirrored")
    assert armed("--set", "finetune.arm=mirrored", "--set", "finetune.learning_rate_cnn=1e-12", "--set",
                 "finetune.learning_rate_sequence=1e-12", "finetune").exit_code == 0  # fmt: skip
    model = load_end_to_end(artifacts.finetuned)
    test = index[index["split"] == "test"].reset_index(drop=True)
    assert armed("evaluate", "--help").exit_code == 0
    cached = pd.read_parquet(artifacts.sequence("mirrored") / "predictions.parquet")
    cached = cached[cached["split"] == "test"][list(CLASSES)].to_numpy()
    np.testing.assert_allclose(predict_held_out(model, test, torch.device("cpu"))[0], cached, atol=2e-3)
    assert armed("finetune").exit_code == 0  # as it was, for the other tests


def test_mirror_images_that_are_not_extracted_are_asked_for(run, capsys):
    message = run.error(capsys, "--set", "sequence.paper.average={mirrored: true}", "fit-sequence", "--arm", "paper")
    assert "extract.mirror" in message


def test_compare_prints_and_writes_the_table(armed):
    said = armed("compare", "--baseline", "floor")
    assert said.exit_code == 0, said.output
    assert "| second " in said.output
    folder = armed.artifacts / "compare"
    found = json.loads((folder / "arms.json").read_text())
    assert [row["arm"] for row in found["arms"]][:3] == ["paper", "gru-logits", "floor"]
    assert found["baseline"] == "floor"
    assert all(warning.startswith("AUC is not defined of ") for warning in found["warnings"])
    assert (folder / "arms.md").read_text().strip() in said.output
    assert (folder / "arms.png").stat().st_size > 10_000


@pytest.mark.slow
def test_runs_of_other_patients_and_stores_are_told_apart(armed, run, tmp_path):
    other = run.fresh(tmp_path / "other")
    assert other("--set", "prepare.seed=5", "prepare").exit_code == 0
    other.steps("fit-slices", "extract")
    assert other("fit-sequence", "--arm", "paper").exit_code == 0
    said = armed("compare", run.artifacts, other.artifacts, "--baseline", f"{run.artifacts}/paper")
    assert said.exit_code == 0, said.output
    assert "not comparable" in said.output
    assert "another embedding store" in said.output


def test_compare_before_any_arm_names_the_command(run, tmp_path, capsys):
    other = run.fresh(tmp_path / "none")
    message = other.error(capsys, "compare")
    assert "ichpipe fit-sequence" in message


@pytest.mark.parametrize("name", ["sequence/paper", "finetuned"])
def test_predictions_of_another_model_are_not_scored(run, tmp_path, capsys, name):
    branch = run.copy(tmp_path)
    own = branch.artifacts / name / "predictions.parquet"
    shutil.copy(branch.artifacts / "sequence" / "gru-logits" / "predictions.parquet", own)
    message = branch.error(capsys, "evaluate")
    assert "does not come from the model beside it" in message
    assert "run: ichpipe f" in message
    own.write_bytes(own.read_bytes()[:500])
    assert "no whole parquet file" in branch.error(capsys, "evaluate")
    own.unlink()
    assert "does not exist" in branch.error(capsys, "evaluate")


def test_a_killed_arm_trains_no_finished_seed_again(run, tmp_path, monkeypatch):
    settings = ["--set", "sequence.paper.seeds=3", "--set", "sequence.paper.epochs=2"]
    whole, killed = run.copy(tmp_path / "whole"), run.copy(tmp_path / "killed")
    assert whole(*settings, "fit-sequence", "--arm", "paper").exit_code == 0
    from ichpipe.stages import fit_sequence
    from ichpipe.training import sequence_trainer

    train_seed, seen = fit_sequence.train_seed, []

    def stop_at_the_third(section, features, data, device, seed, *rest):
        if seed == 2:
            raise KeyboardInterrupt
        return train_seed(section, features, data, device, seed, *rest)

    monkeypatch.setattr(fit_sequence, "train_seed", stop_at_the_third)
    assert killed(*settings, "fit-sequence", "--arm", "paper").exit_code != 0
    monkeypatch.setattr(fit_sequence, "train_seed", train_seed)
    train = sequence_trainer.SequenceFitting.train_epoch
    monkeypatch.setattr(
        sequence_trainer.SequenceFitting,
        "train_epoch",
        lambda self, epoch, position: seen.append((self.seed, epoch)) or train(self, epoch, position),
    )
    assert killed(*settings, "fit-sequence", "--arm", "paper").exit_code == 0
    assert seen == [(2, 1), (2, 2)]
    for name in ("model.safetensors", "predictions.parquet", "history.json"):
        one, other = ((each.artifacts / "sequence" / "paper" / name).read_bytes() for each in (whole, killed))
        assert one == other, name


@pytest.mark.parametrize(("stage", "absent"), [("evaluate", "torch"), ("compare", "torch"), ("fit_sequence", "timm")])
@pytest.mark.slow
def test_what_need_not_wait_does_not(stage, absent):
    code = f"import sys, ichpipe.stages.{stage}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
def test_arms_on_a_gpu_score_like_those_on_the_cpu(armed, tmp_path):
    """Other sums, other bits: the same within what two seeds differ by."""
    other = armed.copy(tmp_path)
    other.params.write_text(armed.params.read_text())
    for arm in ("paper", "transformer", "conv", "second", "changed", "mirrored", "floor"):
        assert other("fit-sequence", "--gpu", "0", "--arm", arm).exit_code == 0
        found, wanted = (
            json.loads((one.artifacts / "sequence" / arm / "record.json").read_text())["val_loss"]
            for one in (other, armed)
        )
        assert found == pytest.approx(wanted, abs=0.02), arm
