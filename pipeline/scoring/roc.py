"""ROC statistics of independent cases: DeLong's variance and test of the AUC, operating points with exact intervals.

DeLong, DeLong & Clarke-Pearson, Biometrics 1988, 44, 837-845, with the ranks of Sun & Xu, IEEE Signal Processing
Letters 2014, 21, 1389-1393. Cases are scans of different patients, not slices of one scan. For slices use the bootstrap
over patients in ``ichpipe.scoring.metrics``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import beta, norm, rankdata

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]


def areas(labels: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats] | None:
    """Return the AUCs (k,) of k models and their covariance (k, k).

    Labels (n,) are 0 or 1, scores (n, k) any numbers, higher for positive. None with fewer than two positives or two
    negatives: the covariance is not defined there.
    """
    positive, columns = np.asarray(labels) == 1, np.asarray(scores, dtype=np.float64)
    positives, negatives = columns[positive], columns[~positive]
    m, n = len(positives), len(negatives)
    if m < 2 or n < 2:
        return None
    together = rankdata(np.concatenate([positives, negatives]), axis=0)  # midranks: a tie counts one half
    # Share of negatives below each positive (m, k), and share of positives above each negative (n, k).
    above = (together[:m] - rankdata(positives, axis=0)) / n
    below = 1.0 - (together[m:] - rankdata(negatives, axis=0)) / m
    covariance = np.atleast_2d(np.cov(above, rowvar=False)) / m + np.atleast_2d(np.cov(below, rowvar=False)) / n
    return above.mean(axis=0), covariance


def interval(labels: ArrayLike, scores: ArrayLike, confidence: float = 0.95) -> dict[str, float] | None:
    """Return ``standard_error``, ``ci_low``, ``ci_high`` of one AUC of scores (n,); None where `areas` is."""
    auc = areas(labels, np.asarray(scores)[:, None])
    if auc is None:
        return None
    value, error = float(auc[0][0]), float(np.sqrt(auc[1][0, 0]))
    width = float(norm.ppf(0.5 + confidence / 2.0)) * error
    return {"standard_error": error, "ci_low": max(value - width, 0.0), "ci_high": min(value + width, 1.0)}


def compare(labels: ArrayLike, scores: ArrayLike, others: ArrayLike, confidence: float = 0.95) -> dict[str, Any]:
    """Test whether two models' AUCs differ on the same cases; positive ``difference`` means ``scores`` is better.

    Returns ``auc``, ``auc_against``, ``difference``, ``ci_low``, ``ci_high``, ``z`` and the two-sided ``p_value``; all
    None where `areas` is. A difference without variance has no z; its p-value is 1 if it is 0, else None.
    """
    aucs = areas(labels, np.column_stack([scores, others]))
    if aucs is None:
        return dict.fromkeys(("auc", "auc_against", "difference", "ci_low", "ci_high", "z", "p_value"))
    (first, second), covariance = aucs[0].tolist(), aucs[1]
    variance = covariance[0, 0] + covariance[1, 1] - 2.0 * covariance[0, 1]
    difference, error = first - second, float(np.sqrt(max(variance, 0.0)))
    width = float(norm.ppf(0.5 + confidence / 2.0)) * error
    z = difference / error if error > 1e-12 else None
    p_value = float(2.0 * norm.sf(abs(z))) if z is not None else (1.0 if first == second else None)
    values = {"auc": first, "auc_against": second, "difference": difference}
    return values | {"ci_low": difference - width, "ci_high": difference + width, "z": z, "p_value": p_value}


def operating_points(
    labels: ArrayLike, scores: ArrayLike, *, wanted: float = 0.9, confidence: float = 0.95, independent: bool = True
) -> dict[str, dict[str, Any] | None]:
    """Return ``high_sensitivity`` and ``high_specificity``; each None with no positive or no negative.

    A case is called positive where its score is at least the threshold, which is one of the scores. The first point has
    the highest threshold at which sensitivity is at least ``wanted`` (above 0, to 1), the second the lowest at which
    specificity is; a threshold of None calls nothing positive. Labels (n,) are 0 or 1, scores (n,) any numbers.
    Cases that are not ``independent``, such as several studies of a patient, get no exact interval (None).
    Both points describe the curve of these cases. They don't estimate what a threshold chosen beforehand would give.
    """
    positive, values = np.asarray(labels) == 1, np.asarray(scores, dtype=np.float64)
    m, n = int(positive.sum()), int((~positive).sum())
    if not m or not n:
        return {"high_sensitivity": None, "high_specificity": None}
    thresholds = np.append(np.unique(values), np.inf)
    true_positives = m - np.searchsorted(np.sort(values[positive]), thresholds)
    true_negatives = np.searchsorted(np.sort(values[~positive]), thresholds)
    rows = {  # 1e-6 of a case: 0.9 of 130 is 117, whatever the binary digits say
        "high_sensitivity": np.flatnonzero(true_positives >= wanted * m - 1e-6)[-1],
        "high_specificity": np.flatnonzero(true_negatives >= wanted * n - 1e-6)[0],
    }

    def interval_of(successes: int, trials: int) -> list[float] | None:
        return proportion_interval(successes, trials, confidence) if independent else None

    return {
        name: {
            "wanted": wanted,
            "threshold": float(thresholds[row]) if np.isfinite(thresholds[row]) else None,
            "sensitivity": int(true_positives[row]) / m,
            "sensitivity_ci": interval_of(int(true_positives[row]), m),
            "specificity": int(true_negatives[row]) / n,
            "specificity_ci": interval_of(int(true_negatives[row]), n),
        }
        for name, row in rows.items()
    }


def proportion_interval(successes: int, trials: int, confidence: float = 0.95) -> list[float]:
    """Return the exact binomial interval of Clopper & Pearson (Biometrika 1934) of successes / trials."""
    tail = (1.0 - confidence) / 2.0
    low = beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
    high = beta.ppf(1.0 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    return [float(low), float(high)]
