"""The bleeds of a study, each kind in its anatomical location and shape; and mimics, bleeds cut down to one slice.

One function per kind draws bleeds and mimics, so a mimic has the shape, position and HU of one slice of a true bleed.
Only the neighbouring slices show the difference. On CT, streaks, partial volume, vessels and calcium look like this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ichpipe.common.classes import SUBTYPES
from ichpipe.phantom.anatomy import Anatomy, cerebellum
from ichpipe.phantom.fields import Floats, Ints, ellipsoid, inside, ripple

Draw = Callable[[np.random.Generator, Anatomy], tuple[Floats, Floats | None]]
MIN_SLICES = 3  # a true bleed lies in at least so many neighbouring slices
MIN_AREA_MM2 = 30.0  # less of a bleed than this in a slice is not drawn and not labelled
ATTEMPTS = 40
BLEED_SHARE = 0.45  # of studies
SECOND_KIND_SHARE = 0.3  # of studies with a bleed
MIMICS_PER_STUDY = 2.5  # mean of a Poisson draw, whether the study holds a bleed or not
KIND_SHARE = (0.17, 0.23, 0.19, 0.2, 0.21)  # in the order of SUBTYPES, for bleeds and mimics alike
LONGEST_SLICES = 14  # a bleed this long is surely accepted as the source of a mimic


@dataclass(frozen=True)
class Lesion:
    """One bleed, or one mimic, on the voxels of an ``Anatomy`` (arrays of shape [m])."""

    kind: str  # one of SUBTYPES
    blood: Floats  # weight in [0, 1]; above one half is what the label's mask counts
    oedema: Floats | None  # weight of the darker rim
    hu: float  # of the blood
    slices: tuple[int, int]  # first and last slice, both included
    is_mimic: bool = False


def draw_lesions(rng: np.random.Generator, anatomy: Anatomy) -> tuple[Lesion, ...]:
    """Draw the bleeds and mimics of one study. No two lesions of a kind touch or share a slice."""
    lesions: list[Lesion] = []
    if rng.random() < BLEED_SHARE:
        count = 2 if rng.random() < SECOND_KIND_SHARE else 1
        kinds = rng.choice(SUBTYPES, size=count, replace=False, p=KIND_SHARE)
        lesions += [bleed for kind in kinds if (bleed := draw_lesion(rng, anatomy, str(kind))) is not None]
    for _ in range(int(rng.poisson(MIMICS_PER_STUDY))):
        mimic = draw_mimic(rng, anatomy, str(rng.choice(SUBTYPES, p=KIND_SHARE)), lesions)
        if mimic is not None:
            lesions.append(mimic)
    return tuple(lesions)


def draw_mimic(rng: np.random.Generator, anatomy: Anatomy, kind: str, others: list[Lesion]) -> Lesion | None:
    """Cut one slice out of a drawn bleed; None if every attempt lies too close to a lesion of its kind."""
    for _ in range(ATTEMPTS):
        source = draw_lesion(rng, anatomy, kind)
        if source is None:
            return None
        # Most slices of true bleeds belong to long bleeds: weigh sources by their length.
        first, last = source.slices
        if rng.random() * LONGEST_SLICES > last - first + 1:
            continue
        level = int(rng.integers(first, last + 1))
        close = (o.slices[0] - MIN_SLICES < level < o.slices[1] + MIN_SLICES for o in others if o.kind == kind)
        if not any(close):
            return replace(keep_slices(anatomy, source, (level, level)), is_mimic=True)
    return None


def draw_lesion(rng: np.random.Generator, anatomy: Anatomy, kind: str) -> Lesion | None:
    """Draw a bleed of ``kind`` that spans at least MIN_SLICES neighbouring slices; None if it won't fit."""
    for _ in range(ATTEMPTS):
        draw_blood, hu_range = KINDS[kind]
        blood, oedema = draw_blood(rng, anatomy)
        hu = float(rng.uniform(*hu_range))
        present = slice_area_mm2(anatomy, blood) >= MIN_AREA_MM2
        edges = np.flatnonzero(np.diff(np.concatenate([[False], present, [False]]).astype(np.int8)))
        runs = [(int(start), int(stop) - 1) for start, stop in edges.reshape(-1, 2)]
        span = max(runs, key=lambda run: run[1] - run[0], default=(0, -1))  # the first of the longest
        if span[1] - span[0] + 1 >= MIN_SLICES:
            return keep_slices(anatomy, Lesion(kind, blood, oedema, hu, span), span)
    return None


