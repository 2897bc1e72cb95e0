"""Scores of any studies by table: ``studies.csv`` of ``predict`` against labels of studies, series or patients.

A hospital seldom labels all six classes: each class is scored on the studies whose label of it is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.common.user_tables import read_table
from ichpipe.scoring.bootstrap import Ranking, percentile_interval, resample
from ichpipe.scoring.calibration_metrics import brier, calibration_error
from ichpipe.scoring.delong import interval
from ichpipe.scoring.metrics import cross_entropies, weighted_log_loss
from ichpipe.scoring.operating_points import operating_points

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ichpipe.index.label_tables import LabelTable

    Floats = NDArray[np.float64]

_KEYS: Final = ("series_uid", "study_uid", "patient_id")


def read_studies(path: Path, key: str, pool: str | None = None) -> pd.DataFrame:
    """Read probabilities by ``key`` (series_uid, study_uid, patient_id): the columns of CLASSES, and patient_id.

    Several rows of one key, such as two series of a study, are an error unless ``pool`` (max, mean) says what to take.
    Raises DataError that names file and line: no such column, a value that is no probability.
    """
    table = read_table(path, "prediction")
    absent = [name for name in (key, *CLASSES) if name not in table.names]
    if absent:
        raise table.error(f"lacks {', '.join(absent)}; studies.csv of predict has them (the labels are by {key})")
    frame = pd.DataFrame({name: table.numbers(name) for name in CLASSES})
    for name in CLASSES:
        wrong = ~frame[name].between(0.0, 1.0).to_numpy()  # NaN is outside too
        table.refuse(wrong, f"column {name} is no probability; give numbers from 0 to 1", frame[name])
    names = pd.Series(table.text(key).to_pandas())
    if pool is None:
        remedy = f"names one {key} a second time; give one row each, or say --pool max"
        table.refuse(names.duplicated().to_numpy(), remedy, names)
    patients = table.optional_text("patient_id")
    groups = frame.assign(patient_id=names if patients is None else patients).groupby(names.rename(key))
    values = groups[list(CLASSES)].mean() if pool == "mean" else groups[list(CLASSES)].max()
    return pd.DataFrame(values.join(groups["patient_id"].first()))


def score_studies(
    predictions: Path,
    labels: LabelTable,
    *,
    pool: str | None = None,
    missing: float | None = None,
    operating_point: float = 0.9,
    **settings: Any,
) -> dict[str, Any]:
    """Return M of the contract by study, with DeLong's intervals, operating points and what did not match.

    ``settings`` are ``bootstrap_samples``, ``confidence`` and ``seed``; patients are resampled. Each class is scored on
    the studies whose label is known, the weighted log loss on those whose six labels are. A labelled study without
    prediction is left out, counted and named, or gets ``missing``.
    """
    if labels.key not in _KEYS:
        raise DataError(f"the labels are by {labels.key}, not by study; use --format rsna or cq500")
    found = read_studies(predictions, labels.key, pool)
    wanted = labels.values.index
    common = wanted if missing is not None else wanted.intersection(found.index, sort=False)
    if not wanted.isin(found.index).any():
        raise DataError(
            f"prediction table {predictions} has no prediction for any {labels.key} of the labels: one names "
            f"{found.index[0]}, the other {wanted[0]}; check that they belong together"
        )
    rows = found.reindex(common)
    probabilities = np.array(rows[list(CLASSES)], dtype=np.float64)
    if missing is not None:
        probabilities[np.isnan(probabilities)] = missing
    patients = rows["patient_id"].where(rows["patient_id"].notna(), pd.Series(common, index=common))
    true = labels.values.loc[common, list(CLASSES)].to_numpy(np.float64)
    result = _figures(true, probabilities, pd.factorize(patients, sort=True)[0], operating_point, settings)
    return result | {
        "n_studies": len(common),
        "n_patients": int(patients.nunique()),
        "by": labels.key,
        "resampled_by": "patient_id",
        "predictions": {"file": str(predictions), "n_rows": len(found), "pool": pool, "filled_with": missing}
        | _listed("studies_without_label", found.index.difference(wanted, sort=False))
        | _listed("studies_without_prediction", wanted.difference(found.index, sort=False)),
        "labels": labels.report,
        **settings,
    }


def _figures(
    true: Floats, probabilities: Floats, patient: NDArray[np.intp], operating_point: float, settings: dict[str, Any]
) -> dict[str, Any]:
    confidence = settings["confidence"]
    whole = ~np.isnan(true).any(axis=1)
    result: dict[str, Any] = {
        "weighted_log_loss": weighted_log_loss(true[whole], probabilities[whole]) if whole.any() else None,
        "n_studies_with_all_labels": int(whole.sum()),
    }
    parts = {}
    for column, name in enumerate(CLASSES):
        known = ~np.isnan(true[:, column])
        parts[name] = (true[known, column], probabilities[known, column], patient[known])
    result["log_loss"] = {name: _log_loss(label, value) for name, (label, value, _) in parts.items()}
    result["auc"] = _aucs(parts, int(patient.max()) + 1, settings)
    result["study_auc"] = result["auc"]
    result["brier"] = {name: brier(label, value) if len(label) else None for name, (label, value, _) in parts.items()}
    result["calibration_error"] = {
        name: calibration_error(label, value) if len(label) else None for name, (label, value, _) in parts.items()
    }
    result["delong"] = {name: interval(label, value, confidence) for name, (label, value, _) in parts.items()}
    result["operating_points"] = {
        name: operating_points(label, value, wanted=operating_point, confidence=confidence)
        for name, (label, value, _) in parts.items()
    }
    return result


def _aucs(parts: dict[str, Any], n_patients: int, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rankings = {name: Ranking(*part) for name, part in parts.items()}
    statistics = [ranking.resample for ranking in rankings.values()]
    resampled = resample(statistics, n_patients, settings["bootstrap_samples"], settings["seed"])
    result = {}
    for (name, ranking), values in zip(rankings.items(), resampled, strict=True):
        bounds = None if ranking.value is None else percentile_interval(values, settings["confidence"])
        low, high = bounds or (None, None)
        counts = {"n_positive": ranking.n_positive, "n_negative": ranking.n_negative}
        result[name] = {"value": ranking.value, "ci_low": low, "ci_high": high} | counts
    return result


def _log_loss(label: Floats, value: Floats) -> float | None:
    if not len(label):
        return None
    return float(cross_entropies(label, value).mean())


def _listed(what: str, names: pd.Index) -> dict[str, Any]:
    return {f"n_{what}": len(names)} | ({what: [str(name) for name in names[:20]]} if len(names) else {})
