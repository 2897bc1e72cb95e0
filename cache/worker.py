"""What runs on a Dask worker: compute the rows of one chunk and write them."""

from __future__ import annotations

import os
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
import zarr
from distributed import WorkerPlugin, get_worker

from ichpipe.cache import layout
from ichpipe.cache.errors import StoreError
from ichpipe.cache.location import PARTIAL, Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from io import FileIO

    from distributed import Worker
    from numpy.typing import NDArray

    Compute = Callable[[Sequence[Any]], tuple[NDArray[np.float32], NDArray[np.float32]]]

PLUGIN = "ichpipe-compute"


class ComputePlugin(WorkerPlugin):
    """Builds the compute function once per worker: the model is not sent with every task."""

    name = PLUGIN

    def __init__(self, make_compute: Callable[[int], Compute], numbers: dict[str, int] | None = None) -> None:
        self.make_compute, self.numbers = make_compute, numbers or {}
        self.compute: Compute | None = None

    def setup(self, worker: Worker) -> None:
        """Build the function; the worker's number on its machine lets it choose its device.

        Workers of our own cluster are named by numbers, and keep theirs when they are started anew. Others are
        numbered by address; one that joins later is number 0.
        """
        number = worker.name if isinstance(worker.name, int) else self.numbers.get(worker.address, 0)
        self.compute = self.make_compute(number)

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002 - the base class's signature
        """End what the function holds, if it has a ``close``."""
        close = getattr(self.compute, "close", None)
        if close is not None:
            close()


def numbers_of(addresses: Iterable[str]) -> dict[str, int]:
    """Number the workers of each machine from 0, in the order of their addresses."""
    numbers: dict[str, int] = {}
    seen: Counter[str] = Counter()
    for address in sorted(addresses):
        machine = address.rpartition(":")[0]
        numbers[address] = seen[machine]
        seen[machine] += 1
    return numbers


@dataclass(frozen=True)
class Inputs:
    """The inputs of one chunk: Dask looks into a list, and keeps its thousands of objects longer than the task."""

    values: list[Any]


def compute_chunk(address: str, segment: str, rows: slice, packed: Inputs) -> int:
    """Compute one chunk of rows and write it, ``embedding`` last. Returns the number of its rows.

    A worker may die between writing a chunk and saying so: then the task comes again, and the chunk is there.
    """
    place, inputs = Place(address), packed.values
    if not _is_there(place, segment, rows):
        plugin: Any = get_worker().plugins[PLUGIN]
        embedding, logit = plugin.compute(inputs)
        write_rows(place, segment, rows, {"logit": logit, "embedding": embedding}, inputs)
    return len(inputs)


def _is_there(place: Place, segment: str, rows: slice) -> bool:
    """Say whether a chunk of a local store is whole, by the sizes of its files, as `survey` does."""
    if place.local is None:
        return False
    for array in _row_arrays(place, segment).values():
        file = place.local / array.path / "c" / str(rows.start // int(array.chunks[0])) / "0"
        if not file.exists() or file.stat().st_size != layout.chunk_bytes(array):
            return False
    return True


def _row_arrays(place: Place, segment: str) -> dict[str, zarr.Array[Any]]:
    store = place.zarr_store(read_only=False)
    return {name: zarr.open_array(store, path=f"{segment}/{name}", mode="r+") for name in layout.ROW_ARRAYS}


def write_rows(place: Place, segment: str, rows: slice, values: dict[str, NDArray[Any]], inputs: Sequence[Any]) -> None:
    """Write one whole chunk of a segment's row arrays; values that are not finite in float16 are refused."""
    arrays = _row_arrays(place, segment)
    for name, array in arrays.items():
        _check(values[name], (len(inputs), array.shape[1]), inputs)
    for name, array in arrays.items():
        write_chunk(place, array, rows, values[name])


def write_chunk(place: Place, array: zarr.Array[Any], rows: slice, values: NDArray[Any]) -> None:
    """Write one chunk of rows, under its name by renaming.

    A plain chunk of a local store is written without zarr, which would copy it three times: the bytes are the same.
    """
    if place.local is None or not layout.is_plain(array):
        array[rows] = values.astype(array.dtype)
        return
    size = int(array.chunks[0])
    whole = np.ascontiguousarray(values, dtype=array.dtype)
    if len(whole) < size:  # the last chunk has full length on disk
        filled = np.full(array.chunks, array.fill_value, dtype=array.dtype)
        filled[: len(whole)] = whole
        whole = filled
    body = whole.reshape(-1).view(np.uint8)
    target = place.local / array.path / "c" / str(rows.start // size) / "0"
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with temporary.open("wb", buffering=0) as handle:
            _write_all(handle, body.data)
            _write_all(handle, memoryview(google_crc32c.value(body).to_bytes(layout.CRC_BYTES, "little")))
            os.fsync(handle.fileno())  # a chunk that is there counts as done, also after a power cut
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


WRITE_BYTES = 2**15
"""Small pieces: for large writes Linux looks for large pages of memory, which now and then takes long."""


def _write_all(handle: FileIO, body: memoryview) -> None:
    """Write in pieces; a system call may take less than it was given."""
    while body:
        body = body[handle.write(body[:WRITE_BYTES]) :]


def _check(values: NDArray[Any], shape: tuple[int, ...], inputs: Sequence[Any]) -> None:
    if values.shape != shape:
        raise StoreError(f"the model returned shape {values.shape}, the store wants {shape}")
    if _all_finite(values):
        return
    bad = ~(np.abs(values) <= layout.EMBEDDING_LIMIT).all(axis=1)  # NaN compares false
    first = inputs[int(np.argmax(bad))]
    raise StoreError(
        f"{int(bad.sum())} slices have features that are not finite in float16, the first is {first}; "
        "the weights have diverged: train the slice CNN again with a lower learning rate"
    )


def _all_finite(values: NDArray[Any]) -> bool:
    if values.dtype == np.float16:  # numpy compares halves slowly; as integers they are in order, by sign
        bits = np.ascontiguousarray(values)
        positive, negative = bits.view(np.int16).max(initial=0), bits.view(np.uint16).max(initial=0)
        return bool(positive < _INFINITY_BITS and negative < _INFINITY_BITS + _SIGN_BIT)
    low, high = values.min(initial=0), values.max(initial=0)  # both are NaN where any value is
    return bool(low >= -layout.EMBEDDING_LIMIT and high <= layout.EMBEDDING_LIMIT)


_INFINITY_BITS, _SIGN_BIT = 0x7C00, 0x8000
"""Sign aside, halves from here on are infinite or NaN (IEEE 754)."""
