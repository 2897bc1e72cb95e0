"""Stops a command on Ctrl-C, SIGTERM or a closed terminal, with one line and no half-written file.

Files on disk are whole at any moment, so nothing is saved here. The same command goes on from the last checkpoint,
chunk or file. The exit code is 128 plus the signal's number, as in shells: 130 for Ctrl-C, 143 for SIGTERM.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterator

GRACE_S: Final = 10.0  # seconds for closing processes and connections; then the process ends as it stands
SIGNALS: Final = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(BaseException):
    """A signal asked this process to end."""


class _State:
    signal_number = 0  # of the first signal
    reported = False


_state = _State()


@contextmanager
def stop_cleanly(*, leaving: bool = False) -> Iterator[None]:
    """Raise `Stopped` at the first signal; print one line and exit when the block has ended.

    A second signal, or GRACE_S seconds without an end, ends the process at once. A signal that was ignored when the
    process began (nohup, a shell's background jobs) stays ignored. ``leaving``: the process ends after the block, and
    a signal during that time ends it at once.
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
        _report(_state.signal_number)
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
    for name in ("asyncio", "distributed", "tornado"):  # they report each connection that is cut now
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    timer = threading.Timer(GRACE_S, _leave, (number,))
    timer.daemon = True
    timer.start()
    raise Stopped


def _leave(number: int) -> NoReturn:
    from ichpipe.common.processes import end_children

    end_children()
    _report(number)
    os._exit(128 + number)


def _report(number: int) -> None:
    if not _state.reported:
        _state.reported = True
        with suppress(OSError):  # standard error may be gone with the terminal
            sys.stderr.write(f"ichpipe: stopped by {signal.Signals(number).name}; the same command goes on\n")
            sys.stderr.flush()
