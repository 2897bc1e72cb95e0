"""The DICOM SR: right codes and references, the patient of the source, read by dcmtk and highdicom."""

import json
import shutil
import subprocess

import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import save_dicom
from test_enhanced_ct import write_enhanced

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.dicom.enhanced import ENHANCED_CT
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.index.scan import scan
from ichpipe.inference.findings import PACKAGE_VERSION, Extent, Provenance
from ichpipe.inference.structured_report import FINDINGS, make_report, read_source, write_report

hd = pytest.importorskip("highdicom")

PROVENANCE = Provenance("ab" * 32, "temperature", CLASSES, 0.5, "max")
COPIED = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "StudyInstanceUID", "ReferringPhysicianName", "IssuerOfPatientID", "StudyDescription",
)  # fmt: skip
ENHANCED_SR = "1.2.840.10008.5.1.4.1.1.88.22"


@pytest.fixture
def series(write_series):
    """Paths of five slices of a named patient, and their SOPInstanceUIDs in the order of the paths."""
    paths = write_series(
        "scan",
        [0.0, 5.0, 10.0, 15.0, 20.0],
        PatientName="Jekyll^Henry",
        PatientID="P7",
        PatientBirthDate="18860105",
        PatientSex="M",
        AccessionNumber="A77",
        StudyID="S1",
        StudyDate="20200102",
        StudyTime="030405",
        StudyDescription="CT head",
        IssuerOfPatientID="HYDE",
        ReferringPhysicianName="Utterson^G",
        FrameOfReferenceUID="1.2.3.4",
        PixelSpacing=[0.5, 0.5],
        SliceThickness=5.0,
    )
    return [str(path) for path in paths], [f"1.2.3.1.{number}" for number in range(1, 6)]


def report_of(paths, uids, forced=""):
    """Return the report of a series whose last slice shows each class most."""
    positive = {"any": uids[1:4], "subdural": uids[2:3]}
    where = {name: Extent(tuple(positive.get(name, ())), None, None, uids[-1]) for name in CLASSES}
    probability = {**dict.fromkeys(CLASSES, 0.01), "any": 0.9, "subdural": 0.5}
    return make_report(read_source(paths), probability, where, PROVENANCE, forced)


def written(paths, uids, tmp_path, forced=""):
    write_report(tmp_path / "report.dcm", report_of(paths, uids, forced))
    return tmp_path / "report.dcm"


def groups_of(path):
    report = hd.sr.srread(path)
    groups = report.content.get_image_measurement_groups()
    return report, {group.tracking_identifier.removeprefix("ichpipe "): group for group in groups}


def test_each_class_is_a_finding_with_probability_presence_site_and_images(series, tmp_path):
    paths, uids = series
    report, groups = groups_of(written(paths, uids, tmp_path))
    assert report.SOPClassUID == ENHANCED_SR
    assert list(groups) == list(CLASSES)
    for name, group in groups.items():
        finding, site = FINDINGS[name]
        assert (group.finding_type.value, group.finding_type.scheme_designator) == (finding.value, "SCT")
        assert [item.value.value for item in group.finding_sites] == [site.value]
        (measured,) = group.get_measurements()
        assert (measured.name.value, measured.unit.value) == ("122157", "%")
        (present,) = group.get_qualitative_evaluations()
        assert present.value.meaning == ("Present" if name in ("any", "subdural") else "Absent")
    assert groups["any"].get_measurements()[0].value == 90.0
    assert groups["epidural"].get_measurements()[0].value == 1.0
    assert groups["any"].finding_type.value == "1386000"


def test_measurements_refer_to_the_slices_that_show_it(series, tmp_path):
    paths, uids = series
    _, groups = groups_of(written(paths, uids, tmp_path))

    def images(name):
        (measured,) = groups[name].get_measurements()
        return [image.referenced_sop_instance_uid for image in measured.referenced_images]

    assert images("any") == uids[1:4]
    assert images("subdural") == uids[2:3]
    assert images("epidural") == uids[4:5]  # none shows it: the one whose probability it is


