"""The slices of a generation in order, and the packed arrays that hold their UIDs and file digests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ichpipe.cache.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

UID_BYTES = 64  # DICOM PS3.5 9.1
DIGEST_BYTES = 32  # of a SHA-256
PIECE_ROWS = 2**14  # Python objects of all texts would take several times the memory of the codes

Codes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Rows:
    """N slices of S series. The slices of a series are contiguous and ordered along the slice normal."""

    sop_uid: Codes  # (N, 64), NUL-padded ASCII
    source: Codes  # (N, 32), SHA-256 of each slice's file
    series_uid: Codes  # (S, 64)
    study_uid: Codes  # (S, 64), of each series
    offset: NDArray[np.int64]  # (S + 1,): series s is rows offset[s] to offset[s + 1]

    @staticmethod
    def of(series_uid: Sequence[str], study_uid: Sequence[str], sop_uid: Sequence[str], source: Sequence[str]) -> Rows:
        """Build from one entry a slice; ``source`` is hexadecimal. Raises StoreError if a series is not contiguous."""
        series = encode_uids(series_uid)
        text = as_text(series)
        first = np.flatnonzero(np.concatenate([[True], text[1:] != text[:-1]])) if len(text) else np.zeros(0, int)
        if len(np.unique(text[first])) != len(first):
            raise StoreError("the slices of a series must be contiguous in the index; run: ichpipe prepare")
        studies = encode_uids([study_uid[row] for row in first.tolist()])
        offset = np.append(first, len(text)).astype(np.int64)
        return Rows(encode_uids(sop_uid), encode_digests(source), series[first], studies, offset)

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.sop_uid)

    def select(self, series: NDArray[np.intp]) -> Rows:
        """Return the rows of some series, by number, in the given order."""
        lengths = self.offset[series + 1] - self.offset[series]
        offset = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        rows = np.repeat(self.offset[series] - offset[:-1], lengths) + np.arange(offset[-1])
        return Rows(self.sop_uid[rows], self.source[rows], self.series_uid[series], self.study_uid[series], offset)

    def join(self, other: Rows) -> Rows:
        """Return these rows followed by the other ones."""
        return Rows(
            np.concatenate([self.sop_uid, other.sop_uid]),
            np.concatenate([self.source, other.source]),
            np.concatenate([self.series_uid, other.series_uid]),
            np.concatenate([self.study_uid, other.study_uid]),
            np.concatenate([self.offset, self.offset[-1] + other.offset[1:]]),
        )

    def studies_of(self, rows: NDArray[np.intp]) -> list[str]:
        """Return the StudyInstanceUIDs of some rows, sorted, each once."""
        series = np.unique(np.searchsorted(self.offset, rows, side="right") - 1)
        return sorted(set(decode_uids(self.study_uid[series])))


def encode_uids(uids: Sequence[str]) -> Codes:
    """Encode UIDs as NUL-padded ASCII, shape (n, 64): Zarr v3 has no settled fixed-length string."""
    packed = np.zeros(len(uids), dtype=f"S{UID_BYTES}")
    for start in range(0, len(uids), PIECE_ROWS):
        piece = uids[start : start + PIECE_ROWS]
        for uid in piece:
            if not uid.isascii() or not 0 < len(uid) <= UID_BYTES:
                raise StoreError(
                    f"UID {uid[:80]!r} must have 1 to {UID_BYTES} ASCII characters; correct the DICOM file"
                )
        packed[start : start + len(piece)] = piece
    return packed.view(np.uint8).reshape(len(uids), UID_BYTES)


def as_text(codes: Codes) -> NDArray[np.bytes_]:
    """View codes (n, 64) as ASCII strings (n,)."""
    return np.ascontiguousarray(codes).view(f"S{UID_BYTES}").reshape(-1)


def decode_uids(codes: Codes) -> list[str]:
    """Undo `encode_uids`."""
    return [value.decode("ascii") for value in as_text(codes).tolist()]


def encode_digests(digests: Sequence[str]) -> Codes:
    """Encode hexadecimal SHA-256 digests as bytes, shape (n, 32)."""
    packed = np.zeros((len(digests), DIGEST_BYTES), dtype=np.uint8)
    for start in range(0, len(digests), PIECE_ROWS):
        piece = digests[start : start + PIECE_ROWS]
        values = np.frombuffer(bytes.fromhex("".join(piece)), dtype=np.uint8)
        if values.size != len(piece) * DIGEST_BYTES:
            raise StoreError("a file digest must be a SHA-256 of 64 hexadecimal digits; run: ichpipe prepare")
        packed[start : start + len(piece)] = values.reshape(-1, DIGEST_BYTES)
    return packed
