"""Several archives in one run: identifiers, splits, labels that lack classes, and slices for stage one alone."""

import json
import shutil

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from process_kit import slice_fitting

from ichpipe.common.artifacts import Artifacts
from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError, ParamsError
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.index.slice_index import read_index
from ichpipe.index.splits import assign_splits
from ichpipe.models.weights import load_slice_cnn
from ichpipe.params.schema import PrepareParams, SourceParams, load_params
from ichpipe.phantom.dataset import write_dataset
from ichpipe.stages import evaluate, extract, finetune, fit_sequence, fit_slices, prepare
from ichpipe.training.trainer import known_slices, weighted_bce


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Two phantoms of different seeds; the second as a table of `any` alone."""
    root = tmp_path_factory.mktemp("sources")
    for number, name in enumerate(("one", "two")):
        write_dataset(root / name, studies=14, size_px=32, seed=number)
    table = pd.read_csv(root / "two" / "stage_2_train.csv")
    table["sop_uid"], table["kind"] = table["ID"].str[:12], table["ID"].str[13:]
    wide = table.pivot_table(index="sop_uid", columns="kind", values="Label")[["any"]]
    wide.to_csv(root / "two" / "any.csv")
    return root


def sources(root, **second):
    one = {"name": "one", "dicom_dir": str(root / "one/dicom"), "labels": str(root / "one/stage_2_train.csv")}
    two = {"name": "two", "dicom_dir": str(root / "two/dicom"), "labels": str(root / "two/stage_2_train.csv")}
    return [one, two | second]


def write_params(root, given, **sections):
    small = {
        "prepare": {"sources": given, "size_px": 32, "folds": 2},
        "fit-slices": {"backbone": "resnet10t", "epochs": 1},
        "sequence": {"paper": {"hidden": 4, "layers": 1, "epochs": 1}},
        "finetune": {"epochs": 1},
        "evaluate": {"bootstrap_samples": 20},
    }
    for name, values in sections.items():
        small[name.replace("_", "-")] |= values
    path = root / "params.yaml"
    path.write_text(json.dumps(small), encoding="utf-8")
    return load_params(path)


def prepared(tmp_path, given, **sections):
    params, artifacts = write_params(tmp_path, given, **sections), Artifacts(tmp_path / "artifacts")
    prepare.run(params.prepare, artifacts.index_dir)
    return params, artifacts, read_index(artifacts.index)


def test_two_sources_become_one_index_without_colliding_patients(archives, tmp_path):
    _, artifacts, index = prepared(tmp_path, sources(archives))
    assert index["patient_id"].str.partition("/")[0].equals(index["source"])
    assert index.groupby("source")["study_uid"].nunique().to_dict() == {"one": 14, "two": 14}
    # Stratified by source: each split holds patients of both.
    by_split = index.drop_duplicates("patient_id").groupby(["split", "source"]).size().unstack()
    assert by_split.notna().all(axis=None)
    assert (by_split["one"] - by_split["two"]).abs().max() <= 2
    summary = json.loads((artifacts.index_dir / "summary.json").read_text(encoding="utf-8"))
    patients = {name: part["patients"] for name, part in summary["sources"].items()}
    assert patients == index.groupby("source")["patient_id"].nunique().to_dict()
    assert 0 < summary["sources"]["two"]["prevalence"]["any"]["share"] < 1


def test_a_study_in_two_sources_is_kept_once_and_makes_one_patient(archives, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(archives / "one", again)
    given = sources(archives, dicom_dir=str(again / "dicom"), labels=str(again / "stage_2_train.csv"))
    _, artifacts, index = prepared(tmp_path, given)
    assert set(index["source"]) == {"one"}
    rejected = pd.read_csv(artifacts.index_dir / "rejected.csv")
    assert len(rejected) == len(index)
    assert rejected["reason"].str.contains("stands in the source one, too").all()


def test_a_slice_in_two_sources_takes_its_later_series_along(archives, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(archives / "two", again)
    stranger = next(iter(sorted((archives / "one" / "dicom").iterdir())))
    taken = sorted((again / "dicom").iterdir())[3]
    with quiet_pydicom():
        dataset, series = pydicom.dcmread(taken), pydicom.dcmread(stranger)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = series.SOPInstanceUID
        dataset.save_as(taken)
        series_uid = str(dataset.SeriesInstanceUID)
    given = sources(archives, dicom_dir=str(again / "dicom"), labels=str(again / "stage_2_train.csv"))
    _, artifacts, index = prepared(tmp_path, given)  # reading the index finds no gap
    rejected = pd.read_csv(artifacts.index_dir / "rejected.csv")
    assert rejected["reason"].str.contains("stands in the source one, too").all()
    assert str(taken) in set(rejected["path"])
    assert series_uid not in set(index["series_uid"])
    assert len(rejected) + len(index) == sum(
        len(list((root / "dicom").iterdir())) for root in (again, archives / "one")
    )


SHARED = {
    "slice": ("SOPInstanceUID",),
    "series": ("SOPInstanceUID", "SeriesInstanceUID"),
    "study": ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"),
}


@pytest.mark.parametrize("level", SHARED)
def test_what_two_sources_share_makes_their_patients_one(archives, tmp_path, level):
    again = tmp_path / "again"
    shutil.copytree(archives / "two", again)
    pairs = zip(*(read_index_of(folder, tmp_path) for folder in (archives / "one", again)), strict=True)
    shared = [pair for number, pair in enumerate(pairs) if number % 3 == 0]
    for (original, _), (path, _) in shared:
        with quiet_pydicom():
            dataset, other = pydicom.dcmread(path), pydicom.dcmread(original)
            for keyword in SHARED[level]:
                setattr(dataset, keyword, other[keyword].value)
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            dataset.save_as(path)
    given = sources(archives, dicom_dir=str(again / "dicom"), labels=None)
    _, _, index = prepared(tmp_path, given)
    assert "train" in set(index["split"])
    for (_, patient), (_, other) in shared:
        splits = set(index.loc[index["patient_id"].isin([f"one/{patient}", f"two/{other}"]), "split"])
        assert len(splits) == 1
        assert f"two/{other}" not in set(index["patient_id"])


def read_index_of(folder, tmp_path):
    """Path and patient of the first slice of each patient."""
    from ichpipe.index.scan import scan

    slices = scan([folder / "dicom"])[0]
    return slices.drop_duplicates("patient_id").sort_values("patient_id")[["path", "patient_id"]].values.tolist()[:10]


def test_slices_for_stage_one_are_trained_on_and_never_scored_nor_stored(archives, tmp_path):
    params, artifacts, index = prepared(tmp_path, sources(archives, use="slices"))
    alone = index[index["source"] == "two"]
    assert set(alone["split"]) == {"train"}
    assert set(alone["fold"]) == {-1}
    assert set(index.loc[index["source"] == "one", "split"]) == {"train", "val", "test"}
    fit_slices.run(params, artifacts, "cpu")
    record = json.loads((artifacts.slice_cnn / "record.json").read_text(encoding="utf-8"))
    assert record["n_train_slices"] == int((index["split"] == "train").sum())
    extract.run(params, artifacts, "cpu")
    fit_sequence.run(params, artifacts, "paper", "cpu")
    record = json.loads((artifacts.sequence("paper") / "record.json").read_text(encoding="utf-8"))
    one = index[index["source"] == "one"]
    assert record["n_train_series"] == one.loc[one["split"] == "train", "series_uid"].nunique()
    finetune.run(params, artifacts, "cpu")
    text = evaluate.run(params, artifacts)
    assert "source" not in text  # the held-out slices come from one


def test_the_sources_for_stage_one_alone_may_come_first(archives, tmp_path):
    settings = {"pretrain_epochs": 1, "source_weights": {"two": 0.0}, "epochs": 1, "pretrain_learning_rate": 4e-3}
    params, artifacts, index = prepared(tmp_path, sources(archives, use="slices"), fit_slices=settings)
    folder = tmp_path / "shared"
    fit_slices.run(params, artifacts, "cpu", pretrained=folder)
    (first,) = (path.parent for path in folder.glob("*/model.safetensors"))
    record = json.loads((first / "record.json").read_text(encoding="utf-8"))
    assert record["n_train_slices"] == int(index["slices_only"].sum())
    assert record["params"]["fit-slices"]["learning_rate"] == 4e-3
    before = (first / "model.safetensors").stat().st_mtime_ns
    # Another split of the other source starts from the same network, and it alone decides what follows.
    later = params.fit_slices.model_copy(update={"learning_rate": 5e-4})  # its own rate is another
    split = params.prepare.model_copy(update={"seed": 5})
    other = params.model_copy(update={"prepare": split, "fit_slices": later})
    again = Artifacts(tmp_path / "again")
    prepare.run(other.prepare, again.index_dir)
    fit_slices.run(other, again, "cpu", pretrained=folder)
    assert [path.stat().st_mtime_ns for path in folder.glob("*/model.safetensors")] == [before]
    start, trained = (load_slice_cnn(path).state_dict() for path in (first, artifacts.slice_cnn))
    assert not all(torch.equal(start[name], trained[name]) for name in start)
    plain = write_params(tmp_path, sources(archives, use="slices"))
    fresh = fit_slices._build(plain, torch.device("cpu")).state_dict()
    weight = "backbone.conv1.0.weight"
    assert (start[weight] - trained[weight]).norm() < (fresh[weight] - trained[weight]).norm()


def test_scores_are_given_by_source_and_together(archives, tmp_path):
    params, artifacts, index = prepared(tmp_path, sources(archives))
    fit_slices.run(params, artifacts, "cpu")
    extract.run(params, artifacts, "cpu")
    fit_sequence.run(params, artifacts, "paper", "cpu")
    text = evaluate.run(params, artifacts)
    metrics = json.loads(artifacts.metrics.read_text(encoding="utf-8"))
    test = index[index["split"] == "test"]
    for source, part in metrics["sources"].items():
        assert part["n_slices"] == int((test["source"] == source).sum())
        assert f"source {source}" in text
        assert "ci_low" in part["slice_cnn"]["auc"]["any"]
    assert sum(part["n_slices"] for part in metrics["sources"].values()) == metrics["n_slices"] == len(test)
    compared = json.loads((artifacts.comparison / "arms.json").read_text(encoding="utf-8"))
    assert {name: part["n_slices"] for name, part in compared["sources"].items()} == test[
        "source"
    ].value_counts().to_dict()
    assert all(f"## Source {source}" in text for source in compared["sources"])


def test_a_source_without_some_classes_trains_on_those_it_has(archives, tmp_path):
    given = sources(archives, dataset="folder", labels=str(archives / "two/any.csv"))
    params, artifacts, index = prepared(tmp_path, given)
    two = index[index["source"] == "two"]
    assert two["any"].notna().all()
    fit_slices.run(params, artifacts, "cpu")
    record = json.loads((artifacts.slice_cnn / "record.json").read_text(encoding="utf-8"))
    assert record["n_train_slices"] == int((index["split"] == "train").sum())


def test_the_loss_leaves_out_each_unknown_label_by_itself():
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn((5, 6), generator=generator), torch.rand((5, 6), generator=generator).round()
    masked = labels.clone()
    masked[2, 1:] = float("nan")
    masked[4] = float("nan")
    weights = torch.tensor([2.0, 1, 1, 1, 1, 1])
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none") * weights
    known = (~masked.isnan()) * weights
    assert float(known_slices(masked)) == pytest.approx(3 + 2 / 7)
    expected = (each * ~masked.isnan()).sum() / known.sum()
    assert float(weighted_bce(logits, masked)) == pytest.approx(float(expected), rel=1e-6)
    leaf = logits.clone().requires_grad_()
    weighted_bce(leaf, masked).backward()
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[masked.isnan()].any()
    assert leaf.grad[2, 0] != 0


def test_weights_say_how_often_an_epoch_shows_a_slice():
    fitting = slice_fitting(batch_size=4)
    n = len(fitting.rows)
    weights = [0.0 if row % 2 else 2.5 for row in range(n)]
    fitting.slices = fitting.slices.__class__(fitting.slices.train, fitting.slices.val, fitting.slices.series, weights)
    shown = [row for epoch in range(40) for batches in fitting.steps(epoch) for batch in batches for row in batch.rows]
    counts = np.bincount(shown, minlength=n)
    assert not counts[1::2].any()
    assert counts[::2].mean() / 40 == pytest.approx(2.5, abs=0.2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"name": "a", "dicom_dir": "x"}, {"name": "a", "dicom_dir": "y"}], "the name a stands twice"),
        ([{"name": "a", "dicom_dir": "x", "use": "slices"}], "one must have use: all"),
        ([{"name": "a/b", "dicom_dir": "x"}], "sources.0.name"),
        ([{"dicom_dir": "x"}], "sources.0.name"),
        ([{"name": "a", "dicom_dir": "x", "use": "some"}], "sources.0.use"),
    ],
)
def test_wrong_sources_are_errors_that_name_the_key(tmp_path, given, message):
    with pytest.raises(ParamsError, match=message):
        write_params(tmp_path, given)


def test_weights_of_an_absent_source_are_an_error(tmp_path):
    with pytest.raises(ParamsError, match="source_weights names b, but the sources are a"):
        write_params(tmp_path, [{"name": "a", "dicom_dir": "x"}], fit_slices={"source_weights": {"b": 1.0}})


def test_min_slices_beside_the_arms_counts_for_each(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("sequence: {min_slices: 7, a: {hidden: 8}, b: {min_slices: 2}}\nfinetune: {arm: a}\n")
    arms = load_params(path).sequence
    assert {name: arm.min_slices for name, arm in arms.items()} == {"a": 7, "b": 2}


def test_one_patient_in_a_source_of_either_use_is_refused():
    index = pd.DataFrame({"patient_id": [f"p{n}" for n in range(12)] + ["p0"], "source": ["a"] * 12 + ["b"]})
    index = index.assign(slices_only=index["source"] == "b", **dict.fromkeys(CLASSES, 0.0))
    with pytest.raises(DataError, match="in a source of use: slices and in another one"):
        assign_splits(index, PrepareParams())


def test_a_single_archive_is_one_source():
    params = PrepareParams(dicom_dir="x", labels=None)
    assert params.archives == (SourceParams(name="rsna", dicom_dir="x", labels=None),)
