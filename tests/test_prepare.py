"""The stage ``prepare`` from files to files."""

import json
import shutil

import pandas as pd
import pytest
from score_kit import reads_text

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError, MissingFileError
from ichpipe.index import scan, slice_index
from ichpipe.params.schema import PrepareParams
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


def prepared(params, out, **options):
    """Run the stage; return the index that it writes."""
    prepare.run(params, out, **options)
    return slice_index.read_index(out / "slices.parquet")


def test_prepare_writes_index_rejected_and_summary(data_set, tmp_path):
    index = prepared(data_set, tmp_path / "index")
    assert list(index.columns) == slice_index.SCHEMA.names
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
    index = prepared(params, tmp_path / "index")
    assert index[list(CLASSES)].isna().all(axis=None)
    assert set(index["split"]) == {"train", "val", "test"}


@pytest.fixture
def cq500(tmp_path, write_series, monkeypatch):
    """Six scans as the archive has them, two of them zipped: each plain, thin and with contrast; names out of order."""
    for case in range(6):
        folder = f"data/CQ500CT{case} CQ500CT{case}/Unknown Study"
        common = {"patient": f"CQ500CT{case}", "StudyInstanceUID": f"1.9.{case}", "ConvolutionKernel": "STANDARD"}
        kinds = {"CT 5mm Plain": 5.0, "CT PLAIN THIN": 0.625, "CT POST CONTRAST": 5.0}
        for number, (name, step) in enumerate(kinds.items()):
            series, places = f"1.2.{case}.{number}", [step * k for k in range(int(100 / step))][::-1]
            write_series(
                f"{folder}/{name}", places, series=series, SliceThickness=step, SeriesDescription=name, **common
            )
        scout = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], **common}
        write_series(f"{folder}/CT Scout", [0.0], series=f"1.2.{case}.9", **scout)
    for case in (4, 5):
        folder = tmp_path / f"data/CQ500CT{case} CQ500CT{case}"
        shutil.make_archive(str(tmp_path / f"data/CQ500-CT-{case}"), "zip", tmp_path / "data", folder.name)
        shutil.rmtree(folder)
    rows = [(f"CQ500-CT-{case}", [case % 2, 0, 0, 0, 0, case % 2] * 3) for case in range(7)]
    (tmp_path / "reads.csv").write_text(reads_text(rows))
    monkeypatch.chdir(tmp_path)
    return PrepareParams(dataset="cq500", dicom_dir="data", labels="reads.csv", folds=2)


@pytest.mark.slow
def test_cq500_takes_one_plain_thick_series_a_scan_and_says_why(cq500, tmp_path):
    index = prepared(cq500, tmp_path / "index")
    series = pd.read_csv(tmp_path / "index/series.csv")
    assert (len(series), series["chosen"].sum()) == (24, 6)
    chosen = series[series["chosen"]]
    assert set(chosen["series_uid"]) == {f"1.2.{scan}.0" for scan in range(6)} == set(index["series_uid"])
    assert chosen["reason"].str.startswith("nearest to 5 mm of 2 without a fault (5 mm, plain, kernel STANDARD)").all()
    reasons = series[~series["chosen"]].groupby("reason").size().to_dict()
    localizer = "ImageType (0008,0008) says LOCALIZER: a localizer or screen, not a slice"
    assert reasons == {localizer: 6, "contrast": 6, "0.625 mm thick; the chosen one has 5 mm": 6}
    assert index.groupby("series_uid")["position_mm"].is_monotonic_increasing.all()
    packed = index.loc[index["patient_id"] == "CQ500CT4", "path"]
    assert packed.str.startswith("data/CQ500-CT-4.zip/CQ500CT4 CQ500CT4/Unk").all()
    rejected = pd.read_csv(tmp_path / "index/rejected.csv")
    summary = json.loads((tmp_path / "index/summary.json").read_text())
    assert len(index) + len(rejected) == summary["files"] == 6 * (20 + 160 + 20 + 1)
    assert sum(summary["rejected_by_reason"].values()) == len(rejected)
    assert summary["labels"]["labels_without_study"] == 1


