"""Label tables of every format that ``prepare`` reads, joined to the index by identifier.

A table labels slices or whole studies. A study without a kind of bleed has none on any slice: these get 0. A study with
one does not say on which slices: these labels stay unknown. So training and scores of slices use known labels only.
The labels of studies have a table of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.common.files import require_file
from ichpipe.common.user_tables import read_table
from ichpipe.index.cq500_reads import read_majority, scan_name, scan_number
from ichpipe.index.rsna_labels import LONG_COLUMNS, first_names, read_rsna_labels, resolve_labels

if TYPE_CHECKING:
    from pathlib import Path

    from ichpipe.common.pseudonyms import Pseudonyms

KEYS: Final = {
    "sop_uid": ("sop_uid", "SOPInstanceUID", "ID"),
    "series_uid": ("series_uid", "SeriesInstanceUID"),
    "study_uid": ("study_uid", "StudyInstanceUID"),
    "patient_id": ("patient_id", "PatientID"),
}
"""Identifiers of a row, from narrow to wide, and their column names; the first match counts."""

SCAN: Final = "scan"  # key of CQ500's reads: the number in PatientID or in the name of a folder
STUDY_COLUMNS: Final = ["patient_id", "study_uid", "series_uid", "n_slices", *CLASSES]


@dataclass(frozen=True)
class LabelTable:
    """Labels by one kind of identifier."""

    key: str  # of KEYS, or SCAN
    values: pd.DataFrame  # index: identifiers, unique, sorted; the columns of CLASSES, float32; 0, 1 or NaN
    report: dict[str, Any]

    @property
    def of_slices(self) -> bool:
        """Whether a row is one slice."""
        return self.key == "sop_uid"

    def hidden(self, pseudonyms: Pseudonyms | None) -> LabelTable:
        """Replace each PatientID by its pseudonym."""
        if pseudonyms is None or self.key != "patient_id":
            return self
        names = {key: pseudonyms.of(value) for key, value in self.report.items() if key.endswith("_names")}
        values = self.values.set_axis(pd.Index(pseudonyms.of(self.values.index), name=self.key)).sort_index()
        return LabelTable(self.key, values, self.report | names)


def read_labels(dataset: str, path: Path) -> LabelTable:
    """Read the label table of a data set: ``rsna`` the competition's, ``cq500`` its reads, ``folder`` a simple table.

    Raises MissingFileError, or DataError that names file and line.
    """
    require_file(path, "name the label table with prepare.labels, or null for none")
    if dataset == "rsna":
        return LabelTable("sop_uid", *read_rsna_labels(path))
    if dataset == "cq500":
        majority = read_majority(path)
        return LabelTable(SCAN, majority.values.astype(np.float32), majority.report)
    return _read_simple(path)


def _read_simple(path: Path) -> LabelTable:
    """Read a table with an identifier in each row and any of the six classes: 0, 1, or empty for unknown."""
    table = read_table(path, "label")
    if sorted(table.names) == LONG_COLUMNS:
        return LabelTable("sop_uid", *read_rsna_labels(path))
    columns = [(key, column) for key, names in KEYS.items() for column in names if column in table.names]
    if not columns:
        known = ", ".join(names[0] for names in KEYS.values())
        raise table.error(f"names no slice, series, study or patient: it needs one column of {known}")
    if not set(CLASSES) & set(table.names):
        raise table.error(f"has none of the columns {', '.join(CLASSES)}")
    (key, column), *_ = columns
    names = pd.Index(table.text(column).to_pandas())
    codes, unique = pd.factorize(names, sort=True)
    zeros, ones = (np.zeros((len(unique), len(CLASSES)), dtype=np.int64) for _ in range(2))
    for number, name in enumerate(CLASSES):
        if name not in table.names:
            continue
        cells = table.content[name].combine_chunks()
        if pa.types.is_string(cells.type):  # CSV: an empty cell is unknown
            text = pc.utf8_trim_whitespace(cells)
            cells = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
        shown = cells.to_pandas()
        values = pd.to_numeric(shown.astype(object), errors="coerce").to_numpy(np.float64)
        wrong = ~np.isin(values, (0.0, 1.0)) & shown.notna().to_numpy()
        table.refuse(wrong, f"column {name} is neither 0, 1 nor empty", shown)
        for counts, label in ((zeros, 0.0), (ones, 1.0)):
            counts[:, number] = np.bincount(codes[values == label], minlength=len(unique))
    labels, contradictory, odd_any = resolve_labels(zeros, ones, derive_any=True)
    frame = pd.DataFrame(labels.astype(np.float32), index=pd.Index(unique, name=key), columns=list(CLASSES))
    report: dict[str, Any] = {"file": str(path), "key": key, "rows": len(names), "names": len(unique)}
    report["duplicate_rows"] = len(names) - len(unique)
    for kind, marked in (("contradictory", contradictory), ("inconsistent_any", odd_any)):
        report |= {kind: int(marked.sum()), f"{kind}_names": first_names(unique[marked])}
    return LabelTable(key, frame, report)


def join(index: pd.DataFrame, labels: LabelTable | None) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]:
    """Add the six columns of CLASSES to the index by identifier, and make the table of studies.

    Returns the index (float32 labels, NaN where unknown), a row of STUDY_COLUMNS for each series, and counts of rows
    without a match. Raises DataError if nothing matches: the table belongs to other images.
    """
    if labels is None:
        joined = index.assign(**dict.fromkeys(CLASSES, np.float32(np.nan)))
        return joined, _reduce_to_series(joined, joined[list(CLASSES)]), {}
    names = _names(index, labels.key)
    matched = names.isin(labels.values.index)
    if not matched.any():
        what = f"{len(index)} slices" if labels.of_slices else f"{index['study_uid'].nunique()} studies"
        raise DataError(
            f"none of {what} is in the label table (first {labels.key}: {names.iloc[0]!r}, first in the table: "
            f"{labels.values.index[0]!r}); check prepare.labels and prepare.dicom_dir"
        )
    values = labels.values[list(CLASSES)].reindex(names).set_axis(index.index)
    of_slice = values if labels.of_slices else values.where(values == 0.0)
    joined = index.assign(**{name: of_slice[name].astype(np.float32) for name in CLASSES})
    if labels.of_slices:
        unmatched = len(labels.values) - int(matched.sum())
        counts = {"slices_without_label": int((~matched).sum()), "labels_without_slice": unmatched}
    else:
        counts = {
            "studies_without_label": int(index.loc[~matched, "study_uid"].nunique()),
            "labels_without_study": int((~labels.values.index.isin(names)).sum()),
        }
    return joined, _reduce_to_series(joined, values), counts


def _names(index: pd.DataFrame, key: str) -> pd.Series:
    """Return the identifier of each row (n,); for CQ500 the scan that PatientID names, or else the path."""
    if key != SCAN:
        return index[key]
    by_patient = {patient: scan_number(patient) for patient in index["patient_id"].drop_duplicates()}
    numbers = [
        number if (number := by_patient[patient]) is not None else scan_number(path)
        for patient, path in zip(index["patient_id"], index["path"], strict=True)
    ]
    return pd.Series(["" if number is None else scan_name(number) for number in numbers], index=index.index)


def _reduce_to_series(index: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
    """Reduce to one row a series: 1 if any row says 1, 0 if all say 0, else unknown."""
    keys = ["study_uid", "series_uid"]
    rows = index[[*keys, "patient_id"]].assign(**{name: values[name] for name in CLASSES})
    groups = rows.groupby(keys, sort=True)
    highest = groups[list(CLASSES)].max()  # of the known labels
    unknown = rows[list(CLASSES)].isna().groupby([rows[key] for key in keys]).any()
    labels = highest.where((highest == 1.0) | ~unknown).astype(np.float32)
    table = groups.agg(patient_id=("patient_id", "first"), n_slices=("patient_id", "size")).join(labels)
    return table.reset_index()[STUDY_COLUMNS]
