"""What a user hands over, as series to predict: found, ordered, chosen, judged; every file accounted for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from ichpipe.common.errors import DataError, MissingFileError
from ichpipe.dicom.slice_header import FORCEABLE
from ichpipe.index.scan import REJECTED, scan
from ichpipe.index.series_selection import choose
from ichpipe.inference.head_ct_check import REFUSED_COLUMNS, judge

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ichpipe.common.pseudonyms import Pseudonyms
    from ichpipe.params.schema import SelectionParams


@dataclass(frozen=True)
class Intake:
    """Slices to predict, and what became of the rest."""

    slices: pd.DataFrame  # as ``scan`` returns them
    series: pd.DataFrame  # one row a series: facts, ``chosen``, ``reason``
    refused: pd.DataFrame  # REFUSED_COLUMNS: studies (or series) that are no head CT
    rejected: pd.DataFrame  # path, reason, study_uid, series_uid: every file that is not used
    forced: dict[str, str]  # series taken by force, and what spoke against it


def take_in(
    paths: Sequence[Path],
    params: SelectionParams,
    workers: int = 1,
    *,
    one_per_study: bool = True,
    judged: bool = True,
    force: bool = False,
    pseudonyms: Pseudonyms | None = None,
) -> Intake:
    """Find the slices below ``paths`` and decide which of them are predicted (``selection``, ``head_ct``).

    Without ``judged`` nothing is refused. ``force`` takes what would be refused, as far as there are Hounsfield units.
    With ``pseudonyms`` no PatientID is in what is returned.
    """
    slices, rejected = scan(list(paths), workers, pseudonyms=pseudonyms)
    overruled: dict[str, str] = {}
    if force:
        slices, rejected, overruled = _by_force(slices, rejected, pseudonyms)
    chosen = choose(slices, rejected, params, one_per_study=one_per_study)
    rejected = pd.concat([rejected, chosen.left_out], ignore_index=True)
    if not judged:
        return Intake(chosen.slices, chosen.series, pd.DataFrame(columns=REFUSED_COLUMNS), rejected, {})
    verdict = judge(chosen.slices, chosen.series, params, overruled, force=force)
    reasons = verdict.refused.set_index("series_uid")["reason"]
    stopped = chosen.slices[chosen.slices["series_uid"].isin(reasons.index)]
    left_out = stopped[["path", "study_uid", "series_uid"]].assign(
        reason="refused: " + stopped["series_uid"].map(reasons).astype(str)
    )
    whole = pd.concat([rejected, left_out[REJECTED]], ignore_index=True)
    return Intake(verdict.slices, chosen.series, verdict.refused, whole, verdict.forced)


def read_list(text: str, source: str) -> list[Path]:
    """Return the paths of a list, one a line; blank lines and lines that begin with # don't count.

    Relative paths start from the current folder. Raises DataError where there is none.
    """
    lines = [line.strip() for line in text.lstrip("\ufeff").splitlines()]
    paths = [Path(line) for line in lines if line and not line.startswith("#")]
    if not paths:
        raise DataError(f"{source} names no path; write one a line")
    return paths


def expand(arguments: Iterable[Path]) -> list[Path]:
    """Replace each ``@FILE`` by the paths that FILE lists; a file whose name begins with @ is meant as it stands."""
    found: list[Path] = []
    for one in arguments:
        name = str(one)
        if not name.startswith("@") or one.exists():
            found.append(one)
            continue
        listed = Path(name[1:])
        try:
            found += read_list(listed.read_text(encoding="utf-8"), str(listed))
        except FileNotFoundError as error:
            raise MissingFileError(f"{listed} does not exist; @FILE names a list of paths, one a line") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{listed} is not UTF-8 text; @FILE names a list of paths, one a line") from error
    return found


def _by_force(
    slices: pd.DataFrame, rejected: pd.DataFrame, pseudonyms: Pseudonyms | None
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, str]]:
    """Read again what was rejected for its modality or kind, of studies that have nothing else."""
    wanted = rejected["reason"].str.startswith(FORCEABLE) & ~rejected["study_uid"].isin(slices["study_uid"])
    if not wanted.any():
        return slices, rejected, {}
    again = rejected[wanted]
    read, still = scan([Path(path) for path in again["path"]], force=True, pseudonyms=pseudonyms)
    reasons = again.set_index("path")["reason"]
    first = read.drop_duplicates("series_uid").set_index("series_uid")["path"].map(reasons)
    both = [part for part in (slices, read) if len(part)]
    whole = pd.concat(both, ignore_index=True) if both else slices
    return whole, pd.concat([rejected[~wanted], still], ignore_index=True), {str(k): str(v) for k, v in first.items()}
