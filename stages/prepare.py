"""``ichpipe prepare``: read DICOM files and labels, write the index, the choice of series and rejected files."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import click

from ichpipe.common.errors import DataError
from ichpipe.stages.options import workers_option

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from ichpipe.params.schema import PrepareParams
    from ichpipe.stages.options import Settings

log = logging.getLogger("ichpipe")

MOST_NAMED = 5
"""Lost patients that a warning names."""


@click.command("prepare")
@workers_option
@click.pass_obj
def command(settings: Settings, workers: int) -> None:
    """Scan DICOM files, order slices, join labels, split by patient.

    \b
    Example:
      ichpipe --set prepare.dicom_dir=data/phantom/dicom prepare
    """
    params, artifacts = settings.params().prepare, settings.artifacts()
    with settings.lock_stage("prepare", "index", ".resume/prepare"):
        run(params, artifacts.index_dir, workers, artifacts.resume("prepare"))


def run(params: PrepareParams, out: Path, workers: int = 0, header_cache: Path | None = None) -> None:
    """Write ``slices.parquet``, ``series.csv``, ``studies.csv``, ``rejected.csv`` and ``summary.json`` into ``out``.

    ``header_cache`` is a folder: headers that a former run read, stopped or complete, are not read again.
    Raises MissingFileError without the folder or table, DataError where nothing usable is in them.
    """
    from ichpipe.common.pseudonyms import read_pseudonyms
    from ichpipe.index import index_writer, sources, splits

    pseudonyms = read_pseudonyms(params.hash_patient_ids)
    # Tables first: a wrong one is found in seconds, the scan may take an hour.
    tables = sources.read_tables(params, pseudonyms)
    test_slices = splits.read_test_slices(params.test_slices) if params.split == "stage1" else None
    try:
        scanned = sources.read_archives(params, tables, workers, header_cache, pseudonyms)
    except sources.NothingUsableError as error:
        index_writer.write_rejected(out, error.rejected)
        where = f"; {out / 'rejected.csv'} says why for each" if len(error.rejected) else ""
        raise DataError(f"{error}{where}") from error
    rejected = scanned.rejected
    index = splits.assign_splits(scanned.slices, params, test_slices)
    summary: dict[str, Any] = {"dataset": params.dataset, **index_writer.summarise(index, rejected)}
    summary["labels"] = scanned.labels
    if params.sources:
        del summary["dataset"]
        summary["sources"] = {name: index_writer.describe(rows) for name, rows in index.groupby("source")}
    if test_slices is not None:
        summary["overlap"] = splits.count_overlap(index)
        summary["test_slices_without_file"] = int((~test_slices.isin(index["sop_uid"])).sum())
    index_writer.write_outputs(out, index, rejected, summary, series=scanned.series, studies=scanned.studies)
    _log_warnings(index, scanned.series, rejected, summary)


def _log_warnings(index: pd.DataFrame, series: pd.DataFrame, rejected: pd.DataFrame, summary: dict[str, Any]) -> None:
    """Warn of files and patients that are left out, and of what changes the meaning of later figures."""
    import pandas as pd

    from ichpipe.index.scan import NOT_CHOSEN

    if unused := int((rejected["code"] != NOT_CHOSEN).sum()):
        log.warning("%d files are left out; rejected.csv says why for each", unused)
    lost = rejected[(rejected["patient_id"] != "") & ~rejected["patient_id"].isin(index["patient_id"])]
    for number, (patient, rows) in enumerate(lost.groupby("patient_id")):
        if number == MOST_NAMED:
            log.warning("%d more patients have no slice in the index", lost["patient_id"].nunique() - MOST_NAMED)
            break
        reason = rows["reason"].value_counts().index[0]
        log.warning("patient %s has no slice in the index; of %d files most often: %s", patient, len(rows), reason)
    ids = pd.Series(index["patient_id"].unique(), dtype=object)
    written_alike = ids.groupby(ids.str.split().str.join("").str.casefold())
    if alike := [list(group) for _, group in written_alike if len(group) > 1]:
        log.warning(
            "%d groups of PatientIDs (0010,0020) differ only in case or spaces, the first: %s; they count as different "
            "patients: correct them, such as with dcmodify, if they are one",
            len(alike),
            " and ".join(map(repr, alike[0])),
        )
    sequences = series["series_uid"].isin(index.loc[~index["slices_only"], "series_uid"])  # loose slices need not be
    flawed = series[series["chosen"] & (series["faults"] != "") & sequences]
    if len(flawed):
        commonest = flawed["faults"].value_counts().index[0]
        log.warning(
            "%d studies have no series without a fault; most often: %s; series.csv says which", len(flawed), commonest
        )
    for name, report in summary["labels"].items() if "sources" in summary else [("", summary["labels"])]:
        _log_label_warnings(f"source {name}: " if name else "", report)
    if not index["split"].isin(["train", "val"]).any():
        log.warning("nothing to train on: all %d patients are in the test split", index["patient_id"].nunique())
    if index["lossy"].any():
        log.warning("%d slices are compressed with loss (column lossy)", int(index["lossy"].sum()))
    if summary.get("overlap", {}).get("patients"):
        log.warning(
            "%(patients)d patients of the test slices have others too: those %(slices_left_out_of_training)d are not "
            "trained on",
            summary["overlap"],
        )


def _log_label_warnings(source: str, report: dict[str, Any]) -> None:
    if absent := report.get("classes_without_column"):
        unused = ", ".join(report.get("columns_not_used", []))
        others = f"; columns not used: {unused[:200]}" if unused else ""
        text = "%sthe label table has no column %s: these labels are unknown%s"
        log.warning(text, source, ", ".join(absent), others)
    for kind in ("slices", "studies"):
        if without := report.get(f"{kind}_without_label"):
            log.warning("%s%d %s have no label in the table", source, without, kind)
    if cause := report.get("labels_likely_cause"):
        log.warning("%s%s", source, cause)
