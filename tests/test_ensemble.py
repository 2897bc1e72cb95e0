"""Several networks as one model: the mean of their probabilities, in one file, with one calibration."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import WeightsError
from ichpipe.features.embedder import classify_hu
from ichpipe.models.end_to_end import EndToEnd, Ensemble
from ichpipe.models.header import SequenceSpec, read_header
from ichpipe.models.sequence import build_sequence
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.models.weights import load_predictor, save_model
from ichpipe.params.schema import PAPER_WINDOWS
from ichpipe.scoring.calibration import read_calibration
from ichpipe.scoring.heldout_predictions import SLICE_COLUMNS, model_mark, read_predictions, write_predictions

CPU = torch.device("cpu")


def network(seed, **settings):
    torch.manual_seed(seed)
    cnn = SliceCnn(spec_for("resnet10t", PAPER_WINDOWS, 32, 0.0))
    plain = {"cell": "lstm", "hidden": 8, "layers": 1, "bidirectional": True, "dropout": 0.0, "inputs": ("embedding",)}
    return EndToEnd(cnn, build_sequence(SequenceSpec(embedding_dim=cnn.embedding_dim, **plain | settings))).eval()


def probabilities(model, slices=5):
    hu = torch.randint(-100, 300, (slices, 1, 32, 32), generator=torch.Generator().manual_seed(0)).short()
    return [
        torch.sigmoid(logits.double()).numpy() for logits in classify_hu(model, hu, [5.0 * n for n in range(5)], CPU)
    ]


def test_probabilities_are_the_mean_over_the_networks_in_any_order():
    networks = [network(seed) for seed in range(3)]
    together, of_cnns = probabilities(Ensemble(networks))
    each = [probabilities(one) for one in networks]
    np.testing.assert_allclose(together, np.mean([one for one, _ in each], axis=0), atol=1e-6)
    np.testing.assert_allclose(of_cnns, np.mean([cnn for _, cnn in each], axis=0), atol=1e-6)
    assert np.ptp([one for one, _ in each], axis=0).max() > 1e-3  # they do differ
    np.testing.assert_allclose(probabilities(Ensemble(networks[::-1]))[0], together, atol=1e-6)


@pytest.mark.parametrize("mirrored", [False, True])
def test_an_ensemble_of_equal_networks_is_this_network(mirrored):
    one = network(1, mirrored=mirrored)
    for together, alone in zip(probabilities(Ensemble([one, one, one])), probabilities(one), strict=True):
        np.testing.assert_allclose(together, alone, atol=1e-6)


def test_one_network_alone_is_bit_by_bit_this_network():
    one = network(1)
    for together, alone in zip(probabilities(Ensemble([one])), probabilities(one), strict=True):
        assert (together == alone).all()


@pytest.mark.parametrize("change", [{"hidden": 16}, {"inputs": ("embedding", "logits")}, {"mirrored": True}])
def test_a_network_of_another_description_is_refused(change):
    with pytest.raises(WeightsError, match="network 2 of the ensemble"):
        Ensemble([network(0), network(0, **change)])


def test_the_file_gives_the_same_model_back(tmp_path):
    model = Ensemble([network(0), network(1)])
    digests = [{"finetuned": "a"}, {"slice_cnn": "b", "sequence": "c", "excluded_fold": "1"}]
    save_model(tmp_path, model, {"index": "d"}, digests)
    header, again = read_header(tmp_path), load_predictor(tmp_path)
    assert header.kind == "ensemble"
    assert list(header.networks) == digests
    for one, other in zip(probabilities(model), probabilities(again), strict=True):
        assert (one == other).all()


SETTINGS = ("--set", "fit-slices.folds=2", "--set", "predict.ensemble=true", "--set", "predict.mirror=true")


@pytest.fixture(scope="module")
def ensembled(run, tmp_path_factory):
    """A run with a network per fold: finetune makes the ensemble at its end, and evaluate scores it."""
    other = run.copy(tmp_path_factory.mktemp("ensembled"))
    settings = (*SETTINGS, "--set", "evaluate.blend=true")
    return other.steps(
        *((*settings, command) for command in ("fit-slices", "extract", "fit-sequence", "finetune", "evaluate"))
    )


@pytest.mark.slow
def test_members_are_the_fine_tuned_model_and_the_networks_of_the_folds(ensembled):
    header = read_header(ensembled.artifacts / "ensemble")
    first, *folds = header.networks
    assert first == {"finetuned": model_mark(ensembled.artifacts / "finetuned")}
    assert [made_from["excluded_fold"] for made_from in folds] == ["0", "1"]
    assert {made_from["sequence"] for made_from in folds} == {model_mark(ensembled.artifacts / "sequence" / "paper")}
    for fold, made_from in enumerate(folds):
        assert made_from["slice_cnn"] == model_mark(ensembled.artifacts / "slice-cnn" / "folds" / f"fold-{fold}")
    assert header.sequence.mirrored
    record = json.loads((ensembled.artifacts / "ensemble" / "record.json").read_text())
    assert record["networks"] == list(header.networks)


@pytest.mark.slow
def test_evaluate_scores_and_calibrates_the_whole(ensembled):
    metrics = json.loads(ensembled.metrics())
    assert metrics["ensemble"]["weighted_log_loss"] > 0
    assert "ensemble against finetuned" in metrics["paired"]
    assert metrics["ensemble_calibration"]["fitted_on"]["patients"] > 0
    assert read_calibration(ensembled.artifacts / "ensemble").model_sha256 == model_mark(
        ensembled.artifacts / "ensemble"
    )
    assert "ensemble" in (ensembled.artifacts / "metrics" / "ladder.txt").read_text()
    assert (ensembled.artifacts / "plots" / "reliability_ensemble.png").exists()


def predicted(run, out, *arguments):
    result = run(*arguments, "--out", out)
    assert result.exit_code == 0, result.output
    return pd.read_csv(out / "slices.csv"), result.output


@pytest.mark.slow
def test_predict_gives_what_evaluate_scored(ensembled, tmp_path):
    table = read_predictions(ensembled.artifacts / "ensemble", "")
    slices, _ = predicted(ensembled, tmp_path, *SETTINGS, "predict", ensembled.data / "dicom")
    joined = table.merge(slices, on="sop_uid", suffixes=("", "_predicted"))
    assert len(joined) == len(table)
    calibration = read_calibration(ensembled.artifacts / "ensemble")
    expected = calibration.apply(joined[list(CLASSES)].to_numpy(), joined[SLICE_COLUMNS].to_numpy())
    np.testing.assert_allclose(joined[[f"{name}_predicted" for name in CLASSES]], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_the_exported_folder_is_enough_and_the_cost_is_said(ensembled, tmp_path):
    out = tmp_path / "model"
    ensembled.steps((*SETTINGS, "export", "--out", out))
    card = json.loads((out / "config.json").read_text())
    assert card["kind"] == "ensemble"
    assert len(card["networks"]) == 3
    assert "mean of 3 such networks" in (out / "README.md").read_text()
    own, _ = predicted(ensembled, tmp_path / "own", *SETTINGS, "predict", ensembled.data / "dicom")
    alone = ("--artifacts", tmp_path / "none", "predict", ensembled.data / "dicom", "--model", out)
    again, said = predicted(ensembled, tmp_path / "alone", *alone)
    pd.testing.assert_frame_equal(again, own, check_exact=True)
    assert "ensemble of 3 networks, on the images and on their mirror images: about 6 times" in said
    fine, said = predicted(ensembled, tmp_path / "fine", "predict", ensembled.data / "dicom")
    assert not np.allclose(fine[list(CLASSES)], own[list(CLASSES)])
    assert "times" not in said


@pytest.mark.slow
def test_explain_shows_the_number_of_predict(ensembled, tmp_path):
    own, _ = predicted(ensembled, tmp_path / "own", *SETTINGS, "predict", ensembled.data / "dicom")
    one = own["series_uid"].iloc[0]
    paths = pd.read_parquet(ensembled.artifacts / "index" / "slices.parquet").set_index("series_uid")["path"]
    result = ensembled(*SETTINGS, "explain", *paths[one], "--out", tmp_path / "seen", "--force")
    assert result.exit_code == 0, result.output
    assert "the heat maps are of the first alone" in " ".join(result.output.split())
    shown = pd.read_csv(tmp_path / "seen" / "explained.csv")["probability"].iloc[0]
    studies = pd.read_csv(tmp_path / "own" / "studies.csv").set_index("series_uid")
    assert shown == pytest.approx(studies.loc[one, "any"], rel=1e-4)


@pytest.fixture
def changed(ensembled, tmp_path):
    return ensembled.copy(tmp_path / "changed")


@pytest.mark.slow
def test_a_fold_of_another_network_is_refused(changed, capsys):
    folds = changed.artifacts / "slice-cnn" / "folds"
    shutil.copy(folds / "fold-1" / "model.safetensors", folds / "fold-0" / "model.safetensors")
    message = changed.error(capsys, *SETTINGS, "ensemble")
    assert "was trained without fold 1 of 2, wanted without fold 0" in message
    assert "ichpipe fit-slices" in message


@pytest.mark.slow
def test_an_ensemble_of_former_networks_is_not_scored(changed, capsys):
    shutil.rmtree(changed.artifacts / "finetuned")
    message = changed.error(capsys, *SETTINGS, "evaluate")
    assert "other networks than there are now" in message
    assert "ichpipe ensemble" in message
    changed.steps((*SETTINGS, "ensemble"), (*SETTINGS, "evaluate"))  # the slice CNN with the arm stands first
    assert set(read_header(changed.artifacts / "ensemble").networks[0]) == {"slice_cnn", "sequence"}
    metrics = json.loads(changed.metrics())
    assert metrics["finetuned"] is None
    assert "ensemble against sequence-paper" in metrics["paired"]


@pytest.mark.slow
def test_what_is_not_there_is_asked_for(changed, capsys):
    shutil.rmtree(changed.artifacts / "ensemble")
    for command in (("predict", changed.data / "dicom"), ("export",)):
        assert "run: ichpipe ensemble" in changed.error(capsys, *SETTINGS, *command)
    result = changed(*SETTINGS, "evaluate")
    assert "ensemble: not scored" in result.output
    assert json.loads(changed.metrics())["ensemble"] is None
    assert not list((changed.artifacts / "plots").glob("reliability_ensemble*"))


def test_one_network_without_mirror_images_is_no_ensemble(branch, capsys):
    assert "predict.mirror" in branch.error(capsys, "ensemble")


def test_an_ensemble_has_no_onnx_file(branch, capsys, tmp_path):
    branch.steps(("--set", "predict.mirror=true", "ensemble"))
    message = branch.error(capsys, "--set", "predict.ensemble=true", "export", "--onnx", "--out", tmp_path / "out")
    assert "--set predict.ensemble=false" in message


def test_an_older_table_is_not_blended_and_says_so(branch, capsys, caplog):
    folder = branch.artifacts / "finetuned"
    table = read_predictions(folder, "").drop(columns=SLICE_COLUMNS)
    write_predictions(table, folder, model_mark(folder))
    result = branch("--set", "evaluate.blend=true", "evaluate")
    assert result.exit_code == 0
    assert "is not blended with the slice CNN" in result.output
    assert json.loads(branch.metrics())["calibration"]["blend"] == {}
