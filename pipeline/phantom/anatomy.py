"""Skull, brain and fluid spaces of a head in Hounsfield units, as functions of position.

Sizes follow common neuroanatomy atlases, and HU clinical CT (fluid 5, white matter 28, grey matter 37, bone 700 to
1500, fat -80, air -1000). Proportions differ between patients.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ichpipe.common.constants import AIR_HU
from ichpipe.phantom.fields import Floats, Geometry, Ints, Points, RandomField, blend, capsule, ellipsoid, inside

FLUID_HU, WHITE_HU, GREY_HU, DURA_HU = 5.0, 28.0, 37.0, 52.0
MUSCLE_HU, FAT_HU, BONE_HU = 50.0, -80.0, 1000.0
# One lateral ventricle from the frontal horn over body and atrium to the occipital horn, then the temporal
# horn: (x, y, z) and radius, mm.
HORNS = (((14.0, -40.0, 24.0), 3.0), ((8.0, -24.0, 30.0), 4.6), ((11.0, 0.0, 38.0), 4.8),
         ((21.0, 28.0, 31.0), 6.8), ((21.0, 54.0, 24.0), 3.4))  # fmt: skip
TEMPORAL_HORN = (((21.0, 28.0, 31.0), 5.0), ((30.0, 12.0, 10.0), 2.4), ((28.0, -6.0, 3.0), 1.5))


@dataclass(frozen=True)
class Head:
    """One patient's proportions; the same in all studies of that patient."""

    scale: tuple[float, float, float]  # of the standard head along x, y, z
    egg: float  # how much wider the back is than the front
    skew: float  # one-sided flattening at the back
    skull_mm: float
    scalp_mm: float
    bone_hu: float
    atrophy: float  # 0 young and full, 1 old and shrunken
    ventricles: tuple[float, float]  # radius factors, right and left
    pineal_hu: float  # 0: not calcified
    plexus_hu: float
    sinus: float  # size of the frontal sinus, 0 to 1
    folds: RandomField  # sulci: its zeros
    slow: RandomField  # thickness of bone, density of tissue

    def inner_table(self, points: Points) -> Floats:
        """Signed distance to the inner surface of the skull vault, mm, negative inside."""
        half_width, half_length = 66.0 * self.scale[0], 83.0 * self.scale[1]
        shift = points.y * np.float32(1 / half_length)
        flat = self.skew * np.maximum(points.y, 0) ** 2 * np.float32(1 / half_length)
        # A little more than an ellipse: foreheads are blunt.
        blunt = np.maximum(np.abs(points.y) - 45, 0) * np.float32(0.06)
        x, z = points.x / (1 + self.egg * shift) + flat, points.z - np.float32(20)
        squeezed = Points(x, points.y - np.sign(points.y) * blunt, np.where(z > 0, z, z * np.float32(74 / 92)))
        return ellipsoid(squeezed, (0, 0, 0), (half_width, half_length - 1.0, 74.0 * self.scale[2]))


def draw_head(rng: np.random.Generator) -> Head:
    """Draw a patient."""
    atrophy = float(rng.beta(1.3, 1.8))
    wide = rng.uniform(0.75, 1.0) + 0.75 * atrophy
    size = rng.normal(1.0, 0.025)
    x, y, z = (float(np.clip(size * rng.normal(1, 0.02), 0.93, 1.07)) for _ in range(3))
    return Head(
        scale=(x, y, z),
        egg=float(rng.uniform(0.03, 0.09)),
        skew=float(rng.normal(0, 0.03)),
        skull_mm=float(rng.uniform(5.5, 8.0)),
        scalp_mm=float(rng.uniform(4.0, 7.0)),
        bone_hu=float(rng.uniform(1100, 1500)),
        atrophy=atrophy,
        ventricles=(float(wide * rng.uniform(0.92, 1.08)), float(wide * rng.uniform(0.92, 1.08))),
        pineal_hu=float(rng.uniform(90, 250) * (rng.random() < 0.6)),
        plexus_hu=float(rng.uniform(70, 200) * (rng.random() < 0.5)),
        sinus=float(rng.uniform(0, 1) * (rng.random() < 0.8)),
        folds=RandomField.draw(rng, 15.0),
        slow=RandomField.draw(rng, 60.0),
    )


