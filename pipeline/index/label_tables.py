"""Labels in every form that ``prepare`` takes, joined to the index by identifier: of slices, or of whole studies.

A study that has no bleed of a kind has none on any slice: 0 there. A study that has one does not say on which slices:
unknown there. So what learns from slices, or is scored on them, sees only what is known; the labels of studies stand
in a table of their own.
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
from ichpipe.common.user_tables import read_table
from ichpipe.index.cq500_reads import read_majority, scan_name, scan_number
from ichpipe.index.rsna_labels import inconsistent_any, read_kaggle
from ichpipe.index.slice_index import join_labels

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ichpipe.common.pseudonyms import Pseudonyms
    from ichpipe.common.user_tables import Table

    Floats = NDArray[np.float64]

KEYS: Final = {
    "sop_uid": ("sop_uid", "SOPInstanceUID", "ID"),
    "series_uid": ("series_uid", "SeriesInstanceUID"),
    "study_uid": ("study_uid", "StudyInstanceUID"),
    "patient_id": ("patient_id", "PatientID"),
}
"""What a row of a label table may name, from narrow to wide, and what the column may be called; the first counts."""

SCAN: Final = "scan"  # key of CQ500's reads: the number in PatientID or in the name of a folder
STUDY_COLUMNS: Final = ["patient_id", "study_uid", "series_uid", "n_slices", *CLASSES]
_EXAMPLES: Final = 10


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
        """Return the table with each PatientID replaced by its pseudonym, where it names patients at all."""
        if pseudonyms is None or self.key != "patient_id":
            return self
        names = {key: pseudonyms.of(value) for key, value in self.report.items() if key.endswith("_names")}
        values = self.values.set_axis(pd.Index(pseudonyms.of(self.values.index), name=self.key)).sort_index()
        return LabelTable(self.key, values, self.report | names)


def read_labels(dataset: str, path: Path) -> LabelTable:
    """Read the label table of a data set: ``rsna`` the competition's, ``cq500`` its reads, ``folder`` a simple table.

    Raises MissingFileError, or DataError that names file and line.
    """
    if dataset == "rsna":
        values, report = read_kaggle(path)
        return LabelTable("sop_uid", values, report.as_dict())
    if dataset == "cq500":
        found = read_majority(path)
        return LabelTable(SCAN, found.values.astype(np.float32), found.report)
    return _read_simple(path)


def _read_simple(path: Path) -> LabelTable:
    """Read a table with one identifier a row and any of the six classes: 0, 1, or empty for unknown."""
    table = read_table(path, "label")
    if sorted(table.names) == ["ID", "Label"]:
        values, report = read_kaggle(path)
        return LabelTable("sop_uid", values, report.as_dict())
    key, column = _key_column(table)
    present = [name for name in CLASSES if name in table.names]
    if not present:
        raise table.error(f"has none of the columns {', '.join(CLASSES)}")
    cells = np.full((len(table.content), len(CLASSES)), np.nan)
    for name in present:
        cells[:, CLASSES.index(name)] = _cells(table, name)
    return _resolve(key, pd.Index(table.text(column).to_pandas()), cells, str(path))


def _key_column(table: Table) -> tuple[str, str]:
    for key, columns in KEYS.items():
        for column in columns:
            if column in table.names:
                return key, column
    known = ", ".join(columns[0] for columns in KEYS.values())
    raise table.error(f"names no slice, series, study or patient: it needs one column of {known}")


def _cells(table: Table, name: str) -> Floats:
    """Return a column (rows,) of 0, 1 and NaN; an empty cell is NaN, in CSV too."""
    column = table.content[name].combine_chunks()
    if pa.types.is_string(column.type):
        text = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
    shown = column.to_pandas()
    values: Floats = pd.to_numeric(shown.astype(object), errors="coerce").to_numpy(np.float64)
    wrong = ~np.isin(values, (0.0, 1.0)) & shown.notna().to_numpy()
    table.refuse(wrong, f"column {name} is neither 0, 1 nor empty", shown)
    return values


def _resolve(key: str, names: pd.Index, cells: Floats, path: str) -> LabelTable:
    """Put rows of one identifier together; where they contradict each other, nothing of it is believed."""
    codes, unique = pd.factorize(names, sort=True)
    ones, zeros = (_counts(codes, cells == value, len(unique)) for value in (1.0, 0.0))
    contradictory: NDArray[np.bool_] = np.asarray(((ones > 0) & (zeros > 0)).any(axis=1))
    values = np.where(ones > 0, 1.0, np.where(zeros > 0, 0.0, np.nan))
    values[:, 0] = _any_of(values)
    odd: NDArray[np.bool_] = np.asarray(inconsistent_any(~np.isnan(values), values == 1.0) & ~contradictory)
    values[contradictory | odd] = np.nan
    frame = pd.DataFrame(values.astype(np.float32), index=pd.Index(unique, name=key), columns=list(CLASSES))
    report = {"file": path, "key": key, "rows": len(names), "names": len(unique)}
    report["duplicate_rows"] = len(names) - len(unique)
    return LabelTable(
        key, frame, report | _told("contradictory", unique[contradictory]) | _told("inconsistent_any", unique[odd])
    )


def _counts(codes: NDArray[np.intp], marked: NDArray[np.bool_], size: int) -> NDArray[np.int64]:
    columns = [np.bincount(codes[column], minlength=size) for column in marked.T]
    return np.stack(columns, axis=1)


def _any_of(values: Floats) -> Floats:
    """Fill ``any`` where the table leaves it out: 1 with a known bleed, 0 where all five kinds are known absent."""
    kinds = values[:, 1:]
    derived = np.where((kinds == 1.0).any(axis=1), 1.0, np.where((kinds == 0.0).all(axis=1), 0.0, np.nan))
    return np.where(np.isnan(values[:, 0]), derived, values[:, 0])


def _told(what: str, names: pd.Index) -> dict[str, Any]:
    return {what: len(names), f"{what}_names": [str(name) for name in names[:_EXAMPLES]]}


def join(index: pd.DataFrame, labels: LabelTable | None) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]:
    """Add the six columns of CLASSES to the index, and make the table of studies: a row a series, STUDY_COLUMNS.

    Returns index, studies and what did not match, counted. Raises DataError where nothing matches.
    """
    if labels is None or labels.of_slices:
        joined, counts = join_labels(index, None if labels is None else labels.values)
        return joined, _studies(joined, joined[list(CLASSES)]), counts
    names = _names(index, labels.key)
    known = names.isin(labels.values.index)
    if not known.any():
        raise DataError(
            f"none of {index['study_uid'].nunique()} studies is in the label table (first {labels.key}: "
            f"{names.iloc[0]!r}, first in the table: {labels.values.index[0]!r}); check prepare.labels and "
            "prepare.dicom_dir"
        )
    of_study = labels.values.reindex(names).set_axis(index.index)
    of_slice = of_study.where(of_study == 0.0)
    joined = index.assign(**{name: of_slice[name].astype(np.float32) for name in CLASSES})
    counts = {
        "studies_without_label": int(index.loc[~known, "study_uid"].nunique()),
        "labels_without_study": int((~labels.values.index.isin(names)).sum()),
    }
    return joined, _studies(joined, of_study), counts


def _names(index: pd.DataFrame, key: str) -> pd.Series:
    """Return what ``key`` is called on each row (n,); for CQ500 the scan, from PatientID or else from the path."""
    if key != SCAN:
        return index[key]
    texts = index["patient_id"].drop_duplicates()
    by_patient = {text: scan_number(text) for text in texts}
    numbers = [
        found if (found := by_patient[patient]) is not None else scan_number(path)
        for patient, path in zip(index["patient_id"], index["path"], strict=True)
    ]
    names = ["" if number is None else scan_name(number) for number in numbers]
    return pd.Series(names, index=index.index)


def _studies(index: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
    """Reduce to one row a series: 1 if any row says 1, 0 if all say 0, else unknown."""
    keys = ["study_uid", "series_uid"]
    rows = index[[*keys, "patient_id"]].assign(**{name: values[name] for name in CLASSES})
    groups = rows.groupby(keys, sort=True)
    highest = groups[list(CLASSES)].max()  # of what is known
    unknown = rows[list(CLASSES)].isna().groupby([rows[key] for key in keys]).any()
    labels = highest.where((highest == 1.0) | ~unknown).astype(np.float32)
    table = groups.agg(patient_id=("patient_id", "first"), n_slices=("patient_id", "size")).join(labels)
    return table.reset_index()[STUDY_COLUMNS]
