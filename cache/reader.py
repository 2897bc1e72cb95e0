"""Reading one generation of a store: rows are found by UID, never by position, and another generation is refused."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ichpipe.cache import layout, pca
from ichpipe.cache.chunks import Chunks, DamagedChunkError, Held
from ichpipe.cache.errors import StoreError
from ichpipe.cache.fingerprint import differences, name_of
from ichpipe.cache.location import Place
from ichpipe.cache.manifest import read_manifest
from ichpipe.cache.rows import as_text, decode_uids, ranges

if TYPE_CHECKING:
    from pathlib import Path

    import zarr
    from numpy.typing import NDArray

    from ichpipe.cache.pca import PrincipalComponents
    from ichpipe.cache.rows import Codes, Rows


HOLD_BYTES = 4 * 2**30
"""How much of a remote store stays in memory once it was fetched; the whole of RSNA takes 3.1 GB."""


@dataclass(frozen=True)
class SeriesFeatures:
    """The cached rows of one series, ordered along the slice normal."""

    series_uid: str
    sop_codes: Codes  # (slices, 64)
    embedding: NDArray[np.float16]  # (slices, embedding_dim); read-only
    logit: NDArray[np.float32]  # (slices, classes), before the sigmoid; read-only

    @property
    def sop_uids(self) -> tuple[str, ...]:
        """SOPInstanceUID of each slice."""
        return tuple(decode_uids(self.sop_codes))


class EmbeddingStore:
    """The slices that one generation holds, read-only; every chunk is checked when it is first touched.

    On a local disk nothing is loaded: rows are mapped, so that the whole of RSNA (3.1 GB) costs the memory that the
    system can spare. A remote store's chunks are fetched when touched, and held up to ``hold_bytes``.
    """

    def __init__(
        self,
        where: str | Path | Place,
        identity: dict[str, Any] | None = None,
        rows: Rows | None = None,
        hold_bytes: int = HOLD_BYTES,
    ) -> None:
        """Open the generation made by ``identity`` (None: the only one there is) and require ``rows`` in it.

        Raises StoreError that names each field in which the nearest generation differs, or the series that is
        missing or other.
        """
        self.place = Place.of(where)
        self._group = _choose(self.place, identity)
        self.identity = layout.identity_of(self._group)
        self.classes: tuple[str, ...] = tuple(self._group.attrs["classes"])  # type: ignore[arg-type]
        self.embedding_dim = int(self._group.attrs["embedding_dim"])  # type: ignore[arg-type]
        manifest = read_manifest(self.place, self._group, prove=True)
        self._rows, self._segments, self._where = manifest.rows, manifest.segments, manifest.where
        self._number = {uid: number for number, uid in enumerate(as_text(self._rows.series_uid).tolist())}
        # Lists, since an element of an array costs a tenth of what copying a series costs.
        self._together = _find_together(self._rows.offset, self._where).tolist()
        self._offset: list[int] = self._rows.offset.tolist()
        self._first: list[list[int]] = self._where[self._rows.offset[:-1]].tolist()
        self._chunks: dict[tuple[int, str], Chunks] = {}
        self._held = Held(hold_bytes)
        if rows is not None:
            self.require(rows)

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self._rows)

    @property
    def path(self) -> str:
        """Address of the store."""
        return str(self.place)

    @property
    def generation(self) -> str:
        """Name of the generation."""
        return str(self._group.path)

    @functools.cached_property
    def principal_components(self) -> PrincipalComponents:
        """The map of the companion; StoreError where there is none."""
        return pca.read(self._group)[0]

    @functools.cached_property
    def _companion_rows(self) -> Chunks:
        return Chunks(self.place, pca.read(self._group)[1], self._held)

    @property
    def series_uids(self) -> list[str]:
        """SeriesInstanceUID of every series, in stored order."""
        return decode_uids(self._rows.series_uid)

    def series(self, series_uid: str) -> SeriesFeatures:
        """Return one series; an unknown UID is an error that says how many are there."""
        number = self._find(series_uid)
        rows = slice(self._offset[number], self._offset[number + 1])
        embedding, logit = self._read(number, rows, "embedding"), self._read(number, rows, "logit")
        return SeriesFeatures(series_uid, self._rows.sop_uid[rows], embedding, logit)

    def read(self, series_uid: str, name: str) -> NDArray[Any]:
        """Return one array of one series (slices, …), read-only: ``embedding``, ``logit``, or ``pca`` (float16)."""
        number = self._find(series_uid)
        rows = slice(self._offset[number], self._offset[number + 1])
        if name != "pca":
            return self._read(number, rows, name)
        try:
            return self._companion_rows.rows(rows.start, rows.stop)
        except DamagedChunkError as error:
            raise StoreError(
                f"{self.place}: chunk {error.chunk} of the principal components {error.what}; "
                f"run: ichpipe cache verify --repair {self.place}, then: ichpipe extract"
            ) from error

    def embedding(self, series_uid: str) -> NDArray[np.float16]:
        """Return the embeddings of one series (slices, embedding_dim), read-only."""
        return self.read(series_uid, "embedding")

    def require(self, rows: Rows) -> None:
        """Raise StoreError unless every series of ``rows`` is here with the same slices of the same files."""
        uids = as_text(rows.series_uid).tolist()
        numbers = np.array([self._number.get(uid, -1) for uid in uids], dtype=np.intp)
        if (numbers < 0).any():
            first = uids[int(np.argmax(numbers < 0))].decode()
            raise StoreError(
                f"{self.place}: {int((numbers < 0).sum())} of {len(uids)} series are missing, the first is {first}; "
                "run: ichpipe extract"
            )
        offset = self._rows.offset
        other = (offset[numbers + 1] - offset[numbers]) != (rows.offset[1:] - rows.offset[:-1])
        if not other.any():
            here = ranges(offset[numbers], offset[numbers + 1])
            same = (self._rows.source[here] == rows.source).all(axis=1)
            same &= (self._rows.sop_uid[here] == rows.sop_uid).all(axis=1)
            other = np.logical_or.reduceat(~same, rows.offset[:-1])
        if other.any():
            first = uids[int(np.argmax(other))].decode()
            raise StoreError(
                f"{self.place}: {int(other.sum())} series have other slices than the index, the first is {first}; "
                "run: ichpipe extract"
            )

    def _find(self, series_uid: str) -> int:
        number = self._number.get(series_uid.encode())
        if number is None:
            raise StoreError(f"series {series_uid} is not among the {len(self._number)} in {self.place}")
        return number

    def _read(self, number: int, rows: slice, name: str) -> NDArray[Any]:
        if self._together[number]:
            segment, start = self._first[number]
            return self._from_segment(segment, name, start, start + rows.stop - rows.start)
        parts = [self._from_segment(int(s), name, int(row), int(row) + 1) for s, row in self._where[rows]]
        return np.concatenate(parts)

    def _from_segment(self, segment: int, name: str, start: int, stop: int) -> NDArray[Any]:
        chunks = self._chunks.get((segment, name))
        if chunks is None:
            group = layout.subgroup(self._group, self._segments[segment])
            chunks = self._chunks[segment, name] = Chunks(self.place, layout.row_array(group, name), self._held)
        try:
            return chunks.rows(start, stop)
        except DamagedChunkError as error:
            rows = range(error.chunk * chunks.chunk_rows, (error.chunk + 1) * chunks.chunk_rows)
            raise StoreError(
                f"{self.place}: chunk {error.chunk} of {name} in {self._segments[segment]} {error.what}; it holds "
                f"{self.describe(segment, rows)}; run: ichpipe cache verify --repair {self.place}, "
                "then: ichpipe extract"
            ) from error

    def describe(self, segment: int, rows: range) -> str:
        """Name the studies that have a row in a part of a segment."""
        inside = (self._where[:, 0] == segment) & (self._where[:, 1] >= rows.start) & (self._where[:, 1] < rows.stop)
        return name_studies(studies_of(self._rows, np.flatnonzero(inside)))


def studies_of(rows: Rows, numbers: NDArray[np.intp]) -> list[str]:
    """Return the StudyInstanceUIDs to which some rows belong, each once."""
    series = np.unique(np.searchsorted(rows.offset, numbers, side="right") - 1)
    return sorted(set(decode_uids(rows.study_uid[series])))


def name_studies(uids: list[str], limit: int = 3) -> str:
    """Put study UIDs into a message."""
    more = f" and {len(uids) - limit} more" if len(uids) > limit else ""
    return f"slices of {'study' if len(uids) == 1 else 'studies'} {', '.join(uids[:limit])}{more}"


def _choose(place: Place, identity: dict[str, Any] | None) -> zarr.Group:
    root = layout.open_root(place)
    if identity is not None and layout.has(root, name_of(identity)):
        group = layout.subgroup(root, name_of(identity))
        if layout.identity_of(group) != identity:
            raise StoreError(
                f"{place}: the metadata of {group.path} is damaged; remove that folder and run: ichpipe extract"
            )
        return group
    found = layout.generations(place, root)
    if identity is None:
        if len(found) != 1:
            raise StoreError(f"{place} holds {len(found)} generations; say which by its identity")
        return next(iter(found.values()))
    nearest = min(
        (differences(layout.identity_of(group), identity) for group in found.values()),
        key=len,
        default=["it is empty"],
    )
    raise StoreError(f"{place} was made by something else; run: ichpipe extract\n  " + "\n  ".join(nearest))


def _find_together(offset: NDArray[np.int64], where: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say of each series whether its rows follow one another in one segment, as they were written."""
    follows = np.ones(len(where), dtype=bool)
    follows[1:] = (where[1:, 0] == where[:-1, 0]) & (where[1:, 1] == where[:-1, 1] + 1)
    follows[offset[:-1]] = True  # the first row of a series follows nothing
    return np.logical_and.reduceat(follows, offset[:-1]) if len(where) else follows
