"""What a study holds: its bleeds, and mimics that look like bleeds but lie in one slice only.

A mimic is a bleed that was drawn by the same function in the same head and cut down to one of its slices.
In that slice it has, by construction, the distribution of shape, place and HU of a true bleed's slice; only
the neighbouring slices tell. On real CT such things are streaks, partial volume of bone, vessels, calcium.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ichpipe.common.classes import SUBTYPES
from ichpipe.phantom.bleeds import ATTEMPTS, MIN_SLICES, Lesion, draw_lesion, keep_slices

if TYPE_CHECKING:
    import numpy as np

    from ichpipe.phantom.anatomy import Anatomy

BLEED_SHARE = 0.45  # of studies
SECOND_KIND_SHARE = 0.3  # of studies with a bleed
MIMICS_PER_STUDY = 2.5  # mean of a Poisson draw, whether the study holds a bleed or not
KIND_SHARE = (0.17, 0.23, 0.19, 0.2, 0.21)  # in the order of SUBTYPES, for bleeds and mimics alike
LONGEST_SLICES = 14  # a bleed this long is surely accepted as the source of a mimic


def draw_lesions(rng: np.random.Generator, anatomy: Anatomy) -> tuple[Lesion, ...]:
    """Draw the bleeds and mimics of one study. No two lesions of a kind touch or share a slice."""
    lesions: list[Lesion] = []
    if rng.random() < BLEED_SHARE:
        count = 2 if rng.random() < SECOND_KIND_SHARE else 1
        kinds = rng.choice(SUBTYPES, size=count, replace=False, p=KIND_SHARE)
        drawn = [draw_lesion(rng, anatomy, str(kind)) for kind in kinds]
        lesions += [lesion for lesion in drawn if lesion is not None]
    for _ in range(int(rng.poisson(MIMICS_PER_STUDY))):
        mimic = draw_mimic(rng, anatomy, str(rng.choice(SUBTYPES, p=KIND_SHARE)), lesions)
        if mimic is not None:
            lesions.append(mimic)
    return tuple(lesions)


def draw_mimic(rng: np.random.Generator, anatomy: Anatomy, kind: str, others: list[Lesion]) -> Lesion | None:
    """Cut one slice out of a drawn bleed; None if none was found at a distance from its like."""
    for _ in range(ATTEMPTS):
        source = draw_lesion(rng, anatomy, kind)
        if source is None:
            return None
        # A slice of a true bleed comes from a long bleed more often than a bleed is long: weigh by length.
        if rng.random() * LONGEST_SLICES > source.n_slices:
            continue
        level = int(rng.integers(source.slices[0], source.slices[1] + 1))
        if not any(other.kind == kind and _near(level, other) for other in others):
            return replace(keep_slices(anatomy, source, (level, level)), is_mimic=True)
    return None


def _near(level: int, other: Lesion) -> bool:
    return other.slices[0] - MIN_SLICES < level < other.slices[1] + MIN_SLICES
