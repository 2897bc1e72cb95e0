"""A Dask client for one stage: in this process, in worker processes, or on an existing cluster."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Final

import dask
from distributed import Client, LocalCluster

from ichpipe.common.errors import IchpipeError
from ichpipe.common.malloc import ENVIRONMENT
from ichpipe.common.processes import interrupts_stay_here

if TYPE_CHECKING:
    from collections.abc import Iterator

CONNECT_SECONDS = 20  # to wait for the scheduler of an existing cluster
SETTINGS: Final = {
    "distributed.worker.daemon": False,  # daemonic workers may not start decoding processes
    # A scheduler forgets silent workers, as all are after a laptop has slept. Dead ones close their connection.
    "distributed.scheduler.worker-ttl": None,
    "distributed.admin.low-level-log-length": 1,  # each of the last messages keeps its inputs, 500 bytes a slice
    **{f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in ENVIRONMENT.items()},
}


@contextlib.contextmanager
def connect(workers: int, scheduler: str | None) -> Iterator[Client]:
    """Yield a client of ``workers`` new workers, or of the existing scheduler at an address.

    A single worker runs in this process, so that torch is not imported twice.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(SETTINGS))
        if scheduler:
            try:
                client = Client(scheduler, timeout=CONNECT_SECONDS)  # type: ignore[no-untyped-call]
            except (OSError, ValueError, TimeoutError) as error:
                raise IchpipeError(f"--scheduler {scheduler}: no Dask scheduler answers there ({error})") from error
        else:
            with interrupts_stay_here() if workers > 1 else contextlib.nullcontext():
                cluster = LocalCluster(  # type: ignore[no-untyped-call]
                    n_workers=workers,
                    threads_per_worker=2,  # one thread computes while the other writes a chunk
                    processes=workers > 1,
                    host="127.0.0.1" if workers > 1 else None,  # ports are open to this machine alone
                    dashboard_address="127.0.0.1:0",
                    worker_dashboard_address="127.0.0.1:0",
                    silence_logs=logging.CRITICAL,  # a task's error is raised here instead
                )
            client = Client(stack.enter_context(cluster))  # type: ignore[no-untyped-call]
        yield stack.enter_context(client)
