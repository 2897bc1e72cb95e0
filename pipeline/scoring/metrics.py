"""Metrics: RSNA's weighted log loss, AUC by slice and by study with confidence intervals, and calibration.

Labels and probabilities have shape (n, 6), one row a slice, columns in the order of ``ichpipe.common.classes.CLASSES``
(``any`` first). A row with an unknown (NaN) label is left out, and counted in ``n_excluded``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ichpipe.common.classes import CLASSES, METRIC_CLIP, METRIC_WEIGHTS
from ichpipe.common.errors import DataError
from ichpipe.scoring.bootstrap import Estimate, Ranking, estimate, group_sums, resample, resampled_mean
from ichpipe.scoring.pooling import pool

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

    from ichpipe.scoring.pooling import StudyScore

    Floats = NDArray[np.float64]

WEIGHTS: Final = np.array(METRIC_WEIGHTS) / sum(METRIC_WEIGHTS)  # 2/7 for any; divided by 7, not by 6 classes
BINS: Final = 15  # of calibration error; equal width, as in Guo et al., ICML 2017 (arXiv 1706.04599)


def cross_entropies(labels: Floats, probabilities: Floats) -> Floats:
    """Return binary cross-entropies in nats, in the shape of labels (0 or 1) and probabilities (clipped)."""
    clipped = np.clip(probabilities, METRIC_CLIP, 1.0 - METRIC_CLIP)
    losses: Floats = -np.where(labels == 1.0, np.log(clipped), np.log1p(-clipped))
    return losses


def weighted_log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Return RSNA 2019's score: the mean over slices of ``sum_c w_c BCE_c / 7``, in nats; all 0.5 gives ln 2.

    Labels (n, 6) are 0, 1 or NaN, probabilities (n, 6) 0 to 1. Raises DataError where shapes or values are wrong or
    no row has a label.
    """
    true, predicted, _ = _select_known(labels, probabilities)
    return float((cross_entropies(true, predicted) @ WEIGHTS).mean())


