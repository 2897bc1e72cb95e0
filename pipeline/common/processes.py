"""Worker processes that exit with their parent and leave Ctrl-C to it."""

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
    """Yield a pool of ``workers`` new processes; an exception in the block terminates them at once.

    Processes are spawned, not forked: pyarrow and torch run threads here, and a fork may inherit their locks.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=follow_the_parent) as pool:
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
    """Hide Ctrl-C from processes and threads that start in the block; a terminal sends it to all of them.

    A child that is still importing would print its own traceback. An interrupt in the block arrives after it.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # its start unblocks the signals that are blocked here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def launched_rank() -> tuple[int, int]:
    """Return this process's number and how many a launcher such as `torchrun` started; (0, 1) without one.

    A cluster may leave RANK or WORLD_SIZE in the environment without starting further processes. Then nobody can be
    found, since MASTER_ADDR or MASTER_PORT is missing.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = [os.environ.get(name, "").strip() for name in names]
    if not all(values) or not values[0].isdecimal() or not values[1].isdecimal():
        return 0, 1
    return int(values[0]), int(values[1])


@contextmanager
def signals_end_at_once() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the process in the block, which waits in native code and could not answer them."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_children() -> None:
    """Terminate the processes that `multiprocessing` started here."""
    for child in multiprocessing.active_children():
        child.terminate()


def follow_the_parent(_number: int = 0) -> None:
    """Exit this process when its parent has gone; a parent that was killed (SIGKILL) can't terminate it.

    PyTorch's own watch starts only after the imports, and mistakes an adopting process for the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def exit_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
