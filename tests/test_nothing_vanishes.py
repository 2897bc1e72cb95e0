"""Every file becomes a slice or a line in rejected.csv, and every patient stands in a table or a warning."""

import bz2
import gzip
import logging
import lzma
import os
import re
import time
import warnings
import zipfile

import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import ct_dataset, save_dicom
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError, UnreadableDicomError
from ichpipe.dicom.archive import list_files
from ichpipe.dicom.elements import MAX_TEXT
from ichpipe.dicom.hounsfield import read_hu
from ichpipe.dicom.series_description import marks_of, names_agent
from ichpipe.dicom.slice_header import read_header
from ichpipe.index.label_tables import join, read_labels
from ichpipe.index.scan import scan
from ichpipe.index.series_selection import has_absurd_values, select_series
from ichpipe.index.volume import read_series
from ichpipe.inference.findings import format_nothing_left
from ichpipe.inference.inputs import collect_inputs
from ichpipe.params.schema import Params, PrepareParams
from ichpipe.scoring.score_studies import read_studies, score_studies
from ichpipe.stages import prepare, score

SELECTION = PrepareParams().selection

pytestmark = pytest.mark.slow  # each starts processes or writes whole heads


@pytest.fixture(autouse=True)
def log_reaches_caplog(monkeypatch):
    monkeypatch.setattr(logging.getLogger("ichpipe"), "propagate", True)  # the command line switches it off


def write_head(folder, *, patient="P1", study="1.2.3", series="1.2.3.1", count=12, pixels=None, start=0.0, **tags):
    """A series of ``count`` slices 8 mm apart; a callable tag gets the number of the slice."""
    rng = np.random.default_rng(len(series))
    for number in range(count):
        shown = rng.integers(900, 1200, (8, 8)).astype(np.int16) if pixels is None else pixels
        dataset = ct_dataset(shown, series=series, number=number + 1, z=start + 8.0 * number, patient=patient)
        dataset.StudyInstanceUID, dataset.BodyPartExamined = study, "HEAD"
        for keyword, value in tags.items():
            setattr(dataset, keyword, value(number) if callable(value) else value)
        save_dicom(dataset, folder / f"{series}-{number:03d}.dcm")


def prepared(folder, out, **params):
    prepare.run(PrepareParams(dataset="folder", dicom_dir=str(folder), labels=None, **params), out)
    return pd.read_parquet(out / "slices.parquet"), pd.read_csv(out / "rejected.csv")


def test_members_of_one_name_are_lines(tmp_path):
    write_head(tmp_path / "source")
    paths = sorted((tmp_path / "source").iterdir())
    (tmp_path / "zip").mkdir()
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "zip" / "a.zip", "w") as archive:
        warnings.simplefilter("ignore", UserWarning)  # of the repeated names
        for number, path in enumerate(paths):
            archive.write(path, f"IM{number % 5}")
    slices, rejected = scan([tmp_path / "zip"])
    assert (len(slices), len(rejected)) == (5, 7)
    assert rejected["reason"].str.contains("another file of this name; unpack it with `unzip -B`").all()
    assert rejected["path"].is_unique


def test_links_and_what_is_no_file_are_lines(tmp_path):
    write_head(tmp_path / "data", count=1)
    folder = tmp_path / "data"
    (folder / "dangling").symlink_to(folder / "annex" / "gone")
    (folder / "linked").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    listing = list_files([folder])
    assert len(listing.files) == 1
    reasons = {path.rpartition("/")[2]: reason for path, reason in listing.damaged}
    assert reasons.keys() == {"dangling", "linked", "pipe"}
    assert "not there; fetch" in reasons["dangling"]
    assert "name the folder itself" in reasons["linked"]


def test_a_folder_that_cannot_be_opened_is_a_line(tmp_path, monkeypatch):
    write_head(tmp_path / "good", count=1)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    listing = list_files([tmp_path])
    assert [path.rpartition("/")[2] for path, _ in listing.damaged] == ["locked"]
    assert "Permission denied" in listing.damaged[0][1]


def test_a_study_of_several_patients_is_refused(tmp_path):
    for number in range(3):
        write_head(tmp_path / "in", patient=f"P{number}", study="1.2.77", series=f"1.2.77.{number}")
    write_head(tmp_path / "in", patient="P9", study="1.2.88", series="1.2.88.1")
    index, rejected = prepared(tmp_path / "in", tmp_path / "out")
    assert index["patient_id"].unique().tolist() == ["P9"]
    assert rejected["reason"].str.contains(r"StudyInstanceUID \(0020,000D\) stands under 3 patients").sum() == 36


