"""Sensitivity and specificity at two points of the ROC curve, with exact intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy.stats import beta

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_ROUNDING: Final = 1e-6  # of a case: 0.9 of 130 is 117, whatever the binary digits say


def operating_points(
    labels: ArrayLike, scores: ArrayLike, *, wanted: float = 0.9, confidence: float = 0.95
) -> dict[str, dict[str, Any] | None]:
    """Return ``high_sensitivity`` and ``high_specificity``; each None with no positive or no negative.

    A case is called positive where its score is at least the threshold, which is one of the scores. The first point has
    the highest threshold at which sensitivity is at least ``wanted`` (above 0, to 1), the second the lowest at which
    specificity is; a threshold of None calls nothing positive. Labels (n,) are 0 or 1, scores (n,) any numbers.
    Both points describe the curve of these cases. They don't estimate what a threshold chosen beforehand would give.
    """
    positive, values = np.asarray(labels) == 1, np.asarray(scores, dtype=np.float64)
    m, n = int(positive.sum()), int((~positive).sum())
    if not m or not n:
        return {"high_sensitivity": None, "high_specificity": None}
    thresholds = np.append(np.unique(values), np.inf)
    true_positives = m - np.searchsorted(np.sort(values[positive]), thresholds)
    true_negatives = np.searchsorted(np.sort(values[~positive]), thresholds)
    rows = {
        "high_sensitivity": np.flatnonzero(true_positives >= wanted * m - _ROUNDING)[-1],
        "high_specificity": np.flatnonzero(true_negatives >= wanted * n - _ROUNDING)[0],
    }
    return {
        name: {
            "wanted": wanted,
            "threshold": float(thresholds[row]) if np.isfinite(thresholds[row]) else None,
            "sensitivity": int(true_positives[row]) / m,
            "sensitivity_ci": proportion_interval(int(true_positives[row]), m, confidence),
            "specificity": int(true_negatives[row]) / n,
            "specificity_ci": proportion_interval(int(true_negatives[row]), n, confidence),
        }
        for name, row in rows.items()
    }


def proportion_interval(successes: int, trials: int, confidence: float = 0.95) -> list[float]:
    """Return the exact binomial interval of Clopper & Pearson (Biometrika 1934) of successes / trials."""
    tail = (1.0 - confidence) / 2.0
    low = beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
    high = beta.ppf(1.0 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    return [float(low), float(high)]
