"""Collects and checks the inputs of `predict`: the series to predict, and a reason for every other file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pandas as pd

from ichpipe.common.errors import DataError, MissingFileError, NotCtError
from ichpipe.common.files import decode_text
from ichpipe.index.scan import REJECTED, scan
from ichpipe.index.series_selection import axial, find_faults, select_series

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ichpipe.common.pseudonyms import Pseudonyms
    from ichpipe.params.schema import SelectionParams

# Keys of the faults that refuse a series. With other faults (bone kernel, loss, thin) it is still a head CT.
REFUSING_FAULTS: Final = (
    "unusable", "absurd values", "not a head", "other examination", "too little", "contrast", "turned"
)  # fmt: skip
REFUSED_COLUMNS: Final = ["patient_id", "study_uid", "series_uid", "n_slices", "reason"]


@dataclass(frozen=True)
class Inputs:
    """Slices to predict, and the reason for every other file."""

    slices: pd.DataFrame  # as ``scan`` returns them
    series: pd.DataFrame  # one row a series: facts, ``chosen``, ``reason``
    refused: pd.DataFrame  # REFUSED_COLUMNS: series that are not plain head CT, and studies without a usable one
    rejected: pd.DataFrame  # path, reason, study_uid, series_uid: every file that is not used
    forced: dict[str, str]  # by UID: why a series that is predicted by force would have been refused


def collect_inputs(
    paths: Sequence[Path],
    params: SelectionParams,
    workers: int = 1,
    *,
    one_per_study: bool = True,
    judged: bool = True,
    force: bool = False,
    pseudonyms: Pseudonyms | None = None,
) -> Inputs:
    """Find the slices below ``paths`` and decide which of them are predicted.

    Without ``judged`` nothing is refused. ``force`` keeps all series that have Hounsfield units. With ``pseudonyms``
    the result holds no PatientID.
    """
    slices, rejected = scan(list(paths), workers, pseudonyms=pseudonyms)
    overruled: dict[str, str] = {}
    if force:  # read again what was rejected for modality or kind, of studies that have no usable slice
        again = (rejected["code"] == NotCtError.code) & ~rejected["study_uid"].isin(slices["study_uid"])
        if again.any():
            reasons = rejected[again].set_index("path")["reason"]
            read, unread = scan(list(paths), force=True, only=set(reasons.index), pseudonyms=pseudonyms)
            first_paths = read.drop_duplicates("series_uid").set_index("series_uid")["path"]
            overruled = {str(uid): str(reason) for uid, reason in first_paths.map(reasons).items()}
            slices = pd.concat([table for table in (slices, read) if len(table)] or [slices], ignore_index=True)
            rejected = pd.concat([rejected[~again], unread], ignore_index=True)
    chosen = select_series(slices, rejected, params, one_per_study=one_per_study)
    rejected = pd.concat([rejected, chosen.left_out], ignore_index=True)
    if not judged:
        return Inputs(chosen.slices, chosen.series, pd.DataFrame(columns=REFUSED_COLUMNS), rejected, {})
    slices, refused, forced = check_head_ct(chosen.slices, chosen.series, params, overruled, force=force)
    reasons = refused.set_index("series_uid")["reason"]
    files = chosen.slices[chosen.slices["series_uid"].isin(reasons.index)]
    files = files.assign(reason="refused: " + files["series_uid"].map(reasons).astype(str))
    rejected = pd.concat([rejected, files.assign(code="")[REJECTED]], ignore_index=True)
    return Inputs(slices, chosen.series, refused, rejected, forced)


def check_head_ct(
    slices: pd.DataFrame,
    series: pd.DataFrame,
    params: SelectionParams,
    overruled: Mapping[str, str] | None = None,
    *,
    force: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, str]]:
    """Reject series that are not plain head CT, by headers and extent: a network gives a probability for any image.

    ``slices`` and ``series`` are those of ``select_series``. ``overruled`` gives the reason, by UID, of series that
    were read only by force. A series without a usable slice is refused even by force. Series that were passed over are
    not listed: another one stands for their study. Returns slices, refused and forced as in ``Inputs``.
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
    return slices[~slices["series_uid"].isin(table["series_uid"])].reset_index(drop=True), table, forced


def read_list(content: bytes, source: str) -> list[Path]:
    """Return the paths of a list, one a line, without blank lines and remarks (#). Raises DataError if none is left."""
    lines = [line.strip() for line in decode_text(content, source).splitlines()]
    paths = [Path(line) for line in lines if line and not line.startswith("#")]
    if not paths:
        raise DataError(f"{source} names no path; write one path a line")
    return paths


def expand(arguments: Iterable[Path]) -> list[Path]:
    """Replace each ``@FILE`` by the paths that FILE lists, unless a file named ``@FILE`` exists."""
    paths: list[Path] = []
    for argument in arguments:
        if not str(argument).startswith("@") or argument.exists():
            paths.append(argument)
            continue
        source = str(argument)[1:]
        try:
            paths += read_list(Path(source).read_bytes(), source)
        except FileNotFoundError as error:
            raise MissingFileError(f"{source} does not exist; @FILE names a list of paths, one a line") from error
    return paths
