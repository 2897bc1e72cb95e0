"""Scores studies by table: ``studies.csv`` of ``predict`` against labels of studies, series or patients.

Hospitals seldom label all six classes: each class is scored on the studies whose label of it is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.common.user_tables import read_table
from ichpipe.index.label_tables import explain_spelling
from ichpipe.scoring.bootstrap import Ranking, estimate, resample
from ichpipe.scoring.metrics import brier, calibration_error, cross_entropies, weighted_log_loss
from ichpipe.scoring.roc import interval, operating_points
from ichpipe.scoring.score_slices import count_names, read_probabilities

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from ichpipe.index.label_tables import LabelTable

    Floats = NDArray[np.float64]

_KEYS: Final = ("series_uid", "study_uid", "patient_id")


def read_studies(path: Path, key: str, pool: str | None = None) -> pd.DataFrame:
    """Read probabilities by ``key`` (series_uid, study_uid, patient_id): the columns of CLASSES, and patient_id.

    Without a PatientID the latter is NaN.
    Several rows of one key, such as two series of a study, are an error unless ``pool`` (max, mean) is given.
    Raises DataError that names file and line: no such column, a value that is no probability.
    """
    table = read_table(path, "prediction", _KEYS, CLASSES)
    absent = [name for name in (key, *CLASSES) if name not in table.names]
    if absent:
        raise table.error(f"lacks {', '.join(absent)}; studies.csv of predict has them (the labels are by {key})")
    frame = pd.DataFrame({name: read_probabilities(table, name) for name in CLASSES})
    names = pd.Series(table.text(key).to_pandas())
    if pool is None:
        remedy = f"names one {key} a second time; give one row each, or say --pool max"
        table.refuse(names.duplicated().to_numpy(), remedy, names)
    patients = table.sparse_text("patient_id")
    groups = frame.assign(patient_id=np.nan if patients is None else patients).groupby(names.rename(key))
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
    prediction is left out, counted and named, or gets ``missing``. Studies of one patient are not independent: a class
    with such studies has None instead of DeLong's and exact intervals, and ``no_exact_intervals`` says why.
    """
    if labels.key not in _KEYS:
        raise DataError(f"the labels are by {labels.key}, not by study; use --format rsna or cq500")
    table = read_studies(predictions, labels.key, pool)
    labelled = labels.values.index
    if not labelled.isin(table.index).any():
        raise DataError(
            f"prediction table {predictions} has no prediction for any {labels.key} of the labels: one names "
            f"{table.index[0]}, the other {labelled[0]}; "
            + (explain_spelling(table.index, labelled) or "check that they belong together")
        )
    cause = explain_spelling(table.index.difference(labelled, sort=False), labelled)
    studies = labelled if missing is not None else labelled.intersection(table.index, sort=False)
    rows = table.reindex(studies)
    probabilities = np.array(rows[list(CLASSES)], dtype=np.float64)
    if missing is not None:
        probabilities[np.isnan(probabilities)] = missing
    named = rows["patient_id"].notna()
    patients = rows["patient_id"].where(named, pd.Series(studies, index=studies))
    true = labels.values.loc[studies, list(CLASSES)].to_numpy(np.float64)
    return {
        **_score(true, probabilities, pd.factorize(patients, sort=True)[0], operating_point, settings),
        "n_studies": len(studies),
        "n_patients": int(patients.nunique()),
        "by": labels.key,
        "resampled_by": "patient_id" if named.any() else labels.key,
        "predictions": {"file": str(predictions), "n_rows": len(table), "pool": pool, "filled_with": missing}
        | count_names("studies_without_label", table.index.difference(labelled, sort=False))
        | count_names("studies_without_prediction", labelled.difference(table.index, sort=False))
        | ({"likely_cause": cause} if cause else {}),
        "labels": labels.report,
        **settings,
    }


def _score(
    true: Floats, probabilities: Floats, patient: NDArray[np.intp], operating_point: float, settings: dict[str, Any]
) -> dict[str, Any]:
    confidence = settings["confidence"]
    whole = ~np.isnan(true).any(axis=1)
    known = ~np.isnan(true).T  # (6, n)
    parts = {
        name: (true[rows, column], probabilities[rows, column])
        for column, (name, rows) in enumerate(zip(CLASSES, known, strict=True))
    }
    rankings = [Ranking(*part, patient[rows]) for part, rows in zip(parts.values(), known, strict=True)]
    shared = {
        name: int((np.bincount(patient[rows]) > 1).sum()) for name, rows in zip(CLASSES, known, strict=True)
    }  # patients with several studies
    statistics = [ranking.resample for ranking in rankings]
    resampled = resample(statistics, int(patient.max()) + 1, settings["bootstrap_samples"], settings["seed"])
    aucs = {
        name: estimate(ranking.value, values, confidence).to_json()
        | {"n_positive": ranking.n_positive, "n_negative": ranking.n_negative}
        for name, ranking, values in zip(CLASSES, rankings, resampled, strict=True)
    }

    def by_class(metric: Callable[[Floats, Floats], float]) -> dict[str, float | None]:
        return {name: metric(*part) if len(part[0]) else None for name, part in parts.items()}

    return {
        "weighted_log_loss": weighted_log_loss(true[whole], probabilities[whole]) if whole.any() else None,
        "n_studies_with_all_labels": int(whole.sum()),
        "log_loss": by_class(lambda label, value: float(cross_entropies(label, value).mean())),
        "auc": aucs,
        "study_auc": aucs,
        "brier": by_class(brier),
        "calibration_error": by_class(calibration_error),
        "delong": {name: None if shared[name] else interval(*part, confidence) for name, part in parts.items()},
        "operating_points": {
            name: operating_points(*part, wanted=operating_point, confidence=confidence, independent=not shared[name])
            for name, part in parts.items()
        },
        "no_exact_intervals": {
            name: f"patients with several studies, which are not independent: {count}; see ci_low and ci_high of auc"
            for name, count in shared.items()
            if count
        },
    }
