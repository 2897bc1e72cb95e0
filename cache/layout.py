"""Groups and arrays of a store: how they are opened and created (Zarr v3, documented in docs/store-format.md).

    STORE/                      attributes: format, format_version
      <generation>/             attributes: identity, classes, embedding_dim, manifest
        segment-<name>/         rows computed together: embedding, logit, source
        manifest-<name>/        the slices of the generation, and the segment and row of each

Large chunks without shards or compressor measured fastest. A chunk file is the raw rows and a 4-byte CRC-32C, so it
can be mapped into memory and a flipped bit is detected.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.errors import ContainsArrayError, ContainsGroupError

from ichpipe.cache.errors import StoreError
from ichpipe.cache.fingerprint import FORMAT_VERSION, name_of, name_of_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ichpipe.cache.location import StoreLocation
    from ichpipe.cache.rows import Codes

FORMAT = "ichpipe-embeddings"
SEGMENT, MANIFEST, PCA = "segment-", "manifest-", "pca-"
EMBEDDING_DTYPE = np.float16
EMBEDDING_LIMIT = float(np.finfo(EMBEDDING_DTYPE).max)
CRC_BYTES: Final = 4
ROW_ARRAYS: Final = ("logit", "embedding")
"""The arrays of a segment with one row a slice, in the order in which a chunk of rows is written."""

CODECS: Final[dict[str, Any]] = {"serializer": BytesCodec(endian="little"), "compressors": [Crc32cCodec()]}
"""Raw values, then a checksum."""

MAX_NAMES_BYTES: Final = 4 * 2**30  # damaged metadata may claim any size; the names of RSNA's slices take 0.1 GiB
MAX_CHUNKS: Final = 10**6

DAMAGED: Final = (
    ValueError, LookupError, TypeError, AttributeError, NotImplementedError, ArithmeticError, RecursionError,
    MemoryError,
)  # fmt: skip
"""What zarr raises for damaged metadata or chunks."""


@dataclass(frozen=True)
class Generation:
    """Rows that were computed in the same way. ``identity`` is a flat mapping of JSON values."""

    identity: dict[str, Any]
    embedding_dim: int
    classes: tuple[str, ...]
    chunk_rows: int  # of new segments

    @property
    def name(self) -> str:
        """Name of the group."""
        return name_of(self.identity)


@dataclass(frozen=True)
class Segment:
    """Rows that were computed together."""

    name: str
    source: Codes  # (n, 32), SHA-256 of each row's file
    chunk_rows: int
    present: NDArray[np.bool_]  # of each chunk: whether it is on disk

    @property
    def rows_present(self) -> NDArray[np.intp]:
        """Rows that are on disk."""
        return np.flatnonzero(np.repeat(self.present, self.chunk_rows)[: len(self.source)])

    @property
    def chunks(self) -> list[slice]:
        """Rows of each chunk, which is one Dask task; the last chunk may be shorter."""
        n = len(self.source)
        return [slice(start, min(start + self.chunk_rows, n)) for start in range(0, n, self.chunk_rows)]


def segment_name(source: Codes, chunk_rows: int) -> str:
    """Name a segment by the sources of its rows, so that the name also proves ``source``."""
    return SEGMENT + name_of_bytes(source.tobytes(), str(chunk_rows).encode())


def chunk_name(segment: str, array: str, chunk: int) -> str:
    """Return the file of a chunk of rows, relative to the store, as ``segment``, the path of the group, is."""
    return f"{segment}/{array}/c/{chunk}/0"


def chunk_bytes(array: zarr.Array[Any]) -> int:
    """Return the size of a chunk file. All have the same size: zarr pads the last chunk."""
    return int(np.prod(array.chunks)) * array.dtype.itemsize + CRC_BYTES


def is_plain(array: zarr.Array[Any]) -> bool:
    """Return whether a chunk file is raw little-endian values and a CRC-32C, so that it can be mapped."""
    codecs = [codec.to_dict()["name"] for codec in array.metadata.codecs]  # type: ignore[union-attr] # Zarr v3 alone
    return codecs == ["bytes", "crc32c"] and array.dtype.newbyteorder("<") == array.dtype


# Opening


def open_root(location: StoreLocation, *, write: bool = False) -> zarr.Group:
    """Open a store of this format. Raises StoreError for anything else."""
    if not location.exists():
        raise StoreError(f"embedding store {location} does not exist; run: ichpipe extract")
    try:
        store = location.zarr_store(read_only=not write)
        group = zarr.open_group(store, mode="r+" if write else "r", zarr_format=3)
    except (FileNotFoundError, NotADirectoryError, *DAMAGED) as error:
        raise StoreError(f"{location} is no Zarr v3 group; remove it and run: ichpipe extract") from error
    if group.attrs.get("format") != FORMAT:
        raise StoreError(f"{location} is a Zarr group, but not an ichpipe embedding store; set another extract.store")
    version = group.attrs.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise StoreError(f"{location} has format {version}; this program reads up to {FORMAT_VERSION}: update ichpipe")
    if version < FORMAT_VERSION:
        raise StoreError(
            f"{location} has format {version}, which was never released; remove it and run: ichpipe extract"
        )
    return group


def generations(location: StoreLocation, root: zarr.Group) -> dict[str, zarr.Group]:
    """Return the generations of a store by name, sorted."""
    return {name: subgroup(root, name) for name in _list_groups(location, "")}


def parts(location: StoreLocation, group: zarr.Group, prefix: str) -> dict[str, zarr.Group]:
    """Return the groups of a generation whose name has the prefix, sorted. Damaged groups are left out."""
    groups = {}
    for name in _list_groups(location, group.path):
        with contextlib.suppress(StoreError):
            if name.startswith(prefix):
                groups[name] = subgroup(group, name)
    return groups


def _list_groups(location: StoreLocation, folder: str) -> list[str]:
    """List the subfolders with metadata. A killed writer leaves folders without, of which zarr would warn."""
    depth = len(folder.split("/")) if folder else 0
    paths = (file.split("/") for file in location.files(folder))
    return sorted({path[depth] for path in paths if len(path) == depth + 2 and path[-1] == "zarr.json"})


@contextlib.contextmanager
def _refuse_damage(group: zarr.Group, name: str) -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        raise StoreError(f"{group.store_path}: {name} is damaged; run: ichpipe cache verify --repair") from error


def has(group: zarr.Group, name: str) -> bool:
    """Return whether a member exists. Raises StoreError if its metadata is damaged."""
    with _refuse_damage(group, name):
        return name in group


def subgroup(group: zarr.Group, name: str) -> zarr.Group:
    """Return a group of the group. Raises StoreError if it is missing or damaged."""
    with _refuse_damage(group, name):
        member = group.get(name)
    if not isinstance(member, zarr.Group):
        raise StoreError(f"{group.store_path}: {name} is missing; run: ichpipe extract")
    return member


def array(group: zarr.Group, name: str, *, whole_rows: bool = False) -> zarr.Array[Any]:
    """Return an array of the group. Raises StoreError if it is missing or damaged.

    ``whole_rows``: its chunks must hold whole rows, since a checksum does not prove the order of bytes.
    """
    with _refuse_damage(group, name):
        member = group.get(name)
        if not isinstance(member, zarr.Array):
            raise StoreError(f"{group.store_path}: array {name!r} is missing; run: ichpipe cache verify --repair")
        if whole_rows and (member.ndim != 2 or member.chunks[1] != member.shape[1]):
            raise ValueError(f"chunks of {member.chunks}")
    return member


def identity_of(group: zarr.Group) -> dict[str, Any]:
    """Return the identity of a generation; empty if its creation was interrupted."""
    identity = group.attrs.get("identity")
    return dict(identity) if isinstance(identity, dict) else {}


def read(group: zarr.Group, name: str) -> Any:
    """Read a small array whole. Raises StoreError that names it if it is damaged."""
    small = array(group, name)
    with _refuse_damage(group, name):
        if small.nbytes > MAX_NAMES_BYTES or small.nchunks > MAX_CHUNKS:
            raise ValueError(f"{small.nbytes} bytes in {small.nchunks} chunks")
        return np.asarray(small[:])


# Creating. Names derive from content, so that creating the same group again changes nothing.


def create_root(location: StoreLocation) -> zarr.Group:
    """Open the store for writing; create it if it is absent or empty."""
    if location.exists() and location.files():
        return open_root(location, write=True)
    root = zarr.open_group(location.zarr_store(read_only=False), mode="a", zarr_format=3)
    root.attrs.update({"format": FORMAT, "format_version": FORMAT_VERSION})
    return root


def create_generation(root: zarr.Group, generation: Generation) -> zarr.Group:
    """Open or create the group of a generation."""
    group = root.require_group(generation.name)
    if group.attrs.get("identity") != generation.identity:
        group.attrs.update({
            "identity": generation.identity,
            "classes": list(generation.classes),
            "embedding_dim": generation.embedding_dim,
        })  # fmt: skip
    return group


def create_segment(group: zarr.Group, source: Codes, chunk_rows: int, extra: dict[str, Any]) -> Segment:
    """Create the arrays of rows that are still to be computed; ``extra`` holds further arrays with one row a slice."""
    name = segment_name(source, chunk_rows)
    segment = group.require_group(name)
    classes: Any = group.attrs["classes"]
    width: Any = {"logit": len(classes), "embedding": group.attrs["embedding_dim"]}
    for kind in ROW_ARRAYS:
        create_rows(segment, kind, len(source), width[kind], chunk_rows)
    for kind, values in extra.items():
        create_small(segment, kind, values, ("slice", "parameter"))
    create_small(segment, "source", source, ("slice", "byte"))  # written last: it completes the segment
    return Segment(name, source, chunk_rows, np.zeros(-(-len(source) // chunk_rows), dtype=bool))


def create_rows(group: zarr.Group, kind: str, n_rows: int, width: int, chunk_rows: int) -> zarr.Array[Any]:
    """Create an array with one row a slice, in chunks of whole rows; NaN until a chunk is written."""
    dtype, columns, meaning = {
        "embedding": ("float16", "feature", "features of a slice, rounded to float16"),
        "logit": ("float32", "class", "the slice CNN's outputs before the sigmoid, one a class"),
    }[kind]
    with contextlib.suppress(ContainsArrayError, ContainsGroupError):
        return group.create_array(
            kind, shape=(n_rows, width), chunks=(chunk_rows, width), dtype=dtype, fill_value=np.nan, **CODECS,
            dimension_names=("slice", columns), attributes={"unit": "1", "meaning": meaning},
            config={"write_empty_chunks": True},
        )  # fmt: skip
    return array(group, kind)


def create_small(group: zarr.Group, name: str, data: Any, dimensions: tuple[str, ...]) -> None:
    """Write an array in one chunk, over the one of a killed writer, which may lack its chunk."""
    values = np.ascontiguousarray(data)
    group.create_array(name, data=values, chunks=data.shape, dimension_names=dimensions, **CODECS, overwrite=True)
