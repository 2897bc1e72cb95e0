"""Percentile bootstrap over patients, and the area under the ROC curve in every resample.

Slices of one patient resemble each other, so patients are drawn and all their slices come along. A resample is
how many times each patient was drawn. Sixteen resamples are worked on at once: 674,258 slices of 17,000 patients
cost 0.6 ms a resample and class on one core, five times less than one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Draws = NDArray[np.float32]

AT_ONCE: Final = 16
"""Resamples drawn together: the counts of one patient then fill one cache line."""


def draw_patients(patients: int, samples: int, seed: int) -> Iterator[Draws]:
    """Draw ``patients`` patients with replacement, ``samples`` times: whole-number counts (patients, up to 16).

    Yields as many such blocks as ``samples`` needs, never all of them at once: 1,000 resamples of 674,258 would
    take 2.7 GB. With fewer than two patients there is nothing to resample, and nothing is yielded.
    """
    generator = np.random.default_rng(seed)
    for start in range(0, samples if patients >= 2 else 0, AT_ONCE):
        counts = np.empty((min(AT_ONCE, samples - start), patients), dtype=np.float32)
        for row in counts:
            row[:] = np.bincount(generator.integers(patients, size=patients), minlength=patients)
        yield np.ascontiguousarray(counts.T)


def resample(statistics: Sequence[Callable[[Draws], Floats]], patients: int, samples: int, seed: int) -> list[Floats]:
    """Return every statistic in the same resamples: (samples,) each, or (0,) with fewer than two patients.

    A statistic takes counts (patients, k) and returns its value in each of these k resamples: (k,).
    """
    blocks = [[one(counts) for one in statistics] for counts in draw_patients(patients, samples, seed)]
    empty: Floats = np.empty(0)
    return [np.concatenate([empty, *(block[place] for block in blocks)]) for place in range(len(statistics))]


def resampled_mean(values: Floats, patient: NDArray[np.intp], patients: int) -> Callable[[Draws], Floats]:
    """Return the statistic that is the mean over slices of ``values`` (n,); ``patient`` (n,) indexes the counts."""
    sums = np.stack([group_sums(values, patient, patients), group_sums(np.ones_like(values), patient, patients)])

    def means(counts: Draws) -> Floats:
        total, size = np.einsum("sp,pk->sk", sums, counts)  # not @: threads of BLAS that share a core wait by spinning
        found: Floats = total / size
        return found

    return means


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
    Only the steps of the ROC curve matter: neighbours in rank that are all positive, or all negative, are one step.
    """

    def __init__(self, labels: NDArray[Any], scores: Floats, patient: NDArray[np.intp]) -> None:
        """Take labels (n,) of 0 and 1, scores (n,), and each row's patient (n,) as an index into the counts."""
        positive = np.asarray(labels) == 1
        self.n_positive = int(positive.sum())
        self.n_negative = len(positive) - self.n_positive
        step, steps = _steps(positive, scores)
        shape = (steps, int(patient.max()) + 1 if len(patient) else 0)
        self._positives, self._negatives = (_count(step[rows], patient[rows], shape) for rows in (positive, ~positive))

    @property
    def value(self) -> float | None:
        """The AUC, 0 to 1; None without a positive or without a negative."""
        if not self.n_positive or not self.n_negative:
            return None
        return float(self.resample(np.ones((self._positives.shape[1], 1), dtype=np.float32))[0])

    def resample(self, counts: Draws) -> Floats:
        """Return the AUC in each resample of counts (patients, k): (k,); NaN where it has no positive or no negative.

        Exact: every sum is of whole numbers that its type holds (16 million a step, 2**52 in all).
        """
        if not self.n_positive or not self.n_negative:
            return np.full(counts.shape[1], np.nan)
        counts = counts[: self._positives.shape[1]]
        positives, negatives = self._positives @ counts, self._negatives @ counts
        below = np.cumsum(negatives, axis=0, dtype=np.float64)
        pairs = below[-1] * positives.sum(axis=0, dtype=np.float64)
        below *= 2.0
        below -= negatives  # twice the negatives below a step, plus those that tie with it
        won = np.einsum("sk,sk->k", positives, below)
        found: Floats = np.divide(won, 2.0 * pairs, out=np.full_like(won, np.nan), where=pairs > 0)
        return found


def _count(step: NDArray[np.intp], patient: NDArray[np.intp], shape: tuple[int, int]) -> Any:
    """Count rows by step and patient: a sparse matrix of that shape."""
    return sparse.csr_matrix((np.ones(len(step), dtype=np.float32), (step, patient)), shape=shape)


def _steps(positive: NDArray[np.bool_], scores: Floats) -> tuple[NDArray[np.intp], int]:
    """Number the steps of the ROC curve from the lowest score up: the step of each row (n,), and how many there are."""
    values, place = np.unique(scores, return_inverse=True)
    some_positive, some_negative = (
        np.bincount(place[rows], minlength=len(values)) > 0 for rows in (positive, ~positive)
    )
    kind = some_positive * 2 + some_negative
    begins = np.ones(len(values), dtype=np.bool_)
    begins[1:] = (kind[1:] != kind[:-1]) | (kind[1:] == 3)  # a tie of both kinds is a step of its own
    step = np.cumsum(begins) - 1
    return step[place], int(begins.sum())
