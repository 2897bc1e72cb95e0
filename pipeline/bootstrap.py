"""Percentile bootstrap over patients, and the area under the ROC curve in every resample.

Slices of one patient resemble each other, so patients are drawn and all their slices come along. A resample is
a row of counts: how many times each patient was drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def draw_patients(patients: int, samples: int, seed: int) -> NDArray[np.int32]:
    """Draw ``patients`` patients with replacement, ``samples`` times: counts (samples, patients).

    With fewer than two patients there is nothing to resample, and no row is returned.
    """
    if patients < 2:
        return np.zeros((0, patients), dtype=np.int32)
    generator = np.random.default_rng(seed)
    counts = np.empty((samples, patients), dtype=np.int32)
    for row in counts:
        row[:] = np.bincount(generator.integers(patients, size=patients), minlength=patients)
    return counts


def group_sums(values: Floats, patient: NDArray[np.intp], patients: int) -> Floats:
    """Sum ``values`` (n,) over the slices of each patient: (patients,)."""
    return np.bincount(patient, weights=values, minlength=patients).astype(np.float64, copy=False)


def percentile_interval(values: Floats, confidence: float) -> list[float] | None:
    """Return [low, high] that hold the middle ``confidence`` of the values (samples,).

    NaN marks a resample in which the figure has no value. None where fewer than half of the resamples have one.
    """
    defined = values[~np.isnan(values)]
    if len(defined) == 0 or 2 * len(defined) < len(values):
        return None
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(defined, (tail, 1.0 - tail))
    return [float(low), float(high)]


class Ranking:
    """Scores of one class, sorted once, so that the AUC of any resample costs one pass.

    The AUC is the chance that a positive scores above a negative, a tie counting one half (Mann-Whitney; Hanley &
    McNeil 1982). With patients drawn several times each pair counts as often as the product of both counts.
    """

    def __init__(self, labels: NDArray[Any], scores: Floats, patient: NDArray[np.intp]) -> None:
        """Take labels (n,) of 0 and 1, scores (n,), and each row's patient (n,) as an index into the counts."""
        positive = labels == 1
        negatives, positives = scores[~positive], scores[positive]
        order = np.argsort(negatives, kind="stable")
        ranked = negatives[order]
        self.n_positive = int(positive.sum())
        self._negative_patient = patient[~positive][order]
        self._positive_patient = patient[positive]
        # Negatives below each positive, and negatives below or equal: their mean counts a tie one half.
        self._below = np.searchsorted(ranked, positives, side="left")
        self._through = np.searchsorted(ranked, positives, side="right")

    @property
    def value(self) -> float | None:
        """The AUC, 0 to 1; None without a positive or without a negative."""
        negatives = len(self._negative_patient)
        if not self.n_positive or not negatives:
            return None
        pairs = int(self._below.sum()) + int(self._through.sum())
        return pairs / (2 * self.n_positive * negatives)

    def resample(self, counts: NDArray[np.int32]) -> Floats:
        """Return the AUC in each resample (samples,); NaN where it has no positive or no negative."""
        return np.array([self._weighted(row) for row in counts], dtype=np.float64)

    def _weighted(self, counts: NDArray[np.int32]) -> float:
        weights = counts[self._positive_patient].astype(np.float64)
        cumulative = np.zeros(len(self._negative_patient) + 1)
        np.cumsum(counts[self._negative_patient], out=cumulative[1:])
        total = weights.sum() * cumulative[-1]
        if total == 0.0:
            return np.nan
        return float(weights @ (cumulative[self._below] + cumulative[self._through]) / (2.0 * total))
