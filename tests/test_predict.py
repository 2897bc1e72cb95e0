"""What `predict` takes, refuses, prints and writes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError, MissingFileError
from ichpipe.inference.inputs import expand, read_list
from ichpipe.stages.cli import cli

HEAD = [5.0 * number for number in range(26)]
TABLES = ("slices.csv", "studies.csv", "series.csv", "refused.csv", "rejected.csv", "predictions.json")


@pytest.fixture
def head(write_series):
    """A function that writes a series of a whole head, one study for each name; returns its folder."""

    def write(name, positions=HEAD, **tags):
        series = f"1.2.{sum(name.encode())}.{len(positions)}"
        tags.setdefault("StudyInstanceUID", f"{series}.7")
        return write_series(name, positions, series=series, **tags)[0].parent

    return write


def table(folder, name):
    return pd.read_csv(folder / f"{name}.csv")


@pytest.mark.slow
def test_without_a_folder_the_table_is_printed_and_nothing_is_written(run, head, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = head("one")
    before = sorted(tmp_path.rglob("*"))
    result = run("predict", folder)
    assert result.exit_code == 0
    assert sorted(tmp_path.rglob("*")) == before
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["study", "class", "probability", "first", "mm", "last", "mm", "slices"]
    assert [line[25:].split()[0] for line in lines[1:7]] == list(CLASSES)
    assert "the only usable series" in result.stdout
    assert max(map(len, lines)) <= 80


def test_the_table_says_where_along_the_normal(run, head, tmp_path):
    folder = head("one")
    assert run("predict", folder, "--out", tmp_path / "out").exit_code == 0
    slices = table(tmp_path / "out", "slices")
    cut = float(slices["any"].median())  # half of the slices are at or above it
    positive_mm = slices[slices["any"] >= cut]["position_mm"]
    text = run("predict", folder, "--threshold", repr(cut)).stdout
    line = next(line for line in text.splitlines() if " any " in line)
    probability, first, last, count = line.split()[2:]
    assert float(probability) == pytest.approx(slices["any"].max(), abs=6e-4)
    assert (float(first), float(last), int(count)) == (positive_mm.min(), positive_mm.max(), len(positive_mm))
    text = run("predict", folder, "--threshold", "1").stdout
    assert next(line for line in text.splitlines() if " any " in line).split()[3:] == ["-", "-", "0"]


@pytest.mark.parametrize("form", ["folder", "zip", "DICOMDIR", "files", "at", "list", "stdin"])
def test_every_form_of_input_gives_the_same(run, head, tmp_path, form):
    folder = head("one")
    files = sorted(folder.iterdir())
    listed = tmp_path / "list.txt"
    listed.write_text("# a series\n\n" + "\n".join(map(str, files)) + "\n", encoding="utf-8")
    if form == "DICOMDIR":
        (folder / "DICOMDIR").write_bytes(b"")
    arguments = {
        "folder": [folder],
        "zip": [shutil.make_archive(str(tmp_path / "scan"), "zip", folder)],
        "DICOMDIR": [folder / "DICOMDIR"],
        "files": files,
        "at": [f"@{listed}"],
        "list": ["--list", listed],
        "stdin": ["--list", "-"],
    }[form]
    out = tmp_path / "out"
    command = [*run.arguments("predict"), *map(str, arguments), "--out", str(out)]
    text = listed.read_text(encoding="utf-8") if form == "stdin" else None
    assert CliRunner().invoke(cli, command, input=text, catch_exceptions=False).exit_code == 0
    assert run("predict", folder, "--out", tmp_path / "plain").exit_code == 0
    for name in ("slices.csv", "studies.csv"):
        assert (out / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_lists_that_are_empty_missing_or_no_text_say_so(tmp_path):
    with pytest.raises(DataError, match="names no path"):
        read_list(b"# nothing\n\n", "list.txt")
    with pytest.raises(MissingFileError, match=r"gone\.txt does not exist"):
        expand([Path("@gone.txt")])
    (tmp_path / "image").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="neither UTF-8 nor UTF-16"):
        expand([Path(f"@{tmp_path / 'image'}")])


def test_a_file_that_really_begins_with_at_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "@scan").mkdir()
    assert expand([Path("@scan")]) == [Path("@scan")]


def test_naming_nothing_is_wrong_usage(run):
    result = run("predict")
    assert result.exit_code == 2
    assert "name what to predict" in result.stderr


REFUSALS = {
    "modality": ({"Modality": "MR"}, HEAD, "Modality (0008,0060) is 'MR', not CT"),
    "localizer": ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, HEAD, "a localizer or screen"),
    "body part": ({"BodyPartExamined": "CHEST"}, HEAD, "not a head: CHEST"),
    "description": ({"SeriesDescription": "Lumbar spine"}, HEAD, "not a head: spine"),
    "agent": ({"ContrastBolusAgent": "Iohexol"}, HEAD, "contrast"),
    "angiography": ({"SeriesDescription": "CTA head"}, HEAD, "contrast"),
    "perfusion": ({"SeriesDescription": "Brain perfusion"}, HEAD, "another examination: perfusion"),
    "few": ({}, HEAD[:9], "fewer than 10 slices (9)"),
    "slab": ({}, [2.0 * number for number in range(26)], "covers only 50 mm"),
    "coronal": ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, HEAD, "coronal or sagittal"),
}


@pytest.fixture
def refusable(head):
    """A function that writes one of REFUSALS; returns its folder."""

    def write(kind):
        tags, positions, _ = REFUSALS[kind]
        folder = head(kind.replace(" ", "-"), positions, **tags)
        if kind == "coronal":
            import pydicom

            for number, path in enumerate(sorted(folder.iterdir())):
                dataset = pydicom.dcmread(path)
                dataset.ImagePositionPatient = [0, 5.0 * number, 0]
                dataset.save_as(path)
        return folder

    return write


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_is_no_plain_head_ct_is_refused_with_the_reason(run, refusable, tmp_path, capsys, kind):
    folder, out = refusable(kind), tmp_path / "out"
    message = run.error(capsys, "predict", folder, "--out", out)
    assert REFUSALS[kind][2] in " ".join(message.split())
    assert "--force" in message
    refused = table(out, "refused")
    assert len(refused) == 1
    assert REFUSALS[kind][2] in refused["reason"][0]
    assert len(table(out, "rejected")) == len(list(folder.iterdir()))
    assert not (out / "slices.csv").exists()
    assert not (out / "predictions.json").exists()


@pytest.mark.parametrize("kind", REFUSALS)
def test_force_predicts_it_and_marks_every_output(run, refusable, tmp_path, kind):
    out = tmp_path / "out"
    result = run("predict", refusable(kind), "--out", out, "--force")
    assert result.exit_code == 0
    assert "FORCED, although: " in result.stdout
    assert REFUSALS[kind][2] in " ".join(result.stdout.partition("FORCED")[2].split())
    assert table(out, "studies")["forced"].tolist() == [True]
    assert table(out, "slices")["forced"].all()
    document = json.loads((out / "predictions.json").read_text())
    assert document["forced"] is True
    assert REFUSALS[kind][2] in document["studies"][0]["forced_despite"]
    assert table(out, "refused").empty


def test_force_marks_nothing_that_is_a_head(run, head, tmp_path):
    plain, forced = tmp_path / "plain", tmp_path / "forced"
    folder = head("one")
    assert run("predict", folder, "--out", plain).exit_code == 0
    assert run("predict", folder, "--out", forced, "--force").exit_code == 0
    assert not table(forced, "studies")["forced"].any()
    assert json.loads((forced / "predictions.json").read_text())["forced"] is False
    pd.testing.assert_frame_equal(table(forced, "slices").drop(columns=["forced"]), table(plain, "slices"))
    assert "forced" not in table(plain, "studies")


def test_what_has_no_hounsfield_units_cant_be_forced(run, head, capsys):
    folder = head("mr", Modality="MR", RescaleSlope=None, RescaleIntercept=None)
    message = run.error(capsys, "predict", folder, "--force")
    assert "RescaleSlope is missing" in message


def test_one_refused_study_does_not_stop_the_others(run, head, refusable, tmp_path):
    good, bad = head("one"), refusable("modality")
    out = tmp_path / "out"
    result = run("predict", good, bad, "--out", out)
    assert result.exit_code == 0
    assert len(table(out, "studies")) == 1
    assert table(out, "refused")["reason"].str.contains("Modality").tolist() == [True]
    assert "refused: 1 study" in result.stdout
    (study,) = json.loads((out / "predictions.json").read_text())["refused"]
    assert study["study_uid"] == table(out, "refused")["study_uid"][0]
    assert run("predict", good, "--out", tmp_path / "alone").exit_code == 0
    pd.testing.assert_frame_equal(table(out, "slices"), table(tmp_path / "alone", "slices"))


@pytest.fixture
def mixed_study(head):
    """Folders of two series of one study: a plain head, and one with contrast."""
    plain = head("plain-head", StudyInstanceUID="1.2.99")
    return [plain, head("with-contrast", StudyInstanceUID="1.2.99", ContrastBolusAgent="Iohexol")]


def test_a_plain_series_beside_contrast_and_localizer_is_taken_and_nothing_refused(run, head, mixed_study, tmp_path):
    scout = head("scout", HEAD[:1], StudyInstanceUID="1.2.99", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    out = tmp_path / "out"
    assert run("predict", *mixed_study, scout, "--out", out).exit_code == 0
    assert table(out, "refused").empty
    assert len(table(out, "studies")) == 1
    chosen = table(out, "series").set_index("series_uid")["chosen"]
    assert chosen.sum() == 1
    assert table(out, "studies")["series_uid"][0] == chosen.index[chosen].item()


def test_all_series_refuses_series_by_series(run, mixed_study, tmp_path):
    plain, both = tmp_path / "plain", tmp_path / "both"
    assert run("predict", *mixed_study, "--all-series", "--out", plain).exit_code == 0
    assert (len(table(plain, "studies")), len(table(plain, "refused"))) == (1, 1)
    assert run("predict", *mixed_study, "--all-series", "--force", "--out", both).exit_code == 0
    assert table(both, "studies")["forced"].sum() == 1


def test_a_submission_refuses_nothing(run, head, tmp_path):
    folder = head("few", HEAD[:3])
    assert run("predict", folder, "--kaggle", tmp_path / "submission.csv").exit_code == 0
    assert len(pd.read_csv(tmp_path / "submission.csv")) == 18


def test_json_is_what_is_written_and_alone_on_standard_output(run, head, tmp_path):
    folder, out = head("one"), tmp_path / "out"
    result = run("predict", folder, "--json", "--out", out)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document == json.loads((out / "predictions.json").read_text())
    assert document["format"] == "ichpipe-predictions"
    (study,) = document["studies"]
    row, slices = table(out, "studies").iloc[0], table(out, "slices")
    for name in CLASSES:
        assert study["findings"][name]["probability"] == pytest.approx(row[name], abs=1e-9)
    shown = pd.DataFrame(study["slices"])
    assert shown["sop_uid"].tolist() == slices["sop_uid"].tolist()
    np.testing.assert_allclose(shown["any"], slices["any"], atol=1e-9)
    assert run("predict", folder, "--json").stdout == result.stdout  # the same bytes again, without a folder


def test_calibration_beside_the_model_is_applied_unless_left_out(branch, head, tmp_path):
    folder, model = head("one"), branch.artifacts / "finetuned"
    made = json.loads((model / "calibration.json").read_text())
    made["temperature"] = {"any": 2.0}
    (model / "calibration.json").write_text(json.dumps(made))
    plain, calibrated = tmp_path / "plain", tmp_path / "calibrated"
    assert "calibrated: temperature of any" in branch("predict", folder, "--out", calibrated).stdout
    assert "not calibrated, as asked" in branch("predict", folder, "--uncalibrated", "--out", plain).stdout
    before, after = table(plain, "slices"), table(calibrated, "slices")
    odds = before["any"] / (1 - before["any"])
    np.testing.assert_allclose(after["any"] / (1 - after["any"]), np.sqrt(odds), rtol=1e-6)
    assert (after["epidural"] == before["epidural"]).all()
    (model / "calibration.json").unlink()
    assert "(ichpipe evaluate writes it)" in " ".join(branch("predict", folder).stdout.split())
    document = json.loads(branch("predict", folder, "--json").stdout)
    assert document["calibration"] == {"method": "absent", "classes": [], "blend": {}}


def test_calibration_of_another_model_stops_predict_with_the_remedy(branch, head, capsys):
    path = branch.artifacts / "finetuned" / "calibration.json"
    made = json.loads(path.read_text())
    path.write_text(json.dumps({**made, "model_sha256": "0" * 64}))
    message = branch.error(capsys, "predict", head("one"))
    assert "another model" in message
    assert "--uncalibrated" in message
    assert branch("predict", head("one"), "--uncalibrated").exit_code == 0


def test_no_name_and_no_free_text_leaves_the_images(run, head, tmp_path):
    secret = {
        "PatientName": "Jekyll^Henry", "PatientBirthDate": "18860105", "AccessionNumber": "A77",
        "SeriesDescription": "head for Mr Jekyll", "StudyDescription": "fell on Hyde street",
    }  # fmt: skip
    folder, out = head("one", **secret), tmp_path / "out"
    result = run("predict", folder, head("few", HEAD[:2], **secret), "--out", out)
    assert result.exit_code == 0
    text = result.output + "".join((out / name).read_text() for name in TABLES)
    assert not [word for word in ("Jekyll", "18860105", "A77", "Hyde", "Mr ") if word in text]


def test_more_than_ten_studies_show_any_and_what_is_positive(run, head):
    folders = [head(f"{'x' * number}", StudyInstanceUID=f"1.2.50.{number}") for number in range(1, 12)]
    text = run("predict", *folders, "--threshold", "1").stdout
    assert text.count(" any ") == 11
    assert " epidural " not in text


def test_reports_without_highdicom_are_refused_before_any_work(run, head, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ichpipe.stages.predict.find_spec", lambda _name: None)
    message = run.error(capsys, "predict", head("one"), "--sr", tmp_path / "sr")
    assert "pip install 'ichpipe[sr]'" in message


def test_a_study_none_of_whose_slices_can_be_read_is_refused_not_lost(run, head, tmp_path, monkeypatch):
    from ichpipe.inference import predictor

    good, bad = head("one"), head("other")
    before = predictor.classify_twice

    def unreadable(model, paths, *rest, **options):
        if str(bad) in paths[0]:
            nothing = before(model, [], [], *rest[1:], **options)
            return nothing[0], nothing[1], [(path, "no decoder") for path in paths]
        return before(model, paths, *rest, **options)

    monkeypatch.setattr(predictor, "classify_twice", unreadable)
    out = tmp_path / "out"
    result = run("predict", good, bad, "--out", out)
    assert result.exit_code == 0
    assert len(table(out, "studies")) == 1
    assert table(out, "refused")["reason"].tolist() == ["no slice could be read; the first: no decoder"]
    assert len(table(out, "rejected")) == len(HEAD)
