"""What would give wrong numbers without a sign, each caught by a check in the product (docs/reliability.md)."""

import json
import struct

import numpy as np
import pandas as pd
import pytest

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError, WeightsError
from ichpipe.index.scan import scan
from ichpipe.index.series_selection import choose_series, describe_series
from ichpipe.index.slice_index import read_index
from ichpipe.inference.inputs import check_head_ct
from ichpipe.models.weights import load_end_to_end
from ichpipe.params.schema import SelectionParams

POSITIONS = [float(z) for z in range(0, 150, 5)]


def series_of(folder):
    slices, rejected = scan([folder])
    return slices, choose_series(describe_series(slices, rejected), SelectionParams())


@pytest.mark.parametrize(
    ("direction", "turned"),
    [
        ([1, 0, 0, 0, 1, 0], False),
        ([1, 0, 0, 0, 0.94, -0.342], False),  # gantry tilt of 20 degrees
        ([0.94, 0.342, 0, -0.342, 0.94, 0], False),  # a rolled head
        ([-1, 0, 0, 0, 1, 0], True),  # mirrored left to right
        ([1, 0, 0, 0, -1, 0], True),  # upside down
        ([-1, 0, 0, 0, -1, 0], True),  # prone
        ([0, -1, 0, 1, 0, 0], True),  # a quarter turn: one series of RSNA 2019 is so
    ],
)
def test_mirrored_and_turned_images_are_flagged_and_refused_by_predict(tmp_path, write_series, direction, turned):
    write_series("in", POSITIONS, ImageOrientationPatient=direction)
    slices, series = series_of(tmp_path / "in")
    assert ("mirrored or turned" in series["reason"][0]) is turned
    _, refused, _ = check_head_ct(slices, series, SelectionParams())
    assert refused["reason"].str.contains("mirrored or turned").any() is np.bool_(turned)
    assert len(check_head_ct(slices, series, SelectionParams(), force=True)[1]) == 0


def test_slices_of_two_sizes_under_one_series_are_flagged(tmp_path, write_series):
    write_series("in", POSITIONS)
    write_series("in/more", [2.5], series="1.2.3.1", pixels=np.zeros((8, 8), np.int16), SOPInstanceUID="9.9")
    _, series = series_of(tmp_path / "in")
    assert "slices of several sizes" in series["reason"][0]


def torn(table):
    row = table.index[table["split"] == "train"][0]
    return table.assign(split=table["split"].where(table.index != row, "test"))


def wrong_any(table):
    row = table.index[table["any"] == 1][0]
    return table.assign(any=table["any"].where(table.index != row, np.float32(0)))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (torn, "a patient in more than one split"),
        (wrong_any, "`any` that contradicts"),
        (lambda t: t.iloc[[0, *range(len(t))]], "more than once"),
        (lambda t: t.iloc[::-1], "slices out of order"),
        (lambda t: t.assign(position_mm=-t["position_mm"]), "slices out of order"),
        (lambda t: t.sample(frac=1, random_state=0), "more than one place"),
        (
            lambda t: t.assign(**{one: t[other] for one, other in zip(CLASSES, CLASSES[::-1], strict=True)}),
            "contradicts",
        ),
        (lambda t: t.drop(index=t.index[t["slice_index"] == 0]), "slices out of order"),
    ],
)
def test_an_index_that_was_changed_is_refused(run, tmp_path, change, complaint):
    path = tmp_path / "slices.parquet"
    table = pd.read_parquet(run.artifacts / "index" / "slices.parquet")
    table.to_parquet(path, index=False)
    assert len(read_index(path)) == len(table)
    change(table).to_parquet(path, index=False)
    with pytest.raises(DataError, match=complaint):
        read_index(path)


def test_a_model_with_classes_in_another_order_is_refused(branch):
    path = branch.artifacts / "finetuned" / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    own = json.loads(header["__metadata__"]["ichpipe"])
    own["slice_cnn"]["classes"] = own["sequence"]["classes"] = list(CLASSES[::-1])
    header["__metadata__"]["ichpipe"] = json.dumps(own)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(WeightsError, match="classes are not any, epidural"):
        load_end_to_end(path.parent)


@pytest.mark.slow
def test_a_store_made_with_other_windows_is_not_read(branch, capsys):
    windows = "windows: [{level_hu: 41, width_hu: 80}, {level_hu: 75, width_hu: 215}, {level_hu: 600, width_hu: 2800}]"
    branch.params.write_text(branch.params.read_text() + windows + "\n")
    branch.steps("fit-slices")
    message = branch.error(capsys, "fit-sequence")
    assert "run: ichpipe extract" in message
