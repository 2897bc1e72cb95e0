"""DeLong's variance of the AUC, and DeLong's test for two models scored on the same cases.

DeLong, DeLong & Clarke-Pearson, Biometrics 1988, 44, 837-845, with the ranks of Sun & Xu, IEEE Signal Processing
Letters 2014, 21, 1389-1393. Cases must be independent: scans of different patients, not slices of one scan. For slices
use the bootstrap over patients in ``ichpipe.scoring.metrics``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import norm, rankdata

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Areas:
    """AUCs of k models on the same cases."""

    values: Floats  # (k,), 0 to 1
    covariance: Floats  # (k, k)


def areas(labels: ArrayLike, scores: ArrayLike) -> Areas | None:
    """Return AUCs and their covariance; labels (n,) are 0 or 1, scores (n, k) any numbers, higher for positive.

    None with fewer than two positives or two negatives: the covariance is not defined there.
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
    return Areas(above.mean(axis=0), covariance)


def interval(labels: ArrayLike, scores: ArrayLike, confidence: float = 0.95) -> dict[str, float] | None:
    """Return ``standard_error``, ``ci_low``, ``ci_high`` of one AUC of scores (n,); None where `areas` is."""
    auc = areas(labels, np.asarray(scores)[:, None])
    if auc is None:
        return None
    value, error = float(auc.values[0]), float(np.sqrt(auc.covariance[0, 0]))
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
    first, second = aucs.values.tolist()
    variance = aucs.covariance[0, 0] + aucs.covariance[1, 1] - 2.0 * aucs.covariance[0, 1]
    difference, error = first - second, float(np.sqrt(max(variance, 0.0)))
    width = float(norm.ppf(0.5 + confidence / 2.0)) * error
    z = difference / error if error > 1e-12 else None
    p_value = float(2.0 * norm.sf(abs(z))) if z is not None else (1.0 if first == second else None)
    values = {"auc": first, "auc_against": second, "difference": difference}
    return values | {"ci_low": difference - width, "ci_high": difference + width, "z": z, "p_value": p_value}
