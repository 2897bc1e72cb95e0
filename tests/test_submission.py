"""The competition's format; a missing prediction is an error unless a value is given for it."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.index.scan import COPY
from ichpipe.inference.kaggle_submission import ORDER, build_submission, read_sample
from ichpipe.params.schema import EvaluateParams, SelectionParams
from ichpipe.scoring.metrics import weighted_log_loss
from ichpipe.stages import predict, score

NOTHING = pd.DataFrame({"path": [], "reason": [], "code": []}, dtype=object)
CORRUPT = pd.DataFrame(
    {"path": ["a/ID_6431af929.dcm", "a/readme.txt"], "reason": ["truncated: PixelData", "not a DICOM file"], "code": ""}
)


def predictions(count, seed=0):
    values = np.random.default_rng(seed).random((count, 6))
    names = [f"ID_{number:09x}" for number in range(count)]
    return pd.DataFrame(values, columns=list(CLASSES)).assign(sop_uid=names)


def value_of(table):
    return table.assign(Label=table["Label"].astype(float)).set_index("ID")["Label"]


def write_sample(path, names):
    path.write_text("ID,Label\n" + "".join(f"{name},0.5\n" for name in names))
    return read_sample(path)


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 8), seed=st.integers(0, 99))
def test_rows_are_those_of_the_sample_in_its_order(tmp_path_factory, count, seed):
    slices = predictions(count, seed)
    names = [f"{uid}_{name}" for uid in slices["sop_uid"] for name in ORDER]
    shuffled = list(np.random.default_rng(seed).permutation(names))
    sample = write_sample(tmp_path_factory.mktemp("sample") / "s.csv", shuffled)
    submission, remarks = build_submission(slices, NOTHING, sample)
    assert submission["ID"].tolist() == shuffled
    assert not remarks
    values = value_of(submission)
    for row in slices.to_dict("records"):
        for name in CLASSES:
            assert values[f"{row['sop_uid']}_{name}"] == pytest.approx(row[name], abs=1e-9)


def test_without_a_sample_slices_are_sorted_and_classes_in_the_order_of_the_competition():
    submission, _ = build_submission(predictions(3).iloc[::-1], NOTHING)
    assert submission["ID"].tolist()[:7] == [
        *(f"ID_000000000_{name}" for name in (
            "epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any"
        )),
        "ID_000000001_epidural",
    ]  # fmt: skip
    assert list(submission.columns) == ["ID", "Label"]
    assert submission["Label"].str.fullmatch(r"[01]\.\d{9}").all()


def test_certainty_is_kept_within_what_nine_decimals_can_say():
    slices = predictions(1)
    slices.loc[0, ["any", "epidural", "subdural"]] = [1e-30, 1.0, 1e-8]
    values = value_of(build_submission(slices, NOTHING)[0])
    ids = [f"ID_000000000_{name}" for name in ("any", "epidural", "subdural")]
    assert values[ids].tolist() == [1e-9, 1 - 1e-9, 1e-8]


@pytest.mark.parametrize(("code", "is_missing"), [(COPY, False), ("", True)])
@pytest.mark.parametrize("reason", ["duplicate: a copy of b.dcm", "read before"])
def test_the_code_of_a_file_decides_and_not_the_wording(code, is_missing, reason):
    """Of a copy the slice itself was read."""
    rejected = pd.DataFrame({"path": ["a/ID_0123456ab.dcm"], "reason": [reason], "code": [code]})
    if is_missing:
        with pytest.raises(DataError, match="ID_0123456ab"):
            build_submission(predictions(1), rejected)
    else:
        assert len(build_submission(predictions(1), rejected)[0]) == 6


def test_a_slice_without_prediction_is_an_error_that_says_why(tmp_path):
    names = [f"{uid}_any" for uid in ("ID_000000000", "ID_6431af929", "ID_fffffffff")]
    sample = write_sample(tmp_path / "s.csv", names)
    message = (
        r"2 slices of the submission have no prediction: ID_6431af929 \(truncated: PixelData\), "
        r"ID_fffffffff \(no such file\); add the files, or fill them by --missing"
    )
    with pytest.raises(DataError, match=message):
        build_submission(predictions(1), CORRUPT, sample)
    submission, remarks = build_submission(predictions(1), CORRUPT, sample, 0.25)
    assert value_of(submission)[names[1:]].tolist() == [0.25, 0.25]
    assert "written as 0.25" in remarks[0]


def test_without_a_sample_a_rejected_file_named_like_a_slice_is_missed():
    with pytest.raises(DataError, match="1 slices of the submission have no prediction: ID_6431af929"):
        build_submission(predictions(2), CORRUPT)
    submission, _ = build_submission(predictions(2), CORRUPT, missing=0.5)
    assert len(submission) == 18
    assert (value_of(submission).filter(like="6431af929") == 0.5).all()


def test_slices_that_the_sample_does_not_name_are_counted(tmp_path):
    sample = write_sample(tmp_path / "s.csv", ["ID_000000001_any"])
    submission, remarks = build_submission(predictions(5), NOTHING, sample)
    assert len(submission) == 1
    assert "4 predicted slices are not in" in remarks[0]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("ID,Label\nID_1_any,0.5\nID_1_bone,0.5\n", "line 3: ID is not <SOPInstanceUID>_<class>"),
        ("ID,Label\nany,0.5\n", "line 2: ID is not"),
        ("ID,Label\nID_1_any,0.5\nID_2_any,0.5\nID_1_any,0.5\n", "line 4: ID appears twice"),
        ("name,Label\nID_1_any,0.5\n", "must have the columns ID,Label"),
        ("ID,Probability\nID_1_any,0.5\n", "must have the columns ID,Label"),
    ],
)
def test_a_wrong_sample_is_named(tmp_path, text, complaint):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(DataError, match=complaint):
        read_sample(tmp_path / "s.csv")


def test_a_wrong_sample_is_an_error_before_anything_is_predicted(tmp_path):
    (tmp_path / "s.csv").write_text("ID,Label\nID_1_bone,0.5\n")
    options = predict.Options(SelectionParams(), kaggle=tmp_path / "k.csv", sample=tmp_path / "s.csv")
    with pytest.raises(DataError, match="line 2: ID is not"):  # not: there is no model
        predict.run([tmp_path], tmp_path / "out", tmp_path / "no model", options, gpu="cpu")


@pytest.mark.parametrize("with_sample", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_prediction_that_is_not_a_number_is_none(tmp_path, with_sample, value):
    slices = predictions(3)
    slices.loc[1, "subdural"] = value
    sample = write_sample(tmp_path / "s.csv", [f"ID_00000000{k}_any" for k in range(3)]) if with_sample else None
    message = r"1 slices of the submission have no prediction: ID_000000001 \(its prediction is not a number\)"
    with pytest.raises(DataError, match=message):
        build_submission(slices, NOTHING, sample)
    submission, remarks = build_submission(slices, NOTHING, sample, 0.25)
    assert "written as 0.25" in remarks[0]
    values = value_of(submission)
    assert (values.filter(like="ID_000000001") == 0.25).all()
    assert values["ID_000000002_any"] == pytest.approx(slices.loc[2, "any"], abs=1e-9)


def test_score_reads_back_what_was_written(tmp_path):
    slices, labels = predictions(50), (np.random.default_rng(1).random((50, 6)) < 0.3).astype(float)
    labels[:, 0] = labels[:, 1:].max(axis=1)
    build_submission(slices, NOTHING)[0].to_csv(tmp_path / "submission.csv", index=False, lineterminator="\n")
    slices[["sop_uid"]].assign(**dict(zip(CLASSES, labels.T, strict=True))).to_csv(tmp_path / "labels.csv", index=False)
    tables = tmp_path / "submission.csv", tmp_path / "labels.csv"
    text = score.run("rsna", *tables, None, EvaluateParams())
    direct = weighted_log_loss(labels, slices[list(CLASSES)].to_numpy())
    assert json.loads(text)["weighted_log_loss"] == pytest.approx(direct, abs=1e-7)
