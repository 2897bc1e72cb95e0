"""``finetune.out_of_fold``: each network of the folds learns from the patients that it left out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ichpipe.common.artifacts import Artifacts
from ichpipe.common.classes import CLASSES
from ichpipe.features.embedder import predict_held_out
from ichpipe.index.slice_index import read_index
from ichpipe.models.end_to_end import EndToEnd
from ichpipe.models.header import read_header
from ichpipe.models.weights import load_predictor, load_sequence, load_slice_cnn, save_model
from ichpipe.params.schema import load_params
from ichpipe.scoring.heldout_predictions import held_out, known_slices, model_mark, read_predictions
from ichpipe.stages import finetune
from ichpipe.training.end_to_end_trainer import EndToEndFitting

FOLDS = ("--set", "fit-slices.folds=2")
SETTINGS = (*FOLDS, "--set", "finetune.out_of_fold=true", "--set", "finetune.keep=last")
ENSEMBLE = ("--set", "predict.ensemble=true", "--set", "predict.mirror=true")


@pytest.fixture(scope="module")
def before(run, tmp_path_factory):
    """A run with a network per fold, up to stage two."""
    other = run.copy(tmp_path_factory.mktemp("before"))
    shutil.rmtree(other.artifacts / "finetuned", ignore_errors=True)
    return other.steps(*((*FOLDS, command) for command in ("fit-slices", "extract", "fit-sequence")))


@pytest.fixture(scope="module")
def after(before, tmp_path_factory):
    """The same after the last step, with the ensemble made of it, evaluated."""
    other = before.copy(tmp_path_factory.mktemp("after"))
    return other.steps((*SETTINGS, *ENSEMBLE, "finetune"), (*SETTINGS, *ENSEMBLE, "evaluate"))


@pytest.mark.slow
def test_each_network_learns_from_the_patients_that_it_left_out(before, tmp_path, monkeypatch):
    seen, made = [], EndToEndFitting.__init__

    def look(self, model, section, device, train, val, *rest):
        first = next(iter(model.cnn.parameters())).detach().clone()
        seen.append((first, section.seed, {path for series in train for path in series.paths}, len(val)))
        made(self, model, section, device, train, val, *rest)

    monkeypatch.setattr(EndToEndFitting, "__init__", look)
    other = before.copy(tmp_path / "other")
    other.steps((*SETTINGS, "finetune"))
    index = read_index(other.artifacts / "index" / "slices.parquet")
    train = index[index["split"] == "train"]
    assert len(seen) == 2
    for fold, (first, _, paths, val) in enumerate(seen):
        own = load_slice_cnn(other.artifacts / "slice-cnn" / "folds" / f"fold-{fold}")
        assert torch.equal(first, next(iter(own.parameters())))
        assert paths == set(train.loc[train["fold"] == fold, "path"])
        assert val == index.loc[index["split"] == "val", "series_uid"].nunique()
    assert seen[0][1] != seen[1][1]  # other draws


@pytest.mark.slow
def test_the_model_is_the_mean_of_what_they_learned(after):
    folder = after.artifacts / "finetuned"
    header, model = read_header(folder), load_predictor(folder)
    assert header.kind == "ensemble"
    assert [network["learned_fold"] for network in header.networks] == ["0", "1"]
    sequence = load_sequence(after.artifacts / "sequence" / "paper")
    index = read_index(after.artifacts / "index" / "slices.parquet")
    rows, cpu = held_out(index), torch.device("cpu")
    alone = [predict_held_out(network, rows, cpu)[0] for network in model.networks]
    table = read_predictions(folder, "")
    assert table["sop_uid"].tolist() == rows["sop_uid"].tolist()
    np.testing.assert_allclose(table[list(CLASSES)].to_numpy(), np.mean(alone, axis=0), atol=1e-6)
    for fold, (network, probabilities) in enumerate(zip(model.networks, alone, strict=True)):
        cnn = load_slice_cnn(after.artifacts / "slice-cnn" / "folds" / f"fold-{fold}")
        start = predict_held_out(EndToEnd(cnn, sequence), rows, cpu)[0]
        assert np.abs(start - probabilities).max() > 1e-4  # it has learned
        for name, value in network.sequence.named_parameters():
            assert not torch.equal(value, dict(sequence.named_parameters())[name])


@pytest.mark.slow
def test_evaluate_predict_and_the_ensemble_take_it(after, tmp_path):
    metrics = json.loads(after.metrics())
    assert {"finetuned against sequence-paper", "ensemble against finetuned"} <= set(metrics["paired"])
    networks = read_header(after.artifacts / "ensemble").networks
    mark = model_mark(after.artifacts / "finetuned")
    assert list(networks) == [{"finetuned": mark, "learned_fold": fold} for fold in ("0", "1")]
    record = json.loads((after.artifacts / "finetuned" / "record.json").read_text())
    history = json.loads((after.artifacts / "finetuned" / "history.json").read_text())
    assert record["val_loss"] == history[-1]["val_loss"]
    result = after(*SETTINGS, "predict", after.data / "dicom", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    slices = pd.read_csv(tmp_path / "out" / "slices.csv")
    table = read_predictions(after.artifacts / "finetuned", "")
    assert set(table["sop_uid"]) <= set(slices["sop_uid"])


@pytest.mark.slow
def test_the_ladder_scores_what_it_begins_with(before, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import ladder

    run, params = ladder.Run(ladder.BASE, 0, tmp_path), load_params(before.params, ("fit-slices.folds=2",))
    shutil.copytree(before.artifacts, run.pooled.root / "fold-9")
    table = run._score_start(params, 9)
    artifacts, rows = (
        Artifacts(before.artifacts),
        known_slices(read_index(before.artifacts / "index" / "slices.parquet"), "test"),
    )
    sequence = load_sequence(artifacts.sequence("paper"))
    alone = [
        predict_held_out(EndToEnd(load_slice_cnn(artifacts.fold_cnn(fold)), sequence), rows, torch.device("cpu"))[0]
        for fold in (0, 1)
    ]
    assert table["sop_uid"].tolist() == rows["sop_uid"].tolist()
    np.testing.assert_allclose(table[list(CLASSES)].to_numpy(), np.mean(alone, axis=0), atol=1e-6)


@pytest.mark.slow
def test_a_changed_network_of_a_fold_is_noticed(after, tmp_path, capsys):
    other = after.copy(tmp_path / "other")
    overrides = tuple(value for value in SETTINGS if value != "--set")
    params, artifacts = load_params(other.params, overrides), Artifacts(other.artifacts)
    assert finetune.is_done(params, artifacts)
    folder = artifacts.fold_cnn(0)
    made_from, changed = read_header(folder).made_from, load_slice_cnn(folder)
    with torch.no_grad():
        next(iter(changed.parameters())).mul_(1.5)
    save_model(folder, changed, made_from)
    assert not finetune.is_done(params, artifacts)
    message = other.error(capsys, *SETTINGS, "--set", "predict.mirror=true", "ensemble")
    assert "slice CNNs of the folds" in message
    assert "ichpipe finetune" in message


def test_it_needs_networks_of_the_folds(branch, capsys):
    message = branch.error(capsys, "--set", "finetune.out_of_fold=true", "finetune")
    assert "write fit-slices.folds:" in message


@pytest.mark.slow
def test_without_epochs_the_model_is_the_mean_of_the_networks_of_the_folds(before, tmp_path):
    none = (*SETTINGS, *ENSEMBLE, "--set", "finetune.epochs=0")
    other = before.copy(tmp_path / "other").steps((*none, "finetune"), (*none, "evaluate"))
    index, cpu = read_index(other.artifacts / "index" / "slices.parquet"), torch.device("cpu")
    sequence = load_sequence(other.artifacts / "sequence" / "paper")
    cnns = [load_slice_cnn(other.artifacts / "slice-cnn" / "folds" / f"fold-{fold}") for fold in (0, 1)]
    alone = [predict_held_out(EndToEnd(cnn, sequence), held_out(index), cpu)[0] for cnn in cnns]
    table = read_predictions(other.artifacts / "finetuned", "")
    np.testing.assert_allclose(table[list(CLASSES)].to_numpy(), np.mean(alone, axis=0), atol=1e-6)
    history = json.loads((other.artifacts / "finetuned" / "history.json").read_text())
    assert [line["epoch"] for line in history] == [0]
    assert json.loads(other.metrics())["ensemble"]["weighted_log_loss"] > 0
