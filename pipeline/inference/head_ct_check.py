"""What a model of head CT is not asked about: another modality or part of the body, localizers, contrast, too little.

A network gives a number for anything. Judged here is what the header says, and how much of a head there is; what the
pixels show is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from ichpipe.index.series_selection import axial, faults_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ichpipe.params.schema import SelectionParams

REFUSED_FOR: Final = ("unusable", "not a head", "other examination", "too little", "contrast", "turned")
"""Keys of ``selection.FAULTS``. Other faults (bone kernel, loss, thin reformats) are of a head CT all the same."""

NOT_AXIAL: Final = "coronal or sagittal slices; the models know axial ones"
REFUSED_COLUMNS: Final = ["patient_id", "study_uid", "series_uid", "n_slices", "reason"]
_DESCRIBED: Final = ["patient_id", "study_uid", "series_uid", "n_slices"]


@dataclass(frozen=True)
class Judged:
    """What ``judge`` decided of the series that stand for their studies."""

    slices: pd.DataFrame  # of the series that are predicted
    refused: pd.DataFrame  # REFUSED_COLUMNS: series that are not, or studies without any usable one
    forced: dict[str, str]  # series that are predicted although there is a reason not to, and the reason


def judge(
    slices: pd.DataFrame,
    series: pd.DataFrame,
    params: SelectionParams,
    overruled: Mapping[str, str] | None = None,
    *,
    force: bool = False,
) -> Judged:
    """Judge the chosen series; ``slices`` and ``series`` are those of ``chosen.choose``.

    ``overruled`` names series that were read only by force, and why they would not have been. A series without a
    usable slice is refused even by force. Series that were passed over are not listed: another one stands for them.
    """
    known = dict(overruled or {})
    level = dict(zip(slices["series_uid"], axial(slices), strict=True))
    rows = [{str(key): value for key, value in row.items()} for row in _candidates(series).to_dict("records")]
    reasons = {str(row["series_uid"]): _why_not(row, params, level, known) for row in rows}
    unusable = {str(row["series_uid"]) for row in rows if not row["n_slices"]}
    stopped = {uid for uid, reason in reasons.items() if reason and (uid in unusable or not force)}
    refused = pd.DataFrame(
        [{**{name: row[name] for name in _DESCRIBED}, "reason": reasons[row["series_uid"]]} for row in rows
         if row["series_uid"] in stopped],
        columns=REFUSED_COLUMNS,
    )  # fmt: skip
    forced = {uid: reason for uid, reason in reasons.items() if reason and uid not in stopped}
    return Judged(slices[~slices["series_uid"].isin(stopped)].reset_index(drop=True), refused, forced)


def _candidates(series: pd.DataFrame) -> pd.DataFrame:
    """Return the chosen series, and of a study without one the series whose refusal says most: the largest."""
    served = set(series.loc[series["chosen"], "study_uid"])
    rest = series[~series["study_uid"].isin(served)].sort_values(["study_uid", "n_refused"], ascending=[True, False])
    return pd.concat([series[series["chosen"]], rest.drop_duplicates("study_uid")]).sort_index()


def _why_not(
    row: dict[str, Any], params: SelectionParams, level: Mapping[str, Any], overruled: Mapping[str, str]
) -> str:
    uid, faults = str(row["series_uid"]), faults_of(row, params)
    reasons = [overruled[uid]] if uid in overruled else []
    reasons += [faults[name] for name in REFUSED_FOR if name in faults]
    if not level.get(uid, True):
        reasons.append(NOT_AXIAL)
    return "; ".join(reasons)
