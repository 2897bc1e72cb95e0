"""Reads one generation of a store: rows are found by UID, and another generation is refused."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ichpipe.cache import layout
from ichpipe.cache.chunks import ChunkCache, Chunks, DamagedChunkError
from ichpipe.cache.errors import SeveralGenerationsError, StoreError
from ichpipe.cache.location import StoreLocation
from ichpipe.cache.rows import as_text, decode_uids

if TYPE_CHECKING:
    from pathlib import Path

    import zarr
    from numpy.typing import NDArray

    from ichpipe.cache.rows import Rows

HOLD_BYTES = 4 * 2**30  # of a remote store stay in memory after they were fetched; the whole of RSNA takes 3.1 GB
PCA_POINTER = "companion"  # attribute of a generation that names the group of its principal components


@dataclass(frozen=True)
class SeriesFeatures:
    """The cached rows of one series, ordered along the slice normal. The arrays are read-only."""

    series_uid: str
    sop_uids: tuple[str, ...]
    embedding: NDArray[np.float16]  # (n, embedding_dim)
    logit: NDArray[np.float32]  # (n, classes), before the sigmoid


@dataclass(frozen=True)
class PrincipalComponents:
    """An affine map of embeddings: ``(x - mean) @ components.T``."""

    mean: NDArray[np.float32]  # (D,)
    components: NDArray[np.float32]  # (k, D), orthonormal rows, by falling variance
    explained_variance_ratio: NDArray[np.float32]  # (k,)

    def project(self, embedding: NDArray[Any]) -> NDArray[np.float32]:
        """Map embeddings (n, D) to components (n, k)."""
        return np.asarray((embedding.astype(np.float32) - self.mean) @ self.components.T, dtype=np.float32)


class EmbeddingStore:
    """The slices of one generation, read-only; every chunk is checked when it is first touched.

    A local store is mapped into memory, so that RSNA (3.1 GB) takes only memory that the system can spare. Chunks of
    a remote store are fetched.

    Parameters
    ----------
    where
        Path, fsspec address or location of the store.
    identity
        Identity of the requested generation; None if the store holds one alone.
    rows
        Slices that the generation must hold.
    hold_bytes
        Memory for the fetched chunks of a remote store.

    Raises
    ------
    StoreError
        The store is absent, incomplete, damaged or of another format; no generation has this identity (the message
        names the fields in which the nearest one differs); a series of ``rows`` is missing or has other slices.

    """

    def __init__(
        self,
        where: str | Path | StoreLocation,
        identity: dict[str, Any] | None = None,
        rows: Rows | None = None,
        hold_bytes: int = HOLD_BYTES,
    ) -> None:
        self.location = where if isinstance(where, StoreLocation) else StoreLocation(where)
        self._group = _select_generation(self.location, identity)
        self.identity = layout.identity_of(self._group)
        attributes: Any = self._group.attrs
        self.classes: tuple[str, ...] = tuple(attributes["classes"])
        self.embedding_dim = int(attributes["embedding_dim"])
        self._manifest = layout.read_manifest(self.location, self._group)
        self._rows = self._manifest.rows
        self._number = {uid: number for number, uid in enumerate(as_text(self._rows.series_uid).tolist())}
        # Lists, since reading an element of an array takes a tenth of the time of copying a series.
        self._offset: list[int] = self._rows.offset.tolist()
        starts = self._rows.offset[:-1]
        self._first: list[list[int]] = self._manifest.where[starts].tolist()
        # Whether the rows of a series follow one another in one segment; its first row follows no other.
        follows = np.zeros(len(self._rows), dtype=bool)
        follows[1:] = (np.diff(self._manifest.where, axis=0) == [0, 1]).all(axis=1)
        follows[starts] = True
        self._contiguous: list[bool] = np.logical_and.reduceat(follows, starts).tolist() if len(starts) else []
        self._chunks: dict[tuple[str, str], Chunks] = {}
        self.fetched = ChunkCache(hold_bytes)
        if rows is not None:
            self.require(rows)

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self._rows)

    @property
    def generation(self) -> str:
        """Name of the generation."""
        return str(self._group.path)

    @property
    def series_uids(self) -> list[str]:
        """SeriesInstanceUID of every series, in stored order."""
        return decode_uids(self._rows.series_uid)

    @functools.cached_property
    def principal_components(self) -> PrincipalComponents:
        """The principal components of the generation; StoreError if there are none."""
        names = ("mean", "components", "explained_variance_ratio")
        return PrincipalComponents(*(layout.read(self._pca_group, name) for name in names))

    @functools.cached_property
    def _pca_group(self) -> zarr.Group:
        name, path = self._group.attrs.get(PCA_POINTER), self._group.store_path
        if not isinstance(name, str):
            raise StoreError(f"{path}: no principal components; set extract.pca and run: ichpipe extract")
        group = layout.subgroup(self._group, name)
        if group.attrs.get("manifest") != self._group.attrs.get("manifest"):
            raise StoreError(f"{path}: the principal components are of other slices; run: ichpipe extract")
        return group

    def series(self, series_uid: str) -> SeriesFeatures:
        """Return embeddings and logits of one series, by its SeriesInstanceUID.

        Raises
        ------
        StoreError
            The series is unknown, or one of its chunks is damaged; the message names the studies.

        """
        embedding, logit = self.read(series_uid, "embedding"), self.read(series_uid, "logit")
        sop_uids = decode_uids(self._rows.sop_uid[self._rows_of(series_uid)[1]])
        return SeriesFeatures(series_uid, tuple(sop_uids), embedding, logit)

    def read(self, series_uid: str, name: str) -> NDArray[Any]:
        """Return one array of one series (n slices, columns), read-only.

        Parameters
        ----------
        series_uid
            SeriesInstanceUID.
        name
            ``embedding``, ``logit``, or ``pca`` (principal components, float16).

        Raises
        ------
        StoreError
            As for `series`, or there are no principal components.

        """
        number, rows = self._rows_of(series_uid)
        if name == "pca":
            return self._read_rows(self._pca_group.basename, "embedding", rows.start, rows.stop)
        if self._contiguous[number]:
            segment, start = self._first[number]
            return self._read_rows(self._manifest.segments[segment], name, start, start + rows.stop - rows.start)
        where = self._manifest.where[rows].tolist()
        parts = [self._read_rows(self._manifest.segments[segment], name, row, row + 1) for segment, row in where]
        return np.concatenate(parts)

    def embedding(self, series_uid: str) -> NDArray[np.float16]:
        """Return the embeddings of one series (n, embedding_dim), read-only."""
        return self.read(series_uid, "embedding")

    def require(self, rows: Rows) -> None:
        """Raise StoreError unless every series of ``rows`` is stored with the same slices of the same files."""
        uids = as_text(rows.series_uid).tolist()
        numbers = np.array([self._number.get(uid, -1) for uid in uids], dtype=np.intp)
        missing = numbers < 0
        if missing.any():
            raise StoreError(
                f"{self.location}: {int(missing.sum())} of {len(uids)} series are missing, the first is "
                f"{uids[int(np.argmax(missing))].decode()}; run: ichpipe extract"
            )
        stored = self._rows.select(numbers)
        differ = np.diff(stored.offset) != np.diff(rows.offset)
        if not differ.any():
            same = (stored.source == rows.source).all(axis=1) & (stored.sop_uid == rows.sop_uid).all(axis=1)
            differ = np.logical_or.reduceat(~same, rows.offset[:-1])
        if differ.any():
            raise StoreError(
                f"{self.location}: {int(differ.sum())} series have other slices than the index, the first is "
                f"{uids[int(np.argmax(differ))].decode()}; run: ichpipe extract"
            )

    def _rows_of(self, series_uid: str) -> tuple[int, slice]:
        number = self._number.get(series_uid.encode())
        if number is None:
            raise StoreError(
                f"series {series_uid} is not among the {len(self._number)} in {self.location}; run: ichpipe extract"
            )
        return number, slice(self._offset[number], self._offset[number + 1])

    def _read_rows(self, part: str, name: str, start: int, stop: int) -> NDArray[Any]:
        chunks = self._chunks.get((part, name))
        if chunks is None:
            array = layout.array(layout.subgroup(self._group, part), name, whole_rows=True)
            chunks = self._chunks[part, name] = Chunks(self.location, array, self.fetched)
        try:
            return chunks.rows(start, stop)
        except DamagedChunkError as error:
            subject, reason = "the principal components", error.reason
            if part.startswith(layout.SEGMENT):
                rows = slice(error.chunk * chunks.chunk_rows, (error.chunk + 1) * chunks.chunk_rows)
                uids = self._manifest.studies_in(part, rows)
                more = f" and {len(uids) - 3} more" if len(uids) > 3 else ""
                studies = f"{'study' if len(uids) == 1 else 'studies'} {', '.join(uids[:3])}{more}"
                subject, reason = f"{name} in {part}", f"{reason}; it holds slices of {studies}"
            raise StoreError(
                f"{self.location}: chunk {error.chunk} of {subject} {reason}; "
                f"run: ichpipe cache verify --repair {self.location}, then: ichpipe extract"
            ) from error


def _select_generation(location: StoreLocation, identity: dict[str, Any] | None) -> zarr.Group:
    root = layout.open_root(location)
    if identity is not None and layout.has(root, layout.name_of(identity)):
        group = layout.subgroup(root, layout.name_of(identity))
        if layout.identity_of(group) != identity:
            raise StoreError(
                f"{location}: the metadata of {group.path} is damaged; remove that folder and run: ichpipe extract"
            )
        return group
    groups = layout.generations(location, root)
    if identity is None:
        if len(groups) != 1:
            raise SeveralGenerationsError(f"{location} holds {len(groups)} generations; say which by its identity")
        return next(iter(groups.values()))
    lists = (layout.differences(layout.identity_of(group), identity) for group in groups.values())
    nearest = min(lists, key=len, default=["it is empty"])
    raise StoreError(f"{location} was made by something else; run: ichpipe extract\n  " + "\n  ".join(nearest))
