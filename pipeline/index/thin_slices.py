"""Thin series made comparable with thick ones: the maximum over 250 noisy slices is higher than that over 30."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from ichpipe.index.slice_order import TIE_MM

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

WINDOW_MM: Final = 5.0
"""Thickness of the slices of most head scans, and of RSNA 2019's, on which models are trained."""


def smooth_thin(values: Floats, position_mm: Floats, window_mm: float = WINDOW_MM) -> Floats:
    """Average the probabilities (n, k) of a thin series over ``window_mm`` along the normal; others stay as they are.

    A series is thin where the median step between its places (``position_mm``, (n,)) is below half the window. Each
    slice gets the mean over the places in the window around it; slices at one place count once, as their mean. A
    window that would reach past an end of the series, or into a step of half a window or more, is moved inside, so
    that a lone slice at an end weighs no more than one in the middle; where a stretch between such ends is shorter
    than the window, its mean stands throughout, and a slice alone in its stretch keeps its own value. A thick slice
    cut into three or more equal thin ones thus leaves the maximum over the series as it was.
    """
    slot = _places(position_mm)
    sizes = np.bincount(slot)
    places = np.bincount(slot, weights=position_mm) / sizes
    step = np.median(np.diff(places)) if len(places) > 1 else np.inf
    if step >= window_mm / 2 - TIE_MM:
        return values
    start, stop = _windows(places, float(step), window_mm)
    means = np.zeros((len(places), values.shape[1]))
    np.add.at(means, slot, values)
    below = np.vstack([np.zeros(values.shape[1]), np.cumsum(means / sizes[:, None], axis=0)])
    smooth: Floats = np.clip((below[stop] - below[start]) / (stop - start)[:, None], 0.0, 1.0)[slot]
    return smooth


def stride_of(position_mm: Floats, spacing_mm: float = WINDOW_MM) -> int:
    """Return in how many interleaved parts a series has about ``spacing_mm`` between slices; positions (n,) in order.

    1 where the median step is half of that or more. A sequence model that was trained on slices 5 mm apart takes
    what lies 0.6 mm apart for a longer head: it is shown every eighth slice, eight times.
    """
    steps = np.diff(position_mm)
    steps = steps[steps >= TIE_MM]
    if not steps.size or (step := float(np.median(steps))) >= spacing_mm / 2 - TIE_MM:
        return 1
    return round(spacing_mm / step)


def _places(position_mm: Floats) -> NDArray[np.intp]:
    """Number the places (n,) from the lowest; slices closer than TIE_MM to the next one share a number."""
    order = np.argsort(position_mm, kind="stable")
    slot = np.empty(len(order), dtype=np.intp)
    slot[order] = np.cumsum(np.diff(position_mm[order], prepend=position_mm[order[:1]]) >= TIE_MM)
    return slot


def _windows(places: Floats, step: float, window_mm: float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the first place of each place's window, and the one after its last."""
    ends = np.flatnonzero(np.diff(places) >= window_mm / 2 - TIE_MM) + 1
    bounds = [0, *ends.tolist(), len(places)]
    parts = [first + _windows_of_stretch(places[first:last], step, window_mm) for first, last in pairwise(bounds)]
    start, stop = np.concatenate(parts, axis=1)
    return start, stop


def _windows_of_stretch(places: Floats, step: float, window_mm: float) -> NDArray[np.intp]:
    """Return the windows of places without a wide step between them, as rows start and stop (2, places)."""
    # Half open, and a tenth of a step low: an even number of thin slices to a window has places at both its ends, and
    # positions rounded in the header must not decide which one counts. At a tenth no usual step is near an end.
    low, high = places - window_mm / 2 - step / 10, places + window_mm / 2 - step / 10
    own = np.arange(len(places))
    # Whole: the places that would come before the first and after the last are outside.
    whole = np.flatnonzero((places[0] - step < low) & (places[-1] + step >= high))
    if not whole.size:
        return np.stack([np.zeros_like(own), np.full_like(own, len(places))])
    nearest = np.clip(own, whole[0], whole[-1])
    start, stop = np.searchsorted(places, low)[nearest], np.searchsorted(places, high)[nearest]
    return np.stack([np.minimum(start, own), np.maximum(stop, own + 1)])  # uneven steps: its own place is always in
