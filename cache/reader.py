"""Reading a store: rows are found by UID, never by position, and a store made by something else is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ichpipe.cache import layout
from ichpipe.cache.errors import StoreError
from ichpipe.cache.fingerprint import differences

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True)
class SeriesFeatures:
    """The cached rows of one series, ordered along the slice normal."""

    series_uid: str
    sop_uids: tuple[str, ...]
    embedding: NDArray[np.float16]  # (slices, embedding_dim)
    logit: NDArray[np.float32]  # (slices, classes), before the sigmoid


class EmbeddingStore:
    """A whole store, read-only, held in memory after the first access (RSNA: 3.1 GB)."""

    def __init__(self, path: Path, expected: dict[str, Any] | None = None) -> None:
        """Open ``path``; where ``expected`` is given, refuse a store with another fingerprint.

        Raises StoreError that names each field that differs, or that the store is not complete.
        """
        self.path = path
        group = layout.open_group(path)
        self.fingerprint: dict[str, Any] = dict(group.attrs["fingerprint"])  # type: ignore[arg-type]
        if group.attrs.get("complete") is not True:
            raise StoreError(f"{path} is not complete; run: ichpipe extract")
        wrong = differences(self.fingerprint, expected) if expected is not None else []
        if wrong:
            detail = "\n  ".join(wrong)
            raise StoreError(f"{path} was made by something else; run: ichpipe extract\n  {detail}")
        self.classes: tuple[str, ...] = tuple(group.attrs["classes"])  # type: ignore[arg-type]
        self._sop_uids = layout.decode_uids(self._read(group, "sop_uid"))
        self.series_uids = layout.decode_uids(self._read(group, "series_uid"))
        self._offset = self._read(group, "series_offset")
        self._check_names()
        self._number = {uid: number for number, uid in enumerate(self.series_uids)}
        self._group = group
        self._rows: tuple[NDArray[np.float16], NDArray[np.float32]] | None = None

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self._sop_uids)

    @property
    def embedding_dim(self) -> int:
        """Return the number of features per slice."""
        return int(layout.array(self._group, "embedding").shape[1])

    def series(self, series_uid: str) -> SeriesFeatures:
        """Return one series; an unknown UID is an error that says how many are there."""
        number = self._number.get(series_uid)
        if number is None:
            raise StoreError(f"series {series_uid} is not among the {len(self.series_uids)} in {self.path}")
        embedding, logit = self._load()
        rows = slice(int(self._offset[number]), int(self._offset[number + 1]))
        return SeriesFeatures(series_uid, tuple(self._sop_uids[rows]), embedding[rows], logit[rows])

    def _load(self) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
        if self._rows is None:
            embedding, logit = self._read(self._group, "embedding"), self._read(self._group, "logit")
            self._check_whole(embedding, logit)
            self._rows = embedding, logit
        return self._rows

    def _check_names(self) -> None:
        """A file of UIDs or offsets that vanished reads as the fill value, 0: nameless rows, empty series."""
        named = all(self._sop_uids) and all(self.series_uids)
        if not named or int(self._offset[-1]) != len(self._sop_uids):
            raise StoreError(
                f"{self.path}: the names of rows are incomplete; remove the store and run: ichpipe extract"
            )

    def _check_whole(self, embedding: NDArray[np.float16], logit: NDArray[np.float32]) -> None:
        """A chunk file that vanished reads as the fill value, NaN."""
        empty = np.isnan(logit).any(axis=1) | np.isnan(embedding).any(axis=1)
        if empty.any():
            row = int(np.argmax(empty))
            series = self.series_uids[int(np.searchsorted(self._offset, row, side="right")) - 1]
            raise StoreError(
                f"{self.path}: {int(empty.sum())} rows are missing, the first in series {series}; "
                "remove the store and run: ichpipe extract"
            )

    def _read(self, group: Any, name: str) -> Any:
        try:
            return np.asarray(layout.array(group, name)[:])
        except ValueError as error:  # zarr's CRC-32C codec, or a chunk that is too short
            raise StoreError(
                f"{self.path}: array {name} is damaged; remove the store and run: ichpipe extract"
            ) from error