def test_prepare_names_the_patients_that_it_lost(tmp_path, caplog):
    for number in range(3):
        write_head(
            tmp_path / "in", patient=f"P{number}", study=f"1.2.{number}", series=f"1.2.{number}.1",
            SOPInstanceUID=lambda row: f"2.16.1.{row + 1}",
        )  # fmt: skip
    with caplog.at_level("WARNING"):
        prepared(tmp_path / "in", tmp_path / "out")
    assert "24 files are left out; rejected.csv says why for each" in caplog.text
    for patient in ("P1", "P2"):
        assert f"patient {patient} has no slice in the index; of 12 files most often: duplicate: same" in caplog.text


def test_a_series_uid_per_slice_is_said_with_the_remedy(tmp_path, caplog):
    write_head(tmp_path / "in", SeriesInstanceUID=lambda row: f"1.2.3.1.{row}")
    with caplog.at_level("WARNING"):
        prepared(tmp_path / "in", tmp_path / "out")
    assert "12 series of one slice each" in caplog.text
    assert "dcmodify -m SeriesInstanceUID" in caplog.text


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"AcquisitionNumber": lambda row: 1 + row // 6}, False),  # side by side
        ({"InstanceNumber": lambda row: 1 + row % 6}, False),  # two slabs, each numbered from 1
        ({"ImagePositionPatient": "again", "InstanceNumber": lambda row: 1 + row % 6}, True),
        ({"ImagePositionPatient": "again", "InstanceNumber": lambda row: row if row < 6 else 20 - row}, True),  # back
        ({"AcquisitionNumber": lambda row: row % 4}, True),  # interleaved
        ({"InstanceNumber": lambda row: (7 * row) % 12}, False),  # in no order
        ({"AcquisitionNumber": lambda row: 1 + row // 6, "ImagePositionPatient": "again"}, True),
        ({"AcquisitionNumber": lambda row: row}, False),  # one each
        ({"ImagePositionPatient": "again"}, True),  # InstanceNumber alone
        ({"ImagePositionPatient": "again", "InstanceNumber": lambda _row: 1}, False),  # nothing tells them apart
    ],
)
def test_passes_over_one_part_are_a_fault(tmp_path, tags, expected):
    if tags.get("ImagePositionPatient"):
        tags = tags | {"ImagePositionPatient": lambda row: [0, 0, 8.0 * (row % 6) + 3.0 * (row // 6)]}
    write_head(tmp_path, **tags)
    chosen = select_series(*scan([tmp_path]), SELECTION, one_per_study=True)
    assert ("several passes" in chosen.series["faults"].iloc[0]) == expected


@pytest.mark.parametrize(
    ("value", "share", "absurd"), [(32767, 0.6, True), (3000, 0.9, False), (32767, 0.05, False), (-1024, 1.0, True)]
)
def test_values_that_no_body_has_are_a_fault(tmp_path, value, share, absurd):
    hu = np.full(1000, 40, np.int16)
    hu[: int(1000 * share)] = value
    assert has_absurd_values(hu.reshape(20, 50)) == absurd
    write_head(tmp_path, pixels=hu.reshape(20, 50), RescaleIntercept=0)
    chosen = select_series(*scan([tmp_path]), SELECTION, one_per_study=True)
    assert ("absurd values" in chosen.series["faults"].iloc[0]) == absurd


@pytest.mark.parametrize("text", [b"4.1", b"K5JR4D", b"12345678901234567890", b"1\\2", b" ", b"1,5", b"-3e400", b"NaN"])
def test_an_odd_instance_number_costs_no_slice(write_ct, text):
    path = write_ct()
    dataset = pydicom.dcmread(path)
    tag = Tag("InstanceNumber")
    dataset._dict[tag] = RawDataElement(tag, "IS", len(text), text + b" " * (len(text) % 2), 0, False, True)
    dataset.save_as(path)
    assert read_header(path).instance_number is None
    assert len(scan([path])[0]) == 1


@pytest.mark.parametrize("keyword", ["SeriesDescription", "ProtocolName", "ContrastBolusAgent", "ConvolutionKernel"])
@pytest.mark.parametrize("unit", ["W ", "W/", "- ", "NO ", "A", "0 "])
def test_a_text_of_64_000_characters_costs_no_time(write_ct, keyword, unit):
    path = write_ct(**{keyword: "X"})
    begin = time.perf_counter()
    marks_of((unit * 64_000)[:MAX_TEXT])
    names_agent((unit * 64_000)[:MAX_TEXT])
    assert time.perf_counter() - begin < 1.0  # a quadratic expression took minutes for the whole text
    assert read_header(path).kernel == ("X" if keyword == "ConvolutionKernel" else "")


@pytest.mark.parametrize(
    "text",
    ["", "-", ".", "NIL", "NA", "n.a.", "(none)", "UNENHANCED", "NON CONTRAST", "NO IV CONTRAST", "NO CONTRAST GIVEN",
     "UNKNOWN", "KEINE", "kein KM", "SANS", "Without IV", "0 ml", "0.0 ml", "PLAIN", "FALSE", "W/O",
     "IV CONTRAST NOT GIVEN", "sin contraste", "SIN CONTRASTE IV", "s/c", "S/ contraste", "SC",
     "nativ", "natif", "C-",
     "-C", "IV (-)", "pre", "PRE CONTRAST", "sans produit de contraste", "senza mezzo di contrasto", "senza mdc",
     "No CM", "zonder contrast", "geen", "utan kontrast", "bez kontrastu", "ingen kontrast", "без контраста",
     "造影剤なし", "无", "조영제 없음", "NONE\\NONE", "None/None", "Not Specified", "not administered", "W/OUT",
     "0 ml Omnipaque", "0", "null"],
)  # fmt: skip
def test_texts_that_name_no_agent(text):
    assert not names_agent(text)


@pytest.mark.parametrize(
    "text",
    ["OMNIPAQUE 300", "IV", "100 ml Ultravist", "ORAL", "Iopamidol", "NONIONIC", "NON IONIC CONTRAST", "Niopam", "YES",
     "CONTRAST", "I.V.", "mit KM", "100CC", "50", "Y", "造影剤", "Омнипак 300", "Ультравист", "0.5 ml/kg Iohexol",
     "con contraste", "avec injection", "PRE AND POST", "C+", "s/c 100 ml Omnipaque", "KM iv"],
)  # fmt: skip
def test_texts_that_name_an_agent(text):
    assert names_agent(text)


HEADINGS = {
    "right": ("study_uid", "any", "subdural"),
    "capitals": ("Study_UID", "ANY", "Subdural"),
    "spaces": ("Study UID", " any", "sub-dural"),
    "standard": ("StudyInstanceUID", "Any", "SUBDURAL"),
    "standard in lower case": ("studyinstanceuid", "any", "subdural"),
}


@pytest.mark.parametrize("name", HEADINGS)
def test_headings_match_whatever_their_case(tmp_path, name):
    path = tmp_path / "labels.csv"
    path.write_text(",".join(HEADINGS[name]) + "\n1.2,1,1\n1.3,0,0\n")
    labels = read_labels("folder", path)
    assert labels.key == "study_uid"
    assert labels.values["subdural"].tolist() == [1.0, 0.0]
    absent = [
        "epidural",
        "intraparenchymal",
        "intraventricular",
        "subarachnoid",
    ]
    assert labels.report["classes_without_column"] == absent


@pytest.mark.parametrize(
    "heading",
    [
        *("subdura", "subdurall", "sub_durel", "subdurals", "SDH", "sdh", "SDH_label", "subdural_label"),
        *("Subdural Hemorrhage", "has subdural", "subdural_"),
    ],
)
def test_a_near_miss_names_the_column(tmp_path, heading):
    path = tmp_path / "labels.csv"
    path.write_text(f"study_uid,any,{heading}\n1.2,1,1\n")
    if heading == "subdural_":  # the same letters
        assert read_labels("folder", path).values["subdural"].tolist() == [1.0]
        return
    with pytest.raises(DataError, match=f"has a column '?{heading}'?.*rename it '?subdural"):
        read_labels("folder", path)


@pytest.mark.parametrize("heading", ["ICH", "ich", "any_ich", "Any bleed", "Hemorrhage", "p_any"])
def test_a_near_miss_of_any_names_the_column(tmp_path, heading):
    path = tmp_path / "labels.csv"
    path.write_text(f"study_uid,{heading},subdural\n1.2,1,1\n")
    with pytest.raises(DataError, match=f"has a column '{heading}': rename it 'any'"):
        read_labels("folder", path)


def test_columns_that_are_not_used_are_said(tmp_path, caplog):
    write_head(tmp_path / "dicom")
    (tmp_path / "labels.csv").write_text("study_uid,any,no_sdh,company,\n1.2.3,1,0,x,\n")
    params = PrepareParams(dataset="folder", dicom_dir=str(tmp_path / "dicom"), labels=str(tmp_path / "labels.csv"))
    prepare.run(params, tmp_path / "index")
    assert "these labels are unknown; columns not used: no_sdh, company" in caplog.text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("study_uid;any\n1.2;0,5\n", "is separated by semicolons"),
        ("study_uid|any\n1.2|1\n", "is separated by semicolons, tabs or |"),
        ("sep=,\nstudy_uid,any\n1.2,1\n", "begins with 'sep='; delete this line"),
        ("sep=;\nstudy_uid;any\n1.2;1\n", "begins with 'sep=;'; delete this line"),
        ("Labels of 2020,,\nstudy_uid,any,subdural\n1.2,1,1\n", "its columns: Labels of 2020$"),
        (bz2.compress(b"study_uid,any\n1.2,1\n"), "is compressed, not by gzip; unpack it"),
    ],
)
def test_other_forms_of_a_table_are_named(tmp_path, text, complaint):
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=re.escape(complaint).replace(r"\$", "$")):
        read_labels("folder", path)


