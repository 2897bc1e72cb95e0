"""Looking after a store: what is in it, whether every byte is as it was written, and freeing what nobody needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ichpipe.cache import layout
from ichpipe.cache.chunks import Chunks, DamagedChunkError, check_file
from ichpipe.cache.errors import StoreError
from ichpipe.cache.fingerprint import FORMAT_VERSION, name_of
from ichpipe.cache.inventory import ABSENT, Survey, survey
from ichpipe.cache.location import PARTIAL, Place
from ichpipe.cache.manifest import Manifest, read_manifest, write_manifest
from ichpipe.cache.reader import studies_of
from ichpipe.cache.rows import decode_uids
from ichpipe.cache.worker import write_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import zarr
    from numpy.typing import NDArray


# What is there


def info(place: Place) -> dict[str, Any]:
    """Count rows, studies, bytes and what is missing, per generation, as JSON-like values."""
    root = layout.open_root(place)
    files = place.files()
    return {
        "store": str(place),
        "format_version": FORMAT_VERSION,
        "files": len(files),
        "bytes": sum(files.values()),
        "generations": [_describe(place, group, files) for group in layout.generations(place, root).values()],
    }


def _describe(place: Place, group: zarr.Group, files: dict[str, int]) -> dict[str, Any]:
    found = survey(place, group)
    manifest, problem = _manifest_or_reason(place, group)
    n_chunks = sum(len(present) for present in found.present)
    there = sum(int(present.sum()) for present in found.present)
    result = {
        "generation": group.path,
        "complete": False,
        "identity": group.attrs.get("identity"),
        "embedding_dim": group.attrs.get("embedding_dim"),
        "bytes": sum(size for name, size in files.items() if name.startswith(f"{group.path}/")),
        "segments": len(found.segments),
        "chunks": n_chunks,
        "chunks_missing": n_chunks - there,
        "rows_stored": found.n_rows,
    }
    if manifest is None:
        return result | {"problem": problem, "rows": 0, "series": 0, "studies": 0, "missing_studies": []}
    absent = np.flatnonzero(found.locate(manifest.rows.source)[:, 0] == ABSENT)
    return result | {
        "complete": not len(absent),
        "rows": len(manifest.rows),
        "series": manifest.rows.n_series,
        "studies": len(set(decode_uids(manifest.rows.study_uid))),
        "rows_unused": found.n_rows - (len(manifest.rows) - len(absent)),
        "rows_missing": len(absent),
        "missing_studies": studies_of(manifest.rows, absent),
    }


def _manifest_or_reason(place: Place, group: zarr.Group) -> tuple[Manifest | None, str]:
    try:
        return read_manifest(place, group, prove=True), ""
    except StoreError as error:
        return None, str(error)


# Whether it is as it was written


@dataclass(frozen=True)
class Problem:
    """One place of a store that is not as it was written, and the studies that need it."""

    generation: str
    part: str  # segment or manifest
    array: str
    chunk: int | None
    what: str
    studies: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-like values."""
        return asdict(self)

    def __str__(self) -> str:
        """Say it in one line."""
        where = "/".join(part for part in (self.generation, self.part, self.array) if part)
        chunk = "" if self.chunk is None else f" chunk {self.chunk}"
        whose = f": {', '.join(self.studies)}" if self.studies else ""
        return f"{where}{chunk} {self.what}{whose}"


def verify(place: Place, on_progress: Callable[[int], None] = lambda _bytes: None) -> list[Problem]:
    """Read every byte of every chunk against its checksum, and every name against what it says."""
    problems: list[Problem] = []
    for name, group in layout.generations(place, layout.open_root(place)).items():
        identity = group.attrs.get("identity")
        if name_of(identity) != name:
            problems.append(Problem(name, "", "", None, "has an identity that is not the one it is named by", []))
        manifest, reason = _manifest_or_reason(place, group)
        if manifest is None and "manifest" in group.attrs:
            problems.append(Problem(name, str(group.attrs["manifest"]), "", None, f"can't be used ({reason})", []))
        problems += _verify_segments(place, group, manifest, on_progress)
        problems += _verify_beside(place, group)
    return problems


def _verify_beside(place: Place, group: zarr.Group) -> Iterator[Problem]:
    """Read what stands beside the rows: parameters of views, principal components."""
    beside = layout.parts(place, group, layout.SEGMENT) | layout.parts(place, group, layout.COMPANION)
    for part, found in beside.items():
        segment = part.startswith(layout.SEGMENT)
        for name, _ in found.arrays():
            if segment and name in (*layout.ROW_ARRAYS, "source"):
                continue
            try:
                values = layout.read(found, name)
            except StoreError:
                yield Problem(group.path, part, name, None, "fails its checksum", [])
                continue
            if values.dtype.kind == "f" and np.isnan(values).any():  # a chunk that is not there reads as NaN
                yield Problem(group.path, part, name, None, "lacks a chunk", [])


def _verify_segments(
    place: Place, group: zarr.Group, manifest: Manifest | None, on_progress: Callable[[int], None]
) -> Iterator[Problem]:
    found = survey(place, group)
    readable = {segment.name: number for number, segment in enumerate(found.segments)}
    referred = set(manifest.segments) if manifest else set()
    for name in sorted(referred - set(readable)):
        yield Problem(group.path, name, "", None, "is missing or has damaged metadata", _users(manifest, name, None))
    for segment, present in zip(found.segments, found.present, strict=True):
        for kind in layout.ROW_ARRAYS:
            array = layout.array(layout.subgroup(group, segment.name), kind)
            for chunk in range(segment.n_chunks):
                users = _users(manifest, segment.name, segment.rows_of_chunk(chunk))
                what = check_chunk(place, array, chunk) if present[chunk] or users else None
                on_progress(layout.chunk_bytes(array))
                if what:
                    yield Problem(group.path, segment.name, kind, chunk, what, users)