@pytest.mark.slow
def test_cq500_labels_are_of_studies(cq500, tmp_path):
    index = prepared(cq500, tmp_path / "index")
    table = pd.read_csv(tmp_path / "index/studies.csv").sort_values("patient_id")
    assert table["subdural"].tolist() == table["any"].tolist() == [0, 1] * 3
    assert (table["epidural"] == 0).all()
    assert (table["n_slices"] == 20).all()
    sick = index["patient_id"].isin(["CQ500CT1", "CQ500CT3", "CQ500CT5"])
    assert index["subdural"].isna().eq(sick).all()  # which slices bleed is not known
    assert index["subdural"][~sick].eq(0).all()


@pytest.mark.slow
def test_choices_overrule_the_rules(cq500, tmp_path):
    (tmp_path / "choices.csv").write_text("series_uid\n1.2.3.2\n")
    selection = cq500.selection.model_copy(update={"choices": "choices.csv"})
    index = prepared(cq500.model_copy(update={"selection": selection}), tmp_path / "index")
    assert "1.2.3.2" in index["series_uid"].to_numpy()


@pytest.mark.slow
def test_a_damaged_archive_is_rejected_and_the_rest_goes_on(cq500, tmp_path):
    packed = tmp_path / "data/CQ500-CT-4.zip"
    packed.write_bytes(packed.read_bytes()[:-400])
    index = prepared(cq500, tmp_path / "index")
    rejected = pd.read_csv(tmp_path / "index/rejected.csv").set_index("path")["reason"]
    assert rejected["data/CQ500-CT-4.zip"] == "damaged zip archive (BadZipFile); get it again"
    assert index["patient_id"].nunique() == 5


def test_rsna_keeps_every_series_and_folder_one(data_set, tmp_path, write_series):
    write_series("data/again", [5, 0, 10], series="1.2.10.7", patient="P0", StudyInstanceUID="1.2.10.0.1")
    for dataset, count in (("rsna", 11), ("folder", 10)):
        index = prepared(data_set.model_copy(update={"dataset": dataset}), tmp_path / dataset)
        assert index["series_uid"].nunique() == count


def test_a_second_run_reads_no_header_and_gives_the_same_bytes(data_set, tmp_path, monkeypatch):
    prepare.run(data_set, tmp_path / "one", header_cache=tmp_path / "cache")
    monkeypatch.setattr(scan, "read_header", None)
    prepare.run(data_set, tmp_path / "two", header_cache=tmp_path / "cache")
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_no_name_or_free_text_reaches_a_file(tmp_path, write_series):
    secret = {"PatientName": "Doe^Secretname", "PatientBirthDate": "19010203"}
    secret |= {"SeriesDescription": "Secretname PLAIN 5MM", "StudyDescription": "Secretname HEAD"}
    secret |= {"ProtocolName": "Secretname", "AccessionNumber": "Secretname"}
    for number in range(6):
        write_series(f"data/{number}", [0, 5, 10], series=f"1.2.{number}", patient=f"P{number}", **secret)
    params = PrepareParams(dataset="folder", dicom_dir=str(tmp_path / "data"), labels=None, folds=2)
    prepare.run(params, tmp_path / "index", header_cache=tmp_path / "cache")
    assert pd.read_csv(tmp_path / "index/series.csv")["marks"].eq("plain").all()
    for path in [*(tmp_path / "index").iterdir(), *(tmp_path / "cache").iterdir()]:
        content = path.read_bytes() if path.suffix != ".parquet" else pd.read_parquet(path).to_csv().encode()
        assert b"Secretname" not in content
        assert b"19010203" not in content


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
    index = prepared(params, tmp_path)
    assert len(index) == 5
    assert index["any"].notna().all()
    assert pd.read_csv(tmp_path / "rejected.csv")["path"].str.endswith("stage_2_train.csv").tolist() == [True]
