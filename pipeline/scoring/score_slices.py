"""Scores slices by RSNA's metric: reads tables of predictions and labels, joins them, counts what did not match.

A table is RSNA's long one, one row a slice, or ``evaluate``'s parquet. Rows are found by SOPInstanceUID and columns by
name, never by position: RSNA lists ``any`` last, this project first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.common.user_tables import read_table
from ichpipe.index.rsna_labels import LONG_COLUMNS, inconsistent_any, parse_ids
from ichpipe.scoring.metrics import paired_difference, reliability, score

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from ichpipe.common.user_tables import Table

    Floats = NDArray[np.float64]

GROUPS: Final = ("patient_id", "study_uid", "series_uid")  # columns that name what a slice belongs to, widest first
_KEYS: Final = ("sop_uid", "ID", "SOPInstanceUID")
_FORMS: Final = (
    f"a slice table has the columns ID,Label with IDs <SOPInstanceUID>_<class>, or one of {', '.join(_KEYS)} "
    f"and the six classes {', '.join(CLASSES)}"
)


@dataclass(frozen=True)
class SliceTable:
    """Values of slices by SOPInstanceUID."""

    title: str
    values: pd.DataFrame  # index: SOPInstanceUID, unique; the columns of CLASSES, float64; NaN where there is none
    groups: pd.DataFrame  # same index; those of GROUPS that the table has in full, as text
    report: dict[str, Any]


def read_predictions(path: Path) -> SliceTable:
    """Read probabilities 0 to 1 of slices; a class of which the long form has no row is NaN.

    Raises DataError that names file and line: a value that is NaN or out of range, an unknown or absent class, two
    different values for one slice and class. Rows that repeat an earlier one are counted in the report.
    """
    return _read(read_table(path, "prediction", [*LONG_COLUMNS, *_KEYS, *GROUPS], CLASSES), read_probabilities, CLASSES)


def read_labels(path: Path) -> SliceTable:
    """Read labels 0 or 1 of slices; NaN where unknown. Of ``evaluate``'s parquet the ``label_`` columns are read.

    Raises DataError as ``read_predictions`` does. Where ``any`` is not the maximum of the five, all six labels become
    unknown, as in ``ichpipe.index.rsna_labels``; the report names the slice.
    """
    prefixed = tuple(f"label_{name}" for name in CLASSES)
    table = read_table(path, "label", [*LONG_COLUMNS, *_KEYS, *GROUPS, *prefixed], CLASSES)
    result = _read(table, _read_label, prefixed if set(prefixed) <= set(table.names) else CLASSES)
    odd = inconsistent_any(result.values.notna().to_numpy(), result.values.to_numpy() == 1.0)
    report = result.report | count_uids("inconsistent_any_slices", result.values.index[odd])
    return replace(result, values=result.values[~odd].reindex(result.values.index), report=report)


def read_probabilities(table: Table, column: str) -> Floats:
    """Read a column (rows,) of probabilities; DataError names the first that is NaN or outside 0 to 1."""
    values = table.numbers(column)
    wrong = ~((values >= 0.0) & (values <= 1.0))  # NaN is outside too
    table.refuse(wrong, f"column {column} is no probability; give numbers from 0 to 1, not logits", values)
    return values


def count_uids(title: str, uids: pd.Index) -> dict[str, Any]:
    """Return how many there are, and the first of them."""
    return {f"n_{title}": len(uids)} | ({f"first_of_{title}": str(uids[0])} if len(uids) else {})


def count_names(title: str, names: Iterable[Any]) -> dict[str, Any]:
    """Return how many there are, and up to 20 of them."""
    texts = [str(name) for name in names]
    return {f"n_{title}": len(texts)} | ({title: texts[:20]} if texts else {})


def _read_label(table: Table, column: str) -> Floats:
    values = table.numbers(column)
    wrong = ~np.isin(values, (0.0, 1.0)) & ~(np.isnan(values) & (not table.is_csv))
    remedy = "is neither 0 nor 1; check that PREDICTIONS and LABELS stand in this order"
    table.refuse(wrong, f"column {column} {remedy}", values)
    return values


def _read(table: Table, read_column: Callable[[Table, str], Floats], columns: tuple[str, ...]) -> SliceTable:
    is_long = sorted(table.names) == LONG_COLUMNS
    groups: dict[str, NDArray[Any]] = {}
    if is_long:  # a row is one slice and class
        ids = table.text("ID")
        uids, column = parse_ids(table, ids)
        codes, unique = pd.factorize(pd.Index(uids.to_pandas()))
        values = read_column(table, "Label")[:, None]
        cells = np.full((len(unique), len(CLASSES)), np.nan)
        cells[codes, column] = values[:, 0]
        kept, names = cells[codes, column][:, None], pd.Series(ids.to_pandas())
        distinct_rows = int((~np.isnan(cells)).sum())
    else:
        key = next((name for name in _KEYS if name in table.names), None)
        absent = [name for name in columns if name not in table.names]
        if key is None or absent:
            near = table.near_misses([*LONG_COLUMNS, *_KEYS, *GROUPS, *columns])
            raise table.error(f"lacks {', '.join(absent) or 'the slices'}; {_FORMS}{near}")
        names = pd.Series(table.text(key).to_pandas())
        values = np.column_stack([read_column(table, name) for name in columns])
        codes, unique = pd.factorize(pd.Index(names))
        first = np.flatnonzero(~names.duplicated())
        cells, kept, distinct_rows = values[first], values[first[codes]], len(first)
        texts = {name: table.optional_text(name) for name in GROUPS}
        groups = {name: column.to_numpy()[first] for name, column in texts.items() if column is not None}
    differ = ((values != kept) & ~(np.isnan(values) & np.isnan(kept))).any(axis=1)
    table.refuse(differ, "contradicts another row of the same ID; keep one of them", names)
    rows = len(table.content)
    report = {"file": str(table.path), "form": "long" if is_long else "wide", "n_rows": rows}
    report["n_duplicate_rows"] = rows - distinct_rows
    frame = pd.DataFrame(cells, index=unique, columns=list(CLASSES))
    return SliceTable(table.title, frame, pd.DataFrame(groups, index=unique), report)


def score_slices(
    predictions: SliceTable,
    labels: SliceTable,
    *,
    missing: float | None = None,
    against: SliceTable | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Return M of the contract with average precision, Brier score, calibration error and what was counted.

    ``settings`` are ``bootstrap_samples``, ``confidence`` and ``seed``. Slices whose labels are not all known are left
    out and counted. A labelled slice without prediction is an error, or gets ``missing`` (0 to 1). Resamples are of
    the widest group that a table names for every slice scored; ``resampled_by`` says which. ``against`` adds a
    paired bootstrap, in which positive means that ``predictions`` is better.
    """
    known = labels.values.dropna().sort_index()  # sorted, so that the order of rows changes no interval
    if known.empty:
        raise DataError(f"{labels.title} has no slice whose six labels are all known; check the table")
    uids, true = known.index, known.to_numpy()
    probabilities, report = _join(predictions, labels, uids, missing)
    groups = {}  # numbers (n,) of patients, studies and series, by the first table that names one for each slice
    for name in GROUPS:
        columns = [table.groups[name].reindex(uids) for table in (labels, predictions) if name in table.groups]
        whole = next((column for column in columns if column.notna().all()), None)
        if whole is not None:
            groups[name] = pd.factorize(whole, sort=True)[0]
    patients = next(iter(groups.values()), np.arange(len(uids)))
    series_key = next((name for name in ("series_uid", "study_uid") if name in groups), None)
    series = groups[series_key] if series_key else None
    result = score(true, probabilities, patients, series, **settings) | reliability(true, probabilities)
    result |= {
        "n_excluded": len(labels.values) - len(known),
        "n_studies": None if series is None else len(np.unique(series)),
        "n_groups": len(np.unique(patients)),
        "resampled_by": next(iter(groups), "slice"),
        "study_auc_by": series_key,
        "predictions": report,
        "labels": labels.report,
    }
    if against is not None:
        others, report = _join(against, labels, uids, missing)
        difference = paired_difference(true, others, probabilities, patients, **settings)
        result["against"] = {"predictions": report, **difference}
    return result | settings