def check_chunk(place: Place, array: zarr.Array[Any], chunk: int) -> str | None:
    """Say what is wrong with one chunk, or nothing."""
    name = f"{array.path}/c/{chunk}/0"
    try:
        if place.local is not None and layout.is_plain(array):
            check_file(place.local / name, chunk, layout.chunk_bytes(array))
        else:
            Chunks(place, array).chunk(chunk)
    except DamagedChunkError as error:
        return error.what
    return None


def _users(manifest: Manifest | None, segment: str, rows: slice | None) -> list[str]:
    if manifest is None or segment not in manifest.segments:
        return []
    inside = manifest.where[:, 0] == manifest.segments.index(segment)
    if rows is not None:
        inside &= (manifest.where[:, 1] >= rows.start) & (manifest.where[:, 1] < rows.stop)
    return studies_of(manifest.rows, np.flatnonzero(inside))


def repair(place: Place, problems: Iterable[Problem]) -> None:
    """Remove what is damaged, so that the next ``extract`` computes it again; nothing else is touched."""
    for problem in problems:
        if problem.chunk is None:
            place.remove("/".join(part for part in (problem.generation, problem.part) if part))
        else:
            for kind in layout.ROW_ARRAYS:
                place.remove(layout.chunk_name(problem.generation, problem.part, kind, problem.chunk))


# Freeing what nobody needs


def prune(place: Place, keep: Callable[[dict[str, Any]], bool], *, dry_run: bool = False) -> dict[str, Any]:
    """Remove generations whose identity ``keep`` refuses, and in the others all rows outside the manifest.

    A generation with rows to remove is copied without them first; readers that are open may have to open again.
    Returns names of removed generations, rows and bytes freed. ``dry_run`` only says so (bytes of whole
    generations exactly, rows as counted).
    """
    before = sum(place.files().values())
    removed, rows = [], 0
    freed_by_removal = 0
    with place.writing(), place.lock(lambda: None):
        root = layout.open_root(place, write=not dry_run)
        for name, group in layout.generations(place, root).items():
            if not keep(layout.identity_of(group)):
                removed.append(name)
                freed_by_removal += sum(place.files(name).values())
                if not dry_run:
                    place.remove(name)
                continue
            rows += _compact(place, group, dry_run=dry_run)
    freed = freed_by_removal if dry_run else before - sum(place.files().values())
    return {"generations_removed": removed, "rows_removed": rows, "bytes_freed": freed, "dry_run": dry_run}


def _compact(place: Place, group: zarr.Group, *, dry_run: bool) -> int:
    """Copy the rows of the manifest into one segment where others lie between them; return how many others."""
    manifest = read_manifest(place, group, prove=True)
    found = survey(place, group)
    source = np.unique(manifest.rows.source, axis=0)
    unused = found.n_rows - len(source)
    unfinished = any(not present.all() for present in found.present)
    orphans = [name for name in place.files(group.path) if name.endswith(PARTIAL)]
    if dry_run or not (unused or unfinished or orphans):
        return unused
    for name in orphans:
        place.remove(name)
    if unused or unfinished:
        _copy(place, group, manifest, found)
    return unused


def _copy(place: Place, group: zarr.Group, manifest: Manifest, found: Survey) -> None:
    where = found.locate(manifest.rows.source)
    if (where[:, 0] == ABSENT).any():
        raise StoreError(f"{place}: generation {group.path} lacks rows; run: ichpipe extract")
    _, first = np.unique(where, axis=0, return_index=True)
    first = np.sort(first)
    chosen, where = manifest.rows.source[first], where[first]
    sources = [layout.subgroup(group, segment.name) for segment in found.segments]
    extra = _extra(sources, where)
    generation = layout.Generation(
        layout.identity_of(group),
        int(group.attrs["embedding_dim"]),  # type: ignore[arg-type]
        tuple(group.attrs["classes"]),  # type: ignore[arg-type]
        max(segment.chunk_rows for segment in found.segments),
    )
    segment = layout.create_segment(group, generation, chosen, extra)
    chunks = {
        (n, kind): Chunks(place, layout.array(g, kind)) for n, g in enumerate(sources) for kind in layout.ROW_ARRAYS
    }
    for number in range(segment.n_chunks):
        rows = segment.rows_of_chunk(number)
        values = {
            kind: np.concatenate([chunks[int(s), kind].rows(int(row), int(row) + 1) for s, row in where[rows]])
            for kind in layout.ROW_ARRAYS
        }
        write_rows(place, f"{group.path}/{segment.name}", rows, values, [str(row) for row in where[rows]])
    after = survey(place, group)
    names = [one.name for one in after.segments]
    only = Survey([after.segments[names.index(segment.name)]], [after.present[names.index(segment.name)]])
    write_manifest(place, group, manifest.rows, [segment.name], only.locate(manifest.rows.source))
    for name in names:
        if name != segment.name:
            place.remove(f"{group.path}/{name}")


def _extra(segments: list[zarr.Group], where: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Gather the arrays that a segment holds besides its rows (the parameters of a view)."""
    names = [name for name, _ in segments[0].arrays() if name not in (*layout.ROW_ARRAYS, "source")]
    result = {}
    for name in names:
        parts = [layout.read(segment, name) for segment in segments]
        result[name] = np.stack([parts[int(s)][int(row)] for s, row in where])
    return result
