"""The RSNA 2019 submission: ``ID,Label``, six rows a slice. A slice without a prediction is never filled in silence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from ichpipe.common.classes import SUBTYPES
from ichpipe.common.errors import DataError
from ichpipe.common.user_tables import read_table

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

ORDER: Final = (*SUBTYPES, "any")
"""The competition's order of classes; this project's has ``any`` first."""

DECIMALS: Final = 9
"""A probability of 1e-8 written with six decimals is 0, which the metric takes for 1e-15: 16 nats more if wrong."""

_RSNA_NAME: Final = re.compile(r"ID_[0-9a-f]{9}")
_NAMED: Final = 3  # slices that a message quotes


@dataclass(frozen=True)
class Submission:
    """The table, and what a user must be told about it."""

    table: pd.DataFrame  # ID, Label (text)
    remarks: list[str]


@dataclass(frozen=True)
class Sample:
    """The rows of a sample submission, in its order."""

    path: Path
    uids: pd.Index  # SOPInstanceUIDs, each once
    rows: NDArray[np.intp]  # (rows,) numbers into uids
    columns: NDArray[np.intp]  # (rows,) numbers into ORDER


def build_submission(
    slices: pd.DataFrame, rejected: pd.DataFrame, sample: Sample | None = None, missing: float | None = None
) -> Submission:
    """Lay out predictions as the competition wants them.

    ``slices`` has ``sop_uid`` and the columns of CLASSES (probabilities), ``rejected`` ``path, reason``. With
    ``sample`` rows and their order are the sample's. Else they are the slices, sorted, and every rejected file that is
    named like a slice, ``<UID>.dcm``. Probabilities are written with nine decimals, from 1e-9 to 1 - 1e-9. A slice
    without a prediction, or with one that is not a number (fp16 can overflow), is a DataError, or gets ``missing``
    (0 to 1) six times.
    """
    predicted = slices.set_index("sop_uid")[list(ORDER)]
    usable = np.isfinite(predicted.to_numpy(np.float64)).all(axis=1)
    values = predicted[usable]
    reasons = _rejected_slices(rejected) | dict.fromkeys(predicted.index[~usable], "its prediction is not a number")
    remarks = []
    if sample is None:
        uids = pd.Index(sorted({*values.index, *reasons}))
        rows = np.repeat(np.arange(len(uids)), len(ORDER))
        columns = np.tile(np.arange(len(ORDER)), len(uids))
    else:
        uids, rows, columns = sample.uids, sample.rows, sample.columns
        if extra := int((~predicted.index.isin(uids)).sum()):
            remarks.append(f"{extra} predicted slices are not in {sample.path} and are left out of the submission")
    absent = uids[~uids.isin(values.index)]
    if len(absent):
        remarks.append(_about(absent, reasons, missing))
    found = np.array(values.reindex(uids), dtype=np.float64)
    if missing is not None:
        found[np.isnan(found)] = missing
    label = np.clip(found[rows, columns], 10.0**-DECIMALS, 1.0 - 10.0**-DECIMALS)
    names = uids.to_numpy(object)[rows] + "_" + np.array(ORDER, dtype=object)[columns]
    return Submission(pd.DataFrame({"ID": names, "Label": [f"{value:.{DECIMALS}f}" for value in label]}), remarks)


def _rejected_slices(rejected: pd.DataFrame) -> dict[str, str]:
    """Return the reason by SOPInstanceUID of rejected files that are named as Kaggle names slices: ``<UID>.dcm``.

    A copy of a file that was used is none of them.
    """
    found: dict[str, str] = {}
    for path, reason in zip(rejected["path"], rejected["reason"], strict=True):
        name = PurePath(path)
        slice_like = name.suffix.lower() == ".dcm" or _RSNA_NAME.fullmatch(name.stem)
        if slice_like and not reason.startswith("duplicate: a copy"):
            found.setdefault(name.stem, reason)
    return found


def read_sample(path: Path) -> Sample:
    """Read the competition's ``…sample_submission.csv``. Raises MissingFileError, or DataError that names the line."""
    table = read_table(path, "sample submission")
    if not {"ID", "Label"} <= set(table.names):
        raise table.error("must have the columns ID,Label")
    names = pd.Series(table.text("ID").to_pandas())
    parts = names.str.rpartition("_")
    columns = pd.Index(ORDER).get_indexer(pd.Index(parts[2]))
    table.refuse(
        (columns < 0) | (parts[0] == "").to_numpy(), f"ID is not <SOPInstanceUID>_<class> ({', '.join(ORDER)})", names
    )
    table.refuse(names.duplicated().to_numpy(), "ID stands there twice", names)
    rows, uids = pd.factorize(parts[0])
    return Sample(path, pd.Index(uids), rows, columns)


def _about(absent: pd.Index, reasons: dict[str, str], missing: float | None) -> str:
    """Say which slices have no prediction and why; raise that where nothing is to be filled in."""
    shown = [f"{uid} ({reasons.get(uid, 'no such file')})" for uid in absent[:_NAMED]]
    more = ", …" if len(absent) > _NAMED else ""
    what = f"{len(absent)} slices of the submission have no prediction: {', '.join(shown)}{more}"
    if missing is None:
        raise DataError(f"{what}; add the files, or fill them by --missing 0.5. slices.csv and studies.csv are written")
    return f"{what}; written as {missing}"