@dataclass(frozen=True)
class Anatomy:
    """One head on one slice grid. Arrays of shape [m] run over the voxels inside the skull vault."""

    hu: Floats  # [slices, rows, columns]
    voxels: Ints  # flat positions in ``hu``
    points: Points
    depth_mm: Floats  # below the inner table
    brain: Floats  # weight of the intracranial space, 0 in bone and face
    ventricle_mm: Floats  # signed distance to the nearest ventricle
    fluid: Floats  # weight of sulci, fissures and cisterns
    geometry: Geometry


def build_anatomy(head: Head, geometry: Geometry) -> Anatomy:
    """Evaluate ``head`` on the slice grid of ``geometry``, before any scanner effect."""
    everywhere = geometry.head_points()
    distance = head.inner_table(everywhere)
    hu = _shells(head, everywhere, distance)
    voxels = np.flatnonzero(distance < 1.5)
    points = everywhere.take(voxels)
    depth = -distance.ravel()[voxels]
    above = points.z - _skull_base_height(points)
    brain = inside(-np.minimum(depth, above))
    ventricle = _ventricles(head, points)
    fluid = _fluid_spaces(head, points, depth) * (1 - inside(ventricle))
    base = hu.ravel()[voxels]
    _add_face(base, points, above, depth, head.slow.sample(points), head.sinus)
    blend(base, _brain(head, points, depth, fluid, ventricle), brain)
    hu.ravel()[voxels] = base
    return Anatomy(hu, voxels, points, depth, brain, ventricle, fluid, geometry)


def _shells(head: Head, points: Points, distance: Floats) -> Floats:
    """Air, scalp and skull, [slices, rows, columns]; what lies inside the skull is filled in later."""
    hu = np.full(distance.shape, AIR_HU, dtype=np.float32)
    near = np.flatnonzero((distance > -3) & (distance < 45))
    points, gap = points.take(near), distance.ravel()[near]
    # Neck and temple muscles thicken the soft tissue low down at the sides and at the back.
    low = np.clip((np.float32(12) - points.z) / 45, 0, 1)
    muscle = low * (0.35 + np.clip(points.y / 80, 0, 1))
    bone = head.skull_mm * (1 + 0.12 * head.slow.sample(points) + 0.25 * np.clip(np.abs(points.y) / 85 - 0.75, 0, 1))
    skin = bone + head.scalp_mm + 22 * muscle
    shell = np.full(near.shape, AIR_HU, dtype=np.float32)
    blend(shell, 25.0, inside(gap - skin))
    blend(shell, -75.0, inside(gap - skin + 2.2) * (1 - 0.5 * np.clip(3 * muscle, 0, 1)))
    blend(shell, 55.0, inside(gap - bone - 20 * muscle - 0.5) * np.clip(6 * low, 0, 1))
    blend(shell, head.bone_hu, inside(gap - bone))
    blend(shell, 0.45 * head.bone_hu, inside(np.abs(gap - 0.5 * bone) - 0.2 * bone, 1.5))  # diploe
    hu.ravel()[near] = shell
    hu[distance < -1.5] = 40.0
    return hu


def _ventricles(head: Head, points: Points) -> Floats:
    """Signed distance to lateral, third and fourth ventricles, mm."""
    size = np.where(points.x < 0, np.float32(head.ventricles[0]), np.float32(head.ventricles[1]))
    nearest = np.full(points.x.shape, 99.0, dtype=np.float32)
    core = np.flatnonzero((np.abs(points.x) < 48) & (np.abs(points.y) < 66) & (points.z < 58))
    half = points.take(core).mirror()
    grown = np.float32(4.5) * (size[core] - 1)
    lateral = nearest[core]
    for tube in (HORNS, TEMPORAL_HORN):
        for (start, first), (end, last) in pairwise(tube):
            lateral = np.minimum(lateral, capsule(half, start, end, (first, last)) - grown)
    lateral = np.maximum(lateral, np.float32(1.2) - half.x)  # the septum keeps the two sides apart
    mean = sum(head.ventricles) / 2
    third = ellipsoid(half, (0, 2, 21), (1.6 + 1.6 * mean, 14, 9))
    fourth = ellipsoid(half, (0, 27, -6), (4 + 3 * mean, 4 + 2 * mean, 11))
    nearest[core] = np.minimum(np.minimum(lateral, third), fourth)
    return nearest


