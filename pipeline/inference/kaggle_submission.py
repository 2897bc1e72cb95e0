"""Builds the RSNA 2019 submission: ``ID,Label``, six rows a slice."""

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
from ichpipe.index.rsna_labels import parse_ids
from ichpipe.index.scan import COPY

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

ORDER: Final = (*SUBTYPES, "any")  # the competition's order of classes; this project's has ``any`` first
DECIMALS: Final = 9  # with six, 1e-8 is written as 0; the metric reads 1e-15: 16 nats more where it is wrong
MAX_QUOTED: Final = 3  # slices that a message quotes


@dataclass(frozen=True)
class Sample:
    """The rows of a sample submission, in its order."""

    path: Path
    uids: pd.Index  # SOPInstanceUIDs, each once
    rows: NDArray[np.intp]  # (rows,) numbers into uids
    columns: NDArray[np.intp]  # (rows,) numbers into ORDER


def read_sample(path: Path) -> Sample:
    """Read the competition's ``…sample_submission.csv``. Raises MissingFileError, or DataError that names the line."""
    table = read_table(path, "sample submission", ("ID", "Label"))
    if not {"ID", "Label"} <= set(table.names):
        raise table.error("must have the columns ID,Label")
    ids = table.text("ID")
    uids, classes = parse_ids(table, ids)
    table.refuse(pd.Index(ids.to_pandas()).duplicated(), "ID appears twice", ids)
    rows, unique = pd.factorize(pd.Index(uids.to_pandas()))
    return Sample(path, unique, rows, (classes - 1) % len(ORDER))  # "any" is first in CLASSES, last in ORDER


def build_submission(
    slices: pd.DataFrame, rejected: pd.DataFrame, sample: Sample | None = None, missing: float | None = None
) -> tuple[pd.DataFrame, list[str]]:
    """Lay out predictions as a table of ID and Label (text, nine decimals, 1e-9 to 1 - 1e-9), with remarks on it.

    ``slices`` holds ``sop_uid`` and six probabilities, ``rejected`` ``path, reason, code``. ``sample`` gives rows and
    order. Without it rows are the slices, sorted, and every rejected file with the name of a slice, ``<UID>.dcm``.
    Slices without a finite prediction (fp16 can overflow) get ``missing`` (0 to 1); without it they are a DataError.
    """
    predicted = slices.set_index("sop_uid")[list(ORDER)]
    finite = np.isfinite(predicted.to_numpy(np.float64)).all(axis=1)
    values, reasons = predicted[finite], dict.fromkeys(predicted.index[~finite], "its prediction is not a number")
    for path, reason, code in rejected[["path", "reason", "code"]].itertuples(index=False):
        name = PurePath(path)
        is_slice = name.suffix.lower() == ".dcm" or re.fullmatch(r"ID_[0-9a-f]{9}", name.stem)
        if is_slice and code != COPY:  # of a copy the slice itself was read
            reasons.setdefault(name.stem, reason)
    remarks = []
    if sample is None:
        uids = pd.Index(sorted({*values.index, *reasons}))
        rows, columns = np.divmod(np.arange(len(uids) * len(ORDER)), len(ORDER))
    else:
        uids, rows, columns = sample.uids, sample.rows, sample.columns
        if extra := int((~predicted.index.isin(uids)).sum()):
            remarks.append(f"{extra} predicted slices are not in {sample.path} and are left out of the submission")
    absent = uids[~uids.isin(values.index)]
    if len(absent):
        quoted = [f"{uid} ({reasons.get(uid, 'no such file')})" for uid in absent[:MAX_QUOTED]]
        quoted += ["…"] if len(absent) > MAX_QUOTED else []
        text = f"{len(absent)} slices of the submission have no prediction: {', '.join(quoted)}"
        if missing is None:
            remedy = "add the files, or fill them by --missing 0.5. slices.csv and studies.csv are written"
            raise DataError(f"{text}; {remedy}")
        remarks.append(f"{text}; written as {missing}")
    filled = values.reindex(uids, fill_value=missing).to_numpy(np.float64)
    labels = np.clip(filled[rows, columns], 10.0**-DECIMALS, 1.0 - 10.0**-DECIMALS)
    ids = uids.to_numpy(object)[rows] + "_" + np.array(ORDER, dtype=object)[columns]
    return pd.DataFrame({"ID": ids, "Label": [f"{label:.{DECIMALS}f}" for label in labels]}), remarks
