"""Groups and arrays of a store and how they are created and opened (Zarr v3, documented in docs/store-format.md).

    STORE/                      attributes: format, format_version
      <generation>/             attributes: identity, classes, embedding_dim, manifest
        segment-<name>/         rows computed together: embedding, logit, source
        manifest-<name>/        the slices that the generation holds now, and where each row lies

Large chunks without shards or compressor measured fastest: a chunk file is then the raw rows plus a 4-byte
CRC-32C, can be mapped into memory, and a flipped byte never goes unnoticed.
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
    from numpy.typing import NDArray

    from ichpipe.cache.location import Place
    from ichpipe.cache.rows import Codes, Rows

FORMAT = "ichpipe-embeddings"
SEGMENT, MANIFEST, COMPANION = "segment-", "manifest-", "pca-"
EMBEDDING_DTYPE = np.float16
EMBEDDING_LIMIT = float(np.finfo(EMBEDDING_DTYPE).max)
CRC_BYTES: Final = 4
ROW_ARRAYS: Final = ("logit", "embedding")
"""The arrays of a segment that hold one row a slice, in the order in which a chunk of rows is written."""


@dataclass(frozen=True)
class Generation:
    """All rows that were made the same way. ``identity`` is a flat mapping of JSON values."""

    identity: dict[str, Any]
    embedding_dim: int
    classes: tuple[str, ...]
    chunk_rows: int  # of segments that are still to be made

    @property
    def name(self) -> str:
        """Name of the generation's group."""
        return name_of(self.identity)

    def width(self, array: str) -> int:
        """Return the number of columns of a row array."""
        return self.embedding_dim if array == "embedding" else len(self.classes)


@dataclass(frozen=True)
class Segment:
    """A segment as its name and the sources of its rows (n, 32) say."""

    name: str
    source: Codes
    chunk_rows: int

    @property
    def n_chunks(self) -> int:
        """Number of row chunks; each is one Dask task."""
        return -(-len(self.source) // self.chunk_rows)

    def rows_of_chunk(self, chunk: int) -> slice:
        """Return the rows of chunk number ``chunk``; the last one may be shorter."""
        return slice(chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, len(self.source)))


def segment_name(source: Codes, chunk_rows: int) -> str:
    """Name a segment by what its rows are made from, so that the name also proves the content of ``source``."""
    return SEGMENT + name_of_bytes(source.tobytes(), str(chunk_rows).encode())


def chunk_name(generation: str, segment: str, array: str, chunk: int) -> str:
    """Return the file of one row chunk, relative to the store."""
    return f"{generation}/{segment}/{array}/c/{chunk}/0"


def chunk_bytes(array: zarr.Array[Any]) -> int:
    """Return the size of a whole chunk file: zarr pads the last chunk, so that all have one size."""
    return int(np.prod(array.chunks)) * array.dtype.itemsize + CRC_BYTES


def is_plain(array: zarr.Array[Any]) -> bool:
    """Say whether a chunk file is raw little-endian values and a CRC-32C, so that it can be mapped."""
    codecs = [codec.to_dict()["name"] for codec in array.metadata.codecs]  # type: ignore[union-attr]
    return codecs == ["bytes", "crc32c"] and array.dtype.newbyteorder("<") == array.dtype


# Opening

MAX_NAMES_BYTES: Final = 4 * 2**30  # names of all slices: RSNA's take 0.1 GiB
MAX_CHUNKS: Final = 10**6

DAMAGED: Final = (
    ValueError, LookupError, TypeError, AttributeError, NotImplementedError, ArithmeticError, RecursionError,
    MemoryError,
)  # fmt: skip
"""What zarr raises at metadata that is not what it should be."""


