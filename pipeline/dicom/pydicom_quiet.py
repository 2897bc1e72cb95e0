"""Silences pydicom's remarks while one thread reads files; other threads keep their warnings."""

from __future__ import annotations

import threading
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydicom import config

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Depth(threading.local):
    """How many `quiet_pydicom` this thread is in."""

    value = 0


class _QuietThread:
    """Stands for the pattern of a message in a filter, and matches all messages of a thread that is quiet."""

    def match(self, _text: str, *_: Any) -> bool:
        return _depth.value > 0


class _Settings(config.Settings):
    """pydicom's settings; values that are read by a quiet thread are not validated."""

    @property
    def reading_validation_mode(self) -> int:
        return config.IGNORE if _depth.value else super().reading_validation_mode

    @reading_validation_mode.setter
    def reading_validation_mode(self, mode: int) -> None:
        self._reading_validation_mode = mode


_depth = _Depth()
_lock = threading.Lock()
_readers = 0  # of all threads
_filter: Any = ("ignore", _QuietThread(), Warning, None, 0)
config.settings.__class__ = _Settings  # the object stays: others may hold it


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Silence remarks on odd but usable files, such as RSNA's UIDs ``ID_…``, in this thread.

    ``warnings.catch_warnings`` would silence all threads; two that overlap restore each other's filters.
    """
    _count_reader(1)
    try:
        yield
    finally:
        _count_reader(-1)


def _count_reader(change: int) -> None:
    """Keep the filter before all others while there are readers; where it stays behind it matches nothing."""
    global _readers  # noqa: PLW0603 - all threads have one list of filters
    _depth.value += change
    with _lock:
        _readers += change
        filters: Any = warnings.filters
        if _readers and filters and filters[0] is _filter:
            return
        while _filter in filters:
            filters.remove(_filter)
        if _readers:
            filters.insert(0, _filter)
