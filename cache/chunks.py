"""Reads and writes chunks of rows, each with its CRC-32C.

A plain chunk of a local store is mapped into memory, and checked when it is first touched. zarr handles all others.
"""

from __future__ import annotations

import os
import uuid
import weakref
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any, ClassVar

import google_crc32c
import numpy as np
import pyarrow as pa
import zarr

from ichpipe.cache import layout
from ichpipe.cache.errors import StoreError
from ichpipe.cache.location import PARTIAL, StoreLocation

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

# Chunks are written in small pieces: for large writes Linux looks for large memory pages, which may take long.
WRITE_BYTES = 2**15
MAX_MAPPED = 2**14  # chunks that a process maps at a time: Linux allows 65,530 maps (vm.max_map_count)


class DamagedChunkError(Exception):
    """A chunk is absent, cut short, or fails its checksum."""

    def __init__(self, chunk: int, reason: str) -> None:
        super().__init__(reason)
        self.chunk, self.reason = chunk, reason


class ChunkCache:
    """Fetched chunks, up to ``limit`` bytes in all; the least recently used one goes first, the last one stays."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._chunks: OrderedDict[tuple[str, int], NDArray[Any]] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of chunks in memory."""
        return len(self._chunks)

    def get(self, key: tuple[str, int]) -> NDArray[Any] | None:
        """Return a chunk if it is in memory."""
        if key in self._chunks:
            self._chunks.move_to_end(key)
        return self._chunks.get(key)

    def put(self, key: tuple[str, int], values: NDArray[Any]) -> None:
        """Add a chunk."""
        self._chunks[key] = values
        self.size += values.nbytes
        while self.size > self.limit and len(self._chunks) > 1:
            self.size -= self._chunks.popitem(last=False)[1].nbytes


class Chunks:
    """One row array of one segment, read-only.

    A process maps up to MAX_MAPPED chunks of all arrays; then the one that was mapped first is let go.
    """

    _all_mapped: ClassVar[deque[tuple[weakref.ref[Chunks], int]]] = deque()

    def __init__(self, location: StoreLocation, array: zarr.Array[Any], fetched: ChunkCache | None = None) -> None:
        self._array = array
        self.chunk_rows = int(array.chunks[0])
        self._mapped: dict[int, NDArray[Any]] = {}
        self._fetched = ChunkCache(array.nbytes) if fetched is None else fetched
        self._folder = location.local / array.path / "c" if location.local and layout.is_plain(array) else None

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Return rows ``start`` to ``stop`` (n, width): a view if they are in one chunk, else a copy."""
        size = self.chunk_rows
        first, last = start // size, (stop - 1) // size
        if first == last:
            return self.chunk(first)[start - first * size : stop - first * size]
        parts = [self.chunk(number) for number in range(first, last + 1)]
        parts[0], parts[-1] = parts[0][start - first * size :], parts[-1][: stop - last * size]
        return np.concatenate(parts)

    def chunk(self, number: int) -> NDArray[Any]:
        """Return one chunk and keep it for the next call. Raises DamagedChunkError."""
        if self._folder is not None:
            values = self._mapped.get(number)
            if values is None:
                body = _map_file(self._folder / str(number) / "0", number, layout.chunk_bytes(self._array))
                values = self._mapped[number] = body.view(self._array.dtype).reshape(self._array.chunks)
                self._all_mapped.append((weakref.ref(self), number))
                while len(self._all_mapped) > MAX_MAPPED:
                    reference, first = self._all_mapped.popleft()
                    if (owner := reference()) is not None:
                        owner._mapped.pop(first, None)
            return values
        key = (self._array.path, number)
        values = self._fetched.get(key)
        if values is None:
            start = number * self.chunk_rows
            try:
                values = np.asarray(self._array[start : start + self.chunk_rows])
            except ValueError as error:  # zarr's CRC-32C codec, or a chunk that is too short
                raise DamagedChunkError(number, "fails its checksum") from error
            if np.isnan(values).all():  # zarr returns the fill value for a missing chunk
                raise DamagedChunkError(number, "is missing")
            self._fetched.put(key, values)
        return values


def _map_file(path: Path, number: int, size: int) -> NDArray[np.uint8]:
    """Map a chunk file, compare its CRC-32C, and return its bytes without the checksum.

    The file is closed, and its map stays: a `numpy.memmap` would hold a file descriptor as long as the array lives.
    """
    try:
        with pa.memory_map(str(path)) as file:
            content = np.frombuffer(file.read_buffer(), dtype=np.uint8)
    except FileNotFoundError as error:
        raise DamagedChunkError(number, "is missing") from error
    if not len(content):
        raise DamagedChunkError(number, "is empty")
    if len(content) != size:
        raise DamagedChunkError(number, f"has {len(content)} bytes instead of {size}")
    body, checksum = content[: -layout.CRC_BYTES], content[-layout.CRC_BYTES :].tobytes()
    if google_crc32c.value(body).to_bytes(layout.CRC_BYTES, "little") != checksum:
        raise DamagedChunkError(number, "fails its checksum")
    return body


def open_row_arrays(location: StoreLocation, segment: str) -> dict[str, zarr.Array[Any]]:
    """Open the row arrays of a segment for writing."""
    store = location.zarr_store(read_only=False)
    return {name: zarr.open_array(store, path=f"{segment}/{name}", mode="r+") for name in layout.ROW_ARRAYS}


def write_rows(
    location: StoreLocation, segment: str, rows: slice, values: dict[str, NDArray[Any]], inputs: Sequence[Any]
) -> None:
    """Write one whole chunk of each row array. Raises StoreError for values that are not finite in float16."""
    arrays = open_row_arrays(location, segment)
    for name, array in arrays.items():
        expected = (len(inputs), array.shape[1])
        if values[name].shape != expected:
            raise StoreError(
                f"{segment}: the model returned {name} of shape {values[name].shape} instead of {expected}; "
                "run fit-slices, then extract"
            )
        finite = (np.abs(values[name]) <= layout.EMBEDDING_LIMIT).all(axis=1)  # false for NaN
        if not finite.all():
            raise StoreError(
                f"{int((~finite).sum())} slices have features that are not finite in float16, the first is "
                f"{inputs[int(np.argmin(finite))]}; the weights have diverged: train the slice CNN again with a lower "
                "learning rate"
            )
    for name, array in arrays.items():
        write_chunk(location, array, rows, values[name])


def write_chunk(location: StoreLocation, array: zarr.Array[Any], rows: slice, values: NDArray[Any]) -> None:
    """Write one chunk of rows under a temporary name, then rename it.

    zarr would copy a plain chunk three times; here the same bytes are written directly.
    """
    if location.local is None or not layout.is_plain(array):
        array[rows] = values.astype(array.dtype)
        return
    whole = np.empty(array.chunks, dtype=array.dtype)
    whole[: len(values)] = values
    whole[len(values) :] = array.fill_value  # the last chunk has full length on disk
    body = whole.reshape(-1).view(np.uint8)
    target = location.local / array.path / "c" / str(rows.start // int(array.chunks[0])) / "0"
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with temporary.open("wb") as handle:
            for start in range(0, len(body), WRITE_BYTES):
                handle.write(body[start : start + WRITE_BYTES].data)
            handle.write(google_crc32c.value(body).to_bytes(layout.CRC_BYTES, "little"))
            handle.flush()
            os.fsync(handle.fileno())  # an existing chunk counts as done, also after a power loss
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
