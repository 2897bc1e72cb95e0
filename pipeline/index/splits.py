"""Patients dealt out to train, val and test, and to folds, with the classes spread evenly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError, ParamsError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ichpipe.params.schema import PrepareParams

SPLITS: Final = ("train", "val", "test")


def assign_splits(index: pd.DataFrame, params: PrepareParams, test_slices: pd.Index | None = None) -> pd.DataFrame:
    """Return ``index`` with ``split`` (``train``, ``val``, ``test``) and ``fold`` (int32), both by patient.

    Iterative stratification (Sechidis et al. 2011) over one label vector a patient: the maximum over the
    patient's slices per class, and whether nothing is known. Depends on the set of patients, their labels
    and ``params.seed``, not on row order. ``val_fraction`` counts in all patients. The test set is

    * ``fractions``: ``test_fraction`` of all patients, or the fold ``test_fold`` where that is set. With fewer patients
      than splits all are the test set, and with fewer than folds each is a fold: an index of a single scan is of use;
    * ``patient-kfold``: the fold ``test_fold``, the first if it is not set;
    * ``stage1``: the slices named by ``test_slices``. A patient who has others as well is not trained on: those slices
      get no split (None), and ``overlap`` counts them. ``val_fraction`` counts in the patients outside the test set.

    Raises DataError where there are too few patients, ParamsError without the slices that stage1 needs.
    """
    patients, labels = _patient_labels(index)
    count = params.folds if _needs_folds(params) else min(params.folds, len(patients))
    folds = _deal(labels, np.full(count, 1 / count), params.seed, "prepare.folds")
    fold = folds.astype(np.int32)[patients.get_indexer(pd.Index(index["patient_id"]))]
    if params.split == "stage1":
        if test_slices is None:
            raise ParamsError("prepare.split stage1 deals slices by a table: give its test slices")
        split = _split_by_table(index, patients, labels, params, test_slices)
    else:
        test_fold = params.test_fold or 0 if params.split == "patient-kfold" else params.test_fold
        of_patient = _split(labels, folds, params.model_copy(update={"test_fold": test_fold}))
        split = of_patient[patients.get_indexer(pd.Index(index["patient_id"]))]
    result = index.assign(split=pd.Series(split, index=index.index, dtype=object), fold=fold)
    require_patients_apart(result)
    return result


def _needs_folds(params: PrepareParams) -> bool:
    return params.test_fold is not None or params.split == "patient-kfold"


def overlap(index: pd.DataFrame) -> dict[str, int]:
    """Count the patients who stand on both sides of a split by table, and their slices on either."""
    out = index["split"].isna()
    patients = pd.Index(index.loc[out, "patient_id"].unique())
    tested = index["patient_id"].isin(patients) & (index["split"] == "test")
    return {
        "patients": len(patients),
        "slices_left_out_of_training": int(out.sum()),
        "slices_in_test": int(tested.sum()),
    }


def _split_by_table(
    index: pd.DataFrame,
    patients: pd.Index,
    labels: NDArray[np.bool_],
    params: PrepareParams,
    test_slices: pd.Index,
) -> NDArray[np.object_]:
    """Return the split of each row (n,); None for the other slices of patients with a slice in the test set."""
    tested = index["sop_uid"].isin(test_slices)
    if not tested.any():
        raise DataError(
            f"none of {len(index)} slices is named in prepare.test_slices (first there: {test_slices[0]!r}); "
            "check that it belongs to prepare.dicom_dir"
        )
    share = tested.groupby(index["series_uid"]).mean()
    torn = share.index[(share > 0) & (share < 1)]
    if len(torn):
        raise DataError(f"prepare.test_slices names only some slices of {len(torn)} series, first {torn[0]}; name all")
    seen = patients.isin(index.loc[tested, "patient_id"])
    split = np.full(len(patients), None, dtype=object)
    shares = np.array([1 - params.val_fraction, params.val_fraction])
    dealt = _deal(labels[~seen], shares, params.seed + 1, "prepare.val_fraction")
    split[~seen] = np.array(SPLITS[:2], dtype=object)[dealt]
    rows = split[patients.get_indexer(pd.Index(index["patient_id"]))]
    rows[tested.to_numpy()] = "test"
    return rows


def require_patients_apart(index: pd.DataFrame) -> None:
    """Raise DataError if a patient stands in two splits or two folds."""
    kinds = index.groupby("patient_id")[["split", "fold"]].nunique()
    torn = kinds.index[(kinds > 1).any(axis=1)]
    if len(torn):
        raise DataError(f"{len(torn)} patient(s) stand in more than one split or fold; run prepare again")


def _patient_labels(index: pd.DataFrame) -> tuple[pd.Index, NDArray[np.bool_]]:
    """Patients sorted by identifier, and their labels (patients, 7); the last column is `nothing known`."""
    present = [name for name in CLASSES if name in index]
    highest = index.groupby("patient_id", sort=True)[present].max()
    unknown = highest.isna().all(axis=1).to_numpy(bool)
    return highest.index, np.column_stack([highest.fillna(0).to_numpy(np.float32) > 0, unknown])


def _split(labels: NDArray[np.bool_], folds: NDArray[np.int64], params: PrepareParams) -> NDArray[np.object_]:
    names = np.array(SPLITS, dtype=object)
    val, seed = params.val_fraction, params.seed + 1  # not the draws of the folds
    if params.test_fold is None:
        shares = np.array([1 - val - params.test_fraction, val, params.test_fraction])
        if len(labels) < np.count_nonzero(shares):
            return np.full(len(labels), "test", dtype=object)
        return names[_deal(labels, shares, seed, "prepare.val_fraction and prepare.test_fraction")]
    splits = np.full(len(labels), "test", dtype=object)
    rest = folds != params.test_fold
    share = val * len(labels) / max(int(rest.sum()), 1)
    if share >= 1:
        raise DataError("prepare.val_fraction leaves no patient to train on beside prepare.test_fold; lower it")
    splits[rest] = names[_deal(labels[rest], np.array([1 - share, share]), seed, "prepare.val_fraction")]
    return splits


def _deal(labels: NDArray[np.bool_], shares: NDArray[np.float64], seed: int, keys: str) -> NDArray[np.int64]:
    """Deal patients (n, labels) into groups of about these shares: (n,) group numbers.

    Every group with a share above 0 gets a patient, or DataError names the parameters ``keys``.
    """
    from iterstrat.ml_stratifiers import IterativeStratification  # noqa: PLC0415  (brings in scikit-learn)

    wanted = np.flatnonzero(shares > 0)
    if len(labels) < len(wanted):
        raise DataError(f"{len(labels)} patient(s) are too few for {len(wanted)} groups; add patients or change {keys}")
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    groups = np.empty(len(labels), dtype=np.int64)
    groups[order] = wanted[IterativeStratification(labels[order], shares[wanted], generator)]
    if len(np.unique(groups)) < len(wanted):  # a handful of patients: even labels left a group empty
        groups[order] = _deal_plainly(len(labels), shares, wanted)
    return groups


def _deal_plainly(count: int, shares: NDArray[np.float64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Group numbers (count,): one patient to each group, each further one to the group most short of its share."""
    sizes = np.zeros(len(shares))
    sizes[wanted] = 1
    for _ in range(count - len(wanted)):
        sizes[np.argmax(shares * count - sizes)] += 1
    return np.repeat(np.arange(len(shares)), sizes.astype(np.int64))
