"""Nothing of a patient but PatientID and UIDs reaches any output: planted in every element, searched in every byte."""

import base64
import contextlib
import io
import itertools
import os
import shutil
import tempfile
import traceback
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pydicom
import pytest
from conftest import ct_dataset, save_dicom, set_options
from PIL import Image, PngImagePlugin

from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.stages.cli import main

STAGES = ("prepare", "fit-slices", "extract", "fit-sequence", "finetune", "evaluate", "report", "export")
FEW = set_options("fit-slices.epochs=1", "finetune.epochs=1", "sequence.paper.epochs=1",
                  "sequence.gru-logits.epochs=1", "sequence.gru-logits.seeds=1")  # fmt: skip


@pytest.fixture(scope="module")
def planter():
    return planted.Planter()


@pytest.fixture(scope="module")
def data(run, planter, tmp_path_factory):
    """The phantom with words in every file, in its first ones in all text elements of the dictionary; and bad files."""
    folder = tmp_path_factory.mktemp("planted")
    files = sorted((run.data / "dicom").iterdir())
    (folder / "dicom").mkdir()
    for number, path in enumerate(files):
        with quiet_pydicom():
            dataset = pydicom.dcmread(path)
            planter.plant(dataset, every=number < 3)
            dataset.save_as(folder / "dicom" / path.name)
    shutil.copy(run.data / "stage_2_train.csv", folder)
    for name, content in bad_files(planter, folder / "scratch.dcm").items():
        (folder / "dicom" / name).write_bytes(content)
    return folder


def bad_files(planter, scratch):
    """Files that are refused, each with a word in the value that is why."""
    numbers = itertools.count(1)

    def slice_with(**values):
        number = next(numbers)
        with quiet_pydicom():
            dataset = ct_dataset(np.full((6, 6), 1000, np.int16), series=f"1.9.{number}", patient=f"BAD{number}")
            for keyword, value in values.items():
                setattr(dataset, keyword, value)
            dataset.file_meta = pydicom.dataset.FileMetaDataset()
            dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
            planter.plant(dataset)
            return save_dicom(dataset, scratch).read_bytes()

    def word_for(old, keyword, value):
        """Save a value that pydicom accepts, and put a word in place of a part of it."""
        content = slice_with(**{keyword: value})
        assert content.count(old) == 1, keyword
        return content.replace(old, planter.word(keyword).encode())

    number, word, syntax = "76543210", planter.word, b"1.2.840.10008.1.2.1\0"
    words = ("RescaleType", "Modality", "BodyPartExamined", "SOPClassUID", "PhotometricInterpretation",
             "LossyImageCompression", "ContrastBolusAgent")  # fmt: skip
    numeric = {
        "RescaleSlope": number, "RescaleIntercept": number, "InstanceNumber": number, "SliceThickness": number,
        "ImagePositionPatient": [number, "1", "2"], "ImageOrientationPatient": [number, 0, 0, 0, 1, 0],
        "PixelSpacing": [number, "1"],
    }  # fmt: skip
    return {
        **{f"{keyword}.dcm": slice_with(**{keyword: word(keyword)}) for keyword in words},
        **{f"{keyword}.dcm": word_for(number.encode(), keyword, value) for keyword, value in numeric.items()},
        "image-type.dcm": slice_with(ImageType=["ORIGINAL", "PRIMARY", f"LOCALIZER {word('ImageType')}"]),
        "body-part-2.dcm": slice_with(BodyPartExamined=f"CHEST {word('BodyPartExamined')}"),
        "syntax.dcm": slice_with().replace(syntax, word("TransferSyntaxUID").encode().ljust(len(syntax), b"\0"), 1),
        "charset.dcm": word_for(b"ISO_IR_7", "SpecificCharacterSet", "ISO_IR_7"),
        "truncated.dcm": slice_with()[:-40],
        "no-dicom.txt": f"Dear colleague, {word('letter')} was seen".encode(),
        "no-dicom.dcm": b"\0" * 128 + b"DICM" + word("garbage").encode() * 20,
        "broken.zip": b"PK\x03\x04" + word("archive").encode() * 9,
    }


