"""The rows of a generation: those that its manifest lists, and those that its segments hold on disk.

A row is on disk if both files of its chunk exist with their full size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ichpipe.cache import layout
from ichpipe.cache.errors import StoreError
from ichpipe.cache.fingerprint import name_of_bytes
from ichpipe.cache.rows import DIGEST_BYTES, Rows

if TYPE_CHECKING:
    import zarr
    from numpy.typing import NDArray

    from ichpipe.cache.location import StoreLocation
    from ichpipe.cache.rows import Codes

ABSENT = -1

_ARRAYS = {
    "sop_uid": ("slice", "character"),
    "source": ("slice", "byte"),
    "series_uid": ("series", "character"),
    "study_uid": ("series", "character"),
    "series_offset": ("series_boundary",),
    "location": ("slice", "segment_and_row"),
}
"""The arrays of a manifest and their dimensions."""


@dataclass(frozen=True)
class Manifest:
    """The slices of a generation; ``where`` (n, 2) is a number in ``segments`` and a row in that segment."""

    rows: Rows
    segments: list[str]
    where: NDArray[np.int64]

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """The arrays in the order of the format."""
        rows = self.rows
        return rows.sop_uid, rows.source, rows.series_uid, rows.study_uid, rows.offset, self.where

    @property
    def name(self) -> str:
        """Name of the group: a digest of the whole content, so that damage is detected."""
        views = (np.ascontiguousarray(part).reshape(-1).view(np.uint8).data for part in self.arrays)
        return layout.MANIFEST + name_of_bytes("\n".join(self.segments).encode(), *views)

    def studies_in(self, segment: str, rows: slice | None = None) -> list[str]:
        """Return the studies with a row in a segment, or in some rows of it."""
        if segment not in self.segments:
            return []
        inside = self.where[:, 0] == self.segments.index(segment)
        if rows is not None:
            inside &= (self.where[:, 1] >= rows.start) & (self.where[:, 1] < rows.stop)
        return self.rows.studies_of(np.flatnonzero(inside))


def read_manifest(location: StoreLocation, group: zarr.Group, *, prove: bool = False) -> Manifest:
    """Read the manifest of a generation. Raises StoreError if there is none or it is damaged.

    Checksums are always compared; ``prove`` also compares the content with the manifest's name (SHA-256, slower).
    """
    name = group.attrs.get("manifest")
    if not isinstance(name, str):
        raise StoreError(f"{location}: generation {group.path} is not complete; run: ichpipe extract")
    folder = layout.subgroup(group, name)
    segments: Any = folder.attrs.get("segments")
    arrays = {part: layout.read(folder, part) for part in _ARRAYS}
    where = arrays.pop("location")
    try:
        manifest = Manifest(Rows(*arrays.values()), list(segments), where)
        intact = not prove or name == manifest.name
    except layout.DAMAGED as error:
        raise StoreError(f"{location}: {group.path}/{name} is damaged; run: ichpipe extract") from error
    if not intact:
        raise StoreError(
            f"{location}: the content of {group.path}/{name} does not match its name; run: ichpipe extract"
        )
    return manifest


def write_manifest(
    location: StoreLocation, group: zarr.Group, rows: Rows, segments: list[str], where: NDArray[np.int64]
) -> None:
    """Write a manifest under its own name, point the generation to it, then remove the former one."""
    used, numbers = np.unique(where[:, 0], return_inverse=True)
    where = np.stack([numbers.reshape(-1), where[:, 1]], axis=1).astype(np.int64)
    manifest = Manifest(rows, [segments[number] for number in used.tolist()], where)
    name = manifest.name
    try:
        current = read_manifest(location, group, prove=True).name
    except StoreError:
        current = None
    if current != name:
        folder = group.require_group(name)
        for (part, dimensions), values in zip(_ARRAYS.items(), manifest.arrays, strict=True):
            layout.create_small(folder, part, values, dimensions)
        folder.attrs["segments"] = manifest.segments
        location.sync(f"{group.path}/{name}")
        group.attrs["manifest"] = name
    for other in layout.parts(location, group, layout.MANIFEST).keys() - {name}:
        location.remove(f"{group.path}/{other}")


@dataclass(frozen=True)
class Inventory:
    """The segments of a generation, and for each of their chunks whether it is on disk."""

    segments: list[layout.Segment]
    present: list[NDArray[np.bool_]]  # of each segment: (n_chunks,)

    def rows_present(self, number: int) -> NDArray[np.intp]:
        """Return the rows of a segment that are on disk."""
        segment = self.segments[number]
        return np.flatnonzero(np.repeat(self.present[number], segment.chunk_rows)[: len(segment.source)])

    @property
    def n_rows(self) -> int:
        """Number of rows on disk."""
        return sum(len(self.rows_present(number)) for number in range(len(self.segments)))

    def locate(self, source: Codes) -> NDArray[np.int64]:
        """Return segment number and row (n, 2) of each file digest (n, 32); ABSENT for rows that are not on disk."""
        where = np.full((len(source), 2), ABSENT, dtype=np.int64)
        sources, addresses = [np.zeros((0, DIGEST_BYTES), np.uint8)], [np.zeros((0, 2), np.int64)]
        for number, segment in enumerate(self.segments):
            rows = self.rows_present(number)
            sources.append(segment.source[rows])
            addresses.append(np.stack([np.full(len(rows), number), rows], axis=1))
        stored, address = np.concatenate(sources), np.concatenate(addresses)
        if not len(stored) or not len(source):
            return where
        # The first 8 of 32 bytes find the candidate; the comparison of all 32 decides.
        have, want = (np.ascontiguousarray(codes[:, :8]).view(np.uint64).reshape(-1) for codes in (stored, source))
        order = np.argsort(have, kind="stable")
        candidates = order[np.minimum(np.searchsorted(have[order], want), len(order) - 1)]
        same = (stored[candidates] == source).all(axis=1)
        where[same] = address[candidates[same]]
        return where


def take_inventory(location: StoreLocation, group: zarr.Group) -> Inventory:
    """List the segments of a generation and their chunk files. Segments that are incomplete or damaged are left out."""
    files = location.files(group.path)
    inventory = Inventory([], [])
    for name, folder in layout.parts(location, group, layout.SEGMENT).items():
        try:
            source, embedding = layout.read(folder, "source"), layout.array(folder, "embedding")
        except StoreError:
            continue
        segment = layout.Segment(name, source, embedding.chunks[0])
        if name != layout.segment_name(source, segment.chunk_rows) or len(source) != embedding.shape[0]:
            continue
        present = np.ones(segment.n_chunks, dtype=bool)
        for kind in layout.ROW_ARRAYS:
            size = layout.chunk_bytes(layout.array(folder, kind))
            names = (layout.chunk_name(folder.path, kind, chunk) for chunk in range(segment.n_chunks))
            present &= [files.get(file) == size for file in names]
        inventory.segments.append(segment)
        inventory.present.append(present)
    return inventory
