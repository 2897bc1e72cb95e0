"""Progress of long work: a bar on a terminal, plain log lines otherwise, nothing with ``--quiet``."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

T = TypeVar("T")
log = logging.getLogger("ichpipe")


def track(items: Iterable[T], what: str, total: int | None = None, unit: str = "batch") -> Iterator[T]:
    """Yield the items, showing how far it has come on a terminal."""
    hidden = not sys.stderr.isatty() or not log.isEnabledFor(logging.INFO)
    yield from tqdm(items, desc=what, total=total, unit=unit, leave=False, disable=hidden, dynamic_ncols=True)


class Counter:
    """Counts work that arrives in lumps: a bar on a terminal, a line at each tenth otherwise."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self.what, self.total, self.unit, self.done, self._said = what, total, unit, 0, 0
        hidden = not sys.stderr.isatty() or not log.isEnabledFor(logging.INFO)
        self._bar = tqdm(desc=what, total=total, unit=unit, leave=False, disable=hidden, dynamic_ncols=True)
        self._plain = hidden

    def add(self, amount: int) -> None:
        """Count ``amount`` more."""
        self.done += amount
        self._bar.update(amount)
        tenth = 10 * self.done // max(1, self.total)
        if self._plain and tenth > self._said:
            self._said = tenth
            log.info("%s: %d of %d %ss", self.what, self.done, self.total, self.unit)

    def close(self) -> None:
        """Clear the bar."""
        self._bar.close()
