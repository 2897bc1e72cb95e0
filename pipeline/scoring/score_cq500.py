"""Scores CQ500 scans by table: AUC per finding, intervals, operating points, a test against another model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.common.user_tables import read_table
from ichpipe.index.cq500_reads import FINDINGS, ScanTable, one_row_each, scan_name, scan_numbers
from ichpipe.scoring.metrics import reliability, score
from ichpipe.scoring.roc import compare, interval, operating_points
from ichpipe.scoring.score_slices import count_names, read_probabilities

if TYPE_CHECKING:
    from pathlib import Path

_NAMES: Final = ("name", "scan", "study", "patient_id", "PatientID", "path", "study_uid", "ID")


def read_scans(path: Path, pool: str | None = None) -> ScanTable:
    """Read probabilities of scans: a column that names the scan, and six columns named as FINDINGS or as CLASSES.

    ``studies.csv`` of ``predict`` serves, where its ``patient_id`` is CQ500's. Rows of no scan of CQ500 are counted
    and left out. Several rows of one scan, such as two series, are an error unless they are equal or ``pool``
    (``max``, ``mean``) is given. DataError names file and line, also for a value that is NaN or out of range.
    """
    table = read_table(path, "prediction", [*_NAMES, *FINDINGS.values(), *CLASSES])
    forms = [form for form in (FINDINGS, {name: name for name in CLASSES}) if set(form.values()) <= set(table.names)]
    if len(forms) != 1:
        both = f"{', '.join(FINDINGS.values())} and {', '.join(CLASSES)}"
        near = "" if forms else table.near_misses([*_NAMES, *FINDINGS.values(), *CLASSES])
        raise table.error(f"must have one whole set of columns of {both}, and has {len(forms)}{near}")
    values = np.column_stack([read_probabilities(table, forms[0][name]) for name in CLASSES])
    for name in _NAMES:  # the first column that names any scan
        texts = table.optional_text(name)
        if texts is not None and not np.isnan(numbers := scan_numbers(texts)).all():
            break
    else:
        raise table.error(f"names no scan of CQ500 (CQ500-CT-12, CQ500CT12) in any column called {', '.join(_NAMES)}")
    known = ~np.isnan(numbers)
    if pool is None:
        frame = one_row_each(table, values, numbers)
    else:
        grouped = pd.DataFrame(values[known], columns=list(CLASSES)).groupby(numbers[known])
        frame = grouped.max() if pool == "max" else grouped.mean()
        frame.index = pd.Index([scan_name(int(number)) for number in frame.index])
    repeated = "n_duplicate_rows" if pool is None else "n_pooled_rows"
    report = {"file": str(path), "n_rows": len(texts), repeated: int(known.sum()) - len(frame), "pool": pool}
    return ScanTable(table.title, frame, report | count_names("rows_of_no_scan", sorted(set(texts[~known]))))


def score_scans(
    predictions: ScanTable,
    labels: ScanTable,
    *,
    missing: float | None = None,
    against: ScanTable | None = None,
    operating_point: float = 0.9,
    **settings: Any,
) -> dict[str, Any]:
    """Return M of the contract by scan, with DeLong's intervals, operating points and what did not match.

    ``settings`` are ``bootstrap_samples``, ``confidence`` and ``seed``; scans are resampled. A scan without prediction
    is left out, counted and named, or gets ``missing`` (0 to 1). ``against`` adds DeLong's test per class on the scans
    that both models have; positive differences mean that ``predictions`` is better.
    """
    confidence = settings["confidence"]
    probabilities, matches = _match(predictions, labels, missing)
    names = probabilities.index
    true, predicted = labels.values.loc[names].to_numpy(), probabilities.to_numpy()
    columns = list(zip(CLASSES, true.T, predicted.T, strict=True))
    scans = np.arange(len(names))
    result = score(true, predicted, scans, scans, **settings) | reliability(true, predicted)
    for by_slice in ("n_slices", "n_excluded"):
        del result[by_slice]
    result |= {
        "delong": {name: interval(label, values, confidence) for name, label, values in columns},
        "operating_points": {
            name: operating_points(label, values, wanted=operating_point, confidence=confidence)
            for name, label, values in columns
        },
        "finding": FINDINGS,
        "n_studies": len(names),
        "resampled_by": "scan",
        "predictions": predictions.report | matches,
        "labels": labels.report,
    }
    if against is not None:
        others, matches = _match(against, labels, missing)
        common = names.intersection(others.index, sort=False)
        if common.empty:
            raise DataError(f"{against.title} has no scan in common with the predictions; check its names")
        truth, first, second = (frame.loc[common] for frame in (labels.values, probabilities, others))
        tests = {name: compare(truth[name], first[name], second[name], confidence) for name in CLASSES}
        report = against.report | matches
        result["against"] = {"n_studies": len(common), "delong_test": tests, "predictions": report}
    return result | settings


def _match(predictions: ScanTable, labels: ScanTable, missing: float | None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the predictions of labelled scans, in the order of the labels, and what did not match."""
    labelled, given = labels.values.index, predictions.values.index
    without = labelled.difference(given, sort=False)
    if len(without) == len(labelled):
        raise DataError(
            f"{predictions.title} has no prediction for any of the {len(labelled)} scans of {labels.title}; "
            f"scans are named CQ500-CT-12 or CQ500CT12, in a column called {', '.join(_NAMES)}"
        )
    report = count_names("scans_without_label", given.difference(labelled, sort=False))
    report |= count_names("scans_without_prediction", without)
    if missing is None:
        return predictions.values.loc[labelled.intersection(given, sort=False)], report
    report |= {"filled_with": missing} if len(without) else {}
    return predictions.values.reindex(labelled).fillna(missing), report
