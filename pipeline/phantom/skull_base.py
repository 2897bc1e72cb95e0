"""The skull base and the face below it: fossae, petrous ridges, orbits and air cells."""

from __future__ import annotations

import numpy as np

from ichpipe.common.constants import AIR_HU
from ichpipe.phantom.fields import Floats, Points, blend, capsule, ellipsoid, inside

MUSCLE_HU, FAT_HU, BONE_HU = 50.0, -80.0, 1000.0


def skull_base_height(points: Points) -> Floats:
    """Height z (mm) of the skull base below each point: front, middle and back fossa, petrous ridge between."""
    x, y = np.abs(points.x), points.y
    front = 16 - 0.018 * (x - 30) ** 2 - 0.01 * (y + 58) ** 2  # the roof of the orbits is a dome
    middle = -22 + 0.012 * (x - 42) ** 2 + 0.01 * (y + 5) ** 2 + 8 * np.exp(-((x / 11) ** 2))
    back = np.full_like(x, -48)
    ridge = y - _petrous_line(x)
    height = middle + (front - middle) * _step((-24 - y - 0.15 * x) / 2.5)
    height += (back - height) * _step((ridge - 5) / 2.5)
    petrous = 22 * np.exp(-((ridge / 6.5) ** 2)) * _step((x - 14) / 2) * _step((64 - x) / 3)
    return np.asarray(height + petrous, dtype=np.float32)


def _petrous_line(x: Floats) -> Floats:
    """How far back (y, mm) the petrous ridge lies at a distance ``x`` from the midline."""
    return np.asarray(0.5 * x - 8, dtype=np.float32)


def _step(value: Floats) -> Floats:
    return np.asarray(0.5 + 0.5 * np.tanh(value), dtype=np.float32)


def add_face(hu: Floats, points: Points, above_mm: Floats, depth_mm: Floats, slow: Floats, sinus: float) -> None:
    """Write all that lies below the skull base into ``hu`` [m], in place. ``above_mm``: height above the base."""
    half = points.mirror()
    below = inside(above_mm)
    blend(hu, MUSCLE_HU - 45.0 * np.clip(slow, 0, 1), below)
    blend(hu, BONE_HU, inside(np.abs(above_mm + 1.8) - 1.8))
    petrous = np.maximum(np.abs(half.y - _petrous_line(half.x)) - 8, np.maximum(12 - half.x, half.x - 66))
    blend(hu, 1.3 * BONE_HU, inside(np.maximum(petrous, half.z + 1)) * below)
    # Orbits
    cone = capsule(half, (31, -68, -4), (14, -28, -2), (17, 4))
    blend(hu, BONE_HU, inside(np.abs(cone - 1) - 1) * below)
    blend(hu, FAT_HU, inside(cone) * below)
    muscles = np.abs(capsule(half, (31, -66, -4), (15, -30, -2), (10.5, 2.5))) - 1.4
    blend(hu, MUSCLE_HU, 0.7 * inside(np.maximum(muscles, cone)) * below)
    blend(hu, 35.0, inside(capsule(half, (30, -58, -4), (14, -28, -2), (2.4, 2.4))) * below)  # optic nerve
    globe = ellipsoid(half, (32, -71, -4), (12, 12, 12))
    blend(hu, 50.0, inside(globe) * below)
    blend(hu, 12.0, inside(globe + 1.8) * below)
    blend(hu, 90.0, inside(ellipsoid(half, (32, -80, -4), (5, 2.2, 5))) * below)  # lens
    # Ethmoid cells between the orbits, sphenoid sinus, mastoid cells, ear canals, frontal sinus
    ethmoid = np.maximum(half.x - 11, np.maximum(np.abs(half.y + 60) - 24, half.z - 2))
    walls = np.sin(0.55 * half.x + 0.3) * np.sin(0.5 * half.y + 2 * slow) * np.sin(0.5 * half.z)
    blend(hu, 350.0, inside(ethmoid) * below)
    blend(hu, AIR_HU, inside(ethmoid + 1.2) * (np.abs(walls) > 0.06) * below)
    blend(hu, AIR_HU, inside(ellipsoid(half, (7, -20, -9), (8, 11, 8))) * below)
    mastoid = ellipsoid(half, (56, 24, -16), (11, 14, 15))
    cells = np.sin(1.1 * half.x) * np.sin(1.0 * half.y + slow) * np.sin(0.9 * half.z)
    blend(hu, -650.0, inside(mastoid) * np.clip(np.abs(cells) * 3, 0, 1) * below)
    blend(hu, AIR_HU, inside(capsule(half, (46, 10, -14), (80, 8, -16), (3.0, 3.5))))
    if sinus:
        frontal = ellipsoid(half, (6, -82, 12), (4 + 12 * sinus, 5, 4 + 12 * sinus))
        blend(hu, AIR_HU, inside(np.maximum(frontal, depth_mm - 3)))