def keep_slices(anatomy: Anatomy, lesion: Lesion, span: tuple[int, int]) -> Lesion:
    """Return ``lesion`` with everything outside the slices ``span`` (both included) taken away."""
    level = slice_of_voxel(anatomy)
    kept = ((level >= span[0]) & (level <= span[1])).astype(np.float32)
    oedema = None if lesion.oedema is None else lesion.oedema * kept
    return replace(lesion, blood=lesion.blood * kept, oedema=oedema, slices=span)


def slice_of_voxel(anatomy: Anatomy) -> Ints:
    """Slice number of each voxel, shape [m]."""
    return np.asarray(anatomy.voxels // anatomy.geometry.size_px**2, dtype=np.int64)


def slice_area_mm2(anatomy: Anatomy, blood: Floats) -> Floats:
    """Area of the mask (weight above one half) in each slice, mm2, shape [slices]."""
    counted = np.bincount(slice_of_voxel(anatomy)[blood > 0.5], minlength=anatomy.geometry.n_slices)
    return np.asarray(counted * anatomy.geometry.pixel_mm**2, dtype=np.float64)


def _epidural(rng: np.random.Generator, anatomy: Anatomy) -> tuple[Floats, None]:
    """A lens between skull and dura: the vault cut by a ball that bulges inward."""
    at = anatomy.points
    near = (anatomy.depth_mm > 0) & (anatomy.depth_mm < 3) & (anatomy.brain > 0.9)
    side = np.sign(rng.uniform(-1, 1)) * at.x > 28  # away from the midline
    seat = int(rng.choice(np.flatnonzero(near & side & (at.z > 0) & (at.z < 62))))
    centre = np.array([at.x[seat], at.y[seat], at.z[seat]], dtype=np.float64)
    out = centre - (0, 0, 20)
    out /= np.linalg.norm(out)
    half_length, thickness = rng.uniform(15, 32), rng.uniform(5, 15)
    radius = (half_length**2 + thickness**2) / (2 * thickness)
    x, y, z = centre + out * (radius - thickness)
    ball = ellipsoid(at, (x, y, z), (radius, radius, radius))
    return inside(ball) * inside(-anatomy.depth_mm) * anatomy.brain, None


def _subdural(rng: np.random.Generator, anatomy: Anatomy) -> tuple[Floats, None]:
    """A crescent along one hemisphere; it crosses sutures and stops at the falx."""
    at = anatomy.points
    side = np.float32(rng.choice([-1, 1]))
    angle = np.arctan2(at.y, side * at.x)
    spread = np.deg2rad(rng.uniform(35, 75))
    along = (angle - np.deg2rad(rng.uniform(-25, 35))) / np.float32(spread)
    up = (at.z - np.float32(rng.uniform(12, 55))) / np.float32(rng.uniform(14, 40))
    profile = np.sqrt(np.clip(1 - along**2, 0, 1) * np.clip(1 - up**2, 0, 1))
    thickness = np.float32(rng.uniform(4, 13)) * profile * (1 + 0.12 * ripple(rng, at, 40))
    crescent = np.maximum(anatomy.depth_mm - thickness, 2 - side * at.x)
    return inside(crescent) * (profile > 0) * (at.z > 0) * anatomy.brain, None


# Where bleeds within the brain arise: lentiform nucleus, thalamus, lobes, cerebellum, pons (x, y, z, mm).
SEATS = ((26, -4, 24), (12, 11, 25), (40, -35, 38), (42, 20, 45), (38, 48, 40), (44, 0, 0), (24, 45, -4), (0, 4, -2))


def _intraparenchymal(rng: np.random.Generator, anatomy: Anatomy) -> tuple[Floats, Floats]:
    """A lumpy clot in the brain with a rim of oedema around it."""
    seat = np.array(SEATS[int(rng.choice(len(SEATS), p=[0.25, 0.14, 0.14, 0.14, 0.13, 0.06, 0.1, 0.04]))], dtype=float)
    x, y, z = seat * (rng.choice([-1, 1]), 1, 1) + rng.normal(0, 3.5, 3)
    size = float(np.exp(rng.uniform(np.log(5.5), np.log(18))))
    radii = size * rng.uniform(0.8, 1.25, 3)
    at = anatomy.points
    near = np.flatnonzero((np.abs(at.x - x) < 45) & (np.abs(at.y - y) < 45) & (np.abs(at.z - z) < 45))
    points = at.take(near)
    lump = ellipsoid(points, (x, y, z), (radii[0], radii[1], max(radii[2], 7.0)))
    lump += np.float32(0.13 * size) * ripple(rng, points, 22)
    fits = anatomy.brain[near] * inside(3 - anatomy.depth_mm[near])
    rim = np.float32(rng.uniform(2, 6)) * (1 + 0.4 * ripple(rng, points, 25))
    blood, oedema = np.zeros_like(at.x), np.zeros_like(at.x)
    blood[near] = inside(lump) * fits
    oedema[near] = inside(lump - rim, 3.0) * fits * inside(-anatomy.ventricle_mm[near])
    return blood, oedema


def _intraventricular(rng: np.random.Generator, anatomy: Anatomy) -> tuple[Floats, None]:
    """Blood in the ventricles: a level in the dependent horns, or a cast of one side or of all."""
    at = anatomy.points
    chamber = inside(anatomy.ventricle_mm)
    if rng.random() < 0.6:  # the patient lies on the back: blood settles behind
        level = np.float32(rng.uniform(8, 42))
        part = inside(level - at.y, 1.5) * (at.z > 8)
    else:
        part = inside(np.float32(rng.uniform(-35, 10)) - at.y)
    sides = rng.choice(3, p=[0.3, 0.3, 0.4])
    if sides < 2:
        part *= inside(np.float32(1 - 2 * sides) * at.x)
    return np.asarray(chamber * part * anatomy.brain, dtype=np.float32), None


# Where subarachnoid blood gathers: suprasellar cistern, Sylvian fissures, convexities, between the hemispheres.
POOLS = ((0, -10, 8), (42, -8, 20), (48, 10, 40), (40, -40, 45), (35, 45, 48), (2, -50, 40))


def _subarachnoid(rng: np.random.Generator, anatomy: Anatomy) -> tuple[Floats, None]:
    """Blood in place of the fluid of sulci and cisterns, around one pool."""
    pool = np.array(POOLS[int(rng.choice(len(POOLS), p=[0.3, 0.3, 0.1, 0.1, 0.1, 0.1]))], dtype=float)
    x, y, z = pool * (rng.choice([-1, 1]), 1, 1) + rng.normal(0, 4, 3)
    reach = rng.uniform(18, 45)
    at = anatomy.points
    ball = ellipsoid(at, (x, y, z), (reach, reach, 0.8 * reach)) + np.float32(0.15 * reach) * ripple(rng, at, 35)
    # Blood swells a sulcus, so that a thin one counts too; the cerebellum's own folia are left alone.
    filled = np.clip(1.7 * anatomy.fluid, 0, 1) * (anatomy.depth_mm > 1.0) * (1 - 0.6 * cerebellum(at))
    return np.asarray(inside(ball, 8.0) * filled * anatomy.brain, dtype=np.float32), None


# Per kind the function that draws it and the range of its HU.
KINDS: dict[str, tuple[Draw, tuple[int, int]]] = {
    "epidural": (_epidural, (58, 76)),
    "intraparenchymal": (_intraparenchymal, (56, 80)),
    "intraventricular": (_intraventricular, (50, 74)),
    "subarachnoid": (_subarachnoid, (50, 68)),
    "subdural": (_subdural, (48, 74)),
}