def ichpipe(*arguments):
    """Exit code, and all that is said on both streams, by Python and by libraries beneath it."""
    text, kept = io.StringIO(), [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as sink, contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        for number in (1, 2):
            os.dup2(sink.fileno(), number)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")  # shown, as to a user
                code = exit_code([str(argument) for argument in arguments])
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
        sink.seek(0)
        return code, text.getvalue().encode() + sink.read()


def exit_code(arguments):
    try:
        main(arguments)
    except SystemExit as stop:
        return stop.code or 0
    except Exception:
        traceback.print_exc()  # as Python does at the end of a program
        return 1
    return 0


@pytest.fixture(scope="module")
def planted_run(run, data, tmp_path_factory):
    """The whole recipe on the planted files, and what it said."""
    other = run.fresh(tmp_path_factory.mktemp("planted-run"), data)
    said = []
    for stage in STAGES:
        code, text = ichpipe(*other.arguments("--debug", *FEW, stage))
        assert code == 0, (stage, text)
        said.append(text)
    return other, b"\n".join(said)


def leaks(planter, contents, *, allowed=()):
    words = set(planter.where) - {word for word, what in planter.where.items() if what in allowed}
    assert len(words) > 1000
    return {(name, planter.where[word]) for name, content in contents for word in planted.found_in(content, words)}


def contents_of(*folders):
    return [(path.name, path.read_bytes()) for path in planted.files_below(*folders)]


@pytest.mark.slow
def test_no_planted_word_is_in_any_output_of_the_recipe(planted_run, planter):
    other, said = planted_run
    rejected = pd.read_csv(other.artifacts / "index" / "rejected.csv")
    assert len(rejected) >= 12  # the bad files were met, and their reasons written
    assert not leaks(planter, [("said", said), *contents_of(other.artifacts)])


@pytest.mark.slow
def test_nor_of_predict_and_explain(planted_run, planter, data, tmp_path):
    other, _ = planted_run
    outs = [tmp_path / name for name in ("plain", "forced", "explained")]
    calls = [
        ("predict", data / "dicom", "--out", outs[0], "--json", "--kaggle", outs[0] / "kaggle.csv", "--missing", "0.1"),
        ("predict", data / "dicom", "--out", outs[1], "--force", "--all-series", "--sr", tmp_path / "sr"),
        ("explain", data / "dicom", "--out", outs[2], "--panels", "2"),
        ("predict", data / "dicom" / "RescaleSlope.dcm", "--out", tmp_path / "none"),
        ("predict", data / "dicom" / "broken.zip"),
        ("predict", data / "dicom" / "Modality.dcm", "--force"),
    ]
    said = []
    for call in calls:
        code, text = ichpipe(*other.arguments("--debug", *call))
        assert code == (0 if "--force" in call or call[1] == data / "dicom" else 1), text
        said.append((call[0], text))
    assert not leaks(planter, said + contents_of(*outs, tmp_path / "none"))


@pytest.mark.slow
def test_a_report_for_the_pacs_has_the_identity_it_must_have_and_no_more(planted_run, planter, data, tmp_path):
    """Its UIDs must be real ones, which RSNA's are not."""
    other, _ = planted_run
    source = tmp_path / "source"
    source.mkdir()
    series = pd.read_parquet(other.artifacts / "index" / "slices.parquet").groupby("series_uid")["path"].apply(list)
    for number, path in enumerate(series.iloc[0]):
        with quiet_pydicom():
            dataset = pydicom.dcmread(path)
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3.4", "1.2.3.5"
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.6.{number + 1}"
            dataset.save_as(source / f"{number}.dcm")
    code, text = ichpipe(*other.arguments("--debug", "predict", source, "--sr", tmp_path / "sr", "--force"))
    assert code == 0, text
    assert len(planted.files_below(tmp_path / "sr")) == 1
    leaked = leaks(planter, [("said", text), *contents_of(tmp_path / "sr")])
    assert {what for _, what in leaked} <= planted.IDENTITY
    assert any(what == "PatientName" for _, what in leaked)


@pytest.mark.slow
def test_nor_a_traceback_of_a_file_that_went_bad_later(planted_run, planter, data, tmp_path):
    """With --debug a traceback is shown, with what it was caused by: parsers quote what they can't read."""
    other, _ = planted_run
    index = pd.read_parquet(other.artifacts / "index" / "slices.parquet")
    path = Path(index.loc[(index["split"] == "train") & index["any"].notna(), "path"].iloc[0])
    content = path.read_bytes()
    with quiet_pydicom():
        dataset = pydicom.dcmread(path)
        dataset.RescaleSlope = "76543210"
        dataset.save_as(tmp_path / "bad.dcm")
    bad = (tmp_path / "bad.dcm").read_bytes()
    assert bad.count(b"76543210") == 1
    try:
        path.write_bytes(bad.replace(b"76543210", planter.word("RescaleSlope").encode()))
        shutil.rmtree(other.artifacts / "slice-cnn")
        code, text = ichpipe(*other.arguments("--debug", *FEW, "fit-slices"))
        assert (code, b"Traceback" in text, b"RescaleSlope" in text) == (1, True, True), text
        workers, more = ichpipe(*other.arguments("--debug", *FEW, "fit-slices", "--workers", "1"))
        assert workers == 1
        assert not leaks(planter, [("said", text + more)])
    finally:
        path.write_bytes(content)


def test_the_search_finds_what_is_packed(planter, tmp_path):
    """The test of the tests: a word in each of the forms that outputs have."""
    word = planter.word("control")
    pd.DataFrame({"a": [word]}).to_parquet(tmp_path / "a.parquet", compression="zstd")
    np.savez_compressed(tmp_path / "b.npz", a=np.array([word]))
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", word, zip=True)
    Image.new("L", (2, 2)).save(tmp_path / "c.png", pnginfo=info)
    packed = base64.b64encode((tmp_path / "c.png").read_bytes()).decode()
    (tmp_path / "d.html").write_text(f'<img src="data:image/png;base64,{packed}">')
    (tmp_path / "e.txt").write_text("&#90;Q" + word[2:])
    (tmp_path / "f.bin").write_bytes(word.encode("utf-16-le"))
    for path in planted.files_below(tmp_path):
        assert planted.found_in(path.read_bytes(), {word}) == {word}, path.name
