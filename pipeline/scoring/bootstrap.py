"""Estimates with confidence intervals: percentile bootstrap over patients, and the AUC of every resample.

Slices of one patient resemble each other: a resample draws patients with all their slices. Sixteen resamples are
computed at once: 674,258 slices of 17,000 patients take 0.6 ms a resample and class, five times less than one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Draws = NDArray[np.float32]

AT_ONCE: Final = 16  # resamples; the counts of one patient then fill one cache line


@dataclass(frozen=True)
class Estimate:
    """A figure and its confidence interval; None where one is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Estimate:
        """Read ``value``, ``ci_low`` and ``ci_high``."""
        return cls(fields["value"], fields["ci_low"], fields["ci_high"])

    @classmethod
    def of_loss(cls, scores: Mapping[str, Any]) -> Estimate:
        """Read the weighted log loss from what `metrics.score` returns."""
        return cls(scores["weighted_log_loss"], *(scores.get("weighted_log_loss_ci") or ()))

    @property
    def interval(self) -> list[float] | None:
        """Both limits, or None."""
        return None if self.low is None or self.high is None else [self.low, self.high]

    def to_json(self) -> dict[str, Any]:
        """Return ``value``, ``ci_low`` and ``ci_high``."""
        return {"value": self.value, "ci_low": self.low, "ci_high": self.high}

    def text(self, digits: int = 4, sign: str = "") -> str:
        """Return ``value [low, high]``, or ``value``, or ``not defined``; ``sign`` ``+`` marks positive numbers."""
        if self.value is None:
            return "not defined"
        form = f"{sign}z.{digits}f"  # z: no minus before a zero
        limits = ", ".join(f"{limit:{form}}" for limit in self.interval or ())
        return f"{self.value:{form}} [{limits}]" if limits else f"{self.value:{form}}"


def draw_patients(patients: int, samples: int, seed: int) -> Iterator[Draws]:
    """Yield how often each patient is drawn with replacement: blocks of counts (patients, up to 16).

    All at once, 1,000 resamples of 674,258 would take 2.7 GB. Fewer than two patients yield nothing.
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
    blocks = [[statistic(counts) for statistic in statistics] for counts in draw_patients(patients, samples, seed)]
    return [np.concatenate([np.empty(0), *(block[i] for block in blocks)]) for i in range(len(statistics))]


def resampled_mean(values: Floats, patient: NDArray[np.intp], patients: int) -> Callable[[Draws], Floats]:
    """Return the statistic that is the mean over slices of ``values`` (n,); ``patient`` (n,) indexes the counts."""
    sums = np.stack([group_sums(values, patient, patients), group_sums(np.ones_like(values), patient, patients)])

    def means(counts: Draws) -> Floats:
        total, size = np.einsum("sp,pk->sk", sums, counts)  # not @: threads of BLAS that share a core wait by spinning
        return np.asarray(total / size)

    return means


def group_sums(values: Floats, group: NDArray[np.intp], groups: int) -> Floats:
    """Sum ``values`` (n,) over the rows of each group, such as the slices of a patient: (groups,)."""
    return np.bincount(group, weights=values, minlength=groups).astype(np.float64, copy=False)


def percentile_interval(values: Floats, confidence: float) -> list[float] | None:
    """Return the limits of the middle ``confidence`` of the values (samples,); None where more than half are NaN."""
    defined = values[~np.isnan(values)]
    if len(defined) == 0 or 2 * len(defined) < len(values):
        return None
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(defined, (tail, 1.0 - tail))
    return [float(low), float(high)]


def estimate(value: float | None, resampled: Floats, confidence: float) -> Estimate:
    """Return a figure with the percentile interval of its resamples (samples,); without a value it has none."""
    return Estimate(value, *(percentile_interval(resampled, confidence) or () if value is not None else ()))


class Ranking:
    """Scores of one class, sorted once, so that the AUC of any resample takes one pass.

    The AUC is the chance that a positive scores above a negative; a tie counts one half (Hanley & McNeil 1982). A pair
    counts as often as the product of the counts of both patients. Neighbours in rank that are all positive, or all
    negative, are one step of the ROC curve.
    """

    def __init__(self, labels: NDArray[Any], scores: Floats, patient: NDArray[np.intp]) -> None:
        """Take labels (n,) of 0 and 1, scores (n,), and each row's patient (n,) as an index into the counts."""
        positive = np.asarray(labels) == 1
        self.n_positive = int(positive.sum())
        self.n_negative = len(positive) - self.n_positive
        values, rank = np.unique(scores, return_inverse=True)
        kind = np.zeros(len(values), dtype=np.int8)  # of rows with the same score: 1 negative, 2 positive, 3 both
        kind[rank[~positive]] |= 1
        kind[rank[positive]] |= 2
        begins = np.ones(len(values), dtype=np.bool_)
        begins[1:] = (kind[1:] != kind[:-1]) | (kind[1:] == 3)  # a tie of both kinds is a step of its own
        step = (np.cumsum(begins) - 1)[rank]  # of each row, from the lowest score up
        shape = (int(begins.sum()), int(patient.max()) + 1 if len(patient) else 0)
        self._positives, self._negatives = (
            sparse.csr_matrix((np.ones(int(rows.sum()), dtype=np.float32), (step[rows], patient[rows])), shape=shape)
            for rows in (positive, ~positive)
        )

    @property
    def value(self) -> float | None:
        """The AUC, 0 to 1; None without a positive or without a negative."""
        if not self.n_positive or not self.n_negative:
            return None
        return float(self.resample(np.ones((self._positives.shape[1], 1), dtype=np.float32))[0])

    def resample(self, counts: Draws) -> Floats:
        """Return the AUC in each resample of counts (patients, k): (k,); NaN where it has no positive or no negative.

        It is exact up to 16 million draws a step and 2**52 pairs.
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
        areas: Floats = np.divide(won, 2.0 * pairs, out=np.full_like(won, np.nan), where=pairs > 0)
        return areas
