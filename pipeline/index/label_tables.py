"""Reads label tables of every format of ``prepare`` and joins them to the index by identifier.

A table labels slices or whole studies. A study without a kind of bleed has none on any slice: these get 0. A study with
one does not say on which slices: these labels stay unknown. So training and scores of slices use known labels only.
The labels of studies have a table of their own.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, replace
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
from ichpipe.nifti.volume_file import is_nifti, slice_path, split_slice

if TYPE_CHECKING:
    from pathlib import Path

    from ichpipe.common.pseudonyms import Pseudonyms
    from ichpipe.common.user_tables import Table

KEYS: Final = {
    "sop_uid": ("sop_uid", "SOPInstanceUID", "ID"),
    "series_uid": ("series_uid", "SeriesInstanceUID"),
    "study_uid": ("study_uid", "StudyInstanceUID"),
    "patient_id": ("patient_id", "PatientID"),
}
"""Identifiers of a row, from narrow to wide, and their column names; the first match counts."""

FILE, FILE_SLICE = "file", "file and slice"  # keys of NIfTI volumes and of their slices, in the column `file`
SCAN: Final = "scan"  # key of CQ500's reads: the number in PatientID or in the name of a folder
_ROUNDED: Final = re.compile(r"[0-9](?:\.[0-9]+)?e\+?[0-9]{1,2}", re.IGNORECASE)  # 2.019E+16
_SPREADSHEET_DIGITS: Final = 15  # that a spreadsheet keeps of a number
STUDY_COLUMNS: Final = ["patient_id", "study_uid", "series_uid", "n_slices", *CLASSES]


@dataclass(frozen=True)
class LabelTable:
    """Labels by one kind of identifier."""

    key: str  # of KEYS, or SCAN, FILE, FILE_SLICE
    values: pd.DataFrame  # index: identifiers, unique, sorted; the columns of CLASSES, float32; 0, 1 or NaN
    report: dict[str, Any]
    patients: pd.Series | None = None  # of NIfTI files by name, where the table has a column patient_id

    def hide_patients(self, pseudonyms: Pseudonyms | None) -> LabelTable:
        """Replace each PatientID by its pseudonym."""
        if pseudonyms is None:
            return self
        if self.patients is not None:
            hidden = pd.Series(list(pseudonyms.of(self.patients)), self.patients.index, dtype=object)
            return replace(self, patients=hidden)
        if self.key != "patient_id":
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
    keys = [*LONG_COLUMNS, *(name for names in KEYS.values() for name in names), "file", "slice"]
    table = read_table(path, "label", keys, CLASSES)
    if sorted(table.names) == LONG_COLUMNS:
        return LabelTable("sop_uid", *read_rsna_labels(path))
    columns = [(key, column) for key, names in KEYS.items() for column in names if column in table.names]
    files = _read_file_names(table)
    if files is None and not columns:
        first = ", ".join(names[0] for names in KEYS.values())
        raise table.error(
            f"names no slice, series, study or patient: it needs one column of {first}, or of NIfTI files a column file"
        )
    if not set(CLASSES) & set(table.names):
        raise table.error(f"has none of the columns {', '.join(CLASSES)}")
    absent = [name for name in CLASSES if name not in table.names]
    key, names = files or (columns[0][0], table.text(columns[0][1]).to_pandas())
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
    return LabelTable(key, frame, report, None if files is None else _read_patients(table))


def _read_file_names(table: Table) -> tuple[str, pd.Series] | None:
    """Return the key and the identifiers (rows,) of a table of NIfTI files; None for any other table."""
    names = _portable_names(table)
    if names is None or not names.map(is_nifti).all():
        return None
    if "slice" not in table.names:
        return FILE, names
    numbers = table.numbers("slice")
    table.refuse(~((numbers >= 0) & (numbers % 1 == 0)), "column slice is no whole number from 0", numbers)
    return FILE_SLICE, pd.Series(
        [slice_path(name, int(number)) for name, number in zip(names, numbers, strict=True)], dtype=object
    )


def _portable_names(table: Table) -> pd.Series | None:
    names = table.optional_text("file")
    return None if names is None else names.str.strip().str.replace("\\", "/").str.removeprefix("./").astype(object)


def _read_patients(table: Table) -> pd.Series | None:
    """Return the patient of each NIfTI file by its name; None where the table names none."""
    files, patients = _portable_names(table), table.optional_text("patient_id")
    if files is None or patients is None:
        return None
    of_file = patients.groupby(files)
    table.refuse((of_file.transform("nunique") > 1).to_numpy(), "column patient_id differs within one file", files)
    names: pd.Series = of_file.first()
    return names


def name_patients(slices: pd.DataFrame, labels: LabelTable | None) -> pd.DataFrame:
    """Replace the patients of NIfTI slices by those that the label table names, where it does."""
    if labels is None or labels.patients is None:
        return slices
    named = _name_files(slices["path"], labels.patients.index).map(labels.patients)
    return slices.assign(patient_id=named.where(named.notna(), slices["patient_id"]))


def _name_files(paths: pd.Series, names: pd.Index) -> pd.Series:
    """Return which of ``names`` is the NIfTI file of each path (n,); its own name for none, empty for another path.

    A name is the path below any folder. Raises DataError where one name stands for files in two folders.
    """
    known, matches, owners = set(names), dict[str, str](), dict[str, str]()
    files = paths.map(_file_of)
    for file in files.unique():
        parts = file.split("/")
        name = next((end for start in range(len(parts)) if (end := "/".join(parts[start:])) in known), parts[-1])
        if name in known and owners.setdefault(name, file) != file:
            raise DataError(
                f"the label table's file {name!r} may be {owners[name]} or {file}: write the folder before the name, "
                "as below prepare.dicom_dir"
            )
        matches[file] = name
    return files.map(matches)


def _file_of(path: str) -> str:
    """Return the file of a NIfTI slice; an empty text for any other path."""
    return (split_slice(path) or ("", 0))[0]


def _name_nifti(index: pd.DataFrame, labels: LabelTable) -> pd.Series:
    """Return the identifier of each row (n,) in a table of NIfTI files or slices; an empty one for other rows.

    Raises DataError where the table counts slices from 1.
    """
    names = labels.values.index
    if labels.key == FILE:
        return _name_files(index["path"], names)
    rows = pd.DataFrame([split_slice(name) for name in names], columns=["file", "slice"])
    files = _name_files(index["path"], pd.Index(rows["file"].unique()))
    numbers = index["instance_number"]
    last = rows.groupby("file")["slice"].max() - numbers.groupby(files).max()
    if rows["slice"].min() == 1 and (last == 1).any():
        file = last.index[last == 1][0]
        raise DataError(
            f"{labels.report['file']}: column slice counts from 1 (the last slice of {file} is "
            f"{rows.groupby('file')['slice'].max()[file]}); count from 0, as the voxels are stored"
        )
    texts = [
        slice_path(file, int(number)) if file else "" for file, number in zip(files, numbers.fillna(0), strict=True)
    ]
    return pd.Series(texts, index=index.index)


def join(index: pd.DataFrame, labels: LabelTable | None) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Add the six columns of CLASSES to the index by identifier, and make the table of studies.

    Returns the index (float32 labels, NaN where unknown), a row of STUDY_COLUMNS for each series, and counts of rows
    without a match. Raises DataError if nothing matches: the table belongs to other images.
    """
    if labels is None:
        joined = index.assign(**dict.fromkeys(CLASSES, np.float32(np.nan)))
        return joined, _reduce_to_series(joined, joined[list(CLASSES)]), {}
    of_slices = labels.key in ("sop_uid", FILE_SLICE)
    if labels.key in (FILE, FILE_SLICE):
        names = _name_nifti(index, labels)
    else:
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
