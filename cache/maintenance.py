"""Maintenance of a store: counting its content, checking every byte, and freeing unused rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ichpipe.cache import layout
from ichpipe.cache.chunks import Chunks, DamagedChunkError, write_rows
from ichpipe.cache.errors import StoreError
from ichpipe.cache.rows import Rows, decode_uids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import zarr

    from ichpipe.cache.location import StoreLocation


def info(location: StoreLocation) -> dict[str, Any]:
    """Return ``store``, ``format_version``, ``files``, ``bytes`` and the counts of each of the ``generations``.

    The values are JSON-like. Raises StoreError if the store is absent or of another format.
    """
    root = layout.open_root(location)
    files = location.files()
    return {
        "store": str(location),
        "format_version": layout.FORMAT_VERSION,
        "files": len(files),
        "bytes": sum(files.values()),
        "generations": [_describe(location, group, files) for group in layout.generations(location, root).values()],
    }


def _describe(location: StoreLocation, group: zarr.Group, files: dict[str, int]) -> dict[str, Any]:
    segments = layout.list_segments(location, group)
    n_stored = sum(len(segment.rows_present) for segment in segments)
    facts = {
        "generation": group.path,
        "complete": False,
        "identity": group.attrs.get("identity"),
        "embedding_dim": group.attrs.get("embedding_dim"),
        "bytes": sum(size for name, size in files.items() if name.startswith(f"{group.path}/")),
        "segments": len(segments),
        "chunks": sum(len(segment.present) for segment in segments),
        "chunks_missing": sum(int((~segment.present).sum()) for segment in segments),
        "rows_stored": n_stored,
    }
    manifest, problem = _read_manifest(location, group)
    if manifest is None:
        return facts | {"problem": problem, "rows": 0, "series": 0, "studies": 0, "missing_studies": []}
    rows = manifest.rows
    absent = np.flatnonzero(layout.locate(segments, rows.source)[:, 0] == layout.ABSENT)
    return facts | {
        "complete": not len(absent),
        "rows": len(rows),
        "series": len(rows.series_uid),
        "studies": len(set(decode_uids(rows.study_uid))),
        "rows_unused": n_stored - (len(rows) - len(absent)),
        "rows_missing": len(absent),
        "missing_studies": rows.studies_of(absent),
    }


def _read_manifest(location: StoreLocation, group: zarr.Group) -> tuple[layout.Manifest | None, str]:
    try:
        return layout.read_manifest(location, group), ""
    except StoreError as error:
        return None, str(error)


@dataclass(frozen=True)
class Problem:
    """A damaged part of a store, and the studies that need it."""

    generation: str
    part: str  # segment, manifest or principal components
    array: str
    chunk: int | None
    what: str
    studies: list[str]

    def __str__(self) -> str:
        """Return one line."""
        path = "/".join(filter(None, (self.generation, self.part, self.array)))
        chunk = "" if self.chunk is None else f" chunk {self.chunk}"
        studies = f": {', '.join(self.studies)}" if self.studies else ""
        return f"{path}{chunk} {self.what}{studies}"


def verify(location: StoreLocation) -> list[Problem]:
    """Compare every chunk with its checksum, and every name with the content that it is derived from.

    Returns the damaged parts. Raises StoreError if the store is absent or of another format.
    """
    problems: list[Problem] = []
    for name, group in layout.generations(location, layout.open_root(location)).items():
        if layout.name_of(group.attrs.get("identity")) != name:
            problems.append(Problem(name, "", "", None, "has an identity that does not match its name", []))
        manifest, reason = _read_manifest(location, group)
        if manifest is None and "manifest" in group.attrs:
            problems.append(Problem(name, str(group.attrs["manifest"]), "", None, f"can't be used ({reason})", []))
        empty = layout.Manifest(Rows.of([], [], [], []), [], np.zeros((0, 2), np.int64))
        problems += _verify_rows(location, group, manifest or empty)
        problems += _verify_small_arrays(location, group)
    return problems


def _verify_rows(location: StoreLocation, group: zarr.Group, manifest: layout.Manifest) -> Iterator[Problem]:
    segments = layout.list_segments(location, group)
    for name in sorted(set(manifest.segments) - {segment.name for segment in segments}):
        yield Problem(group.path, name, "", None, "is missing or has damaged metadata", manifest.studies_in(name))
    for segment in segments:
        for kind in layout.ROW_ARRAYS:
            array = layout.array(layout.subgroup(group, segment.name), kind)
            for chunk, rows in enumerate(segment.chunks):
                studies = manifest.studies_in(segment.name, rows)
                if not segment.present[chunk] and not studies:
                    continue
                try:
                    Chunks(location, array).chunk(chunk)
                except DamagedChunkError as error:
                    yield Problem(group.path, segment.name, kind, chunk, error.reason, studies)


def _verify_small_arrays(location: StoreLocation, group: zarr.Group) -> Iterator[Problem]:
    """Check the parameters of views and the principal components."""
    segments = layout.parts(location, group, layout.SEGMENT)
    for part, folder in (segments | layout.parts(location, group, layout.PCA)).items():
        for name, _ in folder.arrays():
            if part in segments and name in (*layout.ROW_ARRAYS, "source"):
                continue
            try:
                values = layout.read(folder, name)
            except StoreError:
                yield Problem(group.path, part, name, None, "fails its checksum", [])
                continue
            if values.dtype.kind == "f" and np.isnan(values).any():  # a missing chunk reads as NaN
                yield Problem(group.path, part, name, None, "lacks a chunk", [])


def repair(location: StoreLocation, on_wait: Callable[[], None] = lambda: None) -> list[Problem]:
    """Remove what `verify` finds, so that the next ``extract`` computes it again; return it.

    Calls ``on_wait`` and waits if another process writes the store, and verifies after that: what is missing now may
    have been written by then. Raises StoreError as `verify` does, or if the store can't be written.
    """
    with location.writing(on_wait):
        problems = verify(location)
        for problem in problems:
            part = "/".join(filter(None, (problem.generation, problem.part)))
            chunk = problem.chunk
            files = [part] if chunk is None else [layout.chunk_name(part, kind, chunk) for kind in layout.ROW_ARRAYS]
            for name in files:
                location.remove(name)
    return problems


def prune(location: StoreLocation, keep: Callable[[dict[str, Any]], bool], *, dry_run: bool = False) -> dict[str, Any]:
    """Remove whole generations, and from the others all rows outside the manifest.

    ``keep`` decides by its identity whether a generation stays. One with rows outside the manifest is first copied
    without them; open readers may have to open it again. With ``dry_run`` nothing is removed, and ``bytes_freed``
    counts whole generations only. Raises StoreError if the store can't be written or a generation lacks rows.
    """
    removed, n_rows, freed = [], 0, 0
    before = sum(location.files().values())
    with location.writing():
        root = layout.open_root(location, write=not dry_run)
        for name, group in layout.generations(location, root).items():
            if keep(layout.identity_of(group)):
                n_rows += _compact(location, group, dry_run=dry_run)
                continue
            removed.append(name)
            freed += sum(location.files(name).values())
            if not dry_run:
                location.remove(name)
    if not dry_run:
        freed = before - sum(location.files().values())
    return {"generations_removed": removed, "rows_removed": n_rows, "bytes_freed": freed, "dry_run": dry_run}


def _compact(location: StoreLocation, group: zarr.Group, *, dry_run: bool) -> int:
    """Copy the rows of the manifest into one segment if there are others; return the number of the others."""
    rows = layout.read_manifest(location, group).rows
    segments = layout.list_segments(location, group)
    n_unused = sum(len(segment.rows_present) for segment in segments) - len(np.unique(rows.source, axis=0))
    if dry_run:
        return n_unused
    location.remove_partial(group.path)
    if not n_unused and all(segment.present.all() for segment in segments):
        return n_unused
    where = layout.locate(segments, rows.source)
    if (where[:, 0] == layout.ABSENT).any():
        raise StoreError(f"{location}: generation {group.path} lacks rows; run: ichpipe extract")
    first = np.sort(np.unique(where, axis=0, return_index=True)[1])
    where = where[first]
    folders = [layout.subgroup(group, segment.name) for segment in segments]
    extra = {}  # the parameters of a view
    for name, _ in folders[0].arrays():
        if name not in (*layout.ROW_ARRAYS, "source"):
            parts = [layout.read(folder, name) for folder in folders]
            extra[name] = np.stack([parts[number][row] for number, row in where.tolist()])
    chunk_rows = max(segment.chunk_rows for segment in segments)
    copy = layout.create_segment(group, rows.source[first], chunk_rows, extra)
    arrays = {kind: [Chunks(location, layout.array(f, kind)) for f in folders] for kind in layout.ROW_ARRAYS}
    for chunk, copied in enumerate(copy.chunks):
        inputs = where[copied].tolist()
        values = {
            kind: np.concatenate([chunks[number].rows(row, row + 1) for number, row in inputs])
            for kind, chunks in arrays.items()
        }
        write_rows(location, f"{group.path}/{copy.name}", copied, values, inputs)
        copy.present[chunk] = True
    layout.write_manifest(location, group, rows, [copy])
    for segment in layout.list_segments(location, group):
        if segment.name != copy.name:
            location.remove(f"{group.path}/{segment.name}")
    return n_unused
