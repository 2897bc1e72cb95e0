"""Scores slices by RSNA's metric: two tables joined by SOPInstanceUID; counts what did not match."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.scoring.calibration_metrics import reliability
from ichpipe.scoring.metrics import paired_difference, score
from ichpipe.scoring.slice_tables import GROUPS, count_uids

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ichpipe.scoring.slice_tables import SliceTable

    Floats = NDArray[np.float64]


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
        result["against"] = {
            "predictions": report,
            **paired_difference(true, others, probabilities, patients, **settings),
        }
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
