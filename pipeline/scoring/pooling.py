"""From the slices of a study to one probability a class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

StudyScore = Literal["max", "mean", "mean-of-top-3", "noisy-or"]
_TOP: Final = 3


def pool(values: Floats, group: NDArray[np.intp], groups: int, how: StudyScore = "max") -> Floats:
    """Pool the probabilities (n, k) of each group's rows: (groups, k), 0 to 1.

    ``group`` (n,) numbers each row's group from 0; a group without a row gets 0. ``max`` is the paper's (Nguyen et
    al. 2020, CQ500). ``mean-of-top-3`` forgives one false slice; ``mean`` grows with the extent of a bleed;
    ``noisy-or`` is the chance that any slice bleeds if slices were independent, which neighbours are not: it runs
    into 1 on long series.
    """
    shape = (groups, values.shape[1])
    if how == "max":
        largest = np.zeros(shape)
        np.maximum.at(largest, group, values)
        return largest
    if how == "mean-of-top-3":
        return _mean_of_top(values, group, shape)
    sums = np.zeros(shape)
    np.add.at(sums, group, np.log1p(-np.minimum(values, 1.0 - 1e-15)) if how == "noisy-or" else values)
    if how == "noisy-or":
        return -np.expm1(sums)
    means: Floats = sums / np.maximum(np.bincount(group, minlength=groups), 1)[:, None]
    return means


def _mean_of_top(values: Floats, group: NDArray[np.intp], shape: tuple[int, int]) -> Floats:
    starts = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=shape[0]))])
    result = np.zeros(shape)
    for column, found in enumerate(values.T):
        order = np.lexsort((-found, group))  # each group's largest first
        rank = np.arange(len(found)) - starts[group[order]]
        top = order[rank < _TOP]
        np.add.at(result[:, column], group[top], found[top])
    means: Floats = result / np.clip(np.diff(starts), 1, _TOP)[:, None]
    return means
