"""Collects and checks the inputs of `predict`: the series to predict, and a reason for every other file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from ichpipe.common.errors import DataError, MissingFileError
from ichpipe.dicom.slice_header import FORCEABLE
from ichpipe.index.scan import REJECTED, scan
from ichpipe.index.series_selection import select_series
from ichpipe.inference.head_ct_check import REFUSED_COLUMNS, check_head_ct

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ichpipe.common.pseudonyms import Pseudonyms
    from ichpipe.params.schema import SelectionParams


@dataclass(frozen=True)
class Inputs:
    """Slices to predict, and the reason for every other file."""

    slices: pd.DataFrame  # as ``scan`` returns them
    series: pd.DataFrame  # one row a series: facts, ``chosen``, ``reason``
    refused: pd.DataFrame  # REFUSED_COLUMNS: studies (or series) that are not plain head CT
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
        again = rejected["reason"].str.startswith(FORCEABLE) & ~rejected["study_uid"].isin(slices["study_uid"])
        if again.any():
            reasons = rejected[again].set_index("path")["reason"]
            read, unread = scan([Path(path) for path in reasons.index], force=True, pseudonyms=pseudonyms)
            first_paths = read.drop_duplicates("series_uid").set_index("series_uid")["path"]
            overruled = {str(uid): str(reason) for uid, reason in first_paths.map(reasons).items()}
            slices = pd.concat([table for table in (slices, read) if len(table)] or [slices], ignore_index=True)
            rejected = pd.concat([rejected[~again], unread], ignore_index=True)
    chosen = select_series(slices, rejected, params, one_per_study=one_per_study)
    rejected = pd.concat([rejected, chosen.left_out], ignore_index=True)
    if not judged:
        return Inputs(chosen.slices, chosen.series, pd.DataFrame(columns=REFUSED_COLUMNS), rejected, {})
    check = check_head_ct(chosen.slices, chosen.series, params, overruled, force=force)
    reasons = check.refused.set_index("series_uid")["reason"]
    refused = chosen.slices[chosen.slices["series_uid"].isin(reasons.index)]
    refused = refused.assign(reason="refused: " + refused["series_uid"].map(reasons).astype(str))
    rejected = pd.concat([rejected, refused[REJECTED]], ignore_index=True)
    return Inputs(check.slices, chosen.series, check.refused, rejected, check.forced)


def read_list(text: str, source: str) -> list[Path]:
    """Return the paths of a list, one a line, without blank lines and remarks (#). Raises DataError if none is left."""
    lines = [line.strip() for line in text.lstrip("\ufeff").splitlines()]
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
            paths += read_list(Path(source).read_text(encoding="utf-8"), source)
        except FileNotFoundError as error:
            raise MissingFileError(f"{source} does not exist; @FILE names a list of paths, one a line") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{source} is not UTF-8 text; @FILE names a list of paths, one a line") from error
    return paths
