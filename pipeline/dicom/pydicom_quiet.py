"""Reading DICOM without pydicom's remarks, also from several threads."""

from __future__ import annotations

import threading
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydicom import config

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Switch:
    """Turns the remarks off for the first one to enter and on again after the last one has left.

    ``warnings.catch_warnings`` alone is not safe in threads: two that overlap restore each other's filter.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._turn_off()

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                config.settings.reading_validation_mode = self._mode
                self._catcher.__exit__(None, None, None)

    def _turn_off(self) -> None:
        self._mode = config.settings.reading_validation_mode
        self._catcher = warnings.catch_warnings()
        self._catcher.__enter__()
        warnings.simplefilter("ignore")
        config.settings.reading_validation_mode = config.IGNORE


_switch = _Switch()


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Silence pydicom's remarks on odd but usable files, such as RSNA's UIDs ``ID_…``."""
    _switch.enter()
    try:
        yield
    finally:
        _switch.leave()