def open_root(place: Place, *, write: bool = False) -> zarr.Group:
    """Open a store of this format; anything else is an error that says what was found."""
    if not place.exists():
        raise StoreError(f"embedding store {place} does not exist; run: ichpipe extract")
    try:
        store = place.zarr_store(read_only=not write)
        group = zarr.open_group(store, mode="r+" if write else "r", zarr_format=3)
    except (FileNotFoundError, NotADirectoryError, *DAMAGED) as error:
        raise StoreError(f"{place} is no Zarr v3 group; remove it and run: ichpipe extract") from error
    if group.attrs.get("format") != FORMAT:
        raise StoreError(f"{place} is a Zarr group, but not an ichpipe embedding store")
    version = group.attrs.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise StoreError(f"{place} has format {version}; this program reads up to {FORMAT_VERSION}: update ichpipe")
    if version < FORMAT_VERSION:
        raise StoreError(f"{place} has format {version}, which was never released; remove it and run: ichpipe extract")
    return group


def generations(place: Place, root: zarr.Group) -> dict[str, zarr.Group]:
    """Return the generations of a store by name, sorted."""
    return {name: subgroup(root, name) for name in _named(place, "", "")}


def parts(place: Place, group: zarr.Group, prefix: str) -> dict[str, zarr.Group]:
    """Return the segments, manifests or companions of a generation by name, sorted.

    A folder without metadata is what a killed creation left (zarr would warn of it); it is not among them.
    """
    found = {}
    for name in _named(place, group.path, prefix):
        with contextlib.suppress(StoreError):
            found[name] = subgroup(group, name)
    return found


def _named(place: Place, folder: str, prefix: str) -> list[str]:
    """List the folders with metadata right below one."""
    depth = len(folder.split("/")) if folder else 0
    split = (file.split("/") for file in place.files(folder))
    found = {name[depth] for name in split if len(name) == depth + 2 and name[-1] == "zarr.json"}
    return sorted(name for name in found if name.startswith(prefix))


def array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """Return one array of the group; a missing one is an error."""
    try:
        found = group.get(name)
    except DAMAGED as error:
        raise StoreError(f"{group.store_path}: the metadata of {name} is damaged; run: ichpipe cache verify") from error
    if not isinstance(found, zarr.Array):
        raise StoreError(f"{group.store_path}: array {name!r} is missing; run: ichpipe cache verify")
    return found


def row_array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """Return an array of rows; its chunks must hold whole rows, or a checksum proves bytes in another order."""
    found = array(group, name)
    if found.ndim != 2 or found.chunks[1] != found.shape[1]:
        raise StoreError(f"{group.store_path}: the metadata of {name} is damaged; run: ichpipe cache verify")
    return found


def has(root: zarr.Group, name: str) -> bool:
    """Say whether a group is there; one whose metadata can't be read is an error."""
    try:
        return name in root
    except DAMAGED as error:
        raise StoreError(f"{root.store_path}: the metadata of {name} is damaged; run: ichpipe extract") from error


def subgroup(group: zarr.Group, name: str) -> zarr.Group:
    """Return one group of the group; a missing one is an error."""
    try:
        found = group.get(name)
    except DAMAGED as error:
        raise StoreError(f"{group.store_path}: the metadata of {name} is damaged; run: ichpipe cache verify") from error
    if not isinstance(found, zarr.Group):
        raise StoreError(f"{group.store_path}: {name} is missing; run: ichpipe extract")
    return found


def identity_of(group: zarr.Group) -> dict[str, Any]:
    """Return what made a generation; empty where its creation was interrupted."""
    found = group.attrs.get("identity")
    return dict(found) if isinstance(found, dict) else {}


def read(group: zarr.Group, name: str) -> Any:
    """Read a small array whole; damage is an error that names it."""
    found = array(group, name)
    try:
        if found.nbytes > MAX_NAMES_BYTES or found.nchunks > MAX_CHUNKS:  # metadata that ask for any memory
            raise StoreError(f"{group.store_path}: array {name} claims to be too large; run: ichpipe cache verify")
        return np.asarray(found[:])
    except DAMAGED as error:  # zarr's CRC-32C codec, or a chunk that is too short
        raise StoreError(f"{group.store_path}: array {name} is damaged; run: ichpipe cache verify") from error


