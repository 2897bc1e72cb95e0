"""Chunks of row arrays, each checked against its CRC-32C when it is first touched.

A plain chunk of a local store is raw rows and a checksum, so it is mapped into memory: after the check a row costs
what it costs in a memory map. Anything else (a remote store, other codecs) is read through zarr, which checks it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from ichpipe.cache import layout

if TYPE_CHECKING:
    from pathlib import Path

    import zarr
    from numpy.typing import NDArray

    from ichpipe.cache.location import Place


class DamagedChunkError(Exception):
    """A chunk is absent, cut short, or fails its checksum."""

    def __init__(self, chunk: int, what: str) -> None:
        super().__init__(what)
        self.chunk, self.what = chunk, what


class Held:
    """Chunks that had to be fetched, kept until they take more than ``limit`` bytes; the one unused longest goes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._chunks: OrderedDict[tuple[str, int], NDArray[Any]] = OrderedDict()

    def get(self, key: tuple[str, int]) -> NDArray[Any] | None:
        """Return a chunk that is held."""
        if key in self._chunks:
            self._chunks.move_to_end(key)
        return self._chunks.get(key)

    def put(self, key: tuple[str, int], values: NDArray[Any]) -> None:
        """Hold a chunk; at least this one stays."""
        self._chunks[key] = values
        self.size += values.nbytes
        while self.size > self.limit and len(self._chunks) > 1:
            self.size -= self._chunks.popitem(last=False)[1].nbytes


class Chunks:
    """One row array of one segment: ``rows(start, stop)`` as (n, width), read-only."""

    def __init__(self, place: Place, array: zarr.Array[Any], held: Held | None = None) -> None:
        self._array = array
        self.chunk_rows = int(array.chunks[0])
        self._mapped: dict[int, NDArray[Any]] = {}
        self._held = held or Held(array.nbytes)
        mapped = place.local is not None and layout.is_plain(array)
        self._folder = place.local / array.path / "c" if mapped and place.local is not None else None

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Return rows ``start`` to ``stop``: a view where they lie in one chunk, else a copy."""
        size = self.chunk_rows
        first, last = start // size, (stop - 1) // size
        if first == last:
            return self.chunk(first)[start - first * size : stop - first * size]
        parts = [self.chunk(first)[start - first * size :]]
        parts += [self.chunk(between) for between in range(first + 1, last)]
        return np.concatenate([*parts, self.chunk(last)[: stop - last * size]])

    def chunk(self, number: int) -> NDArray[Any]:
        """Return one chunk, checked; it stays mapped, or held where it had to be fetched."""
        if self._folder is None:
            return self._fetch(number)
        found = self._mapped.get(number)
        if found is None:
            found = self._mapped[number] = self._map(number)
        return found

    def _map(self, number: int) -> NDArray[Any]:
        path: Path = self._folder / str(number) / "0"  # type: ignore[operator]
        values = check_file(path, number, layout.chunk_bytes(self._array))
        return values.view(self._array.dtype).reshape(self._array.chunks)

    def _fetch(self, number: int) -> NDArray[Any]:
        key = (self._array.path, number)
        values = self._held.get(key)
        if values is None:
            values = self._read(number)
            self._held.put(key, values)
        return values

    def _read(self, number: int) -> NDArray[Any]:
        start = number * self.chunk_rows
        try:
            values = np.asarray(self._array[start : start + self.chunk_rows])
        except ValueError as error:  # zarr's CRC-32C codec, or a chunk that is too short
            raise DamagedChunkError(number, "fails its checksum") from error
        if np.isnan(values).all():  # zarr gives the fill value where there is no chunk
            raise DamagedChunkError(number, "is missing")
        return values


def check_file(path: Path, number: int, size: int) -> NDArray[np.uint8]:
    """Map a chunk file, compare its CRC-32C, and return its bytes without the checksum."""
    try:
        found = np.memmap(path, dtype=np.uint8, mode="r")
    except FileNotFoundError as error:
        raise DamagedChunkError(number, "is missing") from error
    except ValueError as error:  # an empty file can't be mapped
        raise DamagedChunkError(number, "is empty") from error
    if len(found) != size:
        raise DamagedChunkError(number, f"has {len(found)} bytes instead of {size}")
    body, stored = found[: -layout.CRC_BYTES], found[-layout.CRC_BYTES :].tobytes()
    if google_crc32c.value(body).to_bytes(layout.CRC_BYTES, "little") != stored:
        raise DamagedChunkError(number, "fails its checksum")
    return np.asarray(body)
