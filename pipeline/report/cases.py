"""Which held-out studies are worth a look: the worst misses, the worst false alarms, the best finds."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ichpipe.report.blocks import Picture

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
    """Choose ``count`` of each kind by the study's score; ``series`` (n,), ``positive`` (n,), ``score`` (n,).

    Lowest scores with a bleed, highest without one, highest with one. No study is chosen twice.
    """
    wanted = (
        ("Worst misses: a bleed, and the lowest score", positive, score),
        ("Worst false alarms: no bleed, and the highest score", ~positive, -score),
        ("Best finds: a bleed, and the highest score", positive, -score),
    )
    found: list[Case] = []
    for kind, group, order in wanted:
        taken = {case.series_uid for case in found}
        rows = [row for row in np.argsort(order, kind="stable") if group[row] and series.iloc[row] not in taken]
        found += [Case(str(series.iloc[row]), kind, float(score[row])) for row in rows[:count]]
    return found


def as_picture(png: bytes, alt: str, caption: str) -> Picture:
    """Pack a contact sheet as WebP, which takes a fifth of the PNG's room; same bytes in, same bytes out."""
    with Image.open(io.BytesIO(png)) as image:
        packed = io.BytesIO()
        image.convert("RGB").save(packed, "WEBP", quality=80, method=4)
        return Picture(packed.getvalue(), image.width, image.height, alt, caption)
