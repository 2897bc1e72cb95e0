"""The slice grid, soft shapes and smooth random fields in head coordinates. Lengths in mm, weights in [0, 1], float32.

Patient coordinates are DICOM's (PS3.3 C.7.6.2.1.1): x to the left, y to the back, z to the head, mm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage
from scipy.spatial.transform import Rotation

Floats = NDArray[np.floating[Any]]  # float32 in practice; the stubs promote to float64
Ints = NDArray[np.int64]
Triple = tuple[float, float, float]
TILTED_SHARE = 0.9  # of studies; 92 % of RSNA 2019 slices are tilted
LOWEST_MM, HIGHEST_MM = -26.0, 86.0  # head z of the first and last slice, about: skull base to vertex


@dataclass(frozen=True)
class Points:
    """Points in head coordinates, mm: x to the patient's left, y to the back, z to the vertex."""

    x: Floats
    y: Floats
    z: Floats

    def take(self, positions: Ints) -> Points:
        """Return the points at flat ``positions``, shape [m]."""
        return Points(self.x.ravel()[positions], self.y.ravel()[positions], self.z.ravel()[positions])

    def mirror(self) -> Points:
        """Return the points with the right half folded onto the left: x becomes its magnitude."""
        return Points(np.abs(self.x), self.y, self.z)


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


def inside(distance_mm: Floats, edge_mm: float = 2.0) -> Floats:
    """Weight 1 deep inside (negative distance), 0 outside, and a linear ramp of width ``edge_mm`` between."""
    return np.asarray(np.clip(0.5 - distance_mm / np.float32(edge_mm), 0.0, 1.0), dtype=np.float32)


def blend(hu: Floats, value: Floats | float, weight: Floats) -> None:
    """Blend ``value`` (HU) into ``hu`` in place with ``weight``, as partial volume does."""
    hu += weight * (np.float32(value) - hu if isinstance(value, float | int) else value - hu)


def ellipsoid(points: Points, centre: Triple, radii: Triple) -> Floats:
    """Approximate signed distance (mm, negative inside) to an ellipsoid with axes along x, y, z."""
    u = (points.x - np.float32(centre[0])) / np.float32(radii[0])
    v = (points.y - np.float32(centre[1])) / np.float32(radii[1])
    w = (points.z - np.float32(centre[2])) / np.float32(radii[2])
    norm = np.sqrt(u * u + v * v + w * w)
    slope = np.sqrt((u / radii[0]) ** 2 + (v / radii[1]) ** 2 + (w / radii[2]) ** 2) + np.float32(1e-6)
    return np.asarray(norm * (norm - 1.0) / slope, dtype=np.float32)


def capsule(points: Points, start: Triple, end: Triple, radii: tuple[float, float]) -> Floats:
    """Signed distance (mm) to a tube from ``start`` to ``end`` whose radius runs from the first to the second."""
    ax, ay, az = (np.float32(b - a) for a, b in zip(start, end, strict=True))
    px, py, pz = points.x - np.float32(start[0]), points.y - np.float32(start[1]), points.z - np.float32(start[2])
    along = np.clip((px * ax + py * ay + pz * az) / (ax * ax + ay * ay + az * az), 0.0, 1.0)
    gap = np.sqrt((px - along * ax) ** 2 + (py - along * ay) ** 2 + (pz - along * az) ** 2)
    return np.asarray(gap - (radii[0] + along * np.float32(radii[1] - radii[0])), dtype=np.float32)


@dataclass(frozen=True)
class RandomField:
    """A random function of head coordinates with mean 0, deviation 1 and one typical wavelength."""

    lattice: Floats  # [z, y, x]
    step_mm: float
    corner_mm: float  # head coordinate of the first lattice point on each axis

    @classmethod
    def draw(cls, rng: np.random.Generator, wavelength_mm: float, *, reach_mm: float = 115.0) -> RandomField:
        """Draw band-passed Gaussian noise on a cube of half-side ``reach_mm``; it repeats beyond."""
        step = wavelength_mm / 4.0
        side = fft.next_fast_len(int(np.ceil(2 * reach_mm / step)), real=True)
        frequency = fft.fftfreq(side, step).astype(np.float32) * np.float32(wavelength_mm)
        half = frequency[: side // 2 + 1]
        radius = np.sqrt(frequency[:, None, None] ** 2 + frequency[None, :, None] ** 2 + half[None, None, :] ** 2)
        band = np.exp(-((np.abs(radius) - 1.0) ** 2) / np.float32(2 * 0.25**2))
        parts = rng.standard_normal((2, *band.shape), dtype=np.float32)
        lattice = fft.irfftn((parts[0] + 1j * parts[1]) * band, s=(side, side, side)).astype(np.float32)
        return cls(lattice / lattice.std(), step, -reach_mm)

    def sample(self, points: Points) -> Floats:
        """Return the field at ``points``, same shape; linear between lattice points."""
        axes = [(axis - self.corner_mm) / self.step_mm for axis in (points.z, points.y, points.x)]
        values = ndimage.map_coordinates(self.lattice, axes, order=1, mode="grid-wrap", output=np.float32)
        return np.asarray(values, dtype=np.float32)


def ripple(rng: np.random.Generator, points: Points, wavelength_mm: float) -> Floats:
    """A cheap smooth random function at ``points``: mean 0, deviation about 1, from five plane waves."""
    directions = rng.standard_normal((5, 3))
    directions *= (2 * np.pi / wavelength_mm) / np.linalg.norm(directions, axis=1, keepdims=True)
    total = np.zeros_like(points.x)
    for (kx, ky, kz), phase in zip(directions.astype(np.float32), rng.uniform(0, 2 * np.pi, 5), strict=True):
        total += np.cos(kx * points.x + ky * points.y + kz * points.z + np.float32(phase))
    return np.asarray(total * np.float32(np.sqrt(2.0 / 5)), dtype=np.float32)
