"""Progress of long work on standard error: a bar on a terminal, otherwise a line every 30 seconds.

``--quiet`` silences both.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Final, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Bar = tqdm[Any]
else:
    Bar = tqdm

T = TypeVar("T")
log = logging.getLogger("ichpipe")

LINE_S: Final = 30.0  # without a terminal a line is written at most this often
NOTE_S: Final = 1.0  # a note is made at most this often: reading a loss makes a GPU wait


def track(items: Iterable[T], title: str, total: int | None = None, unit: str = "batch") -> Iterator[T]:
    """Yield the items and show the progress; ``unit`` names one item, in the singular."""
    with Counter(title, total, unit) as counter:
        for item in items:
            yield item
            counter.add(1)


class Counter(Bar):
    """Progress of work that is counted in lumps. ``note`` returns a text for the end of the line."""

    def __init__(self, title: str, total: int | None, unit: str, note: Callable[[], str] | None = None) -> None:
        self.note, self.plain = note, not on_terminal()
        if self.plain:  # tqdm writes to a file that nobody reads, and `display` logs
            options: dict[str, Any] = {"file": io.StringIO(), "mininterval": LINE_S, "delay": LINE_S}
            options["bar_format"] = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        else:
            options = {"mininterval": NOTE_S if note else 0.1, "leave": False, "dynamic_ncols": True}
        options["disable"] = not log.isEnabledFor(logging.INFO)
        super().__init__(desc=title, total=total, unit=unit, miniters=1, **options)

    add = Bar.update

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the bar, or log it as a line."""
        if self.note and self.n and msg is None and not self.disable:
            self.set_postfix_str(self.note(), refresh=False)
        if self.plain:
            log.info("%s", str(self))  # as it is now, whenever a handler formats it
        else:
            super().display(msg, pos)


def on_terminal() -> bool:
    """Say whether standard error is a terminal that can go back in a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
