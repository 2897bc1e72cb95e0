"""Reads one archive or several, each with its labels, into one index in which no identifiers collide."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from ichpipe.common.errors import DataError
from ichpipe.index.label_tables import join, name_patients, read_labels
from ichpipe.index.scan import REJECTED, scan
from ichpipe.index.series_selection import select_series

if TYPE_CHECKING:
    from ichpipe.common.pseudonyms import Pseudonyms
    from ichpipe.index.label_tables import LabelTable
    from ichpipe.params.schema import PrepareParams, SourceParams

SAME_SLICE = "same slice"  # code of a file whose SOPInstanceUID stands in an earlier source


class NothingUsableError(DataError):
    """An archive holds no usable CT slice."""

    def __init__(self, folder: str, rejected: pd.DataFrame) -> None:
        self.rejected = rejected
        if rejected.empty:
            super().__init__(f"no file in {folder}; set prepare.dicom_dir to a folder with DICOM images")
        else:
            commonest = rejected["reason"].value_counts().index[0]
            super().__init__(f"none of {len(rejected)} files in {folder} is a usable CT slice; most often: {commonest}")


class Scanned(NamedTuple):
    """What `prepare` reads of its archives."""

    slices: pd.DataFrame  # with labels; without split and fold
    rejected: pd.DataFrame  # files that are no slice of the index, with the reason
    series: pd.DataFrame  # every series, chosen or not
    studies: pd.DataFrame  # labels of studies
    labels: dict[str, Any]  # what the label table holds, and what of it matches


def read_tables(params: PrepareParams, pseudonyms: Pseudonyms | None) -> list[LabelTable | None]:
    """Read the label table of each archive; None where it has none. It takes seconds; scanning may take an hour."""
    return [
        read_labels(source.dataset, Path(source.labels)).hide_patients(pseudonyms) if source.labels else None
        for source in params.archives
    ]


def read_archives(
    params: PrepareParams,
    tables: list[LabelTable | None],
    workers: int,
    header_cache: Path | None,
    pseudonyms: Pseudonyms | None,
) -> Scanned:
    """Scan every archive, choose its series, join its labels, and put all into one index.

    With ``prepare.sources`` a PatientID becomes ``NAME/PatientID``. A study, series or slice that stands in two
    sources makes its patients one: the first source names the patient. Of a slice (SOPInstanceUID) that stands in
    two, the first is kept. Raises NothingUsableError for an archive without a usable slice.
    """
    parts = []
    for source, table in zip(params.archives, tables, strict=True):
        cache = header_cache / source.name if header_cache and params.sources else header_cache
        parts.append(_read_archive(source, params, table, workers, cache, pseudonyms))
    if not params.sources:
        return parts[0]
    series, studies = (
        pd.concat([getattr(part, name) for part in parts], ignore_index=True) for name in ("series", "studies")
    )
    index, repeated = _join([part.slices for part in parts])
    rejected = pd.concat([*(part.rejected for part in parts), repeated]).sort_values("path", ignore_index=True)
    labels = {source.name: part.labels for source, part in zip(params.sources, parts, strict=True)}
    return Scanned(index, rejected, series, studies, labels)


def _read_archive(
    source: SourceParams,
    params: PrepareParams,
    table: LabelTable | None,
    workers: int,
    cache: Path | None,
    pseudonyms: Pseudonyms | None,
) -> Scanned:
    slices, rejected = scan([Path(source.dicom_dir)], workers, cache, pseudonyms=pseudonyms)
    if slices.empty:
        raise NothingUsableError(source.dicom_dir, rejected)
    per_study = params.selection.per_study
    one_per_study = source.dataset != "rsna" if per_study == "auto" else per_study == "one"
    slices, rejected = name_patients(slices, table), name_patients(rejected, table)
    chosen = select_series(slices, rejected, params.selection, one_per_study=one_per_study)
    rejected = pd.concat([rejected, chosen.left_out]).sort_values("path", ignore_index=True)
    index, studies, matched = join(chosen.slices, table)
    index = index.assign(source=source.name, slices_only=source.use == "slices")
    series = chosen.series
    if params.sources:
        index, studies, series, rejected = (
            frame.assign(patient_id=(source.name + "/" + frame["patient_id"]).where(frame["patient_id"] != "", ""))
            for frame in (index, studies, series, rejected)
        )
    return Scanned(index, rejected, series, studies, (table.report if table else {}) | matched)


def _join(indexes: list[pd.DataFrame]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return one index, sorted by series and slice, and the files that repeat a series of an earlier source.

    Sources that share a study, a series or a slice share its patients; without one name for both, one could be trained
    on and the other scored.
    """
    whole = pd.concat(indexes, ignore_index=True)
    earlier: dict[str, str] = {}  # name of a patient to the name that an earlier source gives

    def first_name(name: str) -> str:
        while name in earlier:
            name = earlier[name]
        return name

    for key in ("study_uid", "series_uid", "sop_uid"):
        names = whole[[key, "patient_id"]].drop_duplicates()
        shared = names[names.duplicated(key, keep=False)]
        for first, *others in shared.groupby(key, sort=False)["patient_id"].unique():
            for other in map(first_name, others):
                if other != first_name(first):
                    earlier[other] = first_name(first)
    whole["patient_id"] = whole["patient_id"].map({name: first_name(name) for name in whole["patient_id"].unique()})
    owners = [whole.groupby(key)["source"].transform("first") for key in ("series_uid", "sop_uid")]
    owner = owners[0].where(owners[0] != whole["source"], owners[1])
    # A series goes as a whole: without the slices that are repeated it would have gaps.
    owner = owner.where(owner != whole["source"]).groupby([whole["series_uid"], whole["source"]]).transform("first")
    repeated = owner.notna()
    reasons = "its series or a slice of it (SeriesInstanceUID, SOPInstanceUID) stands in the source " + owner + ", too"
    rows = whole[repeated].assign(reason=reasons[repeated], code=SAME_SLICE)[REJECTED]
    return whole[~repeated].sort_values(["series_uid", "slice_index"], ignore_index=True), rows