def class_log_loss(labels: ArrayLike, probabilities: ArrayLike) -> dict[str, float]:
    """Return the mean binary cross-entropy of each class, in nats; arguments and errors as of weighted_log_loss."""
    true, predicted, _ = _select_known(labels, probabilities)
    return dict(zip(CLASSES, cross_entropies(true, predicted).mean(axis=0).tolist(), strict=True))


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

    ``patients`` and ``series`` (n,) are identifiers. Intervals are percentiles of a bootstrap over patients, whose
    slices stay together (Efron & Tibshirani 1993, ch. 13). ``study_auc`` pools the slices of a series by
    ``study_score`` (see `pool`), from ``study_probabilities`` (n, 6) where given. It leaves out series with an unknown
    label; without ``series`` it is None. A class with no positive or no negative has the ``value`` None. An interval
    is None with fewer than two patients, or where the class is missing from more than half of the resamples.
    """
    true, predicted, known = _select_known(labels, probabilities)
    names, patient = np.unique(_select_column(patients, known, "patients"), return_inverse=True)
    losses = cross_entropies(true, predicted)
    weighted = losses @ WEIGHTS
    rankings = [Ranking(*columns, patient) for columns in zip(true.T, predicted.T, strict=True)]
    of_study = predicted if study_probabilities is None else _select_known(labels, study_probabilities)[1]
    if series is not None:
        group = _select_column(series, known, "series")
        complete = ~np.isin(group, np.asarray(series)[~known])
        _, first, row = np.unique(group[complete], return_index=True, return_inverse=True)
        highest, pooled = pool(true[complete], row, len(first)), pool(of_study[complete], row, len(first), study_score)
        owner = patient[complete][first]
        rankings += [Ranking(*columns, owner) for columns in zip(highest.T, pooled.T, strict=True)]
    statistics = [resampled_mean(weighted, patient, len(names)), *(ranking.resample for ranking in rankings)]
    means, *resampled = resample(statistics, len(names), bootstrap_samples, seed)
    loss = estimate(float(weighted.mean()), means, confidence)
    aucs = [
        estimate(ranking.value, values, confidence).to_json() | {"n_positive": ranking.n_positive}
        for ranking, values in zip(rankings, resampled, strict=True)
    ]
    study_aucs = aucs[len(CLASSES) :] or [Estimate(None).to_json() | {"n_positive": None} for _ in CLASSES]
    return {
        "weighted_log_loss": loss.value,
        "weighted_log_loss_ci": loss.interval,
        "log_loss": dict(zip(CLASSES, losses.mean(axis=0).tolist(), strict=True)),
        "auc": dict(zip(CLASSES, aucs[: len(CLASSES)], strict=True)),
        "study_auc": dict(zip(CLASSES, study_aucs, strict=True)),
        "n_slices": len(true),
        "n_excluded": int((~known).sum()),
    }


def describe_undefined_aucs(positives: Mapping[str, int]) -> str:
    """Say why classes have no AUC, of their numbers of positives by name; empty where there are none."""
    names = ", ".join(f"{name} ({'no negative' if number else 'no positive'})" for name, number in positives.items())
    return f"AUC is not defined of {names}: it needs both" if positives else ""


def paired_difference(
    labels: ArrayLike,
    probabilities_a: ArrayLike,
    probabilities_b: ArrayLike,
    patients: ArrayLike,
    *,
    bootstrap_samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Compare two models on the same slices; positive means that b is better.

    ``weighted_log_loss`` is a - b, ``auc_any`` is b - a; each with ``value``, ``ci_low``, ``ci_high`` from one
    bootstrap over patients, in which both models see the same resamples.
    """
    true, first, known = _select_known(labels, probabilities_a)
    second = _select_known(labels, probabilities_b)[1]
    names, patient = np.unique(_select_column(patients, known, "patients"), return_inverse=True)
    gains = (cross_entropies(true, first) - cross_entropies(true, second)) @ WEIGHTS
    before, after = (Ranking(true[:, 0], predicted[:, 0], patient) for predicted in (first, second))
    auc = None if before.value is None or after.value is None else after.value - before.value
    statistics = [resampled_mean(gains, patient, len(names)), before.resample, after.resample]
    means, lower, higher = resample(statistics, len(names), bootstrap_samples, seed)
    return {
        "weighted_log_loss": estimate(float(gains.mean()), means, confidence).to_json(),
        "auc_any": estimate(auc, higher - lower, confidence).to_json(),
    }


def reliability(labels: Floats, probabilities: Floats) -> dict[str, Any]:
    """Return Brier score, calibration error and average precision per class.

    Labels (n, 6) are 0 or 1, probabilities (n, 6) 0 to 1, columns in the order of CLASSES, n at least 1.
    """
    columns = list(zip(CLASSES, labels.T, probabilities.T, strict=True))
    return {
        "average_precision": {name: average_precision(*pair) for name, *pair in columns},
        "brier": {name: brier(*pair) for name, *pair in columns},
        "calibration_error": {name: calibration_error(*pair) for name, *pair in columns},
        "calibration_bins": BINS,
    }


def brier(labels: Floats, probabilities: Floats) -> float:
    """Return the mean of (probability - label) squared, 0 to 1 (Brier 1950); labels and probabilities (n,)."""
    return float(np.square(probabilities - labels).mean())


def calibration_error(labels: Floats, probabilities: Floats, bins: int = BINS) -> float:
    """Return the expected calibration error of one class, 0 to 1; labels and probabilities (n,).

    Bin b holds probabilities from b/bins to below (b+1)/bins, the last one 1 too. The error is the mean over slices of
    |mean probability - share of positives| of their bin (Naeini et al., AAAI 2015): ``sum_b |sum p - sum y| / n``.
    """
    bin_of = np.minimum((probabilities * bins).astype(np.intp), bins - 1)
    return float(np.abs(group_sums(probabilities - labels, bin_of, bins)).sum() / len(labels))


