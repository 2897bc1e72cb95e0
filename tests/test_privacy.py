"""Nothing of a patient but PatientID and UIDs reaches any output: planted in every element, searched in every byte."""

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
from conftest import ct_dataset, save_dicom

from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.stages.cli import main

STAGES = ("prepare", "fit-slices", "extract", "fit-sequence", "finetune", "evaluate", "report", "export")
FEW = ("--set", "fit-slices.epochs=1", "--set", "finetune.epochs=1", "--set", "sequence.paper.epochs=1",
       "--set", "sequence.gru-logits.epochs=1", "--set", "sequence.gru-logits.seeds=1")  # fmt: skip


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
    for name, made in bad_files(planter).items():
        (folder / "dicom" / name).write_bytes(made(folder / "scratch"))
    return folder


def bad_files(planter):
    """Files that are refused, each with a word in the value that is why."""

    def tags(**values):
        return lambda scratch: one(
            scratch, {key: value() if callable(value) else value for key, value in values.items()}
        )

    numbers = itertools.count(1)

    def one(scratch, values, size=6):
        number = next(numbers)
        with quiet_pydicom():
            pixels = np.full((size, size), 1000, np.int16)
            dataset = ct_dataset(pixels, series=f"1.9.{number}", patient=f"BAD{number}")
            for keyword, value in values.items():
                setattr(dataset, keyword, value)
            dataset.file_meta = pydicom.dataset.FileMetaDataset()
            dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
            planter.plant(dataset)
            path = save_dicom(dataset, scratch / "one.dcm")
        return path.read_bytes()

    def swapped(old, what, **values):
        def make(scratch):
            content = one(scratch, values)
            assert content.count(old) == 1, what
            return content.replace(old, planter.word(what).encode())

        return make

    def word(what):
        return lambda: planter.word(what)

    return {
        "rescale-type.dcm": tags(RescaleType=word("RescaleType")),
        "modality.dcm": tags(Modality=word("Modality")),
        "image-type.dcm": tags(ImageType=lambda: ["ORIGINAL", "PRIMARY", f"LOCALIZER {planter.word('ImageType')}"]),
        "body-part.dcm": tags(BodyPartExamined=word("BodyPartExamined")),
        "body-part-2.dcm": tags(BodyPartExamined=lambda: f"CHEST {planter.word('BodyPartExamined')}"),
        "sop-class.dcm": tags(SOPClassUID=word("SOPClassUID")),
        "photometric.dcm": tags(PhotometricInterpretation=word("PhotometricInterpretation")),
        "lossy.dcm": tags(LossyImageCompression=word("LossyImageCompression")),
        "contrast.dcm": tags(ContrastBolusAgent=word("ContrastBolusAgent")),
        "syntax.dcm": syntax(one, planter),
        "slope.dcm": swapped(b"76543210", "RescaleSlope", RescaleSlope="76543210"),
        "intercept.dcm": swapped(b"76543210", "RescaleIntercept", RescaleIntercept="76543210"),
        "position.dcm": swapped(b"76543210", "ImagePosition", ImagePositionPatient=["76543210", "1", "2"]),
        "orientation.dcm": swapped(b"76543210", "Orientation", ImageOrientationPatient=["76543210", 0, 0, 0, 1, 0]),
        "number.dcm": swapped(b"76543210", "InstanceNumber", InstanceNumber="76543210"),
        "thickness.dcm": swapped(b"76543210", "SliceThickness", SliceThickness="76543210"),
        "spacing.dcm": swapped(b"76543210", "PixelSpacing", PixelSpacing=["76543210", "1"]),
        "charset.dcm": swapped(b"ISO_IR_7", "SpecificCharacterSet", SpecificCharacterSet="ISO_IR_7"),
        "truncated.dcm": lambda scratch: one(scratch, {})[:-40],
        "no-dicom.txt": lambda _: f"Dear colleague, {planter.word('letter')} was seen".encode(),
        "no-dicom.dcm": lambda _: b"\0" * 128 + b"DICM" + planter.word("garbage").encode() * 20,
        "broken.zip": lambda _: b"PK\x03\x04" + planter.word("archive").encode() * 9,
    }  # fmt: skip


def syntax(one, planter):
    def make(scratch):
        content = one(scratch, {})
        old = b"1.2.840.10008.1.2.1\0"
        return content.replace(old, planter.word("TransferSyntaxUID").encode().ljust(len(old), b"\0"), 1)

    return make


def ichpipe(*arguments):
    """Exit code, and all that is said on both streams, by Python and by libraries beneath it."""
    text, kept = io.StringIO(), [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as sink, contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        for number in (1, 2):
            os.dup2(sink.fileno(), number)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")  # shown, as to a user
                code = outcome([str(one) for one in arguments])
        finally:
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)
        sink.seek(0)
        return code, text.getvalue().encode() + sink.read()


def outcome(arguments):
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
        ("predict", data / "dicom" / "slope.dcm", "--out", tmp_path / "none"),
        ("predict", data / "dicom" / "broken.zip"),
        ("predict", data / "dicom" / "modality.dcm", "--force"),
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
    path = index.loc[(index["split"] == "train") & index["any"].notna(), "path"].iloc[0]
    path = Path(path)
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
    table = pd.DataFrame({"a": [word]})
    table.to_parquet(tmp_path / "a.parquet", compression="zstd")
    np.savez_compressed(tmp_path / "b.npz", a=np.array([word]))
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", word, zip=True)
    Image.new("L", (2, 2)).save(tmp_path / "c.png", pnginfo=info)
    import base64

    packed = base64.b64encode((tmp_path / "c.png").read_bytes()).decode()
    (tmp_path / "d.html").write_text(f'<img src="data:image/png;base64,{packed}">')
    (tmp_path / "e.txt").write_text("&#90;Q" + word[2:])
    (tmp_path / "f.bin").write_bytes(word.encode("utf-16-le"))
    for path in planted.files_below(tmp_path):
        assert planted.found_in(path.read_bytes(), {word}) == {word}, path.name
