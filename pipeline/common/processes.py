"""Processes that work for this one: they end when it ends, however it ends, and leave interrupts to it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield ``workers`` processes, started anew; where the block ends with an exception they are ended, not waited for.

    Not forked: this process has threads (pyarrow's, torch's), and a fork may inherit their locks.
    """
    anew = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=anew, initializer=follow_the_parent) as pool:
        try:
            with interrupts_stay_here():
                for _ in range(workers):  # each task starts a process as long as none is idle
                    pool.submit(os.getpid)
            yield pool
        except BaseException:
            end_children()
            raise


@contextmanager
def interrupts_stay_here() -> Iterator[None]:
    """Let processes and threads that are started in the block never see Ctrl-C: a terminal sends it to all of them.

    A child that is still importing would print a traceback of its own. One that comes meanwhile is kept for afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # when it starts, it unblocks what was blocked here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_children() -> None:
    """End what `multiprocessing` started here: decoding processes, workers of a pool."""
    for child in multiprocessing.active_children():
        child.terminate()


def follow_the_parent(_number: int = 0) -> None:
    """End this process when its parent is gone: a parent that was killed (SIGKILL) can't end it itself.

    A child may still be importing when that happens. PyTorch's own watch begins later, and takes whoever has adopted
    the child for its parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
