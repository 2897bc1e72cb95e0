"""What the models are judged by: RSNA's weighted log loss, AUC by slice and by study, intervals over patients.

Labels and probabilities have shape (n, 6), one row a slice, columns in the order of ``ichpipe.common.classes.CLASSES``
(``any`` first). A row with an unknown (NaN) label is left out, and counted in ``n_excluded``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ichpipe.common.classes import CLASSES, METRIC_WEIGHTS
from ichpipe.common.errors import DataError
from ichpipe.scoring.bootstrap import Ranking, group_sums, percentile_interval, resample, resampled_mean
from ichpipe.scoring.pooling import pool

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ichpipe.scoring.pooling import StudyScore

    Floats = NDArray[np.float64]
    Summary = dict[str, float | int | None]

CLIP: Final = 1e-15
"""RSNA 2019 clips probabilities to [1e-15, 1 - 1e-15]."""

WEIGHTS: Final = np.array(METRIC_WEIGHTS) / sum(METRIC_WEIGHTS)
"""2/7 for ``any``, 1/7 for each subtype: the divisor is the sum of the weights, 7, not the number of classes, 6."""


def weighted_log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return RSNA 2019's score: the mean over slices of ``sum_c w_c BCE_c / 7``, in nats, 0 or more.

    Labels (n, 6) are 0, 1 or NaN, probabilities (n, 6) 0 to 1; all 0.5 gives ln 2. Raises DataError where
    shapes or values are wrong or no row has a label.
    """
    true, predicted, _ = _known(labels, probabilities)
    return float((_losses(true, predicted) @ WEIGHTS).mean())


def class_log_loss(labels: ArrayLike, probabilities: ArrayLike) -> dict[str, float]:
    """Return the mean binary cross-entropy of each class, in nats; arguments and errors as of weighted_log_loss."""
    true, predicted, _ = _known(labels, probabilities)
    return dict(zip(CLASSES, _losses(true, predicted).mean(axis=0).tolist(), strict=True))


def score(
    labels: ArrayLike,
    probabilities: ArrayLike,
    patients: ArrayLike,
    series: ArrayLike | None,
    *,
    bootstrap_samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    study_probabilities: ArrayLike | None = None,
    study_score: StudyScore = "max",
) -> dict[str, Any]:
    """Score one model: weighted log loss, log loss per class, AUC per class by slice and by series.

    ``patients`` and ``series`` (n,) are identifiers. Intervals come from a percentile bootstrap over patients,
    whose slices stay together (Efron & Tibshirani 1993, ch. 13). ``study_auc`` pools the slices
    of a series by ``study_score`` (see `pooling`), from ``study_probabilities`` (n, 6) where those are given; a
    series with an unknown label takes no part in it, and without ``series`` all of it is None.
    Where a class has no positive or no negative, ``value`` is None. Intervals are None where they mean nothing:
    with fewer than two patients, or where the class is missing from more than half of the resamples.
    """
    true, predicted, known = _known(labels, probabilities)
    names, patient = np.unique(_column(patients, known, "patients"), return_inverse=True)
    losses = _losses(true, predicted)
    weighted = losses @ WEIGHTS
    rankings = _rankings(true, predicted, patient)
    of_study = predicted if study_probabilities is None else _known(labels, study_probabilities)[1]
    by_series = [] if series is None else _rankings(*_by_series(true, of_study, series, patient, known, study_score))
    mean = resampled_mean(weighted, patient, len(names))
    statistics = [mean, *(ranking.resample for ranking in rankings + by_series)]
    means, *aucs = resample(statistics, len(names), bootstrap_samples, seed)
    return {
        "weighted_log_loss": float(weighted.mean()),
        "weighted_log_loss_ci": percentile_interval(means, confidence),
        "log_loss": dict(zip(CLASSES, losses.mean(axis=0).tolist(), strict=True)),
        "auc": _aucs(rankings, aucs[: len(CLASSES)], confidence),
        "study_auc": _aucs(by_series, aucs[len(CLASSES) :], confidence),
        "n_slices": len(true),
        "n_excluded": int((~known).sum()),
    }


