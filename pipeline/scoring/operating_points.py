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
    Both are chosen on the very cases they are reported on: they describe the curve, and are no estimate of what a
    threshold fixed beforehand would give.
    """
    positive, values = np.asarray(labels) == 1, np.asarray(scores, dtype=np.float64)
    m, n = int(positive.sum()), int((~positive).sum())
    if not m or not n:
        return {"high_sensitivity": None, "high_specificity": None}
    thresholds = np.append(np.unique(values), np.inf)
    called = m - np.searchsorted(np.sort(values[positive]), thresholds)
    spared = np.searchsorted(np.sort(values[~positive]), thresholds)
    sensitive = np.flatnonzero(called >= wanted * m - _ROUNDING)[-1]
    specific = np.flatnonzero(spared >= wanted * n - _ROUNDING)[0]
    return {
        name: {"wanted": wanted} | _point(thresholds[at], (int(called[at]), m), (int(spared[at]), n), confidence)
        for name, at in (("high_sensitivity", sensitive), ("high_specificity", specific))
    }


def proportion_interval(successes: int, trials: int, confidence: float = 0.95) -> list[float]:
    """Return the exact binomial interval of Clopper & Pearson (Biometrika 1934) of successes / trials."""
    tail = (1.0 - confidence) / 2.0
    low = beta.ppf(tail, successes, trials - successes + 1) if successes else 0.0
    high = beta.ppf(1.0 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    return [float(low), float(high)]


def _point(
    threshold: np.float64, called: tuple[int, int], spared: tuple[int, int], confidence: float
) -> dict[str, Any]:
    """Describe one threshold by the positives called positive, of all, and the negatives spared, of all."""
    return {
        "threshold": float(threshold) if np.isfinite(threshold) else None,
        "sensitivity": called[0] / called[1],
        "sensitivity_ci": proportion_interval(*called, confidence),
        "specificity": spared[0] / spared[1],
        "specificity_ci": proportion_interval(*spared, confidence),
    }
