"""The stage ``prepare`` from files to files."""

import json

import pandas as pd
import pytest

from ichpipe import studies
from ichpipe.classes import CLASSES
from ichpipe.errors import DataError, MissingFileError, ParamsError
from ichpipe.params import PrepareParams
from ichpipe.stages import prepare

KAGGLE_ORDER = (*CLASSES[1:], "any")


@pytest.fixture
def data_set(tmp_path, write_series, monkeypatch):
    """Ten patients of three slices; in every second one the middle slice has a subdural. Plus one bad file."""
    rows = ["ID,Label"]
    for patient in range(10):
        series = f"1.2.{patient + 10}"
        write_series(f"data/{patient}", [5, 0, 10], series=series, patient=f"P{patient}")
        for number in (1, 2, 3):
            sick = patient % 2 == 0 and number == 1
            rows += [f"{series}.{number}_{name},{int(sick and name in ('subdural', 'any'))}" for name in KAGGLE_ORDER]
    (tmp_path / "data/readme.txt").write_text("not an image")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    return PrepareParams(dicom_dir="data", labels="labels.csv", seed=1)


def test_prepare_writes_index_rejected_and_summary(data_set, tmp_path):
    prepare.run(data_set, tmp_path / "index")
    index = studies.read_index(tmp_path / "index/slices.parquet")
    assert list(index.columns) == studies.SCHEMA.names
    assert index["slice_index"].tolist() == [0, 1, 2] * 10
    assert index["position_mm"].tolist() == [0, 5, 10] * 10
    assert index["spacing_mm"].eq(5).all()
    sick = index["patient_id"].isin([f"P{i}" for i in range(0, 10, 2)]) & (index["slice_index"] == 1)
    assert index["subdural"].eq(sick.astype("float32")).all()
    assert index["path"].str.startswith("data/").all()
    rejected = pd.read_csv(tmp_path / "index/rejected.csv")
    assert rejected["path"].tolist() == ["data/readme.txt"]


def test_summary_adds_up(data_set, tmp_path):
    prepare.run(data_set, tmp_path / "index")
    summary = json.loads((tmp_path / "index/summary.json").read_text())
    assert summary["files"] == summary["slices"] + summary["rejected"] == 31
    assert sum(summary["rejected_by_reason"].values()) == summary["rejected"]
    assert (summary["series"], summary["studies"], summary["patients"]) == (10, 10, 10)
    assert summary["prevalence"]["subdural"] == {"known": 30, "positive": 5, "share": pytest.approx(1 / 6)}
    for parts in (summary["splits"], summary["folds"]):
        assert sum(part["patients"] for part in parts.values()) == 10
        assert sum(part["prevalence"]["any"]["positive"] for part in parts.values()) == 5
    assert summary["labels"]["rows"] == 180


def test_same_input_gives_the_same_bytes_whatever_the_workers(data_set, tmp_path):
    prepare.run(data_set, tmp_path / "one", workers=1)
    prepare.run(data_set, tmp_path / "two", workers=2)
    for name in ("slices.parquet", "rejected.csv", "summary.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_folder_without_labels_is_indexed_with_unknown_labels(data_set, tmp_path):
    params = data_set.model_copy(update={"dataset": "folder", "labels": None})
    prepare.run(params, tmp_path / "index")
    index = studies.read_index(tmp_path / "index/slices.parquet")
    assert index[list(CLASSES)].isna().all(axis=None)
    assert set(index["split"]) == {"train", "val", "test"}


def test_cq500_says_that_it_is_not_there(data_set, tmp_path):
    with pytest.raises(ParamsError, match="cq500 is not there yet"):
        prepare.run(data_set.model_copy(update={"dataset": "cq500"}), tmp_path / "index")


def test_missing_inputs_are_named(data_set, tmp_path):
    with pytest.raises(MissingFileError, match="nowhere"):
        prepare.run(data_set.model_copy(update={"dicom_dir": "nowhere"}), tmp_path / "index")
    with pytest.raises(MissingFileError, match=r"absent\.csv"):
        prepare.run(data_set.model_copy(update={"labels": "absent.csv"}), tmp_path / "index")


def test_nothing_usable_is_an_error_and_the_reasons_are_written(data_set, tmp_path):
    (tmp_path / "junk").mkdir()
    params = data_set.model_copy(update={"dicom_dir": "junk"})
    with pytest.raises(DataError, match="no file in junk"):
        prepare.run(params, tmp_path / "index")
    (tmp_path / "junk/a.txt").write_text("x")
    with pytest.raises(DataError, match="not a DICOM file"):
        prepare.run(params, tmp_path / "index")
    assert pd.read_csv(tmp_path / "index/rejected.csv")["path"].tolist() == ["junk/a.txt"]


def test_a_file_name_that_is_not_utf8_is_rejected_and_named(data_set, tmp_path):
    try:
        (tmp_path / "data/bad\udcff.dcm").write_bytes(b"x")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    prepare.run(data_set, tmp_path / "index")
    rejected = pd.read_csv(tmp_path / "index/rejected.csv")
    assert rejected["path"].tolist() == ["data/bad\\xff.dcm", "data/readme.txt"]
    assert "UTF-8" in rejected["reason"][0]


@pytest.mark.real_data
def test_real_rsna_slices(real_data, tmp_path):
    folder = real_data / "rsna_real_slices"
    params = PrepareParams(dicom_dir=str(folder), labels=str(folder / "stage_2_train.csv"))
    prepare.run(params, tmp_path)
    index = studies.read_index(tmp_path / "slices.parquet")
    assert len(index) == 5
    assert index["any"].notna().all()
    assert pd.read_csv(tmp_path / "rejected.csv")["path"].str.endswith("stage_2_train.csv").tolist() == [True]
