"""`predict` on real files: the report of a GE series, a PACS folder, a lone slice. Needs ICHPIPE_REAL_DATA."""

import json
import shutil
import subprocess
import tarfile

import pandas as pd
import pydicom
import pytest

from ichpipe.common.classes import CLASSES

pytestmark = pytest.mark.real_data


@pytest.fixture(scope="session")
def unpack(real_data, tmp_path_factory):
    """A function that unpacks one of the real archives and returns its folder."""

    def unpacked(name):
        folder = tmp_path_factory.mktemp("real")
        with tarfile.open(real_data / name) as archive:
            archive.extractall(folder, filter="data")
        return folder

    return unpacked


def test_the_report_of_a_ge_series_is_read_by_dcmtk_and_refers_to_its_slices(run, unpack, tmp_path):
    hd = pytest.importorskip("highdicom")
    folder = unpack("ge_headct_bsd/ge_hispeed_headct_28slices.tar.xz")
    out, reports = tmp_path / "out", tmp_path / "sr"
    assert run("predict", folder, "--out", out, "--sr", reports).exit_code == 0
    (path,) = reports.iterdir()
    report, slices = hd.sr.srread(path), pd.read_csv(out / "slices.csv")
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    evidence = study.ReferencedSeriesSequence[0]
    assert evidence.SeriesInstanceUID == slices["series_uid"][0]
    assert {item.ReferencedSOPInstanceUID for item in evidence.ReferencedSOPSequence} == set(slices["sop_uid"])
    assert "Image Library" in report.to_json()
    assert len(report.content.get_image_measurement_groups()) == len(CLASSES)
    source = next(pydicom.dcmread(file) for file in sorted(folder.rglob("*.dcm")))
    assert (report.PatientID, report.PatientName) == (source.PatientID, source.PatientName)
    if shutil.which("dsrdump"):
        done = subprocess.run(["dsrdump", str(path)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_dicomdir_stands_for_its_disc_and_the_localizer_is_left_out(run, unpack, tmp_path):
    folder = unpack("philips_phantom_study_bsd/philips_phantom.tar.xz")
    (directory,) = folder.rglob("DICOMDIR")
    out = tmp_path / "out"
    assert run("predict", directory, "--out", out).exit_code == 0
    assert len(pd.read_csv(out / "studies.csv")) >= 1
    reasons = pd.read_csv(out / "rejected.csv")["reason"]
    assert reasons.str.contains("LOCALIZER").any()
    assert reasons.str.contains("DICOMDIR").any()


def test_one_slice_of_cq500_is_refused_and_forced_on_demand(run, real_data, tmp_path, capsys):
    folder = real_data / "cq500_real_dicom"
    assert "fewer than 10 slices (1)" in run.error(capsys, "predict", folder)
    document = json.loads(run("predict", folder, "--force", "--json").stdout)
    assert document["forced"] is True
    assert document["studies"][0]["n_slices"] == 1


def test_of_the_odd_files_each_study_is_refused_with_a_reason(run, real_data, tmp_path, capsys):
    out = tmp_path / "out"
    message = run.error(capsys, "predict", real_data / "odd_and_corrupt_dicom", "--out", out)
    assert "refused: " in message
    refused = pd.read_csv(out / "refused.csv")
    assert refused["reason"].str.len().min() > 5
    reasons = " ".join(refused["reason"])
    assert "not a head: CHEST" in reasons
    assert "RTPLAN" in reasons