def average_precision(labels: Floats, probabilities: Floats) -> float | None:
    """Return the step-wise area under the precision-recall curve, 0 to 1; None without a positive or a negative."""
    from sklearn.metrics import average_precision_score  # noqa: PLC0415 - takes a second

    return float(average_precision_score(labels, probabilities)) if 0 < labels.sum() < len(labels) else None


def _select_known(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Floats, Floats, NDArray[np.bool_]]:
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
    if (wrong := ~np.isin(true, (0.0, 1.0))).any():
        row, column = np.argwhere(wrong)[0]
        raise DataError(f"label {true[row, column]} of class {CLASSES[column]} is neither 0 nor 1; check the labels")
    if (outside := ~((predicted >= 0.0) & (predicted <= 1.0))).any():  # NaN is outside too
        row, column = np.argwhere(outside)[0]
        raise DataError(
            f"{predicted[row, column]} is no probability of class {CLASSES[column]} ({outside.sum()} such values); "
            "give numbers from 0 to 1, not logits"
        )
    return true, predicted, known


def _select_column(values: ArrayLike, known: NDArray[np.bool_], name: str) -> NDArray[Any]:
    column = np.asarray(values)
    if column.shape != known.shape:
        raise DataError(f"{name} {column.shape} must name one value per slice, of which there are {len(known)}")
    return column[known]


def curves(
    labels: ArrayLike, probabilities: ArrayLike, *, max_points: int = 200, bins: int = 10
) -> dict[str, list[dict[str, Any]]]:
    """Return the points of three curves per class as rows for a plot, at most ``max_points`` a curve.

    Rows of ``roc``: ``class, fpr, tpr, threshold``; of ``precision_recall``: ``class, recall, precision, threshold``. A
    threshold of None calls nothing positive. Both lack classes with no positive or no negative. Rows of
    ``calibration``: ``class, predicted, observed, n``: mean probability and share of positives of each filled bin.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve  # noqa: PLC0415 - takes a second; only plots need it

    true, predicted, _ = _select_known(labels, probabilities)
    result: dict[str, list[dict[str, Any]]] = {"roc": [], "precision_recall": [], "calibration": []}
    for name, label, value in zip(CLASSES, true.T, predicted.T, strict=True):
        if 0 < label.sum() < len(label):
            fpr, tpr, thresholds = roc_curve(label, value)
            points = _thin(fpr, tpr, thresholds, max_points)
            result["roc"] += [{"class": name, "fpr": x, "tpr": y, "threshold": limit} for x, y, limit in points]
            precision, recall, thresholds = precision_recall_curve(label, value)
            points = _thin(recall, precision, np.append(thresholds, np.inf), max_points)
            result["precision_recall"] += [
                {"class": name, "recall": x, "precision": y, "threshold": limit} for x, y, limit in points
            ]
        bin_of = np.minimum((value * bins).astype(np.intp), bins - 1)
        sums = np.stack([group_sums(values, bin_of, bins) for values in (value, label, np.ones_like(value))])
        result["calibration"] += [
            {"class": name, "predicted": p / size, "observed": positives / size, "n": int(size)}
            for p, positives, size in sums.T.tolist()
            if size
        ]
    return result


def _thin(x: Floats, y: Floats, thresholds: Floats, max_points: int) -> list[tuple[float, float, float | None]]:
    """Choose at most ``max_points`` points, evenly along the curve's length; the ends are always kept."""
    chosen = np.arange(len(x))
    if len(x) > max_points:
        length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
        chosen = np.searchsorted(length, np.linspace(0.0, length[-1], max_points)).clip(max=len(x) - 1)
        chosen[0], chosen[-1] = 0, len(x) - 1
        chosen = np.unique(chosen)
    limits = [limit if np.isfinite(limit) else None for limit in thresholds[chosen].tolist()]
    return list(zip(x[chosen].tolist(), y[chosen].tolist(), limits, strict=True))
