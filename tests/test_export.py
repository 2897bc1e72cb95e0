"""The model as a folder to hand on: its card, and an ONNX file that computes the same."""

import json

import numpy as np
import pytest
import torch

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import IchpipeError
from ichpipe.models import onnx_export
from ichpipe.models.end_to_end import EndToEnd
from ichpipe.models.header import SequenceSpec
from ichpipe.models.sequence import build_sequence
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.models.weights import load_end_to_end
from ichpipe.params.schema import PAPER_WINDOWS
from ichpipe.scoring.heldout_predictions import model_mark, read_predictions, write_predictions

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

KINDS = {
    "paper": {"cell": "lstm"},
    "second-place": {"cell": "lstm", "residual": True, "inputs": ("embedding", "deltas"), "skip": ("embedding",)},
    "gru": {"cell": "gru", "bidirectional": False, "inputs": ("embedding", "logits"), "skip": ("logits",)},
    "conv": {"cell": "conv", "inputs": ("embedding", "spacing", "position")},
    "average": {"cell": "average", "inputs": ("logits",)},
    "averaged": {"cell": "gru", "members": 2, "reversed": True, "mirrored": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_computes_what_every_kind_of_network_does(tmp_path, kind):
    worst = onnx_export.write_onnx(network(**KINDS[kind]), tmp_path / "model.onnx", {"kind": kind})
    assert worst < 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [one.name for one in session.get_inputs()] == ["hu", "position_mm"]
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["ichpipe"]) == {"kind": kind}
    assert "mm" in properties["position_mm"]


def network(**settings):
    torch.manual_seed(2)
    cnn = SliceCnn(spec_for("resnet10t", PAPER_WINDOWS, 32, 0.0))
    plain = {"hidden": 8, "layers": 2, "bidirectional": True, "dropout": 0.0, "heads": 2, "inputs": ("embedding",)}
    return EndToEnd(cnn, build_sequence(SequenceSpec(embedding_dim=cnn.embedding_dim, **plain | settings))).eval()


def test_a_transformer_is_refused_in_words(tmp_path):
    with pytest.raises(IchpipeError, match="another arm"):
        onnx_export.write_onnx(network(cell="transformer"), tmp_path / "model.onnx", {})


def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    model = network(cell="conv")
    export = torch.onnx.export

    def export_before_a_change(*arguments, **options):
        export(*arguments, **options)
        with torch.no_grad():
            model.sequence.head.bias += 1.0

    monkeypatch.setattr(torch.onnx, "export", export_before_a_change)
    with pytest.raises(IchpipeError, match="differs from the network"):
        onnx_export.write_onnx(model, tmp_path / "model.onnx", {})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def bundle(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle") / "model"
    result = run("export", "--out", out, "--onnx")
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.slow
def test_the_folder_is_enough_to_predict(run, bundle, tmp_path):
    alone = run(
        "--artifacts", tmp_path / "none", "predict", run.data / "dicom", "--model", bundle, "--out", tmp_path / "a"
    )
    assert alone.exit_code == 0, alone.output
    own = run("predict", run.data / "dicom", "--out", tmp_path / "b")
    assert own.exit_code == 0, own.output
    assert (tmp_path / "a" / "slices.csv").read_bytes() == (tmp_path / "b" / "slices.csv").read_bytes()
    assert (bundle / "model.safetensors").read_bytes() == (
        run.artifacts / "finetuned" / "model.safetensors"
    ).read_bytes()


def test_the_card_says_what_was_trained_on_and_how_well_it_does(run, bundle, index):
    card = json.loads((bundle / "config.json").read_text())
    scores = json.loads(run.metrics())["finetuned"]
    assert card["metrics"]["test"]["weighted_log_loss"] == pytest.approx(scores["weighted_log_loss"], abs=1e-9)
    train = card["training_data"]["train"]
    assert train["slices"] == int((index["split"] == "train").sum())
    assert train["positive_slices"]["any"] == int(index.loc[index["split"] == "train", "any"].sum())
    assert card["classes"] == ["any", "epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural"]
    model = load_end_to_end(bundle)
    assert card["slice_cnn"] == model.cnn.spec.model_dump(mode="json")
    page = (bundle / "README.md").read_text()
    assert "Not a medical device" in page
    assert f"{scores['weighted_log_loss']:.4f}" in page
    patients = set(index["patient_id"]) | set(index["study_uid"])
    assert not any(str(one) in page + json.dumps(card) for one in patients)  # counts, no identifiers


@pytest.mark.parametrize("lone", [True, False])
def test_a_model_with_few_held_out_patients_has_a_card(run, index, tmp_path, lone):
    """One patient has no interval; without any there are no scores."""
    other = run.copy(tmp_path)
    folder = other.artifacts / "finetuned"
    table = read_predictions(folder, "")
    first = table.loc[table["split"] == "test", "patient_id"].iloc[0]
    kept = (table["split"] == "val") | (lone & (table["patient_id"] == first))
    write_predictions(table[kept], folder, model_mark(folder))
    result = other("export", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    test = json.loads((tmp_path / "out" / "config.json").read_text())["metrics"]["test"]
    page = (tmp_path / "out" / "README.md").read_text()
    if lone:
        assert test["weighted_log_loss_ci"] is None
        assert f"weighted log loss {test['weighted_log_loss']:.4f}. Scores are" in page  # no interval
    else:
        assert test is None
        assert "No labelled patients were held out" in page


@pytest.mark.parametrize(
    ("score", "spacing_mm"), [("max", 5.0), ("max", 0.625), ("mean", 5.0), ("mean-of-top-3", 0.625), ("noisy-or", 1.25)]
)
def test_the_cards_scores_are_those_of_evaluate(branch, tmp_path, score, spacing_mm):
    """The study AUC pools by evaluate.study_score, and averages thin series before."""
    folder = branch.artifacts / "finetuned"
    table = read_predictions(folder, "")
    table["position_mm"] = spacing_mm * table["slice_index"]
    draw = np.random.default_rng(0)
    table[list(CLASSES)] = np.clip(table[list(CLASSES)] + draw.uniform(-0.3, 0.5, (len(table), 6)), 0, 1)
    write_predictions(table, folder, model_mark(folder))
    settings = ("--set", f"evaluate.study_score={score}")
    assert branch(*settings, "evaluate").exit_code == 0
    assert branch(*settings, "export", "--out", tmp_path / "model").exit_code == 0
    card = json.loads((tmp_path / "model" / "config.json").read_text())["metrics"]["test"]
    assert card.pop("study_score") == score
    expected = json.loads(branch.metrics())["finetuned"]
    assert {name: card["study_auc"][name]["value"] for name in CLASSES} == {
        name: expected["study_auc"][name]["value"] for name in CLASSES
    }
    assert card == expected
    assert f"the {score} over its slices" in (tmp_path / "model" / "README.md").read_text()


def test_the_onnx_file_agrees_on_a_real_series(run, bundle, index):
    from ichpipe.features.embedder import classify_series, to_probabilities
    from ichpipe.images.slice_dataset import load_slices
    from ichpipe.models.header import Framing

    rows = index[index["series_uid"] == index["series_uid"].iloc[0]]
    hu = load_slices(rows["path"].tolist(), Framing(48)).float().numpy()
    places = rows["position_mm"].to_numpy(np.float32)
    session = onnxruntime.InferenceSession(bundle / "model.onnx")
    found = session.run(None, {"hu": hu, "position_mm": places})[0]
    logits, _ = classify_series(load_end_to_end(bundle), rows["path"].tolist(), places.tolist(), torch.device("cpu"))
    np.testing.assert_allclose(found, to_probabilities(logits), atol=1e-5)


def test_a_model_of_another_index_has_no_card(branch, capsys):
    assert branch("--set", "prepare.seed=5", "prepare").exit_code == 0
    assert "another index" in branch.error(capsys, "export")
