"""One synthetic study, a function of the seed and its number only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from ichpipe.common.classes import SUBTYPES
from ichpipe.phantom.anatomy import build_anatomy, draw_head
from ichpipe.phantom.bleeds import Lesion, draw_lesions
from ichpipe.phantom.fields import Geometry, Ints, RandomField, blend, draw_geometry
from ichpipe.phantom.scanner import Scanner, draw_scanner, expose, harden

if TYPE_CHECKING:
    from numpy.typing import NDArray

SECOND_STUDY_CHANCE = 0.1  # of a patient


@dataclass(frozen=True)
class Study:
    """One series of one patient with its lesions and labels."""

    patient_id: str
    study_uid: str
    series_uid: str
    sop_uids: tuple[str, ...]  # slice 0 is the lowest
    hu: NDArray[np.int16]  # [slices, rows, columns]
    lesions: tuple[Lesion, ...]
    geometry: Geometry
    scanner: Scanner
    voxels: Ints  # flat positions of the lesions' voxels in ``hu``

    def mask(self, lesion: Lesion) -> NDArray[np.bool_]:
        """Voxels of one lesion, [slices, rows, columns]."""
        full = np.zeros(self.hu.shape, dtype=np.bool_)
        full.ravel()[self.voxels[lesion.blood > 0.5]] = True
        return full

    @cached_property
    def masks(self) -> NDArray[np.bool_]:
        """True bleeds per subtype, [5, slices, rows, columns] in the order of SUBTYPES; no mimic is in it."""
        full = np.zeros((len(SUBTYPES), *self.hu.shape), dtype=np.bool_)
        for lesion in self.lesions:
            if not lesion.is_mimic:
                full[SUBTYPES.index(lesion.kind)] |= self.mask(lesion)
        return full

    @cached_property
    def labels(self) -> NDArray[np.uint8]:
        """0 or 1, [slices, 6] in the order of CLASSES: any mask voxel in the slice; ``any`` is the maximum."""
        subtypes: NDArray[np.bool_] = np.any(self.masks, axis=(2, 3)).T
        return np.concatenate([subtypes.any(axis=1, keepdims=True), subtypes], axis=1).astype(np.uint8)


def make_study(seed: int, study_index: int, size_px: int) -> Study:
    """Make one study of the data set of a seed, by its number from 0, with ``size_px`` rows and columns a slice."""
    patient = patient_of(seed, study_index)
    rng = np.random.default_rng([seed, 1, study_index])
    head = draw_head(np.random.default_rng([seed, 0, patient]))
    geometry, scanner = draw_geometry(rng, size_px), draw_scanner(rng, size_px)
    anatomy = build_anatomy(head, geometry)
    lesions = draw_lesions(rng, anatomy)
    # A slice has a thickness: it averages its neighbours.
    hu = ndimage.correlate1d(anatomy.hu, np.array([0.1, 0.8, 0.1], np.float32), axis=0, mode="nearest")
    values = hu.ravel()[anatomy.voxels]
    texture = RandomField.draw(rng, 9.0).sample(anatomy.points)  # clot is uneven
    for lesion in lesions:
        if lesion.oedema is not None:
            blend(values, 19.0, lesion.oedema)
        blend(values, lesion.hu + 2.0 * texture, lesion.blood)
    harden(values, anatomy, scanner, rng)
    hu.ravel()[anatomy.voxels] = values
    uids = _identifier(seed, 0, patient), _identifier(seed, 1, study_index), _identifier(seed, 2, study_index)
    sop_uids = tuple(_identifier(seed, 3, study_index * 64 + k) for k in range(geometry.n_slices))
    exposed = expose(hu, scanner, rng, geometry.pixel_mm)
    return Study(*uids, sop_uids, exposed, lesions, geometry, scanner, anatomy.voxels)


def patient_of(seed: int, study_index: int) -> int:
    """Number of the patient of a study. About one patient in ten has two studies, one after the other."""
    # The first n draws of a generator are the same whatever n is.
    returns = np.random.default_rng([seed, 2]).random(study_index + 1) < SECOND_STUDY_CHANCE
    patient, may_return = 0, True
    for has_second in returns[1:]:
        may_return = not (may_return and has_second)
        patient += may_return
    return patient


def _identifier(seed: int, family: int, number: int) -> str:
    """An identifier of the RSNA form, ``ID_`` and nine hexadecimal digits, unique by construction."""
    modulus = 1 << 36
    offset = int.from_bytes(blake2b(str(seed).encode(), digest_size=8).digest()) % modulus
    value = (family << 32 | number) ^ offset
    for shift, odd in ((17, 0x9E3779B97), (15, 0x5851F42D5), (19, 0x2545F4915)):  # each step can be undone
        value ^= value >> shift
        value = value * odd % modulus
    return f"ID_{value ^ value >> 18:09x}"
