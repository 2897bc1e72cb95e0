"""Progress of long work: a bar with rate and time left on a terminal, now and then a line otherwise.

Both go to standard error, so that a pipe gets results alone; ``--quiet`` silences both.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import TYPE_CHECKING, Final, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")
log = logging.getLogger("ichpipe")

INTERVAL_S: Final = 30.0
"""Where there is no terminal, a line at most this often: a file keeps each of them."""
NOTE_S: Final = 1.0
"""A bar's note is made at most this often: reading a loss makes a GPU wait."""


def track(items: Iterable[T], what: str, total: int | None = None, unit: str = "batch") -> Iterator[T]:
    """Yield the items, showing how far it has come; ``unit`` is one of them, in the singular."""
    counter = Counter(what, total, unit)
    try:
        for item in items:
            yield item
            counter.add(1)
    finally:
        counter.close()


class Counter:
    """Counts work that arrives in lumps: a bar on a terminal, else a line every INTERVAL_S.

    ``note`` says how the work goes; it is called only where its text is shown.
    """

    def __init__(self, what: str, total: int | None, unit: str, note: Callable[[], str] | None = None) -> None:
        self.what, self.total, self.unit, self.note, self.done = what, total, unit, note, 0
        wanted = log.isEnabledFor(logging.INFO)
        self._plain = wanted and not on_terminal()
        self._start = self._said = time.monotonic()
        self._noted, hidden = self._start, not wanted or self._plain
        self._bar = tqdm(desc=what, total=total, unit=unit, leave=False, disable=hidden, dynamic_ncols=True)

    def add(self, amount: int) -> None:
        """Count ``amount`` more."""
        self.done += amount
        now = time.monotonic()
        if self.note and not self._bar.disable and now - self._noted >= NOTE_S:
            self._noted = now
            self._bar.set_postfix_str(self.note(), refresh=False)
        self._bar.update(amount)
        if self._plain and now - self._said >= INTERVAL_S:
            self._said = now
            log.info("%s%s", self._line(now - self._start), f"; {self.note()}" if self.note else "")

    def close(self) -> None:
        """Clear the bar; where lines were written, write how it ended."""
        self._bar.close()
        if self._plain and self._said > self._start:
            log.info("%s: %d %s in %s", self.what, self.done, self._units(), span(time.monotonic() - self._start))

    def _line(self, seconds: float) -> str:
        rate = self.done / max(seconds, 1e-9)
        of = f" of {self.total}" if self.total else ""
        line = f"{self.what}: {self.done}{of} {self._units()}, {rate:.3g}/s"
        return f"{line}, {span((self.total - self.done) / rate)} left" if self.total and rate > 0 else line

    def _units(self) -> str:
        return {"series": "series", "batch": "batches"}.get(self.unit, f"{self.unit}s")


def on_terminal() -> bool:
    """Say whether standard error is a terminal that can go back in a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def span(seconds: float) -> str:
    """Return a time as people say it: ``8 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
