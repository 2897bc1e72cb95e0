"""The arrays of a store and how they are created and opened (Zarr v3, documented in docs/store-format.md).

One row is one slice; the rows of a series are contiguous and ordered along the slice normal.
Large chunks without shards or compressor measured fastest: a chunk file is then the raw rows plus a
4-byte CRC-32C, and a flipped byte never goes unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from ichpipe.cache.errors import StoreError
from ichpipe.cache.fingerprint import FORMAT_VERSION

if TYPE_CHECKING:
    from pathlib import Path

UID_BYTES = 64
"""DICOM PS3.5 9.1: a UID has at most 64 characters."""

EMBEDDING_DTYPE = np.float16
EMBEDDING_LIMIT = float(np.finfo(EMBEDDING_DTYPE).max)


@dataclass(frozen=True)
class StorePlan:
    """All that is known of a store before its first row is computed.

    ``sop_uids`` has one entry per row; ``series_uids`` and ``series_lengths`` cut the rows into series.
    """

    sop_uids: tuple[str, ...]
    series_uids: tuple[str, ...]
    series_lengths: tuple[int, ...]
    embedding_dim: int
    classes: tuple[str, ...]
    chunk_rows: int
    fingerprint: dict[str, Any]

    @property
    def n_rows(self) -> int:
        """Number of slices."""
        return len(self.sop_uids)

    @property
    def n_chunks(self) -> int:
        """Number of row chunks; each is one Dask task."""
        return -(-self.n_rows // self.chunk_rows)

    def rows_of_chunk(self, chunk: int) -> slice:
        """Return the rows of chunk number ``chunk``; the last one may be shorter."""
        return slice(chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.n_rows))


def create(path: Path, plan: StorePlan) -> None:
    """Create the arrays of an empty, incomplete store; UIDs and offsets are written at once."""
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    _create_rows(group, "embedding", plan, plan.embedding_dim, "float16", "float16")
    _create_rows(group, "logit", plan, len(plan.classes), "float32", "float32")
    _create_small(group, "sop_uid", encode_uids(plan.sop_uids), ("slice", "character"))
    _create_small(group, "series_uid", encode_uids(plan.series_uids), ("series", "character"))
    offsets = np.concatenate([[0], np.cumsum(plan.series_lengths)]).astype(np.int64)
    _create_small(group, "series_offset", offsets, ("series_boundary",))
    group.attrs.update({
        "format": "ichpipe-embeddings",
        "format_version": FORMAT_VERSION,
        "classes": list(plan.classes),
        "fingerprint": plan.fingerprint,
        "complete": False,
    })  # fmt: skip


def open_group(path: Path, mode: str = "r") -> zarr.Group:
    """Open a store of this format; anything else is an error that says what was found."""
    if not path.is_dir():
        raise StoreError(f"embedding store {path} does not exist; run: ichpipe extract")
    try:
        group = zarr.open_group(str(path), mode=mode, zarr_format=3)  # type: ignore[arg-type]
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise StoreError(f"{path} is no Zarr v3 group; remove it and run: ichpipe extract") from error
    if group.attrs.get("format") != "ichpipe-embeddings":
        raise StoreError(f"{path} is a Zarr group, but not an ichpipe embedding store")
    version = group.attrs.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise StoreError(f"{path} has format {version}; this program reads up to {FORMAT_VERSION}: update ichpipe")
    return group


def array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """Return one array of the group; a missing one is an error."""
    found = group.get(name)
    if not isinstance(found, zarr.Array):
        raise StoreError(f"{group.store_path}: array {name!r} is missing; remove the store and run: ichpipe extract")
    return found


def chunk_files(path: Path, chunk: int) -> tuple[Path, Path]:
    """Return the files that hold row chunk ``chunk``, in the order in which they are written."""
    return path / "logit" / "c" / str(chunk) / "0", path / "embedding" / "c" / str(chunk) / "0"


def encode_uids(uids: tuple[str, ...]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Encode UIDs as NUL-padded ASCII, shape (n, 64): Zarr v3 has no settled fixed-length string."""
    for uid in uids:
        if not uid.isascii() or not 0 < len(uid) <= UID_BYTES:
            raise StoreError(f"UID {uid[:80]!r} is not 1 to {UID_BYTES} ASCII characters")
    packed = np.array(uids, dtype=f"S{UID_BYTES}")
    return packed.view(np.uint8).reshape(len(uids), UID_BYTES)


def decode_uids(codes: np.ndarray[Any, np.dtype[np.uint8]]) -> list[str]:
    """Undo `encode_uids`."""
    packed = np.ascontiguousarray(codes).view(f"S{UID_BYTES}").reshape(-1)
    return [value.decode("ascii") for value in packed.tolist()]


def _create_rows(group: zarr.Group, name: str, plan: StorePlan, width: int, dtype: str, unit: str) -> None:
    group.create_array(
        name,
        shape=(plan.n_rows, width),
        chunks=(plan.chunk_rows, width),
        dtype=dtype,
        fill_value=np.nan,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        dimension_names=("slice", "feature" if name == "embedding" else "class"),
        attributes={"unit": "1", "stored_as": unit},
        config={"write_empty_chunks": True},
    )


def _create_small(group: zarr.Group, name: str, data: np.ndarray[Any, Any], dimensions: tuple[str, ...]) -> None:
    group.create_array(
        name,
        data=data,
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        chunks=data.shape,
        dimension_names=dimensions,
    )
