"""Thin series made comparable with thick ones: the maximum over 250 noisy slices is higher than that over 30."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from ichpipe.ordering import TIE_MM

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

WINDOW_MM: Final = 5.0
"""Thickness of the slices of most head scans, and of RSNA 2019's, on which models are trained."""


def smooth_thin(values: Floats, position_mm: Floats, window_mm: float = WINDOW_MM) -> Floats:
    """Average the probabilities (n, k) of a thin series over ``window_mm`` along the normal; others stay as they are.

    A series is thin where the median step between its places (``position_mm``, (n,), ascending) is below half the
    window. Each place stands for the stretch up to the midpoints to its neighbours; slices at one place share
    it. The window lies around the slice, moved inside where it would stick out at an end, so that a single
    slice at the end weighs no more than one in the middle. A thick slice that is cut into thin ones of the same
    probability thus keeps the maximum over the series.
    """
    places, slot, sizes = np.unique(np.round(position_mm / TIE_MM), return_inverse=True, return_counts=True)
    places = places * TIE_MM
    if len(places) < 2 or np.median(np.diff(places)) >= window_mm / 2:
        return values
    means = np.zeros((len(places), values.shape[1]))
    np.add.at(means, slot, values)
    means /= sizes[:, None]
    edges = np.concatenate([[places[0] * 1.5 - places[1] / 2], (places[1:] + places[:-1]) / 2, [0.0]])
    edges[-1] = places[-1] * 1.5 - places[-2] / 2
    width = min(window_mm, edges[-1] - edges[0])
    low = np.clip(places - width / 2, edges[0], edges[-1] - width)
    below = np.vstack([np.zeros(values.shape[1]), np.cumsum(means * np.diff(edges)[:, None], axis=0)])
    sums = _integral(below, edges, low + width) - _integral(below, edges, low)
    smooth: Floats = np.clip(sums / width, 0.0, 1.0)[slot]
    return smooth


def _integral(below: Floats, edges: Floats, places: Floats) -> Floats:
    """Integrate the step function from its start to ``places`` (m,): (m, k)."""
    return np.stack([np.interp(places, edges, column) for column in below.T], axis=1)
