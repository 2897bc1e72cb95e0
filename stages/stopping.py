"""Ctrl-C, SIGTERM and a closed terminal: the command ends soon, says so in one line, and leaves nothing half-written.

What is on disk is whole at any moment, so nothing has to be saved here: a signal ends the work where it stands, and the
same command goes on from the last checkpoint, chunk or file. Exit codes are those that shells use, 128 and the
signal's number: 130 for Ctrl-C, 143 for SIGTERM, 129 for a closed terminal.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

GRACE_S: Final = 10.0
"""Seconds for closing processes and connections; then the process ends as it stands."""

SIGNALS: Final = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(BaseException):
    """A signal asked this process to end."""


class _State:
    signal_number = 0  # of the first signal


_state = _State()


@contextmanager
def stop_cleanly(*, leaving: bool = False) -> Iterator[None]:
    """Turn the first signal into `Stopped`, and whatever that becomes on its way out into one line and an exit code.

    ``leaving``: the process ends after the block, and a signal that comes while it does so ends it at once.

    A second signal, or GRACE_S seconds without an end, ends the process at once. A signal that was ignored when the
    process began (nohup, a shell's background jobs) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _state.signal_number = 0
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _handle)
    try:
        yield
    except BaseException as error:
        if not _state.signal_number:
            raise
        _say(_state.signal_number)
        raise SystemExit(128 + _state.signal_number) from (None if isinstance(error, Stopped) else error)
    finally:
        if not _state.signal_number:
            for number, handler in before.items():
                at_once = leaving and handler is not signal.SIG_IGN
                signal.signal(number, signal.SIG_DFL if at_once else handler)


def _handle(number: int, _frame: Any) -> None:
    if _state.signal_number:
        _leave(number)
    _state.signal_number = number
    for name in ("asyncio", "distributed", "tornado"):  # connections that are cut now are no news
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    timer = threading.Timer(GRACE_S, _leave, (number,))
    timer.daemon = True
    timer.start()
    raise Stopped


def _leave(number: int) -> NoReturn:
    from ichpipe.common.processes import end_children

    end_children()
    _say(number)
    os._exit(128 + number)


_said = threading.Event()


def _say(number: int) -> None:
    """Say it once; standard error may be gone with the terminal."""
    if _said.is_set():
        return
    _said.set()
    try:
        sys.stderr.write(f"ichpipe: stopped by {signal.Signals(number).name}; the same command goes on\n")
        sys.stderr.flush()
    except OSError:
        pass
