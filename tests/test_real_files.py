"""Real files, end to end: the right series, the lossless file, the same pixels. Skipped without ICHPIPE_REAL_DATA."""

import json
import tarfile

import numpy as np
import pandas as pd
import pytest

from ichpipe.dicom import hounsfield
from ichpipe.index import slice_index
from ichpipe.params.schema import PrepareParams
from ichpipe.stages import prepare

pytestmark = pytest.mark.real_data


def prepared(tmp_path, folder, dataset="folder", labels=None):
    params = PrepareParams(dataset=dataset, dicom_dir=str(folder), labels=None if labels is None else str(labels))
    prepare.run(params, tmp_path / "index")
    index = slice_index.read_index(tmp_path / "index/slices.parquet")
    return index, pd.read_csv(tmp_path / "index/series.csv"), pd.read_csv(tmp_path / "index/rejected.csv")


@pytest.fixture(scope="session")
def philips(real_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("philips")
    with tarfile.open(real_data / "philips_phantom_study_bsd/philips_phantom.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_the_five_rsna_slices_have_their_labels(real_data, tmp_path):
    folder = real_data / "rsna_real_slices"
    index, _, rejected = prepared(tmp_path, folder, "rsna", folder / "stage_2_train.csv")
    assert len(index) == 5
    assert index.set_index("sop_uid").loc["ID_e0ff5bec6", ["any", "intraventricular"]].tolist() == [1, 1]
    assert int(index["any"].sum()) == 2
    assert rejected["path"].str.endswith("stage_2_train.csv").all()


def test_of_three_encodings_of_a_cq500_slice_the_raw_one_is_taken(real_data, tmp_path):
    reads = real_data / "tables/cq500/reads.csv"
    index, series, rejected = prepared(tmp_path, real_data / "cq500_real_dicom", "cq500", reads)
    assert [path.rpartition("/")[2] for path in index["path"]] == ["693_UNCR.dcm"]
    reasons = {path.rpartition("/")[2]: reason for path, reason in rejected.itertuples(index=False)}
    assert "compressed with loss" in reasons["693_J2KI.dcm"]
    assert "same SOPInstanceUID" in reasons["693_J2KR.dcm"]
    assert series["marks"].tolist() == ["plain"]
    assert "fewer than 10 slices (1)" in series["reason"][0]
    labels = pd.read_csv(tmp_path / "index/studies.csv").iloc[0]
    assert labels[["any", "subdural", "epidural"]].tolist() == [1, 1, 0]
    folder = real_data / "cq500_real_dicom/CQ500-CT-310/CT 5mm Plain"
    raw, lossless, lossy = (hounsfield.read_hu(folder / f"693_{name}.dcm") for name in ("UNCR", "J2KR", "J2KI"))
    assert np.array_equal(raw, lossless)
    assert not np.array_equal(raw, lossy)


def test_a_lossy_file_that_stands_alone_is_taken_and_marked(real_data, tmp_path):
    index, series, _ = prepared(tmp_path, real_data / "cq500_real_dicom/CQ500-CT-310/CT 5mm Plain/693_J2KI.dcm")
    assert index["lossy"].tolist() == [True]
    assert "compressed with loss" in series["reason"][0]
    assert json.loads((tmp_path / "index/summary.json").read_text())["lossy"] == 1


def test_of_seven_encodings_the_lossless_ones_are_taken(real_data, tmp_path):
    index, series, rejected = prepared(tmp_path, real_data / "nema_wg04_ct_codecs")
    found = {path.rpartition("/")[2].removesuffix(".dcm") for path in index["path"]}
    assert found == {f"{image}_{codec}" for image in ("CT1", "CT2") for codec in ("UNC", "RLE", "JPLL", "JLSL", "J2KR")}
    lossy = rejected[rejected["reason"].str.contains("with loss")]["path"].str.extract(r"/(CT\d_\w+)\.dcm")[0]
    assert set(lossy) == {f"{image}_{codec}" for image in ("CT1", "CT2") for codec in ("JLSN", "J2KI")}
    assert series.loc[series["contrast"] == "yes", "patient_id"].unique().tolist() == ["1CT1"]


def test_the_philips_study_gives_its_brain_series(philips, tmp_path):
    _, series, rejected = prepared(tmp_path, philips)
    chosen = series[series["chosen"]].sort_values("n_slices")
    assert chosen["n_slices"].tolist() == [18, 28]  # a study each
    assert chosen["marks"].tolist() == ["plain", "brain plain"]
    assert (chosen["kernel_kind"] == "soft").all()
    reasons = series.loc[~series["chosen"], "reason"]
    assert sorted(reason.partition(" ")[0] for reason in reasons) == ["ImageType", "secondary"]
    assert rejected["reason"].str.contains("DICOMDIR").any()


def test_predict_takes_the_same_series(run, philips, tmp_path):
    result = run("predict", philips, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "studies.csv")
    assert sorted(table["n_slices"]) == [18, 28]
    series = pd.read_csv(tmp_path / "series.csv")
    assert set(series.loc[series["chosen"], "series_uid"]) == set(table["series_uid"])


@pytest.mark.parametrize("name", ["cq500_real_dicom", "nema_wg04_ct_codecs", "rsna_real_slices"])
def test_predict_reads_real_files(run, real_data, tmp_path, name):
    result = run("predict", real_data / name, "--out", tmp_path, "--force")  # lone slices are refused otherwise
    assert result.exit_code == 0, result.output
    slices, rejected = pd.read_csv(tmp_path / "slices.csv"), pd.read_csv(tmp_path / "rejected.csv")
    files = [path for path in (real_data / name).rglob("*") if path.is_file()]
    assert len(slices) + len(rejected) == len(files)
    assert slices["any"].between(0, 1).all()
