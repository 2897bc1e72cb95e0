"""Names, groups, arrays and rows of a store, as docs/store-format.md describes them (Zarr v3).

    STORE/                      attributes: format, format_version
      <generation>/             attributes: identity, classes, embedding_dim, manifest
        segment-<name>/         rows computed together: embedding, logit, source
        manifest-<name>/        the slices of the generation, and the segment and row of each

Large chunks without shards or compressor measured fastest. A chunk file is the raw rows and a 4-byte CRC-32C, so it
can be mapped into memory and a flipped bit is detected.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.errors import ContainsArrayError, ContainsGroupError

from ichpipe.cache.errors import StoreError
from ichpipe.cache.rows import DIGEST_BYTES, Rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from ichpipe.cache.location import StoreLocation
    from ichpipe.cache.rows import Codes

FORMAT = "ichpipe-embeddings"
FORMAT_VERSION = 2  # of the layout on disk (docs/store-format.md); a reader refuses a newer one
NAME_DIGITS = 16  # of a SHA-256 in a folder name: 64 bits make a collision among millions of names unlikely
SEGMENT, MANIFEST, PCA = "segment-", "manifest-", "pca-"
EMBEDDING_DTYPE = np.float16
EMBEDDING_LIMIT = float(np.finfo(EMBEDDING_DTYPE).max)
CRC_BYTES: Final = 4
ABSENT = -1  # the segment of a row that is not on disk
ROW_ARRAYS: Final = ("logit", "embedding")  # of a segment, one row a slice, in the order in which they are written
MANIFEST_ARRAYS: Final = {  # and their dimensions
    "sop_uid": ("slice", "character"),
    "source": ("slice", "byte"),
    "series_uid": ("series", "character"),
    "study_uid": ("series", "character"),
    "series_offset": ("series_boundary",),
    "location": ("slice", "segment_and_row"),
}
CODECS: Final[dict[str, Any]] = {"serializer": BytesCodec(endian="little"), "compressors": [Crc32cCodec()]}
MAX_NAMES_BYTES: Final = 4 * 2**30  # damaged metadata may claim any size; the names of RSNA's slices take 0.1 GiB
MAX_CHUNKS: Final = 10**6

DAMAGED: Final = (  # what zarr raises for damaged metadata or chunks
    ValueError, LookupError, TypeError, AttributeError, NotImplementedError, ArithmeticError, RecursionError,
    MemoryError,
)  # fmt: skip


# Names derive from content: of a generation, from all that turns a file into a row


def name_of(value: Any) -> str:
    """Hash the canonical JSON text of a value: 16 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:NAME_DIGITS]


def name_of_bytes(*parts: bytes | memoryview) -> str:
    """Hash byte strings and their lengths: 16 hexadecimal digits."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()[:NAME_DIGITS]


def digest_rows(rows: Iterable[tuple[str, str, str]]) -> str:
    """Return the SHA-256 of (series UID, SOP UID, file digest) of every row in order, hexadecimal."""
    return hashlib.sha256("\n".join("\0".join(row) for row in rows).encode()).hexdigest()


def differences(stored: Mapping[str, Any], requested: Mapping[str, Any]) -> list[str]:
    """Name every field in which two identities differ, with both values."""

    def short(value: Any) -> str:
        text = str(value)
        return text if len(text) <= 40 else f"{text[:37]}..."

    return [
        f"{name}: store has {short(stored.get(name))}, requested {short(requested.get(name))}"
        for name in sorted({*stored, *requested})
        if stored.get(name) != requested.get(name)
    ]


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
        return MANIFEST + name_of_bytes("\n".join(self.segments).encode(), *views)

    def studies_in(self, segment: str, rows: slice | None = None) -> list[str]:
        """Return the studies with a row in a segment, or in some rows of it."""
        if segment not in self.segments:
            return []
        inside = self.where[:, 0] == self.segments.index(segment)
        if rows is not None:
            inside &= (self.where[:, 1] >= rows.start) & (self.where[:, 1] < rows.stop)
        return self.rows.studies_of(np.flatnonzero(inside))


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


# Creating. Creating the same group again changes nothing.


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


# The rows of a generation: those that its manifest lists, and those that its segments hold


def read_manifest(location: StoreLocation, group: zarr.Group) -> Manifest:
    """Read the manifest of a generation, and compare its content with its name (SHA-256).

    Raises StoreError if there is none or it is damaged.
    """
    name = group.attrs.get("manifest")
    if not isinstance(name, str):
        raise StoreError(f"{location}: generation {group.path} is not complete; run: ichpipe extract")
    folder = subgroup(group, name)
    segments: Any = folder.attrs.get("segments")
    arrays = {part: read(folder, part) for part in MANIFEST_ARRAYS}
    where = arrays.pop("location")
    try:
        manifest = Manifest(Rows(*arrays.values()), list(segments), where)
        content_name = manifest.name
    except DAMAGED as error:
        raise StoreError(f"{location}: {group.path}/{name} is damaged; run: ichpipe extract") from error
    if content_name != name:
        raise StoreError(f"{location}: {group.path}/{name} does not match its content; run: ichpipe extract")
    return manifest


def write_manifest(location: StoreLocation, group: zarr.Group, rows: Rows, segments: list[Segment]) -> None:
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
    former = ""
    with contextlib.suppress(StoreError):  # none yet, or a damaged one
        former = read_manifest(location, group).name
    if former != name:
        folder = group.require_group(name)
        for (part, dimensions), values in zip(MANIFEST_ARRAYS.items(), manifest.arrays, strict=True):
            create_small(folder, part, values, dimensions)
        folder.attrs["segments"] = manifest.segments
        location.sync(f"{group.path}/{name}")
        group.attrs["manifest"] = name
    for other in parts(location, group, MANIFEST).keys() - {name}:
        location.remove(f"{group.path}/{other}")


def locate(segments: list[Segment], source: Codes) -> NDArray[np.int64]:
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


def list_segments(location: StoreLocation, group: zarr.Group) -> list[Segment]:
    """List the segments of a generation. Segments that are incomplete or damaged are left out.

    A chunk of rows is present if its file in each row array exists with its full size.
    """
    files = location.files(group.path)
    segments = []
    for name, folder in parts(location, group, SEGMENT).items():
        try:
            source, embedding = read(folder, "source"), array(folder, "embedding")
        except StoreError:
            continue
        chunk_rows = embedding.chunks[0]
        if name != segment_name(source, chunk_rows) or len(source) != embedding.shape[0]:
            continue
        present = np.ones(-(-len(source) // chunk_rows), dtype=bool)
        for kind in ROW_ARRAYS:
            size = chunk_bytes(array(folder, kind))
            names = (chunk_name(folder.path, kind, chunk) for chunk in range(len(present)))
            present &= [files.get(file) == size for file in names]
        segments.append(Segment(name, source, chunk_rows, present))
    return segments
