"""Split presets: by patient, by fold, by a table that names the test set."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError, ParamsError
from ichpipe.index.splits import assign_splits, count_overlap, read_test_slices
from ichpipe.params.schema import PrepareParams


def make_index(series_of_patient, seed=0):
    """An index of patients with some series of three slices each."""
    rows = [
        (f"P{p}", f"S{p}.{s}", f"I{p}.{s}.{k}")
        for p, n in enumerate(series_of_patient)
        for s in range(n)
        for k in range(3)
    ]
    frame = pd.DataFrame(rows, columns=["patient_id", "series_uid", "sop_uid"])
    labels = (np.random.default_rng(seed).random((len(frame), 6)) < 0.2).astype(np.float32)
    return frame.assign(**dict(zip(CLASSES, labels.T, strict=True)))


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(1, 3), min_size=6, max_size=30),
    chosen=st.integers(1, 10),
    seed=st.integers(0, 99),
    val=st.sampled_from([0.0, 0.1, 0.3]),
)
def test_nobody_is_trained_on_who_is_scored(counts, chosen, seed, val):
    index = make_index(counts)
    series = index["series_uid"].drop_duplicates().sample(frac=1, random_state=seed)
    # At most a third of the patients are tested, so that some are left to train on.
    owners = index.drop_duplicates("series_uid").set_index("series_uid")["patient_id"]
    tested = [uid for uid in series if owners[uid] in set(owners[series].unique()[: len(counts) // 3])][:chosen]
    uids = pd.Index(index.loc[index["series_uid"].isin(tested), "sop_uid"])
    params = PrepareParams(split="stage1", test_slices="t.csv", val_fraction=val, test_fraction=0.2, folds=2, seed=seed)
    result = assign_splits(index, params, uids)
    assert ((result["split"] == "test") == result["sop_uid"].isin(uids)).all()
    scored = set(result.loc[result["split"] == "test", "patient_id"])
    learned = set(result.loc[result["split"].isin(["train", "val"]), "patient_id"])
    assert learned
    assert not scored & learned
    out = result["split"].isna()
    assert set(result.loc[out, "patient_id"]) <= scored
    found = count_overlap(result)
    assert found["slices_left_out_of_training"] == out.sum()
    assert found["patients"] == result.loc[out, "patient_id"].nunique()
    mixed = assign_splits(index.sample(frac=1, random_state=seed), params, uids).loc[result.index]
    pd.testing.assert_frame_equal(mixed, result)


def test_the_overlap_of_285_patients_is_found():
    # As in RSNA: most patients have one series, 285 stand in both halves.
    index = make_index([1] * 1000 + [2] * 285)
    tested = index["series_uid"].isin([f"S{p}.0" for p in range(900, 1285)])
    params = PrepareParams(split="stage1", test_slices="t.csv")
    result = assign_splits(index, params, pd.Index(index.loc[tested, "sop_uid"]))
    assert count_overlap(result) == {"patients": 285, "slices_left_out_of_training": 855, "slices_in_test": 855}
    assert result["split"].value_counts().to_dict() == {"test": 3 * 385, "train": 3 * 765, "val": 3 * 135}


def test_kfold_takes_the_first_fold_unless_told():
    index = make_index([1] * 40)
    for fold in (None, 0, 3):
        result = assign_splits(index, PrepareParams(split="patient-kfold", test_fold=fold, test_fraction=0.5))
        assert ((result["split"] == "test") == (result["fold"] == (fold or 0))).all()
    same = assign_splits(index, PrepareParams(test_fold=3))
    pd.testing.assert_frame_equal(same, assign_splits(index, PrepareParams(split="patient-kfold", test_fold=3)))


@pytest.mark.parametrize(
    ("uids", "complaint"),
    [
        (["X"], "none of 30 slices is named in prepare.test_slices"),
        (["I0.0.0", "I1.0.0", "I1.0.1", "I1.0.2"], "first S0.0"),
    ],
)
def test_a_table_that_does_not_fit_is_an_error(uids, complaint):
    with pytest.raises(DataError, match=complaint):
        assign_splits(make_index([1] * 10), PrepareParams(split="stage1", test_slices="t"), pd.Index(uids))


def test_stage1_without_a_table_is_an_error():
    with pytest.raises(ParamsError, match=r"needs prepare\.test_slices"):
        read_test_slices(PrepareParams(split="stage1").test_slices)


@pytest.mark.parametrize(
    "text",
    [
        "ID,Label\nI1_any,0.5\nI1_epidural,0.5\nI2_any,0.5\n",
        "ID,Label,SOPInstanceUID\nwrong_any,0,I1\nwrong_any,0,I2\n",
        "sop_uid\nI1\nI2\nI1\n",
        "ID,any\nI1,0\nI2,1\n",
    ],
)
def test_any_table_may_name_the_slices(tmp_path, text):
    (tmp_path / "t.csv").write_text(text)
    assert read_test_slices(tmp_path / "t.csv").tolist() == ["I1", "I2"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("ID,Label\nI1_any,0.5\nI1_bone,0.5\n", "line 3: ID is not"), ("name\nI1\n", "names no slices")],
)
def test_another_table_is_an_error(tmp_path, text, complaint):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=complaint):
        read_test_slices(tmp_path / "t.csv")


@pytest.mark.real_data
def test_the_real_table_names_78545_slices(real_data):
    found = read_test_slices(real_data / "tables/rsna/stage1_test_with_metadata.csv.gz")
    assert len(found) == 78_545
    assert found.str.startswith("ID_").all()
