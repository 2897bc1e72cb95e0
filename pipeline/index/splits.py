"""Splits of the patients into train, val and test, and into folds, with the classes spread evenly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError, ParamsError
from ichpipe.common.user_tables import read_table
from ichpipe.index.rsna_labels import LONG_COLUMNS, parse_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ichpipe.params.schema import PrepareParams

SPLITS: Final = ("train", "val", "test")


def assign_splits(index: pd.DataFrame, params: PrepareParams, test_slices: pd.Index | None = None) -> pd.DataFrame:
    """Return ``index`` with ``split`` (``train``, ``val``, ``test``) and ``fold`` (int32), both by patient.

    Iterative stratification (Sechidis et al. 2011) over one label vector a patient: the maximum over the patient's
    slices of each class, and whether all is unknown. Depends on the set of patients, their labels and ``params.seed``,
    not on row order. Several sources are spread evenly, too. Patients of a source that serves stage one alone
    (``slices_only``) are in ``train`` and in no fold (-1); the rest is about the others. ``val_fraction`` is a share of
    all patients. The test set is

    * ``fractions``: ``test_fraction`` of all patients, or the fold ``test_fold`` if it is set. With fewer patients than
      splits all are the test set, and with fewer than folds each is a fold: so a single scan has a valid index;
    * ``patient-kfold``: the fold ``test_fold``, by default the first;
    * ``stage1``: the slices of ``test_slices``. Other slices of their patients get no split (None), see
      ``count_overlap``. ``val_fraction`` is a share of the patients outside the test set.

    Raises DataError with too few patients, ParamsError without the slices that stage1 needs.
    """
    if "slices_only" in index and index["slices_only"].any():
        alone = index[index["slices_only"]].assign(split="train", fold=np.int32(-1))
        whole = assign_splits(index[~index["slices_only"]], params, test_slices)
        result = pd.concat([whole, alone]).loc[index.index]
        if both := set(alone["patient_id"]) & set(whole["patient_id"]):
            raise DataError(f"{len(both)} patient(s) are in a source of use: slices and in another one")
        return result
    present = [name for name in CLASSES if name in index]
    highest = index.groupby("patient_id", sort=True)[present].max()
    unknown = highest.isna().all(axis=1).to_numpy(bool)
    sources = (
        index.groupby("patient_id", sort=True)["source"].first() if "source" in index else highest.index.to_series()
    )
    of_source = [sources == name for name in sources.unique()] if "source" in index else []
    facts = [highest.fillna(0).to_numpy(np.float32) > 0, unknown, *(of_source if len(of_source) > 1 else [])]
    patients, labels = highest.index, np.column_stack(facts)
    kfold, val = params.split == "patient-kfold", params.val_fraction
    test_fold = params.test_fold or 0 if kfold else params.test_fold
    count = params.folds if kfold or params.test_fold is not None else min(params.folds, len(patients))
    folds = _deal(labels, np.full(count, 1 / count), params.seed, "prepare.folds")

    tested, dealt = np.zeros(len(index), dtype=np.bool_), np.ones(len(labels), dtype=np.bool_)
    shares, keys = np.array([1 - val, val, 0.0]), "prepare.val_fraction"
    if params.split == "stage1":
        tested = _mark_test_slices(index, test_slices)
        dealt = ~patients.isin(index.loc[tested, "patient_id"])
    elif test_fold is not None:
        dealt = folds != test_fold
        share = val * len(labels) / max(int(dealt.sum()), 1)
        if share >= 1:
            raise DataError("prepare.val_fraction leaves no patient to train on beside prepare.test_fold; lower it")
        shares = np.array([1 - share, share, 0.0])
    else:
        shares = np.array([1 - val - params.test_fraction, val, params.test_fraction])
        keys += " and prepare.test_fraction"
        if len(labels) < np.count_nonzero(shares):
            shares = np.array([0.0, 0.0, 1.0])
    of_patient = np.full(len(patients), None if params.split == "stage1" else "test", dtype=object)
    groups = _deal(labels[dealt], shares, params.seed + 1, keys)  # draws other than those of the folds
    of_patient[dealt] = np.array(SPLITS, dtype=object)[groups]
    rows = patients.get_indexer(pd.Index(index["patient_id"]))  # of each slice
    split = pd.Series(np.where(tested, "test", of_patient[rows]), index=index.index, dtype=object)
    result = index.assign(split=split, fold=folds.astype(np.int32)[rows])
    counts = result.groupby("patient_id")[["split", "fold"]].nunique()
    if torn := int((counts > 1).any(axis=1).sum()):
        raise DataError(f"{torn} patient(s) are in more than one split or fold; run prepare again")
    return result


def count_overlap(index: pd.DataFrame) -> dict[str, int]:
    """Count the patients with slices both inside and outside a test set by table, and these slices."""
    out = index["split"].isna()
    patients = pd.Index(index.loc[out, "patient_id"].unique())
    tested = index["patient_id"].isin(patients) & (index["split"] == "test")
    counts = {"patients": len(patients), "slices_left_out_of_training": int(out.sum())}
    return counts | {"slices_in_test": int(tested.sum())}


def read_test_slices(path: str | Path | None) -> pd.Index:
    """Read the SOPInstanceUIDs of a test set, each once, such as RSNA's stage-1 test set.

    The table has the columns ``ID,Label`` with IDs ``<SOPInstanceUID>_<class>``, or one row a slice with a column
    ``SOPInstanceUID``, ``sop_uid`` or ``ID``, of which the first counts. Raises ParamsError without a path, DataError.
    """
    if path is None:
        raise ParamsError("prepare.split stage1 needs prepare.test_slices: a table with the slices of the test set")
    table = read_table(Path(path), "test slices", ("SOPInstanceUID", "sop_uid", *LONG_COLUMNS))
    key = next((name for name in ("SOPInstanceUID", "sop_uid", "ID") if name in table.names), None)
    if key is None:
        raise table.error("names no slices: it needs a column SOPInstanceUID, sop_uid or ID")
    uids = table.text(key)
    if sorted(table.names) == LONG_COLUMNS:
        uids, _ = parse_ids(table, uids)
    names: pd.Index[str] = pd.Index(uids.unique().to_numpy(zero_copy_only=False))
    return names


def _mark_test_slices(index: pd.DataFrame, test_slices: pd.Index | None) -> NDArray[np.bool_]:
    """Mark the slices (n,) of the test set, which must be whole series."""
    if test_slices is None:
        raise ParamsError("prepare.split stage1 needs the slices of the test set; set prepare.test_slices")
    tested = index["sop_uid"].isin(test_slices)
    if not tested.any():
        raise DataError(
            f"none of {len(index)} slices is named in prepare.test_slices (its first: {test_slices[0]!r}); "
            "check that it belongs to prepare.dicom_dir"
        )
    share = tested.groupby(index["series_uid"]).mean()
    torn = share.index[(share > 0) & (share < 1)]
    if len(torn):
        raise DataError(f"prepare.test_slices names only some slices of {len(torn)} series, first {torn[0]}; name all")
    return tested.to_numpy()


def _deal(labels: NDArray[np.bool_], shares: NDArray[np.float64], seed: int, keys: str) -> NDArray[np.int64]:
    """Return the group (n,) of each patient, by shares; each used group gets one, or DataError names ``keys``."""
    from iterstrat.ml_stratifiers import IterativeStratification  # noqa: PLC0415  (brings in scikit-learn)

    used = np.flatnonzero(shares > 0)
    if len(labels) < len(used):
        raise DataError(f"{len(labels)} patient(s) are too few for {len(used)} groups; add patients or change {keys}")
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    groups = np.empty(len(labels), dtype=np.int64)
    groups[order] = used[IterativeStratification(labels[order], shares[used], generator)]
    if len(np.unique(groups)) < len(used):  # with few patients, even labels can leave a group empty
        sizes = np.where(shares > 0, 1.0, 0.0)
        for _ in range(len(labels) - len(used)):  # the next patient goes to the group most short of its share
            sizes[np.argmax(shares * len(labels) - sizes)] += 1
        groups[order] = np.repeat(np.arange(len(shares)), sizes.astype(np.int64))
    return groups
