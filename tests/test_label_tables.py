"""Labels of slices, series, studies and patients, joined by identifier."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from score_kit import reads_text

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.index.label_tables import join, read_labels
from ichpipe.index.rsna_labels import read_rsna_labels


def make_index(sizes, patients=None):
    """An index of one study a number of slices, names in no order."""
    study = np.repeat(np.arange(len(sizes)), sizes)
    frame = pd.DataFrame({"study_uid": [f"T{number:03d}" for number in study]})
    frame["series_uid"] = "S" + frame["study_uid"]
    frame["patient_id"] = [f"P{number}" for number in study] if patients is None else np.repeat(patients, sizes)
    frame["sop_uid"] = [f"I{number}" for number in range(len(study))]
    return frame.assign(path="data/" + frame["sop_uid"])


def write(path, text):
    path.write_text(text)
    return path


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=st.integers(0, 999))
def test_labels_of_studies_leave_on_slices_what_they_say(tmp_path_factory, sizes, seed):
    generator = np.random.default_rng(seed)
    index = make_index(sizes)
    true = (generator.random((len(index), 6)) < 0.3).astype(float)
    true[:, 0] = true[:, 1:].max(axis=1)
    of_slices = index[["sop_uid"]].assign(**dict(zip(CLASSES, true.T, strict=True)))
    folder = tmp_path_factory.mktemp("labels")
    of_slices.sample(frac=1, random_state=seed).to_csv(folder / "slices.csv", index=False)
    joined, table, _ = join(index, read_labels("folder", folder / "slices.csv"))
    assert (joined[list(CLASSES)].to_numpy() == true).all()
    mixed = table.sample(frac=1, random_state=seed)
    mixed[["study_uid", *CLASSES]].to_csv(folder / "studies.csv", index=False)
    labels = read_labels("folder", folder / "studies.csv")
    again, same_table, counts = join(index.sample(frac=1, random_state=seed), labels)
    pd.testing.assert_frame_equal(same_table, table)
    assert counts == {"studies_without_label": 0, "labels_without_study": 0}
    of_study = table.set_index("study_uid").loc[again["study_uid"], list(CLASSES)].to_numpy()
    found = again[list(CLASSES)].to_numpy()
    assert ((found == 0) == (of_study == 0)).all()
    assert np.isnan(found[of_study == 1]).all()
    before = joined.set_index("sop_uid").loc[again["sop_uid"], list(CLASSES)].to_numpy()
    assert (before[~np.isnan(found)] == found[~np.isnan(found)]).all()


def test_rsna_is_read_as_ever(tmp_path):
    sick = ("I1_any", "I1_subdural")
    ids = [f"I{number}_{name}" for number in range(3) for name in CLASSES]
    rows = [f"{name},{int(name in sick)}" for name in ids]
    path = write(tmp_path / "kaggle.csv", "ID,Label\n" + "\n".join(rows) + "\n")
    values, report = read_rsna_labels(path)
    for dataset in ("rsna", "folder"):
        found = read_labels(dataset, path)
        pd.testing.assert_frame_equal(found.values, values)
        assert (found.key, found.report) == ("sop_uid", report)
    index = make_index([2, 2])
    joined, table, counts = join(index, found)
    expected = values.reindex(index["sop_uid"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(joined[list(CLASSES)], expected)
    assert counts == {"slices_without_label": 1, "labels_without_slice": 0}
    assert table["subdural"].tolist()[0] == 1.0
    assert np.isnan(table["subdural"][1])  # one slice of it has no label


@pytest.mark.parametrize(
    ("column", "names"),
    [("PatientID", ["P0", "P1"]), ("StudyInstanceUID", ["T000", "T001"]), ("series_uid", ["ST000", "ST001"])],
)
def test_a_row_may_name_what_it_likes(tmp_path, column, names):
    path = write(tmp_path / "t.csv", f"{column},any\n{names[0]},1\n{names[1]},0\n")
    joined, table, _ = join(make_index([2, 3]), read_labels("folder", path))
    assert table["any"].tolist() == [1, 0]
    assert table["subdural"].isna().all()
    assert joined["any"].isna().tolist() == [True] * 2 + [False] * 3


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("1,,,,,", [1, None, None, None, None, None]),
        (",1,,,,", [1, 1, None, None, None, None]),
        (",0,0,0,0,0", [0, 0, 0, 0, 0, 0]),
        (",0,0,0,0,", [None, 0, 0, 0, 0, None]),
        ("0,1,,,,", [None] * 6),
        ("1,0,0,0,0,0", [None] * 6),
        ("1.0, 0 ,,,,", [1, 0, None, None, None, None]),
    ],
)
def test_what_is_left_out_is_unknown_and_any_follows_from_the_kinds(tmp_path, row, expected):
    found = read_labels("folder", write(tmp_path / "t.csv", f"study_uid,{','.join(CLASSES)}\nT,{row}\n"))
    assert [None if np.isnan(value) else value for value in found.values.loc["T"]] == expected
    assert found.report["inconsistent_any"] == (1 if row in ("0,1,,,,", "1,0,0,0,0,0") else 0)


def test_rows_that_repeat_or_contradict_are_counted(tmp_path):
    text = "study_uid,any,subdural\nA,1,1\nA,1,\nB,1,0\nB,0,0\nC,0,0\n"
    found = read_labels("folder", write(tmp_path / "t.csv", text))
    assert found.values.loc["A", ["any", "subdural"]].tolist() == [1, 1]
    assert found.values.loc["B"].isna().all()
    assert found.values.loc["C", "any"] == 0
    assert found.report["duplicate_rows"] == 2
    assert (found.report["contradictory"], found.report["contradictory_names"]) == (1, ["B"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("study_uid,any\nA,2\n", r"line 2: column any is neither 0, 1 nor empty: '2'"),
        ("study_uid,any\nA,1\nB,yes\n", r"line 3: column any is neither 0, 1 nor empty: 'yes'"),
        ("study_uid,ich\nA,1\n", "has none of the columns any"),
        ("name,any\nA,1\n", "names no slice, series, study or patient"),
        ("study_uid,any\n,1\n", "column study_uid is empty"),
    ],
)
def test_wrong_tables_are_named(tmp_path, text, complaint):
    with pytest.raises(DataError, match=complaint):
        read_labels("folder", write(tmp_path / "t.csv", text))


@pytest.mark.parametrize(
    ("patient", "path"),
    [
        ("CQ500CT12 CQ500CT12", "x/1"),
        ("CQ500-CT-12", "x/1"),
        ("anonymous", "q/CQ500-CT-12.zip/CQ500CT12 CQ500CT12/Unknown Study/CT 5mm/CT000000.dcm"),
        ("anonymous", "q/CQ500CT12 CQ500CT12/Unknown Study/CT Plain/CT000001.dcm"),
    ],
)
def test_scans_of_cq500_are_found_by_patient_or_folder(tmp_path, patient, path):
    text = reads_text([("CQ500-CT-12", [1, 0, 0, 0, 0, 1] * 2 + [0] * 6), ("CQ500-CT-3", [0] * 18)])
    index = make_index([2, 1]).assign(patient_id=[patient, patient, "CQ500CT999"])
    index.loc[:1, "path"] = path
    joined, table, counts = join(index, read_labels("cq500", write(tmp_path / "reads.csv", text)))
    assert table[["any", "subdural", "epidural"]].iloc[0].tolist() == [1, 1, 0]
    assert joined["epidural"].iloc[:2].tolist() == [0, 0]
    assert joined["subdural"].isna().all()
    assert counts == {"studies_without_label": 1, "labels_without_study": 1}


def test_no_match_at_all_is_an_error(tmp_path):
    path = write(tmp_path / "t.csv", "study_uid,any\nX,1\n")
    with pytest.raises(DataError, match=r"none of 2 studies.*first study_uid: 'T000'.*'X'.*prepare.labels"):
        join(make_index([1, 2]), read_labels("folder", path))


def test_without_labels_all_is_unknown():
    joined, table, counts = join(make_index([2]), None)
    assert joined[list(CLASSES)].isna().all(axis=None)
    assert table[list(CLASSES)].isna().all(axis=None)
    assert not counts


@pytest.mark.real_data
def test_real_reads_label_491_scans(real_data):
    labels = read_labels("cq500", real_data / "tables/cq500/reads.csv")
    numbers = [int(name.rpartition("-")[2]) for name in labels.values.index]
    index = make_index([1] * len(numbers), [f"CQ500CT{number} CQ500CT{number}" for number in numbers])
    _, table, counts = join(index, labels)
    assert counts == {"studies_without_label": 0, "labels_without_study": 0}
    findings = ("any", "intraparenchymal", "intraventricular", "subdural", "epidural", "subarachnoid")
    assert [int(table[name].sum()) for name in findings] == [205, 134, 28, 53, 13, 60]


@pytest.mark.real_data
def test_real_wide_labels_of_slices(real_data):
    labels = read_labels("folder", real_data / "tables/rsna/stage1_train_part0.csv.gz")
    assert (labels.key, labels.report["inconsistent_any"], labels.report["contradictory"]) == ("sop_uid", 0, 0)
    raw = pd.read_csv(real_data / "tables/rsna/stage1_train_part0.csv.gz").set_index("ID").sort_index()
    assert (labels.values.to_numpy() == raw[list(CLASSES)].to_numpy()).all()
