"""Draws the phantom's contact sheet: ``python docs/tools/phantom_sheet.py docs/phantom.png``."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ichpipe.common.classes import SUBTYPES
from ichpipe.phantom.study import Study, make_study

COLUMNS = 8
Tile = tuple[str, NDArray[np.int16]]


def save_sheet(path: Path, seed: int = 0, size_px: int = 128) -> None:
    """Draw a normal head; then, per kind, four neighbouring slices of a bleed and four around a mimic.

    All are in the brain window (level 40, width 80 HU). A mimic lies in one slice only.
    """
    normal = next(study for study in (make_study(seed, index, size_px) for index in count()) if not study.lesions)
    levels = np.linspace(1, len(normal.hu) - 4, COLUMNS).round().astype(int)
    rows: list[list[Tile]] = [[("no finding", normal.hu[level]) for level in levels]]
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
    candidates = []
    for study in studies:
        for lesion in study.lesions:
            if lesion.kind == kind and lesion.is_mimic == is_mimic:
                areas = study.mask(lesion).sum(axis=(1, 2))
                first = min(max(int(np.argmax(areas)) - 1, 0), len(study.hu) - 4)
                others = sum(o.slices[0] <= first + 3 and o.slices[1] >= first for o in study.lesions) - 1
                # Area times contrast; less where other lesions lie in the same picture.
                candidates.append((float(areas.max()) * (lesion.hu - 35) * 0.2**others, study, lesion, first))
    _, study, lesion, first = max(candidates, key=lambda candidate: candidate[0])
    name = f"{kind} mimic" if is_mimic else kind
    levels = range(first, first + 4)
    return [(name if lesion.slices[0] <= k <= lesion.slices[1] else "", study.hu[k]) for k in levels]


if __name__ == "__main__":
    save_sheet(Path(sys.argv[1]))