def _fluid_spaces(head: Head, points: Points, depth: Floats) -> Floats:
    """Weight of sulci, fissures and basal cisterns in [0, 1]."""
    half, loss = points.mirror(), np.float32(head.atrophy)
    shallow = np.clip(1 - depth / (16 + 8 * loss), 0, 1)
    # Near its zeros a field of wavelength L and deviation 1 is about L / (2 pi) times the distance to them.
    crease = np.abs(head.folds.sample(points)) * np.float32(15 / (2 * np.pi))
    width = (0.35 + 1.15 * loss) * shallow + 0.5 * shallow - 0.7 * (1 - shallow)
    sulci = inside(crease - width, 2.2) * np.clip(3 * shallow, 0, 1) * (0.45 + 0.55 * loss)
    sulci *= 1 - 0.75 * cerebellum(points)
    rim = inside(depth - (0.6 + 1.8 * loss))
    # The patient's own fields bend the fissures: a brain has no straight lines.
    bend, wave = 2.5 * head.slow.sample(points), 0.7 * head.folds.sample(points)
    bent = Points(half.x + 0.6 * bend * (half.x > 12) + wave * (half.x > 12), half.y + bend + wave, half.z + bend)
    x, y, z = bent.x, bent.y, bent.z
    # Sylvian and interhemispheric fissures
    cleft = np.maximum(np.abs(y + 10 - 0.6 * (z - 15)) - (0.7 + 1.5 * loss), np.float32(37) - x)
    insula = np.maximum(np.abs(x - 38 - 0.002 * (y + 2) ** 2) - (0.5 + 1.3 * loss), np.abs(y + 2) - 20)
    sylvian = np.maximum(np.minimum(cleft, insula), np.abs(z - 21) - 13)
    midline = np.maximum(x - (0.5 + 1.6 * loss), np.minimum(y + 34, np.float32(46) - z))
    fissures = np.asarray(np.minimum(sylvian, midline), dtype=np.float32)
    suprasellar = ellipsoid(bent, (0, -12, 7), (13, 10, 7))
    prepontine = ellipsoid(bent, (0, -6, -8), (11, 3.5, 14))
    ambient = np.maximum.reduce([np.abs(np.sqrt(x**2 + (y - 8) ** 2) - 16) - 1.2, np.abs(z - 12) - 7, 6 - y])
    quadrigeminal, great = ellipsoid(bent, (0, 25, 16), (9, 4, 7)), ellipsoid(bent, (0, 58, -28), (13, 6, 9))
    cisterns = np.minimum.reduce([suprasellar, prepontine, ambient, np.minimum(quadrigeminal, great)])
    pools = inside(np.asarray(cisterns, dtype=np.float32)) * (0.65 + 0.35 * loss)
    return np.asarray(np.maximum.reduce([sulci, rim, inside(fissures, 3.0), pools]))


def tentorium_mm(points: Points) -> Floats:
    """Height above the tentorium, mm: a tent with its ridge along the midline, falling to the sides and back."""
    roof = 25 - 0.32 * np.abs(points.x) - 0.26 * (points.y - 20)
    return np.asarray(points.z - roof, dtype=np.float32)


def cerebellum(points: Points) -> Floats:
    """Weight of the space under the tentorium behind the brain stem."""
    behind = 15 + 0.25 * np.abs(points.x) - points.y
    return inside(np.maximum(tentorium_mm(points), behind), 3.0)