# Creating: every name says what is inside, so that a second creation of the same thing changes nothing.


def create_root(place: Place) -> zarr.Group:
    """Open the store for writing; create an empty one where nothing is."""
    if place.exists() and place.files():
        return open_root(place, write=True)
    root = zarr.open_group(place.zarr_store(read_only=False), mode="a", zarr_format=3)
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


def create_segment(group: zarr.Group, generation: Generation, source: Codes, known: dict[str, Any]) -> Segment:
    """Create the arrays of rows still to be computed, named by their sources.

    ``known`` holds arrays with one row a slice that are known beforehand (the parameters of a view).
    """
    name = segment_name(source, generation.chunk_rows)
    segment = group.require_group(name)
    for kind in ROW_ARRAYS:
        create_rows(segment, kind, len(source), generation.width(kind), generation.chunk_rows)
    for kind, values in known.items():
        create_small(segment, kind, values, ("slice", "parameter"))
    create_small(segment, "source", source, ("slice", "byte"))  # the last one: with it, the segment counts
    return Segment(name, source, generation.chunk_rows)


_ROWS: Final = {
    "embedding": ("float16", "feature", "features of a slice, rounded to float16"),
    "logit": ("float32", "class", "the slice CNN's outputs before the sigmoid, one a class"),
}


def create_rows(group: zarr.Group, kind: str, n_rows: int, width: int, chunk_rows: int) -> zarr.Array[Any]:
    """Create an array with one row a slice, cut into chunks of whole rows; NaN until a chunk is written."""
    dtype, columns, meaning = _ROWS[kind]
    return _create(
        group,
        kind,
        shape=(n_rows, width),
        chunks=(chunk_rows, width),
        dtype=dtype,
        fill_value=np.nan,
        dimension_names=("slice", columns),
        attributes={"unit": "1", "meaning": meaning},
        config={"write_empty_chunks": True},
    )


def manifest_name(rows: Rows, segments: list[str], where: NDArray[np.int64]) -> str:
    """Name a manifest by all that it says: a damaged one does not answer to its name."""
    parts = (rows.sop_uid, rows.source, rows.series_uid, rows.study_uid, rows.offset, where)
    text = "\n".join(segments).encode()
    views = (np.ascontiguousarray(part).reshape(-1).view(np.uint8).data for part in parts)
    return MANIFEST + name_of_bytes(text, *views)


def create_manifest(group: zarr.Group, name: str, rows: Rows, segments: list[str], where: NDArray[np.int64]) -> None:
    """Write the slices of a generation and where each row lies: ``where`` (n, 2) is segment number and row."""
    manifest = group.require_group(name)
    create_small(manifest, "sop_uid", rows.sop_uid, ("slice", "character"))
    create_small(manifest, "source", rows.source, ("slice", "byte"))
    create_small(manifest, "series_uid", rows.series_uid, ("series", "character"))
    create_small(manifest, "study_uid", rows.study_uid, ("series", "character"))
    create_small(manifest, "series_offset", rows.offset, ("series_boundary",))
    create_small(manifest, "location", where, ("slice", "segment_and_row"))
    manifest.attrs["segments"] = segments


def create_small(group: zarr.Group, name: str, data: Any, dimensions: tuple[str, ...]) -> None:
    """Write an array in one chunk, with its checksum."""
    _create(group, name, data=np.ascontiguousarray(data), chunks=data.shape, dimension_names=dimensions)


def _create(group: zarr.Group, name: str, **settings: Any) -> zarr.Array[Any]:
    """Create an array; one that is there was created with the same content, or its creator was killed."""
    codecs: dict[str, Any] = {"serializer": BytesCodec(endian="little"), "compressors": [Crc32cCodec()]}
    overwrite = "data" in settings  # a killed creator may have left it without its chunk
    try:
        return group.create_array(name, **codecs, **settings, overwrite=overwrite)
    except (ContainsArrayError, ContainsGroupError):
        return array(group, name)
