"""The bleeds of a study, and mimics: bleeds cut down to one slice.

The same function draws both, so within that slice a mimic has the shape, position and HU of a true bleed. Only the
neighbouring slices show the difference. On real CT, streaks, partial volume, vessels and calcium look like this.
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
        # Most slices of true bleeds belong to long bleeds: weigh sources by their length.
        if rng.random() * LONGEST_SLICES > source.n_slices:
            continue
        level = int(rng.integers(source.slices[0], source.slices[1] + 1))
        close = (o.slices[0] - MIN_SLICES < level < o.slices[1] + MIN_SLICES for o in others if o.kind == kind)
        if not any(close):
            return replace(keep_slices(anatomy, source, (level, level)), is_mimic=True)
    return None
