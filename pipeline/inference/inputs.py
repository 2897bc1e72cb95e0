"""Collects the inputs of `predict`: finds, orders, chooses and checks series, and accounts for every file."""

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
    """Slices to predict, and all other files with the reason."""

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
    if force:
        slices, rejected, overruled = _read_by_force(slices, rejected, pseudonyms)
    chosen = select_series(slices, rejected, params, one_per_study=one_per_study)
    rejected = pd.concat([rejected, chosen.left_out], ignore_index=True)
    if not judged:
        return Inputs(chosen.slices, chosen.series, pd.DataFrame(columns=REFUSED_COLUMNS), rejected, {})
    verdict = check_head_ct(chosen.slices, chosen.series, params, overruled, force=force)
    reasons = verdict.refused.set_index("series_uid")["reason"]
    stopped = chosen.slices[chosen.slices["series_uid"].isin(reasons.index)]
    stopped = stopped.assign(reason="refused: " + stopped["series_uid"].map(reasons).astype(str))
    rejected = pd.concat([rejected, stopped[REJECTED]], ignore_index=True)
    return Inputs(verdict.slices, chosen.series, verdict.refused, rejected, verdict.forced)


def read_list(text: str, source: str) -> list[Path]:
    """Return the paths of a list, one a line; blank lines and lines that begin with # don't count.

    Relative paths start from the current folder. Raises DataError where there is none.
    """
    lines = [line.strip() for line in text.lstrip("\ufeff").splitlines()]
    paths = [Path(line) for line in lines if line and not line.startswith("#")]
    if not paths:
        raise DataError(f"{source} names no path; write one path a line")
    return paths


def expand(arguments: Iterable[Path]) -> list[Path]:
    """Replace each ``@FILE`` by the paths that FILE lists, unless a file named ``@FILE`` exists."""
    paths: list[Path] = []
    for argument in arguments:
        name = str(argument)
        if not name.startswith("@") or argument.exists():
            paths.append(argument)
            continue
        source = Path(name[1:])
        try:
            paths += read_list(source.read_text(encoding="utf-8"), str(source))
        except FileNotFoundError as error:
            raise MissingFileError(f"{source} does not exist; @FILE names a list of paths, one a line") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{source} is not UTF-8 text; @FILE names a list of paths, one a line") from error
    return paths


def _read_by_force(
    slices: pd.DataFrame, rejected: pd.DataFrame, pseudonyms: Pseudonyms | None
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, str]]:
    """Read files again that were rejected for modality or kind, of studies that have no usable slice."""
    forceable = rejected["reason"].str.startswith(FORCEABLE) & ~rejected["study_uid"].isin(slices["study_uid"])
    if not forceable.any():
        return slices, rejected, {}
    reasons = rejected[forceable].set_index("path")["reason"]
    read, still_rejected = scan([Path(path) for path in reasons.index], force=True, pseudonyms=pseudonyms)
    first_paths = read.drop_duplicates("series_uid").set_index("series_uid")["path"]
    filled = [table for table in (slices, read) if len(table)]
    return (
        pd.concat(filled, ignore_index=True) if filled else slices,
        pd.concat([rejected[~forceable], still_rejected], ignore_index=True),
        {str(uid): str(reason) for uid, reason in first_paths.map(reasons).items()},
    )
