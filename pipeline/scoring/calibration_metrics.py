"""Calibration metrics: Brier score, expected calibration error; and average precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from sklearn.metrics import average_precision_score

from ichpipe.common.classes import CLASSES
from ichpipe.scoring.bootstrap import group_sums

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

BINS: Final = 15  # of equal width, as in Guo et al., ICML 2017 (arXiv 1706.04599)


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
    if not 0 < labels.sum() < len(labels):
        return None
    return float(average_precision_score(labels, probabilities))