def test_all_slices_are_evidence_of_their_series(series, tmp_path):
    paths, uids = series
    report, _ = groups_of(written(paths, uids, tmp_path))
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    (series_item,) = study.ReferencedSeriesSequence
    assert (study.StudyInstanceUID, series_item.SeriesInstanceUID) == ("1.2.3.1.0.1", "1.2.3.1")
    assert {item.ReferencedSOPInstanceUID for item in series_item.ReferencedSOPSequence} == set(uids)


def test_the_image_library_is_there_where_headers_describe_the_images(series, write_series, tmp_path):
    paths, uids = series
    assert "Image Library" in pydicom.dcmread(written(paths, uids, tmp_path)).to_json()
    bare = [str(path) for path in write_series("bare", [0.0, 5.0, 10.0, 15.0, 20.0])]
    report = pydicom.dcmread(written(bare, uids, tmp_path))
    assert "Image Library" not in report.to_json()
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    assert len(study.ReferencedSeriesSequence[0].ReferencedSOPSequence) == 5


def test_patient_and_study_are_those_of_the_source(series, tmp_path):
    paths, uids = series
    report = pydicom.dcmread(written(paths, uids, tmp_path))
    source = pydicom.dcmread(paths[0])
    for keyword in COPIED:
        assert report[keyword].value == source[keyword].value, keyword
    assert report.SeriesInstanceUID != source.SeriesInstanceUID
    assert (report.Modality, report.VerificationFlag, report.PreliminaryFlag) == ("SR", "UNVERIFIED", "PRELIMINARY")


def test_it_says_which_algorithm_and_model_made_it(series, tmp_path):
    paths, uids = series
    report, _ = groups_of(written(paths, uids, tmp_path))
    text = report.to_json()
    for word in (
        "ichpipe",
        PACKAGE_VERSION,
        "ab" * 32,
        "calibrated: temperature",
        "at least 0.5",
        "not for diagnosis",
    ):
        assert word in text
    contexts = report.content.get_observer_contexts()
    assert [context.observer_type.meaning for context in contexts] == ["Device"]
    assert "FORCED" not in text


def test_what_was_forced_says_so(series, tmp_path):
    paths, uids = series
    text = pydicom.dcmread(written(paths, uids, tmp_path, forced="not a head: CHEST")).to_json()
    assert "Forced: the series was refused (not a head: CHEST)" in text
    assert "research, FORCED" in text


def test_names_in_other_alphabets_survive(series, tmp_path):
    paths, uids = series
    for path in paths:
        dataset = pydicom.dcmread(path)
        dataset.SpecificCharacterSet = "ISO_IR 100"
        dataset.PatientName = "Müller^Jürgen"
        save_dicom(dataset, tmp_path / "scan" / path.rpartition("/")[2])
    report = pydicom.dcmread(written(paths, uids, tmp_path))
    assert str(report.PatientName) == "Müller^Jürgen"


def test_a_source_without_patient_data_gives_empty_ones(write_series, tmp_path):
    paths = [str(path) for path in write_series("bare", [0.0, 5.0], PatientID=None)]
    report = report_of(paths, ["1.2.3.1.1", "1.2.3.1.2"])
    assert (report.PatientID or "", str(report.PatientName or "")) == ("", "")


def test_uids_that_are_none_are_refused(write_series):
    paths = [str(path) for path in write_series("rsna", [0.0], series="ID_a1b2c3")]
    with pytest.raises(DataError, match="is no DICOM UID"):
        report_of(paths, ["ID_a1b2c3.1"])


