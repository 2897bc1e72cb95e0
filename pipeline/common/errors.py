"""The errors that library code raises; only the command line prints them and exits.

Each class is also the builtin exception that a caller would catch. A message says what is wrong, where, and what to
do. It never contains a patient's name or birth date.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class IchpipeError(Exception):
    """Base of all errors that a user's input, data or machine can cause."""


class ParamsError(IchpipeError, ValueError):
    """A parameter file or a ``--set`` has an unknown key or a value out of range."""


class MissingFileError(IchpipeError, FileNotFoundError):
    """An input file does not exist."""


class OutputError(IchpipeError, OSError):
    """A file can't be written: the disk is full, or the folder is not writable."""


class BusyError(IchpipeError, RuntimeError):
    """Another process is writing the same outputs."""


class DataError(IchpipeError, ValueError):
    """A table or a set of DICOM files can't be used."""


class UnreadableDicomError(DataError):
    """A file is no usable DICOM slice; the message is the reason in ``rejected.csv``."""

    code = ""  # what the program must tell apart; the message is for people
    series: tuple[str, str, str] = ("", "", "")  # StudyInstanceUID, SeriesInstanceUID, PatientID if they are readable


class NotCtError(UnreadableDicomError):
    """A file is an image of another modality or kind, which ``force`` accepts."""

    code = "not ct"


class NotOpenedError(UnreadableDicomError):
    """The operating system refused to open a file, which may pass."""

    code = "not opened"


class FileTooLargeError(UnreadableDicomError):
    """A file is larger than one slice can be."""


class WeightsError(IchpipeError, ValueError):
    """A weights file is not readable, or belongs to another model."""


class StoreUnusableError(IchpipeError, RuntimeError):
    """The embedding store is absent or damaged, or holds embeddings of another network."""


class TrainingError(IchpipeError, RuntimeError):
    """Training can't start or continue (no labelled slices, loss not finite)."""


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return `` (did you mean …?)`` with the candidate most like ``word``, or an empty text."""
    matches = difflib.get_close_matches(word, list(candidates), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""
