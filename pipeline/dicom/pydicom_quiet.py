"""Silences pydicom's remarks while files are read, also in several threads."""

from __future__ import annotations

import threading
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from pydicom import config

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Silence:
    """The readers of all threads share one silence; the last one to leave ends it.

    ``warnings.catch_warnings`` alone is not safe in threads: two that overlap restore each other's filter.
    """

    lock = threading.Lock()
    readers = 0
    restore = ExitStack()


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Silence pydicom's remarks on odd but usable files, such as RSNA's UIDs ``ID_…``."""
    with _Silence.lock:
        _Silence.readers += 1
        if _Silence.readers == 1:
            settings = config.settings
            _Silence.restore.enter_context(warnings.catch_warnings(action="ignore"))
            _Silence.restore.callback(setattr, settings, "reading_validation_mode", settings.reading_validation_mode)
            settings.reading_validation_mode = config.IGNORE
    try:
        yield
    finally:
        with _Silence.lock:
            _Silence.readers -= 1
            if _Silence.readers == 0:
                _Silence.restore.close()