@pytest.mark.skipif(shutil.which("dsrdump") is None, reason="dcmtk is not installed")
def test_dcmtk_reads_it_without_a_complaint(series, tmp_path):
    paths, uids = series
    done = subprocess.run(
        ["dsrdump", "+Pc", str(written(paths, uids, tmp_path))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("Enhanced SR Document")
    for code, _ in FINDINGS.values():
        assert f"({code.value},SCT," in done.stdout
    assert '(122157,DCM,"Probability")="90.0" (%,UCUM,"Percent")' in done.stdout


def test_predict_writes_a_report_per_study_with_its_own_numbers(run, write_series, tmp_path):
    for name in ("one", "two"):
        study = f"1.2.{len(name) + ord(name[0])}"
        write_series(f"scans/{name}", np.arange(0, 130, 5.0), series=f"{study}.5", StudyInstanceUID=study)
    out, reports = tmp_path / "out", tmp_path / "reports"
    result = run("predict", tmp_path / "scans", "--out", out, "--sr", reports)
    assert result.exit_code == 0
    assert "2 DICOM reports" in result.stdout
    studies = pd.read_csv(out / "studies.csv").set_index("series_uid")
    document = json.loads((out / "predictions.json").read_text())
    assert sorted(path.stem for path in reports.iterdir()) == sorted(studies.index)
    for path in reports.iterdir():
        report, groups = groups_of(path)
        assert document["model_sha256"] in report.to_json()
        for name in CLASSES:
            value = groups[name].get_measurements()[0].value
            assert value == pytest.approx(100 * studies.loc[path.stem, name], rel=1e-5)


def test_predict_says_for_which_study_there_is_no_report(run, index, tmp_path):
    series = index["series_uid"].iloc[0]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(index.loc[index["series_uid"] == series, "path"]), encoding="utf-8")
    result = run("predict", f"@{listed}", "--sr", tmp_path / "reports")
    assert result.exit_code == 0
    assert f"no DICOM report for 1 series, {series} the first: StudyInstanceUID is no DICOM UID" in result.stderr
    assert "DICOM report" not in result.stdout
    assert not (tmp_path / "reports").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stated", "name"),
    [
        ("\\ISO 2022 IR 87", "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("\\ISO 2022 IR 149", "Hong^Gildong=洪^吉洞=홍^길동"),
        ("ISO 2022 IR 6\\ISO 2022 IR 87", "Yamada^Tarou=山田^太郎"),
        ("ISO_IR 192", "Wang^XiaoDong=王^小東"),
        ("GB18030", "Wang^XiaoDong=王^小东"),
        ("ISO_IR 144", "Люкceмбypг"),
        ("UTF-8", "Wang^XiaoDong=王^小東"),
        ("ISO IR 192", "Wang^XiaoDong=王^小東"),
        ("", "Smith^Ann"),
        ("ISO_IR 100\\ISO_IR 192", "Smith^Ann"),
        ("ISO 2022 IR 100", "Müller^Jörg"),
        ("ISO 2022 IR 6", "Smith^Ann"),
        ("ISO 2022 IR 87", "Yamada^Tarou"),
        ("GBK", "Wang^XiaoDong=王^小东"),
    ],
)
def test_a_name_survives_in_any_character_set(write_ct, tmp_path, stated, name):
    valid = {"UTF-8": "ISO_IR 192", "ISO IR 192": "ISO_IR 192"}.get(stated, stated)
    path = write_ct(SpecificCharacterSet=valid.split("\\") if "\\" in valid else valid, PatientName=name)
    data = path.read_bytes()
    path.write_bytes(data.replace(valid.encode(), stated.encode().ljust(len(valid)), 1) if valid != stated else data)
    sources = read_source([str(path)])
    uid = str(sources[0].SOPInstanceUID)
    where = dict.fromkeys(CLASSES, Extent((uid,), 0.0, 0.0, uid))
    provenance = Provenance("ab" * 32, "absent", (), 0.5, "max")
    target = tmp_path / "report.dcm"
    write_report(target, make_report(sources, dict.fromkeys(CLASSES, 0.5), where, provenance))
    with quiet_pydicom():
        assert str(pydicom.dcmread(target).PatientName) == name


@pytest.mark.parametrize(
    ("keyword", "text"),
    [
        ("PatientName", b"Zhang^X=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1"),
        ("StudyDate", b"2020-01-01"),
        ("StudyDate", b"20209999"),
        ("StudyDate", b"20200101\\20200102"),
        ("StudyTime", b"noon"),
        ("PatientBirthDate", b"unknown"),
        ("PatientBirthDate", b"1e400"),
        ("PatientSex", b"female"),
    ],
)
def test_an_odd_value_costs_no_report(write_ct, tmp_path, keyword, text):
    path = write_ct(SpecificCharacterSet=["", "ISO 2022 IR 58"])
    dataset = pydicom.dcmread(path)
    tag = pydicom.tag.Tag(keyword)
    text += b" " * (len(text) % 2)
    vr = pydicom.datadict.dictionary_VR(tag)
    dataset._dict[tag] = pydicom.dataelem.RawDataElement(tag, vr, len(text), text, 0, False, True)
    dataset.save_as(path)
    sources = read_source([str(path)])
    uid = str(sources[0].SOPInstanceUID)
    where = dict.fromkeys(CLASSES, Extent((uid,), 0.0, 0.0, uid))
    provenance = Provenance("ab" * 32, "absent", (), 0.5, "max")
    report = make_report(sources, dict.fromkeys(CLASSES, 0.5), where, provenance)
    assert str(report[keyword].value or "") == ("Zhang^X=张^小" if keyword == "PatientName" else "")
    assert report.PatientID == dataset.PatientID


@pytest.mark.parametrize("uid", sorted(ENHANCED_CT))
@pytest.mark.parametrize(("files", "count"), [(1, 5), (5, 1), (2, 3)])
@pytest.mark.parametrize("zipped", [False, True])
def test_frames_of_enhanced_ct_are_referred_to_by_number(tmp_path, uid, files, count, zipped):
    folder, archive = tmp_path / "scan", tmp_path / "scan.zip"
    pixels = np.zeros((count, 4, 6), np.int16)
    for number in range(files):
        sop_uid = f"1.2.3.{'9' * 55}.{number}"  # 63 characters: with the number of a frame it would be none
        write_enhanced(
            folder / f"{number}.dcm", pixels, intercepts=[0] * count, uid=uid, SOPInstanceUID=sop_uid,
            PatientName="Jekyll^Henry",
        )  # fmt: skip
    if zipped:
        shutil.make_archive(archive.with_suffix(""), "zip", folder)
    slices, rejected = scan([archive if zipped else folder])
    assert len(slices) == files * count
    assert rejected.empty
    slices = slices.sort_values("path")
    paths, names = slices["path"].tolist(), slices["sop_uid"].tolist()
    shown = names[1 : 1 + max(count - 2, 1)] if files == 1 else names[2:4]
    where = {name: Extent(tuple(shown), None, None, names[0]) for name in CLASSES}
    where["epidural"] = Extent((), None, None, names[0])
    target = tmp_path / "report.dcm"
    write_report(target, make_report(read_source(paths), dict.fromkeys(CLASSES, 0.9), where, PROVENANCE))
    report, groups = groups_of(target)
    assert report.PatientName == "Jekyll^Henry"
    found = [
        (image.referenced_sop_class_uid, f"{image.referenced_sop_instance_uid}{'' if count == 1 else f'.{frame}'}")
        for image in groups["any"].get_measurements()[0].referenced_images
        for frame in image.referenced_frame_numbers
    ]
    assert found == [(uid, name) for name in shown]
    (first,) = groups["epidural"].get_measurements()[0].referenced_images
    assert first.referenced_frame_numbers == [1]
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert {item.ReferencedSOPClassUID for item in evidence} == {uid}
    assert {len(item.ReferencedSOPInstanceUID) for item in evidence} == {63}
    assert len(evidence) == files
    if shutil.which("dsrdump"):
        done = subprocess.run(["dsrdump", "+Pc", str(target)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Enhanced CT" in done.stdout or "image" in done.stdout
