"""The rows of a generation: those that its manifest lists, and those that its segments hold on disk."""

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


def read_manifest(location: StoreLocation, group: zarr.Group) -> Manifest:
    """Read the manifest of a generation, and compare its content with its name (SHA-256).

    Raises StoreError if there is none or it is damaged.
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
        content_name = manifest.name
    except layout.DAMAGED as error:
        raise StoreError(f"{location}: {group.path}/{name} is damaged; run: ichpipe extract") from error
    if content_name != name:
        raise StoreError(f"{location}: {group.path}/{name} does not match its content; run: ichpipe extract")
    return manifest


def write_manifest(location: StoreLocation, group: zarr.Group, rows: Rows, segments: list[layout.Segment]) -> None:
    """Write a manifest of rows that are in segments: under its own name, then let the generation point to it.

    Former manifests are removed last. Raises StoreError if rows are not on disk.
    """
    where = locate(segments, rows.source)
    n_absent = int((where[:, 0] == ABSENT).sum())
    if n_absent:
        raise StoreError(
            f"{location}: {n_absent} of {len(rows)} rows are missing; run: ichpipe cache verify --repair "
            f"{location}, then: ichpipe extract"
        )
    used, numbers = np.unique(where[:, 0], return_inverse=True)
    where = np.stack([numbers.reshape(-1), where[:, 1]], axis=1).astype(np.int64)
    manifest = Manifest(rows, [segments[number].name for number in used.tolist()], where)
    name = manifest.name
    try:
        is_current = read_manifest(location, group).name == name
    except StoreError:
        is_current = False
    if not is_current:
        folder = group.require_group(name)
        for (part, dimensions), values in zip(_ARRAYS.items(), manifest.arrays, strict=True):
            layout.create_small(folder, part, values, dimensions)
        folder.attrs["segments"] = manifest.segments
        location.sync(f"{group.path}/{name}")
        group.attrs["manifest"] = name
    for other in layout.parts(location, group, layout.MANIFEST).keys() - {name}:
        location.remove(f"{group.path}/{other}")


def locate(segments: list[layout.Segment], source: Codes) -> NDArray[np.int64]:
    """Return segment number and row (n, 2) of each file digest (n, 32); ABSENT for rows that are not on disk."""
    where = np.full((len(source), 2), ABSENT, dtype=np.int64)
    sources, addresses = [np.zeros((0, DIGEST_BYTES), np.uint8)], [np.zeros((0, 2), np.int64)]
    for number, segment in enumerate(segments):
        rows = segment.rows_present
        sources.append(segment.source[rows])
        addresses.append(np.stack([np.full(len(rows), number), rows], axis=1))
    stored, address = np.concatenate(sources), np.concatenate(addresses)
    if not len(stored) or not len(source):
        return where
    # The first 8 of 32 bytes find the candidate; the comparison of all 32 decides.
    stored_keys, keys = (np.ascontiguousarray(codes[:, :8]).view(np.uint64).reshape(-1) for codes in (stored, source))
    order = np.argsort(stored_keys, kind="stable")
    candidates = order[np.minimum(np.searchsorted(stored_keys[order], keys), len(order) - 1)]
    same = (stored[candidates] == source).all(axis=1)
    where[same] = address[candidates[same]]
    return where


def list_segments(location: StoreLocation, group: zarr.Group) -> list[layout.Segment]:
    """List the segments of a generation. Segments that are incomplete or damaged are left out.

    A chunk of rows is present if its file in each row array exists with its full size.
    """
    files = location.files(group.path)
    segments = []
    for name, folder in layout.parts(location, group, layout.SEGMENT).items():
        try:
            source, embedding = layout.read(folder, "source"), layout.array(folder, "embedding")
        except StoreError:
            continue
        chunk_rows = embedding.chunks[0]
        if name != layout.segment_name(source, chunk_rows) or len(source) != embedding.shape[0]:
            continue
        present = np.ones(-(-len(source) // chunk_rows), dtype=bool)
        for kind in layout.ROW_ARRAYS:
            size = layout.chunk_bytes(layout.array(folder, kind))
            names = (layout.chunk_name(folder.path, kind, chunk) for chunk in range(len(present)))
            present &= [files.get(file) == size for file in names]
        segments.append(layout.Segment(name, source, chunk_rows, present))
    return segments
