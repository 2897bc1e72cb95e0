"""Smoothing and strides that make thin series comparable with thick ones.

The maximum over 250 noisy slices is higher than the maximum over 30.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from ichpipe.common.constants import THICK_SLICE_MM, TIE_MM

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def smooth_thin(values: Floats, position_mm: Floats, window_mm: float = THICK_SLICE_MM) -> Floats:
    """Average the probabilities (n, k) of a thin series over ``window_mm`` along the normal; keep those of others.

    A series is thin if the median step between its positions (``position_mm``, (n,)) is below half the window. Each
    slice gets the mean over the positions in the window around it. Slices at one position count once, as their mean.
    A window moves inside where it would reach past an end of the series or into a step of half a window or more. So a
    lone slice at an end weighs no more than one in the middle. A stretch shorter than the window gets its mean.
    The maximum over a series does not change when a thick slice is cut into three or more equal thin ones.
    """
    order = np.argsort(position_mm, kind="stable")  # slices closer than TIE_MM to the next share a position
    slot = np.empty(len(order), dtype=np.intp)
    slot[order] = np.cumsum(np.diff(position_mm[order], prepend=position_mm[order[:1]]) >= TIE_MM)
    sizes = np.bincount(slot)
    positions = np.bincount(slot, weights=position_mm) / sizes
    step = np.median(np.diff(positions)) if len(positions) > 1 else np.inf
    if step >= window_mm / 2 - TIE_MM:
        return values
    ends = np.flatnonzero(np.diff(positions) >= window_mm / 2 - TIE_MM) + 1
    stretches = pairwise([0, *ends.tolist(), len(positions)])
    parts = [first + _windows(positions[first:last], float(step), window_mm) for first, last in stretches]
    start, stop = np.concatenate(parts, axis=1)
    means = np.zeros((len(positions), values.shape[1]))
    np.add.at(means, slot, values)
    below = np.vstack([np.zeros(values.shape[1]), np.cumsum(means / sizes[:, None], axis=0)])
    smooth: Floats = np.clip((below[stop] - below[start]) / (stop - start)[:, None], 0.0, 1.0)[slot]
    return smooth


def stride_of(position_mm: Floats, spacing_mm: float = THICK_SLICE_MM) -> int:
    """Return into how many interleaved parts a series splits so that a part has about ``spacing_mm`` between slices.

    ``position_mm`` (n,) is in order. Returns 1 where the median step is half of ``spacing_mm`` or more. A sequence
    model that was trained on slices 5 mm apart sees a longer head in slices 0.6 mm apart. It gets every eighth slice,
    eight times.
    """
    steps = np.diff(position_mm)
    steps = steps[steps >= TIE_MM]
    if not steps.size or (step := float(np.median(steps))) >= spacing_mm / 2 - TIE_MM:
        return 1
    return round(spacing_mm / step)


def _windows(positions: Floats, step: float, window_mm: float) -> NDArray[np.intp]:
    """Return the window of each position of a stretch without a wide step, as rows start and stop (2, positions)."""
    # Half open, and shifted down by a tenth of a step. Else an even number of thin slices a window has positions at
    # both ends, and rounding in the header decides which one counts. No usual step puts a position at a tenth.
    low, high = positions - window_mm / 2 - step / 10, positions + window_mm / 2 - step / 10
    own = np.arange(len(positions))
    # A window is whole if the positions before the first and after the last one would lie outside.
    whole = np.flatnonzero((positions[0] - step < low) & (positions[-1] + step >= high))
    if not whole.size:
        return np.stack([np.zeros_like(own), np.full_like(own, len(positions))])
    nearest = np.clip(own, whole[0], whole[-1])
    start, stop = np.searchsorted(positions, low)[nearest], np.searchsorted(positions, high)[nearest]
    return np.stack([np.minimum(start, own), np.maximum(stop, own + 1)])  # with its own position, at uneven steps too
