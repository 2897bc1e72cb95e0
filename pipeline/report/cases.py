"""Chooses the held-out studies that the page shows: worst misses, worst false alarms, best finds."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ichpipe.report.page import Picture

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Case:
    """One held-out series, and why it is shown."""

    series_uid: str
    kind: str
    score: float


def choose_cases(series: pd.Series, positive: NDArray[np.bool_], score: NDArray[np.float64], count: int) -> list[Case]:
    """Choose ``count`` of each kind by the study's score. No study is chosen twice.

    ``series`` [n] are Series Instance UIDs, ``positive`` [n] says which have a bleed, ``score`` [n] is P(any).
    """
    kinds = (
        ("Worst misses: a bleed, and the lowest score", positive, score),
        ("Worst false alarms: no bleed, and the highest score", ~positive, -score),
        ("Best finds: a bleed, and the highest score", positive, -score),
    )
    cases: list[Case] = []
    for kind, group, order in kinds:
        chosen = {case.series_uid for case in cases}
        rows = [row for row in np.argsort(order, kind="stable") if group[row] and series.iloc[row] not in chosen]
        cases += [Case(str(series.iloc[row]), kind, float(score[row])) for row in rows[:count]]
    return cases


def as_picture(png: bytes, alt: str, caption: str) -> Picture:
    """Pack a contact sheet as WebP, a fifth of the size of the PNG; same bytes in, same bytes out."""
    with Image.open(io.BytesIO(png)) as image:
        webp = io.BytesIO()
        image.convert("RGB").save(webp, "WEBP", quality=80, method=4)
        return Picture(webp.getvalue(), image.width, image.height, alt, caption)