def test_other_columns_are_no_near_misses(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("study_uid,any,subdural,age,subdural_mm,comment\n1.2,1,1,60,4,x\n")
    assert read_labels("folder", path).values["subdural"].tolist() == [1.0]


def test_headings_of_predictions_match_too(tmp_path):
    names = ("Any", "Epidural", "Intraparenchymal", "Intraventricular", "Subarachnoid", "Subdural")
    path = tmp_path / "studies.csv"
    path.write_text("Study_UID," + ",".join(names) + "\n1.2" + ",.5" * 6 + "\n")
    assert read_studies(path, "study_uid")["subdural"].tolist() == [0.5]
    path.write_text("Study_UID," + ",".join(names).replace("Subdural", "Subdurl") + "\n1.2" + ",.5" * 6 + "\n")
    with pytest.raises(DataError, match="'Subdurl': rename it 'subdural'"):
        read_studies(path, "study_uid")


@pytest.mark.parametrize(
    ("images", "rows", "pairs"),
    [
        (["0014", "1016"], ["14", "1016"], "'0014' is '14' there"),
        (["1016", "1017"], ["1016.0", "1017"], "'1016' is '1016.0' there"),
        (["AB1", "1017"], ["ab1", "1017"], "'AB1' is 'ab1' there"),
        (["00", "7"], ["0", "7"], "'00' is '0' there"),
        (["P001", "7"], ["P1", "7"], "'P001' is 'P1' there"),
        (["P 1", "7"], ["P-1", "7"], "'P 1' is 'P-1' there"),
        (["ID_a1", "7"], ["a1", "7"], "'ID_a1' is 'a1' there"),
        (["a1", "7"], ["ID_a1", "7"], "'a1' is 'ID_a1' there"),
        (["1.2.3", "7"], ["1.2.3.dcm", "7"], "'1.2.3' is '1.2.3.dcm' there"),
        (["20190012345678901", "7"], ["2.01900123456789E+16", "7"], "is '2.01900123456789E+16' there"),
        (["20190012345678901", "7"], ["20190012345678900", "7"], "is '20190012345678900' there"),
        (["20190012345678901", "7"], ["2.019E+16", "7"], "'2.019E+16', a number that a spreadsheet has rounded"),
        (["M\u00fc", "7"], ["Mu\u0308", "7"], "is 'Mu\u0308' there"),
        (["A", "7"], ["B", "7"], ""),
        (["1.2.30", "7"], ["1.2.3", "7"], ""),
        (["1.2.3", "7"], ["12.3", "7"], ""),
    ],
)
def test_identifiers_in_another_spelling_are_named(tmp_path, images, rows, pairs):
    path = tmp_path / "labels.csv"
    path.write_text("PatientID,any\n" + "".join(f"{name},1\n" for name in rows))
    index = pd.DataFrame({"patient_id": images, "study_uid": images, "series_uid": images})
    _, _, counts = join(index, read_labels("folder", path))
    assert counts["studies_without_label"] == 1
    assert pairs in counts.get("labels_likely_cause", "")
    assert bool(pairs) == ("labels_likely_cause" in counts)


def test_files_that_only_the_listing_refuses_stop_no_command(tmp_path):
    write_head(tmp_path / "in")
    (tmp_path / "in" / "gone.dcm").symlink_to("nowhere")
    index, rejected = prepared(tmp_path / "in", tmp_path / "out")
    assert (len(index), len(rejected)) == (12, 1)
    assert len(read_series(tmp_path / "in")) == 12


def test_links_in_a_circle_cost_only_themselves(tmp_path):
    write_head(tmp_path / "in")
    for one, other in ("ab", "ba"):
        (tmp_path / "in" / one).symlink_to(tmp_path / "in" / other)
    slices, rejected = scan([tmp_path / "in"])
    assert len(slices) == 12
    assert [path.rpartition("/")[2] for path in rejected["path"]] == ["a", "b"]


@pytest.mark.parametrize("prefix", ["./", "../", "/", "a//", "a/./", "x.zip/"])
def test_members_are_read_whatever_their_folder_is_called(tmp_path, prefix):
    write_head(tmp_path / "source")
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "a.zip", "w") as archive:
        for path in (tmp_path / "source").iterdir():
            archive.writestr(zipfile.ZipInfo(prefix + path.name), path.read_bytes())
    slices, rejected = scan([tmp_path / "in"])
    assert (len(slices), len(rejected)) == (12, 0)
    assert (read_hu(slices["path"].iloc[0]) < 200).all()


