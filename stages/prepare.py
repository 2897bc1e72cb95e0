"""``ichpipe prepare``: DICOM files and labels in; index, choice of series, rejected files and a summary out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichpipe.common.errors import DataError
from ichpipe.stages.options import workers_option

if TYPE_CHECKING:
    import pandas as pd

    from ichpipe.common.pseudonyms import Pseudonyms
    from ichpipe.index import label_tables
    from ichpipe.params.schema import PrepareParams
    from ichpipe.stages.options import Settings

log = logging.getLogger("ichpipe")


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
    with settings.alone("prepare", "index", ".resume/prepare"):
        run(params, artifacts.index_dir, workers, artifacts.resume("prepare"))


def run(params: PrepareParams, out: Path, workers: int = 1, cache: Path | None = None) -> None:
    """Write ``slices.parquet``, ``series.csv``, ``studies.csv``, ``rejected.csv`` and ``summary.json`` into ``out``.

    With ``cache``, a folder, headers read by a former run that was stopped or has ended are not read again.
    Raises MissingFileError without the folder or table, DataError where nothing usable is in them.
    """
    import pandas as pd

    from ichpipe.common.pseudonyms import read_pseudonyms
    from ichpipe.index import index_writer, label_tables, splits
    from ichpipe.index.scan import scan
    from ichpipe.index.series_selection import select_series
    from ichpipe.index.splits import read_test_slices, test_table_path

    pseudonyms = read_pseudonyms(params.hash_patient_ids)
    # Tables first: a wrong one is found in seconds, the scan may take an hour.
    labels = _labels(params, pseudonyms)
    test_slices = None
    if params.split == "stage1":
        test_slices = read_test_slices(test_table_path(params))
    scanned, rejected = scan([Path(params.dicom_dir)], workers, cache, pseudonyms=pseudonyms)
    if scanned.empty:
        index_writer.write_rejected(out, rejected)
        raise DataError(_nothing_usable(params, rejected, out))
    chosen = select_series(scanned, rejected, params.selection, one_per_study=_one_per_study(params))
    rejected = pd.concat([rejected, chosen.left_out]).sort_values("path", ignore_index=True)
    index, of_studies, matched = label_tables.join(chosen.slices, labels)
    index = splits.assign_splits(index, params, test_slices)
    summary: dict[str, Any] = {"dataset": params.dataset, **index_writer.summarise(index, rejected)}
    summary["labels"] = (labels.report if labels else {}) | matched
    if test_slices is not None:
        summary["overlap"] = splits.overlap(index)
        summary["test_slices_without_file"] = int((~test_slices.isin(index["sop_uid"])).sum())
    index_writer.write_outputs(out, index, rejected, summary, series=chosen.series, of_studies=of_studies)
    _tell(index, chosen.series, summary)


def _labels(params: PrepareParams, pseudonyms: Pseudonyms | None) -> label_tables.LabelTable | None:
    from ichpipe.index import label_tables

    if params.labels is None:
        return None
    return label_tables.read_labels(params.dataset, Path(params.labels)).hidden(pseudonyms)


def _one_per_study(params: PrepareParams) -> bool:
    wanted = params.selection.per_study
    return params.dataset != "rsna" if wanted == "auto" else wanted == "one"


def _tell(index: pd.DataFrame, series: pd.DataFrame, summary: dict[str, Any]) -> None:
    """Log what changes the meaning of the figures to come."""
    flawed = series["chosen"] & series["reason"].str.contains("though: ")
    if flawed.any():
        log.warning("%d studies have no series without a fault; series.csv says which faults", int(flawed.sum()))
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


def _nothing_usable(params: PrepareParams, rejected: pd.DataFrame, out: Path) -> str:
    if rejected.empty:
        return f"no file in {params.dicom_dir}; set prepare.dicom_dir to a folder with DICOM images"
    reason = rejected["reason"].value_counts().index[0]
    return (
        f"none of {len(rejected)} files in {params.dicom_dir} is a usable CT slice; "
        f"most often: {reason}; {out / 'rejected.csv'} says why for each"
    )
