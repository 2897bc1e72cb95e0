"""The slices that go on: one series a study where that is asked for, without what lies below the head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from ichpipe.index.series_selection import choose_series, describe_series, head_slices, read_choices
from ichpipe.index.slice_order import order_series

if TYPE_CHECKING:
    from ichpipe.params.schema import SelectionParams


@dataclass(frozen=True)
class Chosen:
    """What ``choose`` decided; every slice that came in is in ``slices`` or in ``left_out``."""

    slices: pd.DataFrame  # as ``scan`` returns them
    series: pd.DataFrame  # one row a series: its facts, ``chosen``, ``reason``
    left_out: pd.DataFrame  # path, reason, study_uid, series_uid


def choose(slices: pd.DataFrame, rejected: pd.DataFrame, params: SelectionParams, *, one_per_study: bool) -> Chosen:
    """Choose series by the rules of ``selection``; ``slices`` and ``rejected`` are those of ``scan``.

    Without ``one_per_study`` every series with a usable slice is taken, whole, and the table says so.
    """
    series = describe_series(slices, rejected)
    if not one_per_study:
        usable = series["n_slices"] > 0
        taken = series.assign(
            chosen=usable, reason=usable.map({True: "every series is used", False: "no usable slice"})
        )
        return Chosen(slices, taken, rejected.iloc[:0])
    choices = read_choices(Path(params.choices), series) if params.choices else None
    series = choose_series(series, params, choices)
    reason = slices["series_uid"].map(series.set_index("series_uid")["reason"])
    passed_over = ~slices["series_uid"].isin(series.loc[series["chosen"], "series_uid"])
    below = ~passed_over & ~head_slices(slices, params.head_mm)
    kept = slices[~passed_over & ~below]
    if below.any():  # numbers and distances of what is left
        kept, _ = order_series(kept.drop(columns=["slice_index", "position_mm", "spacing_mm"]))
    parts = [
        _left_out(slices[passed_over], "series not chosen: " + reason[passed_over]),
        _left_out(slices[below], f"more than {params.head_mm} mm below the topmost slice: no head"),
    ]
    return Chosen(kept.reset_index(drop=True), series, pd.concat(parts, ignore_index=True))


def _left_out(slices: pd.DataFrame, reason: pd.Series | str) -> pd.DataFrame:
    return slices[["path", "study_uid", "series_uid"]].assign(reason=reason)[
        ["path", "reason", "study_uid", "series_uid"]
    ]
