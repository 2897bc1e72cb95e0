"""Geometry of one synthetic series: gantry tilt, slice spacing, field of view and pose of the head.

Patient coordinates are DICOM's (PS3.3 C.7.6.2.1.1): x to the left, y to the back, z to the head, mm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial.transform import Rotation

from ichpipe.phantom.fields import Points

if TYPE_CHECKING:
    from numpy.typing import NDArray

TILTED_SHARE = 0.9  # of studies; 92 % of RSNA 2019 slices are tilted
LOWEST_MM, HIGHEST_MM = -26.0, 86.0  # head z of the first and last slice, about: skull base to vertex


@dataclass(frozen=True)
class Geometry:
    """The slice grid of one series and how the head lies in it."""

    n_slices: int
    size_px: int
    pixel_mm: float
    spacing_mm: float  # between slice centres, along the normal
    tilt_deg: float  # gantry tilt about the x axis; 0 for an upright gantry
    middle_mm: tuple[float, float, float]  # patient position of the middle of slice 0
    pose: NDArray[np.float64]  # [3, 3] rotation from patient axes to head axes
    pivot_mm: tuple[float, float, float]  # patient position of the head's origin

    @property
    def orientation(self) -> tuple[float, float, float, float, float, float]:
        """Direction cosines of a row and of a column, ImageOrientationPatient (0020,0037)."""
        tilt = np.deg2rad(self.tilt_deg)
        return (1.0, 0.0, 0.0, 0.0, float(np.cos(tilt)), float(np.sin(tilt)))

    @property
    def normal(self) -> NDArray[np.float64]:
        """Unit vector of the slice normal, shape [3]: row direction times column direction."""
        _, _, _, _, cosine, sine = self.orientation
        return np.array([0.0, -sine, cosine])

    def position_mm(self, slice_index: int) -> NDArray[np.float64]:
        """Centre of the first pixel of a slice, ImagePositionPatient (0020,0032), mm, shape [3]."""
        half = (self.size_px - 1) / 2 * self.pixel_mm
        row, column = np.array(self.orientation[:3]), np.array(self.orientation[3:])
        first = np.array(self.middle_mm) - half * (row + column)
        return np.asarray(first + slice_index * self.spacing_mm * self.normal, dtype=np.float64)

    def head_points(self) -> Points:
        """Head coordinates of all pixel centres, each [slices, rows, columns], mm."""
        start = self.pose @ (self.position_mm(0) - np.array(self.pivot_mm))
        steps = [self.pose @ (self.pixel_mm * np.array(self.orientation[:3])),
                 self.pose @ (self.pixel_mm * np.array(self.orientation[3:])),
                 self.pose @ (self.spacing_mm * self.normal)]  # fmt: skip
        column = np.arange(self.size_px)[None, None, :]
        row = np.arange(self.size_px)[None, :, None]
        level = np.arange(self.n_slices)[:, None, None]
        axes = [start[i] + column * steps[0][i] + row * steps[1][i] + level * steps[2][i] for i in range(3)]
        return Points(*(axis.astype(np.float32) for axis in axes))


def draw_geometry(rng: np.random.Generator, size_px: int) -> Geometry:
    """Draw one series: 20 to 28 slices, 4 to 6 mm apart, the gantry tilted in 9 studies of 10."""
    n_slices = int(rng.integers(20, 29))
    covered_mm = (HIGHEST_MM - LOWEST_MM) * rng.uniform(0.97, 1.07)
    spacing_mm = float(np.clip(round(covered_mm / (n_slices - 1), 2), 4.0, 6.0))
    tilt_deg = float(rng.choice([-1, 1], p=[0.2, 0.8]) * rng.uniform(3, 24)) if rng.random() < TILTED_SHARE else 0.0
    pixel_mm = round(float(rng.uniform(218, 246)) / size_px, 6)
    # The operator tilts the gantry to follow the patient's orbitomeatal line: the head is tilted alike.
    angles = (tilt_deg + rng.normal(0, 3), rng.normal(0, 2), rng.normal(0, 4))
    pose = Rotation.from_euler("xyz", angles, degrees=True).as_matrix().T
    pivot = rng.uniform((-10, -140, -200), (10, -100, 100))
    up = np.array([0.0, -np.sin(np.deg2rad(tilt_deg)), np.cos(np.deg2rad(tilt_deg))])
    middle = pivot + up * (LOWEST_MM + rng.normal(0, 2)) + np.array([*rng.normal(0, 3, 2), 0.0])
    return Geometry(n_slices, size_px, pixel_mm, spacing_mm, tilt_deg, _triple(middle), pose, _triple(pivot))


def _triple(vector: NDArray[np.float64]) -> tuple[float, float, float]:
    # Six decimals are what DICOM's 16-character decimal string holds, so the header is exact.
    x, y, z = (round(float(v), 6) for v in vector)
    return (x, y, z)
