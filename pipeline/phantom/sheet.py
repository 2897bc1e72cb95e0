"""Draws the phantom's contact sheet: ``python -m ichpipe.phantom.sheet docs/phantom.png``."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from ichpipe.common.classes import SUBTYPES
from ichpipe.phantom.study import make_study

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ichpipe.phantom.bleeds import Lesion
    from ichpipe.phantom.study import Study

COLUMNS = 8
Tile = tuple[str, "NDArray[np.int16]"]


def save_sheet(path: Path, seed: int = 0, size_px: int = 128) -> None:
    """Draw in the brain window (level 40, width 80 HU) a normal head; then, for each kind, four neighbouring slices
    of a bleed and four around a mimic, which is in one of them only.
    """
    normal = next(study for study in (make_study(seed, index, size_px) for index in count()) if not study.lesions)
    chosen = np.linspace(1, len(normal.hu) - 4, COLUMNS).round().astype(int)
    rows: list[list[Tile]] = [[("no finding", normal.hu[level]) for level in chosen]]
    studies = [make_study(seed, index, size_px) for index in range(60)]
    rows += [_lesion_tiles(studies, kind, False) + _lesion_tiles(studies, kind, True) for kind in SUBTYPES]
    figure = Figure(figsize=(COLUMNS * 1.3, len(rows) * 1.45), facecolor="black")
    axes = figure.subplots(len(rows), COLUMNS, squeeze=False)
    for row, tiles in enumerate(rows):
        for axis, (title, image) in zip(axes[row], tiles, strict=True):
            axis.imshow(image, cmap="gray", vmin=0, vmax=80)
            axis.set_title(title, color="white", fontsize=6, pad=2)
    for axis in axes.ravel():
        axis.set_axis_off()
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.975, 0.02, 0.12)
    figure.savefig(path, dpi=80, metadata={"Software": None})


def _lesion_tiles(studies: list[Study], kind: str, is_mimic: bool) -> list[Tile]:
    """Four neighbouring slices around the plainest lesion of a kind."""
    pairs = ((study, lesion) for study in studies for lesion in study.lesions)
    same = (pair for pair in pairs if pair[1].kind == kind and pair[1].is_mimic == is_mimic)
    study, lesion = max(same, key=lambda pair: _plainness(*pair))
    name = f"{kind} mimic" if is_mimic else kind
    return [(name if lesion.slices[0] <= k <= lesion.slices[1] else "", study.hu[k]) for k in _levels(study, lesion)]


def _plainness(study: Study, lesion: Lesion) -> float:
    """Area of the largest slice times contrast; less where other lesions lie in the same picture."""
    levels = _levels(study, lesion)
    others = sum(other.slices[0] <= levels[-1] and other.slices[1] >= levels[0] for other in study.lesions)
    area = float(study.mask(lesion).sum(axis=(1, 2)).max())
    return area * (lesion.hu - 35) * 0.2 ** (others - 1)


def _levels(study: Study, lesion: Lesion) -> range:
    largest = int(np.argmax(study.mask(lesion).sum(axis=(1, 2))))
    first = min(max(largest - 1, 0), len(study.hu) - 4)
    return range(first, first + 4)


if __name__ == "__main__":
    save_sheet(Path(sys.argv[1]))