def paired_difference(
    labels: ArrayLike,
    probabilities_a: ArrayLike,
    probabilities_b: ArrayLike,
    patients: ArrayLike,
    *,
    bootstrap_samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Summary]:
    """Compare two models on the same slices; positive means that b is better.

    ``weighted_log_loss`` is a - b, ``auc_any`` is b - a; each with ``value``, ``ci_low``, ``ci_high`` from one
    bootstrap over patients, in which both models see the same resamples.
    """
    true, first, known = _known(labels, probabilities_a)
    second = _known(labels, probabilities_b)[1]
    names, patient = np.unique(_column(patients, known, "patients"), return_inverse=True)
    gains = (_losses(true, first) - _losses(true, second)) @ WEIGHTS
    before, after = (Ranking(true[:, 0], predicted[:, 0], patient) for predicted in (first, second))
    auc = None if before.value is None or after.value is None else after.value - before.value
    statistics = [resampled_mean(gains, patient, len(names)), before.resample, after.resample]
    means, lower, higher = resample(statistics, len(names), bootstrap_samples, seed)
    return {
        "weighted_log_loss": _summary(float(gains.mean()), means, confidence),
        "auc_any": _summary(auc, higher - lower, confidence),
    }


def _known(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Return labels and probabilities of the rows whose labels are all known, and which rows (n,) those are."""
    true, predicted = np.asarray(labels, dtype=np.float64), np.asarray(probabilities, dtype=np.float64)
    if true.ndim != 2 or true.shape[1] != len(CLASSES) or true.shape != predicted.shape:
        raise DataError(
            f"labels {true.shape} and probabilities {predicted.shape} must both be (slices, {len(CLASSES)}), "
            f"columns {', '.join(CLASSES)}"
        )
    known: NDArray[np.bool_] = np.asarray(~np.isnan(true).any(axis=1))
    if not known.any():
        raise DataError(f"none of {len(true)} rows has all six labels; check the label table (prepare.labels)")
    true, predicted = true[known], predicted[known]
    _check_values(true, predicted)
    return true, predicted, known


def _check_values(true: Floats, predicted: Floats) -> None:
    wrong = ~np.isin(true, (0.0, 1.0))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise DataError(f"label {true[row, column]} of class {CLASSES[column]} is neither 0 nor 1; check the labels")
    outside = ~((predicted >= 0.0) & (predicted <= 1.0))  # NaN is outside too
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise DataError(
            f"{predicted[row, column]} is no probability of class {CLASSES[column]} ({outside.sum()} such values); "
            "give numbers from 0 to 1, not logits"
        )


def _column(values: ArrayLike, known: NDArray[np.bool_], name: str) -> NDArray[Any]:
    column = np.asarray(values)
    if column.shape != known.shape:
        raise DataError(f"{name} {column.shape} must name one value per slice, of which there are {len(known)}")
    return column[known]


def _losses(true: Floats, predicted: Floats) -> Floats:
    """Return binary cross-entropies (n, 6) in nats."""
    clipped = np.clip(predicted, CLIP, 1.0 - CLIP)
    losses: Floats = -np.where(true == 1.0, np.log(clipped), np.log1p(-clipped))
    return losses


def _by_series(
    true: Floats,
    predicted: Floats,
    series: ArrayLike,
    patient: NDArray[np.intp],
    known: NDArray[np.bool_],
    how: StudyScore,
) -> tuple[Floats, Floats, NDArray[np.intp]]:
    """Return labels and probabilities (series, 6) of the series whose slices all have labels, and patients (series,).

    A label is the maximum over the slices, a probability is pooled as ``how`` says.
    """
    group = _column(series, known, "series")
    complete = ~np.isin(group, np.asarray(series)[~known])
    _, first, row = np.unique(group[complete], return_index=True, return_inverse=True)
    labels, pooled = pool(true[complete], row, len(first)), pool(predicted[complete], row, len(first), how)
    return labels, pooled, patient[complete][first]


def _rankings(true: Floats, predicted: Floats, patient: NDArray[np.intp]) -> list[Ranking]:
    return [Ranking(true[:, column], predicted[:, column], patient) for column in range(len(CLASSES))]


def _aucs(rankings: list[Ranking], resampled: list[Floats], confidence: float) -> dict[str, Summary]:
    """Return value, interval and number of positives for each class; all None where there is no ranking."""
    if not rankings:
        return {name: {"value": None, "ci_low": None, "ci_high": None, "n_positive": None} for name in CLASSES}
    return {
        name: {**_summary(ranking.value, values, confidence), "n_positive": ranking.n_positive}
        for name, ranking, values in zip(CLASSES, rankings, resampled, strict=True)
    }


def _summary(value: float | None, resampled: Floats, confidence: float) -> Summary:
    low, high = (percentile_interval(resampled, confidence) or (None, None)) if value is not None else (None, None)
    return {"value": value, "ci_low": low, "ci_high": high}


def curves(
    labels: ArrayLike, probabilities: ArrayLike, *, max_points: int = 200, bins: int = 10
) -> dict[str, list[dict[str, Any]]]:
    """Return the points of three curves per class as rows for a plot, at most ``max_points`` a curve.

    ``roc`` rows hold ``class, fpr, tpr, threshold``; ``precision_recall`` rows ``class, recall, precision,
    threshold``; a threshold of None calls nothing positive. ``calibration`` rows hold ``class, predicted,
    observed, n``: mean probability and share of positives in equal bins of probability, empty ones left out.
    A class with no positive or no negative has no ROC and no precision-recall curve.
    """
    true, predicted, _ = _known(labels, probabilities)
    result: dict[str, list[dict[str, Any]]] = {"roc": [], "precision_recall": [], "calibration": []}
    for name, label, value in zip(CLASSES, true.T, predicted.T, strict=True):
        if 0 < label.sum() < len(label):
            result["roc"] += _roc(name, label, value, max_points)
            result["precision_recall"] += _precision_recall(name, label, value, max_points)
        result["calibration"] += _calibration(name, label, value, bins)
    return result


def _roc(name: str, label: Floats, value: Floats, max_points: int) -> list[dict[str, Any]]:
    from sklearn.metrics import roc_curve  # noqa: PLC0415 - takes a second, and only plots need it

    fpr, tpr, threshold = roc_curve(label, value)
    keep = _thin(fpr, tpr, max_points)
    found = zip(fpr[keep].tolist(), tpr[keep].tolist(), threshold[keep].tolist(), strict=True)
    return [{"class": name, "fpr": x, "tpr": y, "threshold": t if np.isfinite(t) else None} for x, y, t in found]


def _precision_recall(name: str, label: Floats, value: Floats, max_points: int) -> list[dict[str, Any]]:
    from sklearn.metrics import precision_recall_curve  # noqa: PLC0415 - see _roc

    precision, recall, threshold = precision_recall_curve(label, value)
    keep = _thin(recall, precision, max_points)
    thresholds = [*threshold.tolist(), None]
    found = zip(recall[keep].tolist(), precision[keep].tolist(), keep.tolist(), strict=True)
    return [{"class": name, "recall": x, "precision": y, "threshold": thresholds[row]} for x, y, row in found]


def _calibration(name: str, label: Floats, value: Floats, bins: int) -> list[dict[str, Any]]:
    place = np.minimum((value * bins).astype(np.intp), bins - 1)
    size = group_sums(np.ones_like(value), place, bins)
    means = [group_sums(values, place, bins)[size > 0] / size[size > 0] for values in (value, label)]
    found = zip(means[0].tolist(), means[1].tolist(), size[size > 0].tolist(), strict=True)
    return [{"class": name, "predicted": p, "observed": o, "n": int(n)} for p, o, n in found]


def _thin(x: Floats, y: Floats, max_points: int) -> NDArray[np.intp]:
    """Choose at most ``max_points`` points, evenly along the curve's length; the ends are always kept."""
    if len(x) <= max_points:
        return np.arange(len(x))
    length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    wanted = np.linspace(0.0, length[-1], max_points)
    chosen = np.searchsorted(length, wanted).clip(max=len(x) - 1)
    chosen[0], chosen[-1] = 0, len(x) - 1
    return np.unique(chosen)
