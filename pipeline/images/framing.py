"""Fits one decoded slice to the square that the network sees: the whole image, or the head at one scale."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from scipy import ndimage, sparse
from torch import Tensor
from torch.nn import functional as F

from ichpipe.common.constants import MIN_HU

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ichpipe.models.header import Framing

HEAD_HU: Final = 15.0  # brain and skull are above; many archives clip HU to 0 … 80, where air is 0
COARSE_MM: Final = 4.0  # side of the blocks on which the head is found: the shell of a headrest is thinner
LEAST_HEAD_MM2: Final = 1000.0  # a smaller component is no head


def fit_to_size(hu: NDArray[np.int16], size_px: int) -> Tensor:
    """Pad a slice to a square with -1024 HU, then resize it to (1, size, size), int16 HU.

    Bilinear with antialiasing, in HU before any window, rounded to whole HU; the aspect is kept.
    """
    side = max(hu.shape)
    if hu.shape != (side, side):
        widths = [((side - length) // 2, (side - length + 1) // 2) for length in hu.shape]
        hu = np.pad(hu, widths, constant_values=MIN_HU)
    image = torch.from_numpy(np.ascontiguousarray(hu)).view(1, 1, side, side)
    if side == size_px:
        return image[0]
    resized = F.interpolate(image.float(), size=(size_px, size_px), mode="bilinear", antialias=True)
    return resized.round_().to(torch.int16)[0]


Image = tuple["NDArray[np.int16]", tuple[float, float] | None]  # HU (rows, columns); mm between rows and columns


def frame(images: Sequence[Image], framing: Framing) -> Tensor:
    """Fit a slice and its neighbours to (images, size, size), int16 HU; the slice itself is the middle one.

    All lie around the head of the slice itself. Where the spacing is not known, or ``framing`` asks for it, the whole
    image is fitted, and its pixels count as square.
    """
    own, own_mm = images[len(images) // 2]
    scale = framing.mm_per_px
    centre_mm = (0.0, 0.0) if scale is None or own_mm is None else head_centre(own, own_mm)
    squares = [
        fit_to_size(hu, framing.size_px)
        if scale is None or spacing_mm is None
        else resample(hu, spacing_mm, centre_mm, framing.size_px, scale)
        for hu, spacing_mm in images
    ]
    return torch.cat(squares)


def head_centre(hu: NDArray[np.int16], spacing_mm: tuple[float, float]) -> tuple[float, float]:
    """Return where the head's centre lies below and right of the image's centre, mm; (0, 0) where there is no head.

    The head is the largest connected component of blocks above HEAD_HU in the mean, its holes filled.
    """
    steps = [max(1, round(COARSE_MM / spacing)) for spacing in spacing_mm]
    rows, columns = (length // step for length, step in zip(hu.shape, steps, strict=True))
    if not rows or not columns:
        return 0.0, 0.0
    blocks = hu[: rows * steps[0], : columns * steps[1]].reshape(rows, steps[0], columns, steps[1])
    parts, count = ndimage.label(blocks.mean(axis=(1, 3), dtype=np.float32) > HEAD_HU)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    block_mm = [step * spacing for step, spacing in zip(steps, spacing_mm, strict=True)]
    if not count or sizes.max() * math.prod(block_mm) < LEAST_HEAD_MM2:
        return 0.0, 0.0
    head = ndimage.binary_fill_holes(parts == sizes.argmax() + 1)
    places = zip(ndimage.center_of_mass(head), block_mm, hu.shape, spacing_mm, strict=True)
    down, right = ((place + 0.5) * mm - length * spacing / 2 for place, mm, length, spacing in places)
    return float(down), float(right)


def resample(
    hu: NDArray[np.int16],
    spacing_mm: tuple[float, float],
    centre_mm: tuple[float, float],
    size_px: int,
    mm_per_px: float,
) -> Tensor:
    """Return the square around ``centre_mm`` (below and right of the image's centre) as (1, size, size), int16 HU.

    Bilinear with antialiasing, as `fit_to_size`. What lies outside the image is its own lowest HU: -1024 beside an
    image that was clipped to 0 … 80 HU would draw the border of the image into the wider windows.
    """
    outside = float(hu.min())
    axes = zip(hu.shape, spacing_mm, centre_mm, strict=True)
    down, across = (_weights(*axis, size_px, mm_per_px) for axis in axes)
    square = across @ (down @ (hu.astype(np.float64) - outside)).T
    return torch.from_numpy(np.rint(square.T + outside).astype(np.int16))[None]


def _weights(length: int, spacing: float, centre_mm: float, size_px: int, mm_per_px: float) -> sparse.csr_array:
    """Return how much each input pixel of an axis counts in each output pixel (size_px, length)."""
    offsets_mm = (np.arange(size_px) + 0.5 - size_px / 2) * mm_per_px + centre_mm
    places = offsets_mm / spacing + length / 2 - 0.5  # of the output pixels, in input pixels
    reach = max(1.0, mm_per_px / spacing)
    taps = np.ceil(places - reach).astype(int)[:, None] + np.arange(math.ceil(2 * reach) + 1)
    weights = np.maximum(0.0, 1.0 - np.abs(taps - places[:, None]) / reach)
    weights /= weights.sum(axis=1, keepdims=True)
    inside = (taps >= 0) & (taps < length) & (weights > 0)
    rows = np.broadcast_to(np.arange(size_px)[:, None], taps.shape)
    return sparse.csr_array((weights[inside], (rows[inside], taps[inside])), shape=(size_px, length))
