"""CQ500's figures over tables: AUC per finding by scan, intervals, operating points, a test against another model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.common.user_tables import read_table
from ichpipe.index.cq500_reads import FINDINGS, ScanTable, one_row_each, scan_name, scan_numbers
from ichpipe.scoring.calibration_metrics import reliability
from ichpipe.scoring.delong import compare, interval
from ichpipe.scoring.metrics import score
from ichpipe.scoring.operating_points import operating_points

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ichpipe.common.user_tables import Table

POOLINGS: Final = ("max", "mean")

_NAMES: Final = ("name", "scan", "study", "patient_id", "PatientID", "path", "study_uid", "ID")
_LISTED: Final = 20  # names that the report lists of each kind


def read_scans(path: Path, pool: str | None = None) -> ScanTable:
    """Read probabilities of scans: a column that names the scan, and six columns named as FINDINGS or as CLASSES.

    ``studies.csv`` of ``predict`` serves, where its ``patient_id`` is CQ500's. Rows whose name is no scan of CQ500 are
    left out and counted. Several rows of one scan, such as two series, are an error unless they are equal or ``pool``
    (``max``, ``mean``) says what to take, per class. Raises DataError that names file and line also for a value that
    is NaN or out of range.
    """
    table = read_table(path, "prediction")
    columns = _columns(table)
    values = np.column_stack([table.numbers(columns[name]) for name in CLASSES])
    for place, name in enumerate(CLASSES):
        wrong = ~((values[:, place] >= 0.0) & (values[:, place] <= 1.0))  # NaN is outside too
        table.refuse(wrong, f"column {columns[name]} is no probability; give numbers from 0 to 1", values[:, place])
    texts, numbers = _scans(table)
    known = ~np.isnan(numbers)
    if pool is None:
        frame = one_row_each(table, values, numbers)
    else:
        grouped = pd.DataFrame(values[known], columns=list(CLASSES)).groupby(numbers[known])
        frame = grouped.max() if pool == "max" else grouped.mean()
        frame.index = pd.Index([scan_name(int(number)) for number in frame.index])
    strangers = sorted(set(texts[~known]))
    repeated = "n_duplicate_rows" if pool is None else "n_pooled_rows"
    report = {"file": str(path), "n_rows": len(texts), repeated: int(known.sum()) - len(frame), "pool": pool}
    return ScanTable(table.title, frame, report | _listed("rows_of_no_scan", strangers))


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
    true, found = labels.values.loc[names].to_numpy(), probabilities.to_numpy()
    columns = list(zip(CLASSES, true.T, found.T, strict=True))
    scans = np.arange(len(names))
    result = score(true, found, scans, scans, **settings) | reliability(true, found)
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
        result["against"] = _compare(probabilities, labels, against, missing, confidence)
    return result | settings


def _compare(
    probabilities: pd.DataFrame, labels: ScanTable, against: ScanTable, missing: float | None, confidence: float
) -> dict[str, Any]:
    others, matches = _match(against, labels, missing)
    common = probabilities.index.intersection(others.index, sort=False)
    if common.empty:
        raise DataError(f"{against.title} has no scan in common with the predictions; check its names")
    arrays = (frame.loc[common] for frame in (labels.values, probabilities, others))
    true, first, second = (frame.to_numpy().T for frame in arrays)
    tests = {
        name: compare(label, one, other, confidence)
        for name, label, one, other in zip(CLASSES, true, first, second, strict=True)
    }
    return {"n_studies": len(common), "delong_test": tests, "predictions": against.report | matches}


def _match(predictions: ScanTable, labels: ScanTable, missing: float | None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the predictions of labelled scans, in the order of the labels, and what did not match."""
    wanted, given = labels.values.index, predictions.values.index
    without = wanted.difference(given, sort=False)
    if len(without) == len(wanted):
        raise DataError(
            f"{predictions.title} has no prediction for any of the {len(wanted)} scans of {labels.title}; "
            f"scans are named CQ500-CT-12 or CQ500CT12, in a column called {', '.join(_NAMES)}"
        )
    report = _listed("scans_without_label", given.difference(wanted, sort=False).tolist())
    report |= _listed("scans_without_prediction", without.tolist())
    if missing is None:
        return predictions.values.loc[wanted.intersection(given, sort=False)], report
    report |= {"filled_with": missing} if len(without) else {}
    return predictions.values.reindex(wanted).fillna(missing), report


def _listed(what: str, names: list[str]) -> dict[str, Any]:
    return {f"n_{what}": len(names)} | ({what: names[:_LISTED]} if names else {})


def _columns(table: Table) -> dict[str, str]:
    """Return which column holds each class."""
    forms = [form for form in (FINDINGS, {name: name for name in CLASSES}) if set(form.values()) <= set(table.names)]
    if len(forms) != 1:
        both = f"{', '.join(FINDINGS.values())} and {', '.join(CLASSES)}"
        raise table.error(f"must have one whole set of columns of {both}, and has {len(forms)}")
    return forms[0]


def _scans(table: Table) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return names and numbers (NaN where it is none) of the scans: (rows,), by the first column that names any."""
    for name in _NAMES:
        texts = table.optional_text(name)
        if texts is not None and not np.isnan(numbers := scan_numbers(texts)).all():
            return texts.to_numpy(dtype=object), numbers
    raise table.error(f"names no scan of CQ500 (CQ500-CT-12, CQ500CT12) in any column called {', '.join(_NAMES)}")
