"""Silences pydicom's remarks while files are read, also in several threads."""

from __future__ import annotations

import threading
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from pydicom import config

if TYPE_CHECKING:
    from collections.abc import Iterator


# The readers of all threads share one silence; the last one to leave ends it. ``warnings.catch_warnings`` alone is not
# safe in threads: two that overlap restore each other's filter.
_lock, _restore = threading.Lock(), ExitStack()
_readers: list[int] = []  # the threads in ``quiet_pydicom``


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Silence pydicom's remarks on odd but usable files, such as RSNA's UIDs ``ID_…``."""
    with _lock:
        if not _readers:
            settings = config.settings
            _restore.enter_context(warnings.catch_warnings(action="ignore"))
            _restore.callback(setattr, settings, "reading_validation_mode", settings.reading_validation_mode)
            settings.reading_validation_mode = config.IGNORE
        _readers.append(threading.get_ident())
    try:
        yield
    finally:
        with _lock:
            _readers.pop()
            if not _readers:
                _restore.close()
