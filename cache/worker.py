"""The task of a Dask worker: compute the rows of one chunk and write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distributed import WorkerPlugin, get_worker

from ichpipe.cache import layout
from ichpipe.cache.chunks import open_row_arrays, write_rows
from ichpipe.cache.location import StoreLocation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    from distributed import Worker
    from numpy.typing import NDArray

    Compute = Callable[[Sequence[Any]], tuple[NDArray[np.float32], NDArray[np.float32]]]

PLUGIN = "ichpipe-compute"


class ComputePlugin(WorkerPlugin):
    """Builds the compute function once per worker, so that the model is not sent with every task."""

    name = PLUGIN

    def __init__(self, make_compute: Callable[[int], Compute], numbers: dict[str, int]) -> None:
        self.make_compute, self.numbers = make_compute, numbers
        self.compute: Compute | None = None

    def setup(self, worker: Worker) -> None:
        """Build the function for the worker's number on its machine, which chooses its device.

        Workers of our own cluster have numbers as names and keep them after a restart. Others are numbered by
        address; one that joins later is number 0.
        """
        number = worker.name if isinstance(worker.name, int) else self.numbers.get(worker.address, 0)
        self.compute = self.make_compute(number)

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002 - the base class's signature
        """Close the function if it has a ``close``."""
        getattr(self.compute, "close", lambda: None)()


def numbers_of(addresses: Iterable[str]) -> dict[str, int]:
    """Number the workers of each machine from 0, in the order of their addresses."""
    numbers: dict[str, int] = {}
    for address in sorted(addresses):
        machine = address.rpartition(":")[0]
        numbers[address] = sum(other.rpartition(":")[0] == machine for other in numbers)
    return numbers


@dataclass(frozen=True)
class Inputs:
    """The inputs of one chunk. Dask would look into a list, and keep its objects longer than the task."""

    values: list[Any]


def compute_chunk(address: str, segment: str, rows: slice, packed: Inputs) -> int:
    """Compute one chunk of rows, write it, and return the number of its rows.

    Dask repeats the task of a worker that died after writing; then the chunk exists and is not computed again.
    """
    location, inputs = StoreLocation(address), packed.values

    def is_written(name: str, array: Any) -> bool:
        if location.local is None:
            return False
        file = location.local / layout.chunk_name(segment, name, rows.start // int(array.chunks[0]))
        return file.exists() and file.stat().st_size == layout.chunk_bytes(array)

    if not all(is_written(name, array) for name, array in open_row_arrays(location, segment).items()):
        plugin: Any = get_worker().plugins[PLUGIN]
        embedding, logit = plugin.compute(inputs)
        write_rows(location, segment, rows, {"logit": logit, "embedding": embedding}, inputs)
    return len(inputs)
