"""A Dask client for one stage: in this process, in worker processes, or on a cluster that is there."""

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

CONNECT_SECONDS = 20
"""How long to wait for a scheduler that someone else started."""

SETTINGS: Final = {
    "distributed.worker.daemon": False,  # daemonic workers may not have children, and a decoding pool would need them
    # A scheduler forgets workers that were silent for five minutes, as all are after a laptop has slept; here a worker
    # that is gone closes its connection.
    "distributed.scheduler.worker-ttl": None,
    "distributed.admin.low-level-log-length": 1,  # each of the last messages keeps its inputs, 500 bytes a slice
    **{f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in ENVIRONMENT.items()},
}


@contextlib.contextmanager
def connect(workers: int, scheduler: str | None) -> Iterator[Client]:
    """Yield a client with ``workers`` workers, or that of the scheduler at an address.

    One worker runs in this process, which saves starting a second interpreter with torch in it.
    """
    with dask.config.set(SETTINGS):
        if scheduler:
            with _connect_to(scheduler) as client:
                yield client
            return
        with interrupts_stay_here() if workers > 1 else contextlib.nullcontext():
            cluster = _local(workers)
        with cluster, Client(cluster) as client:  # type: ignore[no-untyped-call]
            yield client


def _local(workers: int) -> LocalCluster:
    """Every port is bound to this machine alone; while one thread of a worker writes a chunk, the other computes."""
    return LocalCluster(  # type: ignore[no-untyped-call]
        n_workers=workers,
        threads_per_worker=2,
        processes=workers > 1,
        host="127.0.0.1" if workers > 1 else None,
        dashboard_address="127.0.0.1:0",
        worker_dashboard_address="127.0.0.1:0",
        silence_logs=logging.CRITICAL,  # a task's error is raised here, and said once
    )


def _connect_to(address: str) -> Client:
    try:
        return Client(address, timeout=CONNECT_SECONDS)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TimeoutError) as error:
        raise IchpipeError(f"--scheduler {address}: no Dask scheduler answers there ({error})") from error
