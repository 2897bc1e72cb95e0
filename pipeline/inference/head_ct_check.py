"""Rejects series that are not plain head CT, by headers and extent: a network gives a probability for any image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import pandas as pd

from ichpipe.index.series_selection import axial, find_faults

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ichpipe.params.schema import SelectionParams

REFUSING_FAULTS: Final = (
    "unusable",
    "absurd values",
    "not a head",
    "other examination",
    "too little",
    "contrast",
    "turned",
)
"""Keys of the faults that refuse a series. With other faults (bone kernel, loss, thin) it is still a head CT."""

REFUSED_COLUMNS: Final = ["patient_id", "study_uid", "series_uid", "n_slices", "reason"]


@dataclass(frozen=True)
class HeadCtCheck:
    """Result of ``check_head_ct``."""

    slices: pd.DataFrame  # of the series to predict
    refused: pd.DataFrame  # REFUSED_COLUMNS: refused series, and studies without a usable one
    forced: dict[str, str]  # by UID: why a series that is predicted by force would have been refused


def check_head_ct(
    slices: pd.DataFrame,
    series: pd.DataFrame,
    params: SelectionParams,
    overruled: Mapping[str, str] | None = None,
    *,
    force: bool = False,
) -> HeadCtCheck:
    """Check the chosen series; ``slices`` and ``series`` are those of ``select_series``.

    ``overruled`` gives the reason, by UID, of series that were read only by force. A series without a usable slice is
    refused even by force. Series that were passed over are not listed: another one stands for their study.
    """
    is_axial = dict(zip(slices["series_uid"], axial(slices), strict=True))
    # Of a study without a chosen series, the largest one gives the most useful reason.
    chosen = series[series["chosen"]]
    rest = series[~series["study_uid"].isin(chosen["study_uid"])]
    rest = rest.sort_values(["study_uid", "n_refused"], ascending=[True, False]).drop_duplicates("study_uid")
    refused, forced = [], {}
    for row in pd.concat([chosen, rest]).sort_index().to_dict("records"):
        uid = str(row["series_uid"])
        faults = find_faults({str(key): value for key, value in row.items()}, params)
        reasons = [overruled[uid]] if overruled and uid in overruled else []
        reasons += [faults[name] for name in REFUSING_FAULTS if name in faults]
        if not is_axial.get(uid, True):
            reasons.append("coronal or sagittal slices; the models know axial ones")
        if reasons and force and row["n_slices"]:
            forced[uid] = "; ".join(reasons)
        elif reasons:
            refused.append({**row, "reason": "; ".join(reasons)})
    table = pd.DataFrame(refused, columns=REFUSED_COLUMNS)
    return HeadCtCheck(slices[~slices["series_uid"].isin(table["series_uid"])].reset_index(drop=True), table, forced)
