"""The project's errors. Library code raises them; only the command line prints and exits.

Each child is also the builtin that a caller would catch. A message says what was sought, where,
what is there instead, and what to do. It never holds a patient's name or birth date.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class IchpipeError(Exception):
    """Base of every error that a user's input, data or machine can cause."""


class ParamsError(IchpipeError, ValueError):
    """A parameter file or a ``--set`` holds an unknown key or a value out of range."""


class MissingFileError(IchpipeError, FileNotFoundError):
    """An input that an earlier stage should have written, or the user should have named, is absent."""


class OutputError(IchpipeError, OSError):
    """A file can't be written: the disk is full, or the folder takes none."""


class BusyError(IchpipeError, RuntimeError):
    """Another process is writing the same outputs."""


class DataError(IchpipeError, ValueError):
    """A table or a set of DICOM files can't be used as it stands."""


class UnreadableDicomError(DataError):
    """One file is no DICOM slice that can be used; the message is the reason for ``rejected.csv``."""

    series: tuple[str, str] = ("", "")  # StudyInstanceUID and SeriesInstanceUID of the file, where they could be read


class WeightsError(IchpipeError, ValueError):
    """A weights file can't be read, or belongs to another model."""


class StoreUnusableError(IchpipeError, RuntimeError):
    """The embedding store is absent, damaged, or made by another network than the one asked for."""


class TrainingError(IchpipeError, RuntimeError):
    """Training can't start or can't go on (nothing to learn from, loss not finite)."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean …?)`` with the word of ``known`` that is nearest, or nothing where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
