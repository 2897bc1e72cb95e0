"""Geometry of one synthetic series: gantry tilt, slice spacing, field of view and pose of the head.

Patient coordinates are DICOM's (PS3.3 C.7.6.2.1.1): x to the left, y to the back, z to the head, mm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from ichpipe.phantom.fields import Floats, Points, Triple

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
    middle_mm: Triple  # patient position of the middle of slice 0
    pose: Floats  # [3, 3] rotation from patient axes to head axes
    pivot_mm: Triple  # patient position of the head's origin

    @property
    def orientation(self) -> tuple[float, float, float, float, float, float]:
        """Direction cosines of a row and of a column, ImageOrientationPatient (0020,0037)."""
        tilt = np.deg2rad(self.tilt_deg)
        return (1.0, 0.0, 0.0, 0.0, float(np.cos(tilt)), float(np.sin(tilt)))

    @property
    def normal(self) -> Floats:
        """Unit vector of the slice normal, shape [3]: row direction times column direction."""
        *_, cosine, sine = self.orientation
        return np.array([0.0, -sine, cosine])

    def position_mm(self, slice_index: int) -> Floats:
        """Centre of the first pixel of a slice, ImagePositionPatient (0020,0032), mm, shape [3]."""
        half = (self.size_px - 1) / 2 * self.pixel_mm
        row, column = np.array(self.orientation[:3]), np.array(self.orientation[3:])
        first = np.array(self.middle_mm) - half * (row + column)
        return np.asarray(first + slice_index * self.spacing_mm * self.normal, dtype=np.float64)

    def head_points(self) -> Points:
        """Head coordinates of all pixel centres, each [slices, rows, columns], mm."""
        start = self.pose @ (self.position_mm(0) - np.array(self.pivot_mm))
        step_x = self.pose @ (self.pixel_mm * np.array(self.orientation[:3]))
        step_y = self.pose @ (self.pixel_mm * np.array(self.orientation[3:]))
        step_z = self.pose @ (self.spacing_mm * self.normal)
        level, row, column = np.ogrid[: self.n_slices, : self.size_px, : self.size_px]
        axes = [start[i] + column * step_x[i] + row * step_y[i] + level * step_z[i] for i in range(3)]
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
    # Six decimals are what DICOM's 16-character decimal string holds, so the header is exact.
    middle_mm, pivot_mm = ((round(float(x), 6), round(float(y), 6), round(float(z), 6)) for x, y, z in (middle, pivot))
    return Geometry(n_slices, size_px, pixel_mm, spacing_mm, tilt_deg, middle_mm, pose, pivot_mm)