def _brain(head: Head, points: Points, depth: Floats, fluid: Floats, ventricle: Floats) -> Floats:
    """HU of everything inside the dura, shape [m]."""
    half = points.mirror()
    slow = head.slow.sample(points)
    hu = WHITE_HU + 0.8 * slow
    crease = np.abs(head.folds.sample(points)) * np.float32(15 / (2 * np.pi))
    reach = np.clip(1.6 - depth / 18, 0, 1)
    ribbon = np.maximum(inside(crease - 2.6 * reach, 2.5) * np.clip(2 * reach, 0, 1), inside(depth - 5.5, 3.0))
    insula = np.maximum(np.abs(half.x - 36) - 2.5, np.maximum(np.abs(half.y + 2) - 22, np.abs(half.z - 21) - 14))
    blend(hu, GREY_HU, np.maximum(ribbon, inside(insula)))
    turned = Points(half.x - 0.35 * (half.y + 4), half.y, half.z)
    caudate = ellipsoid(half, (13, -23, 27), (4.5, 9, 11))
    lentiform = ellipsoid(turned, (25, -5, 22), (5.5, 16, 10))
    thalamus = ellipsoid(half, (11, 10, 25), (7.5, 13, 9))
    blend(hu, GREY_HU + 1.0, inside(np.minimum(np.minimum(caudate, lentiform), thalamus), 2.5))
    below = cerebellum(points)
    blend(hu, GREY_HU - 2.5 + 1.5 * np.sin(0.9 * points.z - 0.5 * points.y), below)
    blend(hu, 31.0, inside(ellipsoid(half, (0, 8, -8), (15, 12, 30))))  # brain stem
    blend(hu, FLUID_HU, fluid)
    # Dura: falx, tentorium, and the superior sagittal sinus, which runs inside the vault along the midline
    edge = np.minimum(np.float32(44) - 0.3 * points.y - points.z, np.float32(42) - np.abs(points.y))
    falx = np.maximum(np.maximum(np.abs(points.x) - 0.6, edge), 8 - points.z)
    blend(hu, DURA_HU, 0.8 * inside(falx, 1.6))
    tent = np.maximum(np.abs(tentorium_mm(points)) - 0.8, 22 - points.y)
    blend(hu, DURA_HU - 4, 0.7 * inside(tent, 2.5) * np.clip(below * 2, 0, 1))
    sinus = np.maximum(np.abs(points.x) + 0.8 * depth - 4.5, np.float32(15) - points.z)
    blend(hu, DURA_HU + 3, inside(np.maximum(sinus, 20 - points.y)))
    blend(hu, FLUID_HU, inside(ventricle))
    for value, centre, size in ((head.pineal_hu, (0, 19, 22), 2.6), (head.plexus_hu, (21, 30, 31), 3.0)):
        if value:
            blend(hu, value, inside(ellipsoid(half, centre, (size, size * 1.3, size * 1.3))))
    return hu


def _skull_base_height(points: Points) -> Floats:
    """Height z (mm) of the skull base below each point: front, middle and back fossa, petrous ridge between."""
    x, y = np.abs(points.x), points.y
    front = 16 - 0.018 * (x - 30) ** 2 - 0.01 * (y + 58) ** 2  # the roof of the orbits is a dome
    middle = -22 + 0.012 * (x - 42) ** 2 + 0.01 * (y + 5) ** 2 + 8 * np.exp(-((x / 11) ** 2))
    back = np.full_like(x, -48)
    ridge = y - (0.5 * x - 8)  # the petrous ridge runs outward and back
    height = middle + (front - middle) * _step((-24 - y - 0.15 * x) / 2.5)
    height += (back - height) * _step((ridge - 5) / 2.5)
    petrous = 22 * np.exp(-((ridge / 6.5) ** 2)) * _step((x - 14) / 2) * _step((64 - x) / 3)
    return np.asarray(height + petrous, dtype=np.float32)


def _step(value: Floats) -> Floats:
    return np.asarray(0.5 + 0.5 * np.tanh(value), dtype=np.float32)


def _add_face(hu: Floats, points: Points, above_mm: Floats, depth_mm: Floats, slow: Floats, sinus: float) -> None:
    """Write all that lies below the skull base into ``hu`` [m], in place. ``above_mm``: height above the base."""
    half = points.mirror()
    below = inside(above_mm)
    blend(hu, MUSCLE_HU - 45.0 * np.clip(slow, 0, 1), below)
    blend(hu, BONE_HU, inside(np.abs(above_mm + 1.8) - 1.8))
    petrous = np.maximum(np.abs(half.y - (0.5 * half.x - 8)) - 8, np.maximum(12 - half.x, half.x - 66))
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