def _join(
    predictions: SliceTable, labels: SliceTable, uids: pd.Index, missing: float | None
) -> tuple[Floats, dict[str, Any]]:
    """Return the predictions (n, 6) of the slices, filled or refused where there is none, and what was counted."""
    values = predictions.values.reindex(uids).to_numpy(copy=True)
    absent = np.isnan(values)
    without = uids[absent.any(axis=1)]
    if absent.all():
        raise DataError(
            f"{predictions.title} has no prediction for any of the {len(uids)} slices of {labels.title}: "
            f"one names {predictions.values.index[0]}, the other {uids[0]}; check that they belong together"
        )
    if len(without) and missing is None:
        gaps = zip(CLASSES, absent[uids.get_loc(without[0])], strict=True)
        raise DataError(
            f"{predictions.title} has no prediction for {len(without)} of {len(uids)} labelled slices, first of them "
            f"{without[0]} ({', '.join(name for name, gap in gaps if gap)}); add them, or fill them with --missing 0.5"
        )
    values[absent] = missing
    unlabelled = predictions.values.index.difference(uids, sort=False)
    counts = count_uids("slices_without_label", unlabelled) | count_uids("slices_without_prediction", without)
    return values, predictions.report | counts | ({"filled_with": missing} if len(without) else {})
