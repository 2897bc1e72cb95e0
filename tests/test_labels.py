"""Label tables."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ichpipe.common.classes import CLASSES, SUBTYPES
from ichpipe.common.errors import DataError, MissingFileError
from ichpipe.index.rsna_labels import read_rsna_labels

KAGGLE_ORDER = (*SUBTYPES, "any")
rows_of = st.lists(st.tuples(*[st.integers(0, 1)] * 5), min_size=1, max_size=20)


def write_table(path, rows, heading="ID,Label"):
    path.write_text("\n".join([heading, *rows]) + "\n", encoding="utf-8")
    return path


def lines(uid, subtypes, any_label=None):
    values = [*subtypes, max(subtypes) if any_label is None else any_label]
    return [f"{uid}_{name},{value}" for name, value in zip(KAGGLE_ORDER, values, strict=True)]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(labels=rows_of, seed=st.integers(0, 9))
def test_any_table_comes_back_by_name_in_any_row_order(tmp_path, labels, seed):
    rows = [line for number, subtypes in enumerate(labels) for line in lines(f"ID_{number:09x}", subtypes)]
    np.random.default_rng(seed).shuffle(rows)
    table, report = read_rsna_labels(write_table(tmp_path / "t.csv", rows))
    assert list(table.columns) == list(CLASSES)
    assert (table.dtypes == np.float32).all()
    for number, subtypes in enumerate(labels):
        assert table.loc[f"ID_{number:09x}"].tolist() == [max(subtypes), *subtypes]
    assert (report["rows"], report["slices"], report["duplicate_rows"]) == (6 * len(labels), len(labels), 0)


def test_rows_that_repeat_are_counted_and_change_nothing(tmp_path):
    rows = lines("ID_a", [0, 1, 0, 0, 0]) + lines("ID_b", [0, 0, 0, 0, 0])
    once, _ = read_rsna_labels(write_table(tmp_path / "once.csv", rows))
    twice, report = read_rsna_labels(write_table(tmp_path / "twice.csv", rows + rows[:6]), on_conflict="error")
    assert once.equals(twice)
    assert (report["duplicate_rows"], report["contradictory_slices"]) == (6, 0)


def test_a_slice_with_contradictory_rows_becomes_unknown_and_is_reported_or_is_an_error_if_asked(tmp_path):
    rows = [*lines("ID_a", [0, 1, 0, 0, 0]), "ID_a_subdural,1", *lines("ID_b", [1, 0, 0, 0, 0])]
    path = write_table(tmp_path / "t.csv", rows)
    message = r"t\.csv, line 6: contradicts another row of the same ID; keep one of them: 'ID_a_subdural' \(2 such row"
    with pytest.raises(DataError, match=message):
        read_rsna_labels(path, on_conflict="error")
    table, report = read_rsna_labels(path)
    assert table.loc["ID_a"].isna().all()
    assert table.loc["ID_b"].notna().all()
    assert report["contradictory_sop_uids"] == ["ID_a"]
    assert report["inconsistent_any_slices"] == 0


@pytest.mark.parametrize(("subtypes", "any_label"), [([0, 1, 0, 0, 0], 0), ([0, 0, 0, 0, 0], 1)])
def test_any_must_be_the_maximum_of_the_five(tmp_path, subtypes, any_label):
    rows = lines("ID_a", subtypes, any_label) + lines("ID_b", [0, 0, 0, 0, 1])
    table, report = read_rsna_labels(write_table(tmp_path / "t.csv", rows))
    assert table.loc["ID_a"].isna().all()
    assert report["inconsistent_any_sop_uids"] == ["ID_a"]
    assert table.loc["ID_b", "any"] == 1


def test_absent_rows_leave_that_class_unknown(tmp_path):
    rows = [line for line in lines("ID_a", [0, 1, 0, 0, 0]) if "epidural" not in line]
    table, report = read_rsna_labels(write_table(tmp_path / "t.csv", rows))
    assert np.isnan(table.loc["ID_a", "epidural"])
    assert table.loc["ID_a"].drop("epidural").tolist() == [1, 1, 0, 0, 0]
    assert report["incomplete_sop_uids"] == ["ID_a"]


def test_byte_order_mark_line_ends_and_dotted_uids_pass(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbfID,Label\r\n" + "\r\n".join(lines("1.2.840.1", [0, 0, 0, 0, 1])).encode() + b"\r\n")
    table, _ = read_rsna_labels(path)
    assert table.loc["1.2.840.1"].tolist() == [1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("ID_a_epidurall,0", "unknown class"),
        ("epidural,0", "not <SOPInstanceUID>_<class>"),
        ("_epidural,0", "no SOPInstanceUID"),
        ("ID_a_any,2", "Label"),
        ("ID_a_any,", "Label"),
        ("ID_a_any,0.5", "Label"),
        ("ID_a_any,nan", "Label"),
    ],
)
def test_a_bad_row_is_an_error_that_names_file_and_line(tmp_path, row, complaint):
    path = write_table(tmp_path / "t.csv", [*lines("ID_b", [0] * 5), row])
    with pytest.raises(DataError, match=complaint) as caught:
        read_rsna_labels(path)
    assert f"{path}, line 8" in str(caught.value)


@pytest.mark.parametrize("heading", ["ID,Probability", "ID,Label,Extra", "ID"])
def test_other_columns_are_an_error_that_names_the_file(tmp_path, heading):
    row = ",".join(["ID_a_any", "0", "0"][: heading.count(",") + 1])
    with pytest.raises(DataError, match=r"t\.csv"):
        read_rsna_labels(write_table(tmp_path / "t.csv", [row], heading))


def test_an_empty_or_missing_table_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no rows"):
        read_rsna_labels(write_table(tmp_path / "heading.csv", []))
    (tmp_path / "empty.csv").touch()
    with pytest.raises(DataError, match=r"empty\.csv"):
        read_rsna_labels(tmp_path / "empty.csv")
    with pytest.raises(MissingFileError, match=r"absent\.csv"):
        read_rsna_labels(tmp_path / "absent.csv")


@pytest.mark.real_data
def test_real_rsna_labels(real_data):
    table, report = read_rsna_labels(real_data / "rsna_real_slices" / "stage_2_train.csv")
    assert (report["rows"], report["slices"], report["incomplete_slices"]) == (30, 5, 0)
    assert (table["any"] == table[list(SUBTYPES)].max(axis=1)).all()
