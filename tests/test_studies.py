"""Index: scan, order, labels, splits."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError, MissingFileError
from ichpipe.index.label_tables import LabelTable, join
from ichpipe.index.slice_index import read_index
from ichpipe.index.slice_order import DIRECTIONS, POSITION, find_ties_and_gaps, order_series
from ichpipe.index.splits import assign_splits
from ichpipe.params.schema import PrepareParams


def tilted(degrees):
    angle = np.radians(degrees)
    return [1.0, 0.0, 0.0, 0.0, float(np.cos(angle)), float(-np.sin(angle))]


def table_of(positions, directions, series="S", numbers=None):
    count = len(positions)
    frame = pd.DataFrame({"series_uid": series, "sop_uid": [f"{series}.{i:03d}" for i in range(count)]})
    frame["path"] = frame["sop_uid"]
    frame["instance_number"] = np.full(count, np.nan) if numbers is None else np.asarray(numbers, float)
    frame[list(POSITION)] = np.asarray(positions, float)
    frame[list(DIRECTIONS)] = np.asarray(directions, float)
    return frame


@settings(deadline=None, max_examples=40)
@given(
    steps=st.lists(st.floats(0.1, 20), min_size=1, max_size=12),
    tilt=st.floats(-30, 30),
    sideways=st.floats(-50, 50),
    seed=st.integers(0, 99),
)
def test_order_is_along_the_normal_whatever_the_row_order(steps, tilt, sideways, seed):
    direction = np.array(tilted(tilt))
    normal = np.cross(direction[:3], direction[3:])
    along = np.cumsum(steps) - 30
    generator = np.random.default_rng(seed)
    in_plane = generator.uniform(-1, 1, (len(along), 1)) * sideways * direction[3:]
    frame = table_of(along[:, None] * normal + in_plane, [direction] * len(along))
    shuffled = frame.sample(frac=1, random_state=seed)
    ordered, rejected = order_series(shuffled)
    assert rejected.empty
    assert ordered["sop_uid"].tolist() == frame["sop_uid"].tolist()
    assert ordered["slice_index"].tolist() == list(range(len(along)))
    np.testing.assert_allclose(ordered["position_mm"], along, atol=1e-6)
    np.testing.assert_allclose(ordered["spacing_mm"][1:], np.diff(along), atol=1e-6)


def test_axial_slices_ascend_to_the_head_even_if_the_image_is_upside_down():
    positions = [[0, 0, z] for z in (10, 0, 5)]
    for column_y in (1.0, -1.0):
        ordered, _ = order_series(table_of(positions, [[1.0, 0, 0, 0, column_y, 0]] * 3))
        assert ordered["position_mm"].tolist() == [0, 5, 10]


def test_first_spacing_is_the_next_one_and_one_slice_has_none():
    ordered, _ = order_series(table_of([[0, 0, 0], [0, 0, 3], [0, 0, 10]], [tilted(0)] * 3))
    assert ordered["spacing_mm"].tolist() == [3, 3, 7]
    single, _ = order_series(table_of([[0, 0, 0]], [tilted(0)]))
    assert single["spacing_mm"].isna().all()


def test_ties_follow_instance_number_then_sop_uid():
    positions = [[0, 0, z] for z in (5, 5.0004, 5, 5, 0)]
    ordered, _ = order_series(table_of(positions, [tilted(0)] * 5, numbers=[3, 1, np.nan, 3, 9]))
    assert ordered["sop_uid"].tolist() == ["S.004", "S.001", "S.000", "S.003", "S.002"]
    assert (ordered["spacing_mm"] >= 0).all()
    assert find_ties_and_gaps(ordered)[0].tolist() == [False, False, True, True, True]


def test_gaps_are_marked_and_cut_nothing():
    ordered, _ = order_series(table_of([[0, 0, z] for z in (0, 5, 10, 30, 35)], [tilted(0)] * 5))
    assert ordered["slice_index"].tolist() == [0, 1, 2, 3, 4]
    assert find_ties_and_gaps(ordered)[1].tolist() == [False, False, False, True, False]


def test_a_change_from_thin_to_thick_slices_is_no_gap():
    ordered, _ = order_series(table_of([[0, 0, z] for z in (0, 2, 4, 4, 9, 14, 19)], [tilted(0)] * 7))
    assert not find_ties_and_gaps(ordered)[1].any()


def test_the_few_with_another_orientation_are_rejected():
    coronal = [1.0, 0, 0, 0, 0, -1.0]
    frame = table_of([[0, 0, z] for z in range(5)], [tilted(0), tilted(21), coronal, tilted(0), coronal])
    ordered, rejected = order_series(frame)
    assert rejected["path"].tolist() == ["S.002", "S.004"]
    assert ordered["slice_index"].tolist() == [0, 1, 2]


def test_series_do_not_touch_each_other():
    first = table_of([[0, 0, z] for z in (3, 1, 2)], [tilted(0)] * 3, "A")
    second = table_of([[0, 0, z] for z in (9, 8)], [tilted(20)] * 2, "B")
    alone = pd.concat([order_series(part)[0] for part in (first, second)], ignore_index=True)
    together, _ = order_series(pd.concat([second, first]))
    pd.testing.assert_frame_equal(together, alone)


def patients(count, seed=0):
    """An index of ``count`` patients with one to four slices each and labels of very different rarity."""
    generator = np.random.default_rng(seed)
    names = np.repeat([f"P{i:04d}" for i in range(count)], generator.integers(1, 5, count))
    labels = (generator.random((len(names), 5)) < [0.02, 0.1, 0.1, 0.2, 0.3]).astype(np.float32)
    frame = pd.DataFrame(labels, columns=list(CLASSES[1:])).assign(any=labels.max(axis=1))
    return frame.assign(patient_id=names, sop_uid=[str(i) for i in range(len(names))])


def by_patient(index):
    return index.drop_duplicates("patient_id").set_index("patient_id")[["split", "fold"]].sort_index()


@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(5, 60),
    seed=st.integers(0, 5),
    val=st.sampled_from([0.0, 0.1, 0.3]),
    test=st.sampled_from([0.0, 0.2, 0.5]),
    fold=st.sampled_from([None, 0, 4]),
)
def test_no_patient_is_torn_and_every_wanted_group_has_one(count, seed, val, test, fold):
    params = PrepareParams(val_fraction=val, test_fraction=test, test_fold=fold, seed=seed)
    result = assign_splits(patients(count, seed), params)
    assert (result.groupby("patient_id")[["split", "fold"]].nunique() == 1).all(axis=None)
    wanted = {"train"} | ({"val"} if val else set()) | ({"test"} if test or fold is not None else set())
    assert set(result["split"]) == wanted
    assert set(result["fold"]) == set(range(5))
    if fold is not None:
        assert ((result["split"] == "test") == (result["fold"] == fold)).all()


def test_splits_depend_on_patients_and_seed_and_not_on_row_order():
    index, params = patients(80), PrepareParams(seed=3)
    result = by_patient(assign_splits(index, params))
    assert result.equals(by_patient(assign_splits(index.sample(frac=1, random_state=1), params)))
    assert not result.equals(by_patient(assign_splits(index, PrepareParams(seed=4))))


def test_sizes_and_rare_classes_are_spread_as_asked():
    index = patients(600)
    result = assign_splits(index, PrepareParams(val_fraction=0.15, test_fraction=0.25))
    shares = by_patient(result)["split"].value_counts(normalize=True)
    assert shares.to_dict() == pytest.approx({"train": 0.6, "test": 0.25, "val": 0.15}, abs=0.01)
    sick = result[result["epidural"] == 1].groupby("split")["patient_id"].nunique()
    assert (sick / sick.sum()).to_dict() == pytest.approx({"train": 0.6, "test": 0.25, "val": 0.15}, abs=0.05)


def test_val_fraction_counts_in_all_patients_beside_a_test_fold():
    result = assign_splits(patients(200), PrepareParams(val_fraction=0.2, test_fold=1))
    assert by_patient(result)["split"].value_counts().to_dict() == pytest.approx(
        {"train": 120, "test": 40, "val": 40}, abs=3
    )


def test_unknown_labels_are_split_too():
    index = patients(40).assign(**dict.fromkeys(CLASSES, np.nan))
    assert by_patient(assign_splits(index, PrepareParams()))["split"].nunique() == 3


def test_too_few_patients_are_all_the_test_set():
    for count in (1, 2):
        result = assign_splits(patients(count), PrepareParams(folds=5))
        assert set(result["split"]) == {"test"}
        assert set(result["fold"]) == set(range(count))
    assert assign_splits(patients(3), PrepareParams(folds=5))["split"].nunique() == 3


@pytest.mark.parametrize("asked", [{"test_fold": 0}, {"split": "patient-kfold"}])
def test_too_few_patients_for_folds_that_are_asked_for_name_the_parameter(asked):
    with pytest.raises(DataError, match=r"prepare\.folds"):
        assign_splits(patients(4), PrepareParams(folds=5, **asked))
    with pytest.raises(DataError, match=r"prepare\.val_fraction"):
        assign_splits(patients(2), PrepareParams(folds=2, **asked))


def test_labels_are_joined_by_uid():
    index = pd.DataFrame({"sop_uid": ["c", "a", "b"]}).assign(study_uid="T", series_uid="S", patient_id="P")
    labels = pd.DataFrame(np.eye(3, 6, dtype=np.float32), index=["a", "b", "x"], columns=list(CLASSES))
    joined, _, counts = join(index, LabelTable("sop_uid", labels, {}))
    assert joined.loc[0, list(CLASSES)].isna().all()
    assert joined.loc[1, list(CLASSES)].tolist() == [1, 0, 0, 0, 0, 0]
    assert counts == {"slices_without_label": 1, "labels_without_slice": 1}
    with pytest.raises(DataError, match=r"prepare\.labels"):
        join(index, LabelTable("sop_uid", labels.set_axis(["u", "v", "w"]), {}))


def test_read_index_refuses_what_is_no_index(tmp_path):
    with pytest.raises(MissingFileError, match="prepare"):
        read_index(tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("x")
    with pytest.raises(DataError, match="Parquet"):
        read_index(tmp_path / "text.parquet")
    pd.DataFrame({"sop_uid": ["a"]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(DataError, match="series_uid"):
        read_index(tmp_path / "other.parquet")


@pytest.mark.real_data
def test_real_rsna_headers_are_ordered_whole_and_the_same_from_any_order(real_data):
    raw = pd.read_csv(real_data / "tables/rsna/stage1_test_with_metadata.csv.gz").drop_duplicates("SOPInstanceUID")
    names = {"SeriesInstanceUID": "series_uid", "SOPInstanceUID": "sop_uid"}
    names |= {f"ImagePositionPatient_{i}": name for i, name in enumerate(POSITION, 1)}
    names |= {f"ImageOrientationPatient_{i}": name for i, name in enumerate(DIRECTIONS, 1)}
    frame = raw[list(names)].rename(columns=names).assign(instance_number=np.nan, path=raw["SOPInstanceUID"])
    ordered, rejected = order_series(frame)
    again, _ = order_series(frame.sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(ordered[list(again.columns)], again)
    assert rejected.empty
    assert len(ordered) == len(frame) == 78_545
    assert ordered["series_uid"].nunique() == 2_214
    assert (ordered.groupby("series_uid")["position_z"].diff() == 0).sum() == 212  # neighbours that share a z
    assert (ordered.groupby("series_uid")["position_mm"].diff().dropna() > -1e-3).all()
    tie, gap = find_ties_and_gaps(ordered)
    assert tie.sum() == 266  # along the normal: the 212 and 54 within 0.001 mm
    step_z = ordered.groupby("series_uid")["position_z"].diff()
    widest = step_z.idxmax()
    assert (step_z[widest], round(ordered["spacing_mm"][widest], 1)) == (155.25, 143.9)  # tilted by 22 degrees
    assert gap[widest]
    assert ordered["slice_index"].eq(ordered.groupby("series_uid").cumcount()).all()  # and the series is one sequence
