"""What a generation holds on disk: a row is there when both files of its chunk are there, whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ichpipe.cache import layout
from ichpipe.cache.errors import StoreError
from ichpipe.cache.rows import DIGEST_BYTES

if TYPE_CHECKING:
    import zarr
    from numpy.typing import NDArray

    from ichpipe.cache.location import Place
    from ichpipe.cache.rows import Codes

ABSENT = -1


@dataclass(frozen=True)
class Survey:
    """Segments of one generation and which of their chunks are there."""

    segments: list[layout.Segment]
    present: list[NDArray[np.bool_]]  # a segment: one entry a chunk

    @property
    def n_rows(self) -> int:
        """Rows that are there, referred to or not."""
        return sum(int(self._rows_there(number).sum()) for number in range(len(self.segments)))

    def locate(self, source: Codes) -> NDArray[np.int64]:
        """Return segment number and row (n, 2) of each file digest (n, 32); ABSENT where there is none."""
        where = np.full((len(source), 2), ABSENT, dtype=np.int64)
        known, place = self._all_rows()
        if not len(known) or not len(source):
            return where
        # The first 8 of 32 bytes find the candidate, all 32 decide.
        have, want = _prefix(known), _prefix(source)
        order = np.argsort(have, kind="stable")
        found = order[np.minimum(np.searchsorted(have[order], want), len(order) - 1)]
        same = (known[found] == source).all(axis=1)
        where[same] = place[found[same]]
        return where

    def _all_rows(self) -> tuple[Codes, NDArray[np.int64]]:
        sources = [np.zeros((0, DIGEST_BYTES), np.uint8)]
        places = [np.zeros((0, 2), np.int64)]
        for number, segment in enumerate(self.segments):
            there = np.flatnonzero(self._rows_there(number))
            sources.append(segment.source[there])
            places.append(np.stack([np.full(len(there), number), there], axis=1))
        return np.concatenate(sources), np.concatenate(places)

    def _rows_there(self, number: int) -> NDArray[np.bool_]:
        segment = self.segments[number]
        return np.repeat(self.present[number], segment.chunk_rows)[: len(segment.source)]


def survey(place: Place, group: zarr.Group) -> Survey:
    """List the chunk files of a generation; a segment whose creation was interrupted does not count."""
    generation = group.path
    files = place.files(generation)
    segments, present = [], []
    for name, found in layout.parts(place, group, layout.SEGMENT).items():
        segment = _open(name, found)
        if segment is None:
            continue
        whole = np.ones(segment.n_chunks, dtype=bool)
        for kind in layout.ROW_ARRAYS:
            size = layout.chunk_bytes(layout.array(found, kind))
            names = (layout.chunk_name(generation, name, kind, chunk) for chunk in range(segment.n_chunks))
            whole &= [files.get(file) == size for file in names]
        segments.append(segment)
        present.append(whole)
    return Survey(segments, present)


def _open(name: str, group: zarr.Group) -> layout.Segment | None:
    try:
        source = layout.read(group, "source")
        rows = layout.array(group, "embedding")
    except StoreError:
        return None
    named = layout.segment_name(source, rows.chunks[0])
    return layout.Segment(name, source, rows.chunks[0]) if name == named and len(source) == rows.shape[0] else None


def _prefix(source: Codes) -> NDArray[np.uint64]:
    return np.ascontiguousarray(source[:, :8]).view(np.uint64).reshape(-1)
