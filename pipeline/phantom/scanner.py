"""The scanner: partial volume, beam hardening, noise, headrest, field of view and pixel encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from ichpipe.phantom.fields import Floats, blend, inside

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ichpipe.phantom.anatomy import Anatomy

LOWEST_HU, HIGHEST_HU = -1000, 3000


@dataclass(frozen=True)
class Encoding:
    """How HU become stored values: the Image Pixel and CT Image modules (PS3.3 C.7.6.3, C.8.2.1)."""

    bits_stored: int  # (0028,0101)
    pixel_representation: int  # (0028,0103): 0 unsigned, 1 signed
    intercept: int  # RescaleIntercept (0028,1052); the slope is 1
    padding: int | None = None  # PixelPaddingValue (0028,0120) outside the round field of view
    wrapped: bool = False  # the 12-bit quirk of RSNA 2019


# The last one is the known quirk: unsigned 12-bit values that declare an intercept of 0 and wrap at 4096.
# Readers add 1000, subtract 4096 from values of 4096 and more, and use an intercept of -1000.
ENCODINGS = (Encoding(16, 1, 0), Encoding(12, 0, -1024), Encoding(16, 1, -1024, padding=-2000),
             Encoding(16, 1, 0, padding=-3024), Encoding(16, 0, -1024), Encoding(12, 0, 0, wrapped=True))  # fmt: skip
ENCODING_SHARE = (0.25, 0.25, 0.25, 0.1, 0.09, 0.06)


@dataclass(frozen=True)
class Scanner:
    """Properties of one scanner for one study."""

    noise_hu: float  # standard deviation
    blur_px: float  # in-plane point spread, standard deviation
    grain_px: float  # correlation length of the noise
    hardening_hu: float  # depth of the dark band between the petrous bones
    cupping_hu: float
    headrest_hu: float | None
    encoding: Encoding


def draw_scanner(rng: np.random.Generator, size_px: int) -> Scanner:
    """Draw a scanner; blur and grain are given in mm inside and so grow with the matrix."""
    pixel_scale = size_px / 230  # pixels per mm, about
    return Scanner(
        noise_hu=float(rng.uniform(2.8, 5.0)),
        blur_px=float(max(0.5, rng.uniform(0.5, 0.75) * pixel_scale)),
        grain_px=float(max(0.55, rng.uniform(0.5, 0.8) * pixel_scale)),
        hardening_hu=float(rng.uniform(4, 16)),
        cupping_hu=float(rng.uniform(1, 4)),
        headrest_hu=float(rng.uniform(-350, 100)) if rng.random() < 0.6 else None,
        encoding=ENCODINGS[int(rng.choice(len(ENCODINGS), p=ENCODING_SHARE))],
    )


def harden(values: Floats, anatomy: Anatomy, scanner: Scanner, rng: np.random.Generator) -> None:
    """Beam hardening on the voxels within the skull, in place: cupping, and bands between the petrous bones."""
    at = anatomy.points
    values += anatomy.brain * np.float32(scanner.cupping_hu) * (np.exp(-anatomy.depth_mm / 9) - np.float32(0.3))
    band = np.exp(-(((at.y - 10) / 7) ** 2)) * np.clip(1 - np.abs(at.x) / 50, 0, 1) * inside(np.abs(at.z + 6) - 9, 8.0)
    angle = np.arctan2(at.y - 8, at.x).astype(np.float32)
    streaks = 0.6 + 0.4 * np.sin(rng.uniform(18, 30) * angle + rng.uniform(0, 6))
    values -= (np.float32(scanner.hardening_hu) * band * streaks * anatomy.brain).astype(np.float32)


def expose(hu: Floats, scanner: Scanner, rng: np.random.Generator, pixel_mm: float) -> NDArray[np.int16]:
    """Point spread, headrest, correlated noise and rounding; [slices, rows, columns] in HU."""
    if scanner.headrest_hu is not None:
        axis = (np.arange(hu.shape[1], dtype=np.float32) - (hu.shape[1] - 1) / 2) * np.float32(pixel_mm)
        x, y = axis[None, :], axis[:, None]
        gap = np.abs(np.sqrt(x**2 + (y + 8) ** 2) - 116) - 2
        arc = inside(np.maximum(gap, 55 - y))[None] * (hu < -900)
        blend(hu, scanner.headrest_hu, arc.astype(np.float32))
    image = ndimage.gaussian_filter(hu, (0, scanner.blur_px, scanner.blur_px), truncate=3)
    grain = rng.standard_normal(hu.shape, dtype=np.float32)
    grain = ndimage.gaussian_filter(grain, (0, scanner.grain_px, scanner.grain_px), truncate=3, mode="wrap")
    image += grain * np.float32(scanner.noise_hu / grain.std())
    return np.asarray(np.clip(np.rint(image), LOWEST_HU, HIGHEST_HU), dtype=np.int16)


def field_of_view(size_px: int) -> NDArray[np.bool_]:
    """True inside the circle that the scanner reconstructs, shape [rows, columns]."""
    squares = (np.arange(size_px) - (size_px - 1) / 2) ** 2
    return np.asarray(squares[None, :] + squares[:, None] <= (size_px / 2) ** 2)


def encode(hu: NDArray[np.int16], encoding: Encoding) -> NDArray[np.int16] | NDArray[np.uint16]:
    """Stored pixel values of HU slices [..., rows, columns]; padding where the encoding has one."""
    if encoding.wrapped:
        return np.mod(hu.astype(np.int32), 4096).astype(np.uint16)
    stored = hu.astype(np.int32) - encoding.intercept
    if encoding.padding is not None:
        stored = np.where(field_of_view(hu.shape[-1]), stored, encoding.padding)
    return stored.astype(np.int16) if encoding.pixel_representation else stored.astype(np.uint16)
