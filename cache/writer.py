"""Fills a generation with Dask: only missing rows are computed. Each Zarr chunk is one task, which also writes it.

Tasks that share a chunk would lose rows silently. The manifest makes rows visible, and is written last, after all its
rows are on disk: a reader sees the former rows or all new ones, also after a power loss.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ichpipe.cache import layout
from ichpipe.cache.errors import StoreError
from ichpipe.cache.rows import as_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    import zarr
    from distributed import Client
    from numpy.typing import NDArray

    from ichpipe.cache.location import StoreLocation
    from ichpipe.cache.rows import Codes, Rows
    from ichpipe.cache.worker import Compute

    Task = tuple[str, slice, NDArray[np.intp]]  # a segment, rows in it, and the numbers of the same rows in `Rows`

TASKS_PER_WORKER = 3  # one task computes, one writes, one waits; memory stays flat


@dataclass(frozen=True)
class Work:
    """How missing rows are computed.

    Parameters
    ----------
    inputs
        One picklable value for each row.
    make_compute
        Called once per worker with the worker's number on its machine. Returns a function that maps a list of inputs
        to embeddings (n, D) and logits (n, C), float32.
    connect
        Opens a Dask client; called only if rows are missing.
    make_extra
        Maps row numbers to further arrays with one row each, which are stored beside the embeddings.

    """

    inputs: Sequence[Any]
    make_compute: Callable[[int], Compute]
    connect: Callable[[], AbstractContextManager[Client]]
    make_extra: Callable[[NDArray[np.intp]], dict[str, NDArray[Any]]] | None = None


def update(
    location: StoreLocation,
    generation: layout.Generation,
    rows: Rows,
    work: Work,
    *,
    keep_vanished: bool = False,
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[int]:
    """Make ``rows`` the content of the generation; compute those whose file digest is not in the generation.

    Parameters
    ----------
    location
        Address of the store, which is created if absent.
    generation
        Identity, classes and dimensions of the rows.
    rows
        The slices that the generation shall hold.
    work
        Inputs and compute function.
    keep_vanished
        Keep series that are no longer among ``rows``. Otherwise they leave the manifest, and `prune` frees their bytes.
    on_wait
        Called if another process is writing the store.

    Yields
    ------
    Number of rows that exist already, then the number of rows of each finished chunk.

    Raises
    ------
    StoreError
        The store can't be written, or rows can't be stored. Finished chunks stay.

    """
    if len(work.inputs) != len(rows):
        raise StoreError(f"{location}: {len(work.inputs)} inputs for {len(rows)} rows; pass one input a row")
    with location.writing(on_wait):
        group = layout.create_generation(layout.create_root(location), generation)
        location.remove_partial(group.path)
        segments = layout.list_segments(location, group)
        absent = np.flatnonzero(layout.locate(segments, rows.source)[:, 0] == layout.ABSENT)
        yield len(rows) - len(absent)
        if len(absent):
            tasks = _plan_tasks(group, generation.chunk_rows, segments, rows.source, absent, work)
            with work.connect() as client:
                yield from _run_tasks(client, location, group.path, tasks, work)
        segments = layout.list_segments(location, group)
        location.sync(group.path)
        if keep_vanished:
            with contextlib.suppress(StoreError):  # no manifest yet, or a damaged one
                former = layout.read_manifest(location, group).rows
                vanished = np.flatnonzero(~np.isin(as_text(former.series_uid), as_text(rows.series_uid)))
                rows = rows.join(former.select(vanished))
        layout.write_manifest(location, group, rows, segments)


def _plan_tasks(
    group: zarr.Group,
    chunk_rows: int,
    segments: list[layout.Segment],
    source: Codes,
    absent: NDArray[np.intp],
    work: Work,
) -> list[Task]:
    """Finish the segments of an interrupted run, then put the other rows into a new segment."""
    number_of = {source[row].tobytes(): int(row) for row in absent}  # files with the same content are computed once
    tasks: list[Task] = []
    for segment in segments:
        for rows, present in zip(segment.chunks, segment.present, strict=True):
            digests = [digest.tobytes() for digest in segment.source[rows]]
            if not present and all(digest in number_of for digest in digests):
                numbers = [number_of.pop(digest) for digest in digests]
                tasks.append((segment.name, rows, np.array(numbers, dtype=np.intp)))
    rest = np.array(list(number_of.values()), dtype=np.intp)
    if len(rest):
        extra = work.make_extra(rest) if work.make_extra else {}
        segment = layout.create_segment(group, source[rest], chunk_rows, extra)
        tasks += [(segment.name, rows, rest[rows]) for rows in segment.chunks]
    return tasks


def _run_tasks(
    client: Client, location: StoreLocation, generation: str, tasks: list[Task], work: Work
) -> Iterator[int]:
    # Importing distributed takes half a second, and is not needed if all rows exist.
    from distributed import as_completed  # noqa: PLC0415

    from ichpipe.cache.worker import ComputePlugin, Inputs, compute_chunk, numbers_of  # noqa: PLC0415

    # nthreads lists all workers; some versions of scheduler_info list five.
    client.register_plugin(ComputePlugin(work.make_compute, numbers_of(client.nthreads())))  # type: ignore[no-untyped-call]
    waiting = iter(tasks)
    running: Any = as_completed()  # type: ignore[no-untyped-call] # distributed has no types

    def submit_next() -> None:
        limit = TASKS_PER_WORKER * max(1, len(client.nthreads()))  # type: ignore[no-untyped-call] # workers come and go
        for name, rows, numbers in itertools.islice(waiting, max(0, limit - running.count())):
            inputs = Inputs(select_inputs(work.inputs, numbers))
            segment = f"{generation}/{name}"
            running.add(client.submit(compute_chunk, str(location), segment, rows, inputs, pure=False))

    submit_next()
    for future in running:
        yield future.result()
        submit_next()


def select_inputs(inputs: Sequence[Any], numbers: NDArray[np.intp]) -> list[Any]:
    """Return some inputs. Neighbours are read as a slice, which a table's column returns at once."""
    first, end = int(numbers[0]), int(numbers[-1]) + 1
    if np.array_equal(numbers, np.arange(first, end)):
        return list(inputs[first:end])
    return [inputs[number] for number in numbers]
