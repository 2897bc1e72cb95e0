"""Filling a generation with Dask: only rows that are not there yet, one task per whole Zarr chunk.

Chunks and tasks coincide because tasks that share a chunk lose rows silently. The worker that computed a chunk
writes it; nothing but the inputs of its rows travels. Chunk files are written once, under their final name, by
renaming; the manifest that makes rows visible is written last, when all that it names is on the disk. So a reader sees
the former rows or all new ones, also after a power cut.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ichpipe.cache import layout
from ichpipe.cache.errors import StoreError
from ichpipe.cache.inventory import ABSENT, Survey, survey
from ichpipe.cache.location import PARTIAL, Place
from ichpipe.cache.manifest import read_manifest, write_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    import zarr
    from distributed import Client
    from numpy.typing import NDArray

    from ichpipe.cache.rows import Codes, Rows

    Compute = Callable[[Sequence[Any]], tuple[NDArray[np.float32], NDArray[np.float32]]]
    Known = Callable[[NDArray[np.intp]], dict[str, NDArray[Any]]]

TASKS_PER_WORKER = 3
"""One is computed, one is written, one waits: few enough that memory stays flat."""


@dataclass(frozen=True)
class Work:
    """How rows are computed.

    ``inputs`` has one picklable value a row, handed in lists to the function that ``make_compute`` builds once per
    worker (called with the worker's number on its machine). It returns embeddings (n, D) and logits (n, C), float32.
    ``connect`` opens a Dask client; it is called only where there is something to compute. ``known`` gives arrays
    with one row for each of the row numbers asked for, to be stored beside them.
    """

    inputs: Sequence[Any]
    make_compute: Callable[[int], Compute]
    connect: Callable[[], AbstractContextManager[Client]]
    known: Known | None = None


@dataclass(frozen=True)
class _Task:
    segment: str
    rows: slice  # of the segment
    wanted: NDArray[np.intp]  # the same rows by number in `Rows`


def update(
    place: Place,
    generation: layout.Generation,
    rows: Rows,
    work: Work,
    *,
    keep_vanished: bool = False,
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[int]:
    """Make ``rows`` the content of the generation; yield how many rows are there, after each chunk.

    Rows whose file digest is in the generation are not computed again, wherever the file lies now. Series that are
    no longer among ``rows`` leave the manifest (``keep_vanished``: stay in it); `prune` frees their bytes.
    Another extraction of the same store is waited for. Raises StoreError; what was computed by then stays.
    """
    if len(work.inputs) != len(rows):
        raise StoreError(f"{len(work.inputs)} inputs for {len(rows)} rows")
    with place.writing(), place.lock(on_wait):
        group = layout.create_generation(layout.create_root(place), generation)
        _sweep(place, group.path)
        found = survey(place, group)
        where = found.locate(rows.source)
        absent = np.flatnonzero(where[:, 0] == ABSENT)
        yield len(rows) - len(absent)
        if len(absent):
            tasks = _plan(group, generation, found, rows.source, absent, work)
            with work.connect() as client:
                yield from _run(client, str(place), group.path, tasks, work)
        _publish(place, group, rows, keep_vanished=keep_vanished)


def _sweep(place: Place, generation: str) -> None:
    """Remove what a killed writer left under zarr's temporary names."""
    for name in place.files(generation):
        if name.endswith(PARTIAL):
            place.remove(name)


def _plan(
    group: zarr.Group, generation: layout.Generation, found: Survey, source: Codes, absent: NDArray[np.intp], work: Work
) -> list[_Task]:
    """Finish segments that an interrupted run began, then put the other rows into a new segment."""
    number_of = {source[row].tobytes(): int(row) for row in absent}  # one number per content
    tasks = []
    for segment, present in zip(found.segments, found.present, strict=True):
        for chunk in np.flatnonzero(~present).tolist():
            rows = segment.rows_of_chunk(chunk)
            wanted = [number_of.get(digest.tobytes(), ABSENT) for digest in segment.source[rows]]
            if ABSENT not in wanted:
                tasks.append(_Task(segment.name, rows, np.array(wanted, dtype=np.intp)))
                for digest in segment.source[rows]:
                    del number_of[digest.tobytes()]
    rest = np.array(list(number_of.values()), dtype=np.intp)
    if len(rest):
        known = work.known(rest) if work.known else {}
        segment = layout.create_segment(group, generation, source[rest], known)
        for chunk in range(segment.n_chunks):
            rows = segment.rows_of_chunk(chunk)
            tasks.append(_Task(segment.name, rows, rest[rows]))
    return tasks


def _run(client: Client, address: str, generation: str, tasks: list[_Task], work: Work) -> Iterator[int]:
    # Dask's distributed takes half a second to import, and where all rows are there it is not needed.
    from distributed import as_completed  # noqa: PLC0415

    from ichpipe.cache.worker import ComputePlugin, Inputs, compute_chunk, numbers_of  # noqa: PLC0415

    client.register_plugin(ComputePlugin(work.make_compute, numbers_of(_workers(client))))
    waiting = iter(tasks)
    running: Any = as_completed()  # type: ignore[no-untyped-call]

    def fill() -> None:
        """Submit as many as the workers that are there now can take: on a cluster they come and go."""
        limit = TASKS_PER_WORKER * max(1, len(_workers(client)))
        for task in itertools.islice(waiting, max(0, limit - running.count())):
            packed = Inputs(taken(work.inputs, task.wanted))
            place = f"{generation}/{task.segment}"
            running.add(client.submit(compute_chunk, address, place, task.rows, packed, pure=False))

    fill()
    for future in running:
        yield future.result()
        fill()


def taken(inputs: Sequence[Any], wanted: NDArray[np.intp]) -> list[Any]:
    """Return some inputs. Mostly they are neighbours: asked for as a slice, a table's column gives them all at once."""
    first, end = int(wanted[0]), int(wanted[-1]) + 1
    if np.array_equal(wanted, np.arange(first, end)):
        return list(inputs[first:end])
    return [inputs[row] for row in wanted]


def _workers(client: Client) -> list[str]:
    # Not scheduler_info, which some versions cut to five workers.
    return list(client.nthreads())  # type: ignore[no-untyped-call]


def _publish(place: Place, group: zarr.Group, rows: Rows, *, keep_vanished: bool) -> None:
    found = survey(place, group)
    where = found.locate(rows.source)
    absent = where[:, 0] == ABSENT
    if absent.any():
        raise StoreError(f"{place}: {int(absent.sum())} of {len(rows)} rows are not there; run: ichpipe extract")
    place.sync(group.path)
    if keep_vanished:
        rows, where = _with_vanished(place, group, found, rows, where)
    write_manifest(place, group, rows, [segment.name for segment in found.segments], where)


def _with_vanished(
    place: Place, group: zarr.Group, found: Survey, rows: Rows, where: NDArray[np.int64]
) -> tuple[Rows, NDArray[np.int64]]:
    former = None
    with contextlib.suppress(StoreError):  # no manifest yet, or a damaged one
        former = read_manifest(place, group).rows
    if former is None:
        return rows, where
    now = set(map(bytes, rows.series_uid))
    vanished = np.array([n for n, uid in enumerate(map(bytes, former.series_uid)) if uid not in now], dtype=np.intp)
    kept = former.select(vanished)
    place_of_kept = found.locate(kept.source)
    if (place_of_kept[:, 0] == ABSENT).any():
        raise StoreError(f"{place}: rows of vanished series are damaged; run: ichpipe cache verify")
    return rows.join(kept), np.concatenate([where, place_of_kept])
