"""``ichpipe prepare``: DICOM files and labels in; the index, the rejected files and a summary out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ichpipe import ct, labels, studies
from ichpipe.errors import DataError, ParamsError

if TYPE_CHECKING:
    import pandas as pd

    from ichpipe.params import PrepareParams


def run(params: PrepareParams, out: Path, workers: int = 1) -> None:
    """Write ``slices.parquet``, ``rejected.csv`` and ``summary.json`` into ``out``.

    Raises MissingFileError without the folder or table, DataError where nothing usable is in them.
    """
    if params.dataset == "cq500":
        raise ParamsError("prepare.dataset cq500 is not there yet; use folder, which needs no CQ500 reads table")
    table, label_report = _read_labels(params)
    paths = ct.find_files([Path(params.dicom_dir)])
    index, rejected = studies.scan(paths, workers)
    if index.empty:
        studies.write_rejected(out, rejected)
        raise DataError(_nothing_usable(params, rejected, out))
    index, matched = studies.join_labels(index, table)
    index = studies.assign_splits(index, params)
    summary = {"dataset": params.dataset, **studies.summarise(index, rejected), "labels": label_report | matched}
    studies.write_outputs(out, index, rejected, summary)


def _read_labels(params: PrepareParams) -> tuple[pd.DataFrame | None, dict[str, Any]]:
    if params.labels is None:
        return None, {}
    table, report = labels.read_kaggle(Path(params.labels))
    return table, report.as_dict()


def _nothing_usable(params: PrepareParams, rejected: pd.DataFrame, out: Path) -> str:
    if rejected.empty:
        return f"no file in {params.dicom_dir}; set prepare.dicom_dir to a folder with DICOM images"
    reason = rejected["reason"].value_counts().index[0]
    return (
        f"none of {len(rejected)} files in {params.dicom_dir} is a usable CT slice; "
        f"most often: {reason}; {out / 'rejected.csv'} says why for each"
    )
