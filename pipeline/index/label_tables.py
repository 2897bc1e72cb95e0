"""Reads label tables of every format of ``prepare`` and joins them to the index by identifier.

A table labels slices or whole studies. A study without a kind of bleed has none on any slice: these get 0. A study with
one does not say on which slices: these labels stay unknown. So training and scores of slices use known labels only.
The labels of studies have a table of their own.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
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
_ROUNDED: Final = re.compile(r"[0-9](?:\.[0-9]+)?e\+?[0-9]{1,2}", re.IGNORECASE)  # 2.019E+16
_SPREADSHEET_DIGITS: Final = 15  # that a spreadsheet keeps of a number
STUDY_COLUMNS: Final = ["patient_id", "study_uid", "series_uid", "n_slices", *CLASSES]


@dataclass(frozen=True)
class LabelTable:
    """Labels by one kind of identifier."""

    key: str  # of KEYS, or SCAN
    values: pd.DataFrame  # index: identifiers, unique, sorted; the columns of CLASSES, float32; 0, 1 or NaN
    report: dict[str, Any]

    def hide_patients(self, pseudonyms: Pseudonyms | None) -> LabelTable:
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
    keys = [*LONG_COLUMNS, *(name for names in KEYS.values() for name in names)]
    table = read_table(path, "label", keys, CLASSES)
    if sorted(table.names) == LONG_COLUMNS:
        return LabelTable("sop_uid", *read_rsna_labels(path))
    columns = [(key, column) for key, names in KEYS.items() for column in names if column in table.names]
    if not columns:
        first = ", ".join(names[0] for names in KEYS.values())
        raise table.error(f"names no slice, series, study or patient: it needs one column of {first}")
    if not set(CLASSES) & set(table.names):
        raise table.error(f"has none of the columns {', '.join(CLASSES)}")
    absent = [name for name in CLASSES if name not in table.names]
    key, column = columns[0]
    names = table.text(column).to_pandas()
    labels = pd.DataFrame(np.nan, index=pd.Index(names, name=key), columns=list(CLASSES))
    for name in [name for name in CLASSES if name in table.names]:
        cells = table.content[name].combine_chunks()
        if pa.types.is_string(cells.type):  # CSV: an empty cell is unknown
            text = pc.utf8_trim_whitespace(cells)
            cells = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
        shown = cells.to_pandas()
        labels[name] = pd.to_numeric(shown.astype(object), errors="coerce").to_numpy(np.float64)
        wrong = ~np.isin(labels[name], (0.0, 1.0)) & shown.notna().to_numpy()
        table.refuse(wrong, f"column {name} is neither 0, 1 nor empty", shown)
    zeros, ones = ((labels == label).groupby(level=0).sum() for label in (0, 1))
    values, contradictory, odd_any = resolve_labels(zeros.to_numpy(), ones.to_numpy(), derive_any=True)
    report: dict[str, Any] = {"file": str(path), "key": key, "rows": len(names), "names": len(zeros)}
    report |= {"duplicate_rows": len(names) - len(zeros), "classes_without_column": absent}
    if others := [name for name in table.names if name not in keys and name not in CLASSES]:
        report["columns_not_used"] = others
    for kind, marked in (("contradictory", contradictory), ("inconsistent_any", odd_any)):
        report |= {kind: int(marked.sum()), f"{kind}_names": first_names(zeros.index[marked])}
    frame = pd.DataFrame(values.astype(np.float32), index=zeros.index, columns=list(CLASSES))
    return LabelTable(key, frame, report)


def join(index: pd.DataFrame, labels: LabelTable | None) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Add the six columns of CLASSES to the index by identifier, and make the table of studies.

    Returns the index (float32 labels, NaN where unknown), a row of STUDY_COLUMNS for each series, and counts of rows
    without a match. Raises DataError if nothing matches: the table belongs to other images.
    """
    if labels is None:
        joined = index.assign(**dict.fromkeys(CLASSES, np.float32(np.nan)))
        return joined, _reduce_to_series(joined, joined[list(CLASSES)]), {}
    of_slices = labels.key == "sop_uid"
    names = index[labels.key] if labels.key != SCAN else _name_scans(index)
    matched = names.isin(labels.values.index)
    if not matched.any():
        count = f"{len(index)} slices" if of_slices else f"{index['study_uid'].nunique()} studies"
        hint = explain_spelling(names, labels.values.index) or "check prepare.labels and prepare.dicom_dir"
        raise DataError(
            f"none of {count} is in the label table (first {labels.key}: {names.iloc[0]!r}, first in the table: "
            f"{labels.values.index[0]!r}); {hint}"
        )
    values = labels.values[list(CLASSES)].reindex(names).set_axis(index.index)
    kept = values if of_slices else values.where(values == 0.0)
    joined = index.assign(**{name: kept[name].astype(np.float32) for name in CLASSES})
    counts: dict[str, Any]
    if of_slices:
        unmatched = len(labels.values) - int(matched.sum())
        counts = {"slices_without_label": int((~matched).sum()), "labels_without_slice": unmatched}
    else:
        counts = {
            "studies_without_label": int(index.loc[~matched, "study_uid"].nunique()),
            "labels_without_study": int((~labels.values.index.isin(names)).sum()),
        }
    if hint := explain_spelling(names[~matched], labels.values.index):
        counts["labels_likely_cause"] = hint
    return joined, _reduce_to_series(joined, values), counts


def explain_spelling(unmatched: pd.Series | pd.Index, names: pd.Index) -> str:
    """Return why identifiers match none of a table, if they or the table's were changed on their way."""
    if unmatched.empty:
        return ""
    by_simple = {_simplify(name): str(name) for name in names}
    pairs = [(str(name), by_simple[_simplify(name)]) for name in unmatched.unique() if _simplify(name) in by_simple]
    if pairs:
        examples = ", ".join(f"{image!r} is {row!r} there" for image, row in pairs[:3])
        return (
            f"{len(pairs)} of the images' identifiers stand in the table in another spelling ({examples}): write them "
            "as in the images; a spreadsheet drops leading zeros, adds .0 and rounds long numbers, so make that column "
            "text"
        )
    rounded = [str(name) for name in names if _ROUNDED.fullmatch(str(name).strip())]
    if rounded:
        return f"the table names {rounded[0]!r}, a number that a spreadsheet has rounded; make that column text"
    return ""


def _simplify(name: object) -> str:
    """Return an identifier without what spreadsheets, file names and habits change."""
    text = unicodedata.normalize("NFKC", str(name)).strip().casefold().removesuffix(".dcm")
    text = re.sub(r"^(?:id|sub)[\W_]+", "", text)
    text = re.sub(r"[^\w.+]|_", "", text)
    if _ROUNDED.fullmatch(text) or re.fullmatch(r"[0-9]+(?:\.0)?", text):
        digits = f"{Decimal(text):f}".partition(".")[0].lstrip("0") or "0"
        return f"{digits[:_SPREADSHEET_DIGITS]:0<{len(digits)}}"
    return re.sub(r"(?<![\d.])0+(?=\d)", "", text)


def _name_scans(index: pd.DataFrame) -> pd.Series:
    """Return the name of CQ500's scan in each row (n,): that in PatientID, else in the path, else an empty one."""
    by_patient = {patient: scan_number(patient) for patient in index["patient_id"].drop_duplicates()}
    names = []
    for patient, path in zip(index["patient_id"], index["path"], strict=True):
        number = by_patient[patient]
        number = scan_number(path) if number is None else number
        names.append("" if number is None else scan_name(number))
    return pd.Series(names, index=index.index)


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
