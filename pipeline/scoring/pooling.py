"""Pools the slices of a study into one probability a class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from ichpipe.common.classes import METRIC_CLIP

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

StudyScore = Literal["max", "mean", "mean-of-top-3", "noisy-or"]
_TOP: Final = 3


def pool(values: Floats, group: NDArray[np.intp], groups: int, how: StudyScore = "max") -> Floats:
    """Pool the probabilities (n, k) of each group's rows: (groups, k), 0 to 1.

    ``group`` (n,) numbers each row's group from 0; a group without a row gets 0. ``max`` is the paper's (Nguyen et
    al. 2020, CQ500). ``mean-of-top-3`` forgives one false slice; ``mean`` grows with the extent of a bleed;
    ``noisy-or`` is the chance that any slice bleeds if slices were independent. Neighbours are not: on long series it
    comes close to 1.
    """
    result = np.zeros((groups, values.shape[1]))
    sizes = np.bincount(group, minlength=groups)
    if how == "max":
        np.maximum.at(result, group, values)
        return result
    if how == "noisy-or":
        np.add.at(result, group, np.log1p(-np.minimum(values, 1.0 - METRIC_CLIP)))
        return -np.expm1(result)
    if how == "mean":
        np.add.at(result, group, values)
        return np.asarray(result / np.maximum(sizes, 1)[:, None])
    starts = np.cumsum(sizes) - sizes
    for column, probabilities in enumerate(values.T):
        order = np.lexsort((-probabilities, group))  # each group's largest first
        rank = np.arange(len(order)) - starts[group[order]]
        top = order[rank < _TOP]
        np.add.at(result[:, column], group[top], probabilities[top])
    return result / np.clip(sizes, 1, _TOP)[:, None]