CONTAINERS = {
    "gzip": gzip.compress(b"x" * 200),
    "bzip2": bz2.compress(b"x" * 200),
    "xz": lzma.compress(b"x" * 200),
    "zip": b"PK\x03\x04" + bytes(200),
    "tar": bytes(257) + b"ustar" + bytes(250),
    "7z": b"7z\xbc\xaf\x27\x1c" + bytes(200),
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "git-annex": b"/annex/objects/SHA256E-s12345--abcd.dcm\n",
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_and_pointers_are_named_with_the_remedy(tmp_path, name):
    (tmp_path / "a.dcm").write_bytes(CONTAINERS[name])
    with pytest.raises(UnreadableDicomError, match=f"not a DICOM file but a.* {name}.*; (unpack it|fetch the file)"):
        read_header(tmp_path / "a.dcm")


def test_series_of_few_slices_are_said_with_the_remedy(tmp_path, caplog):
    write_head(tmp_path / "in", SeriesInstanceUID=lambda row: f"1.2.3.1.{row // 2}")
    with caplog.at_level("WARNING"):
        prepared(tmp_path / "in", tmp_path / "out")
    assert "6 series of 3 slices or fewer each: give them one SeriesInstanceUID" in caplog.text


@pytest.mark.parametrize(
    ("names", "alike"), [(("abc", "ABC"), True), (("AB 1", "AB1"), True), (("AB1", "AB2"), False), (("A", "A "), False)]
)
def test_patients_that_differ_in_case_or_spaces_are_named(tmp_path, caplog, names, alike):
    for number, name in enumerate(names):
        write_head(tmp_path / "in", patient=name, study=f"1.2.{number}", series=f"1.2.{number}.1")
    with caplog.at_level("WARNING"):
        prepared(tmp_path / "in", tmp_path / "out")
    assert ("differ only in case or spaces, the first: " + " and ".join(map(repr, names)) in caplog.text) == alike


@pytest.mark.parametrize(
    ("tags", "helps"),
    [
        ({"Modality": "MR"}, True),
        ({"BodyPartExamined": "CHEST"}, True),
        ({"PatientID": lambda row: f"P{row % 2}"}, False),
        ({"RescaleSlope": 0}, False),
        ({"NumberOfFrames": 2}, False),
    ],
)
def test_force_is_offered_only_where_it_helps(tmp_path, tags, helps):
    write_head(tmp_path, **tags)
    found = collect_inputs([tmp_path], SELECTION)
    text = format_nothing_left(found.refused, found.rejected, len(found.rejected), "see there")
    assert ("--force" in text) == helps
    assert bool(len(collect_inputs([tmp_path], SELECTION, force=True).slices)) == helps


def test_scores_of_studies_name_identifiers_in_another_spelling(tmp_path):
    names = ",".join(CLASSES)
    (tmp_path / "studies.csv").write_text(f"patient_id,{names}\n0014,.1,.1,.1,.1,.1,.1\n9,.1,.1,.1,.1,.1,.1\n")
    (tmp_path / "labels.csv").write_text("patient_id,any\n14,1\n9,0\n")
    labels = read_labels("folder", tmp_path / "labels.csv")
    settings = {"bootstrap_samples": 10, "confidence": 0.95, "seed": 0}
    result = score_studies(tmp_path / "studies.csv", labels, **settings)
    assert "'0014' is '14' there" in result["predictions"]["likely_cause"]
    (tmp_path / "labels.csv").write_text("patient_id,any\n14,1\n")
    with pytest.raises(DataError, match="'0014' is '14' there"):
        score_studies(tmp_path / "studies.csv", read_labels("folder", tmp_path / "labels.csv"), **settings)


@pytest.mark.parametrize(
    ("form", "predictions", "labels", "hint"),
    [
        ("rsna", "ID,Lable\n1_any,.5\n", "ID,Label\n1_any,1\n", "'Lable' may be 'Label'"),
        ("rsna", "ID,Label\n1_any,.5\n", "IDs,Label\n1_any,1\n", "'IDs' may be 'ID'"),
        ("rsna", "ID,ICH_probablity\n1_any,.5\n", "ID,Label\n1_any,1\n", "'ICH_probablity'"),
        ("cq500", "name,ICH_probablity,IPH,IVH,SDH,EDH,SAH\n", "name\n", "'ICH_probablity'"),
        ("cq500", "nmae,ICH,IPH,IVH,SDHs,EDH,SAH\n", "name\n", "'SDHs' may be 'SDH'"),
        ("cq500", "name,ICH,IPH,IVH,SDH,EDH,SAH\n", "nam,R1:ICH\n", "'nam' may be 'name'"),
        ("cq500", "name,ICH,IPH,IVH,SDH,EDH,SAH\n", "name,R1_ICHH,R1:IPH\n", "'R1_ICHH' may be 'R1:ICH'"),
    ],
)
def test_a_misspelt_heading_of_any_form_is_named(tmp_path, form, predictions, labels, hint):
    for name, text in (("p.csv", predictions), ("l.csv", labels)):
        rows = [] if form == "rsna" else [",".join(["CQ500-CT-1", *["0"] * text.count(",")])]
        (tmp_path / name).write_text(text + "".join(f"{row}\n" for row in rows))
    with pytest.raises(DataError, match=f"{hint}.*: rename it"):
        score.run(form, tmp_path / "p.csv", tmp_path / "l.csv", None, Params().evaluate)


def test_rsna_labels_of_prepare_name_the_misspelt_heading(tmp_path):
    (tmp_path / "l.csv").write_text("ID,Lable\n1_any,1\n")
    with pytest.raises(DataError, match="'Lable' may be 'Label': rename it"):
        read_labels("rsna", tmp_path / "l.csv")


@pytest.mark.parametrize(("label", "reason"), [(0, "no positive"), (1, "no negative")])
def test_a_class_of_one_kind_says_why_it_has_no_auc(tmp_path, caplog, label, reason):
    header = "study_uid," + ",".join(CLASSES)
    rows = [f"1.{number},{number % 2},0,0,0,0,{label if label == 0 else 1}" for number in range(4)]
    rows = [row if label == 0 else f"{row.split(',')[0]},1,0,0,0,0,{int(row[2:3]) % 2}" for row in rows]
    (tmp_path / "l.csv").write_text("\n".join([header, *rows]) + "\n")
    (tmp_path / "p.csv").write_text("\n".join([header, *(f"1.{n}" + ",.5" * 6 for n in range(4))]) + "\n")
    score.run("studies", tmp_path / "p.csv", tmp_path / "l.csv", None, Params().evaluate)
    (line,) = [record.getMessage() for record in caplog.records if "AUC" in record.getMessage()]
    assert line.startswith("AUC is not defined of ")
    assert f"{'any' if label else 'epidural'} ({reason})" in line
