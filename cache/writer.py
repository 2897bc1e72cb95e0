"""Writing a store with Dask: one task per whole Zarr chunk, and a chunk that is there is done.

Chunks and tasks coincide because tasks that share a chunk lose rows silently. The worker that computed
a chunk writes it; nothing but the file names of slices travels. The store grows in a building folder and
is renamed when every chunk is there, so a store under its final name is always whole.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
from distributed import WorkerPlugin, as_completed, get_worker

from ichpipe.cache import layout
from ichpipe.cache.errors import StoreError
from ichpipe.cache.fingerprint import differences

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import zarr
    from distributed import Client, Worker
    from numpy.typing import NDArray

    Compute = Callable[[Sequence[str]], tuple[NDArray[np.float32], NDArray[np.float32]]]

PLUGIN = "ichpipe-compute"
TASKS_PER_WORKER = 2
"""Enough to keep a worker busy, few enough that memory stays flat."""


class ComputePlugin(WorkerPlugin):
    """Builds the compute function once per worker: the model is not sent with every task."""

    name = PLUGIN

    def __init__(self, make_compute: Callable[[int], Compute]) -> None:
        self.make_compute = make_compute
        self.compute: Compute | None = None

    def setup(self, worker: Worker) -> None:
        """Build the function; the worker's number lets it choose its device."""
        number = worker.name if isinstance(worker.name, int) else 0
        self.compute = self.make_compute(number)


def disagreement(path: Path, fingerprint: dict[str, Any]) -> list[str]:
    """Name what keeps the store at ``path`` from being the one asked for; empty: it is the one."""
    try:
        group = layout.open_group(path)
    except StoreError as error:
        return [str(error)]
    found = group.attrs.get("fingerprint")
    problems = differences(found if isinstance(found, dict) else {}, fingerprint)
    absent = [chunk for chunk in range(_count_chunks(group)) if not _is_done(path, chunk)]
    if absent:
        problems.append(f"{len(absent)} chunks are missing, the first is number {absent[0]}")
    return problems if group.attrs.get("complete") is True else [*problems, "it is not complete"]


def _count_chunks(group: zarr.Group) -> int:
    rows = layout.array(group, "embedding")
    return -(-int(rows.shape[0]) // int(rows.chunks[0]))


def write_store(
    path: Path,
    building: Path,
    plan: layout.StorePlan,
    row_inputs: Sequence[str],
    make_compute: Callable[[int], Compute],
    client: Client,
) -> Iterator[int]:
    """Compute and write every chunk not there yet; yield the number of rows after each one.

    ``row_inputs`` has one string per row, handed to the compute function, which returns embeddings
    (n, embedding_dim) and logits (n, classes). After the last chunk the store is renamed to ``path``.
    """
    todo = _prepare_building(building, plan)
    done_rows = plan.n_rows - sum(_rows(plan, chunk) for chunk in todo)
    if done_rows:
        yield done_rows
    client.register_plugin(ComputePlugin(make_compute))
    waiting = iter(todo)
    limit = TASKS_PER_WORKER * max(1, len(client.scheduler_info()["workers"]))

    def submit(chunk: int) -> Any:
        inputs = list(row_inputs[plan.rows_of_chunk(chunk)])
        return client.submit(_compute_chunk, str(building), plan, chunk, inputs, pure=False)

    running = as_completed([submit(chunk) for _, chunk in zip(range(limit), waiting, strict=False)])  # type: ignore[no-untyped-call]
    for future in running:
        yield future.result()
        following = next(waiting, None)
        if following is not None:
            running.add(submit(following))  # type: ignore[no-untyped-call]
    _publish(building, path)


def _rows(plan: layout.StorePlan, chunk: int) -> int:
    rows = plan.rows_of_chunk(chunk)
    return int(rows.stop - rows.start)


def _prepare_building(building: Path, plan: layout.StorePlan) -> list[int]:
    """Return the chunks still to do; a building folder made for something else is started anew."""
    if not _resumable(building, plan):
        shutil.rmtree(building, ignore_errors=True)
        building.parent.mkdir(parents=True, exist_ok=True)
        layout.create(building, plan)
    for orphan in building.rglob("*.partial"):  # zarr leaves these where a writer was killed
        orphan.unlink()
    return [chunk for chunk in range(plan.n_chunks) if not _is_done(building, chunk)]


def _resumable(building: Path, plan: layout.StorePlan) -> bool:
    try:
        group = layout.open_group(building)
        return group.attrs["fingerprint"] == plan.fingerprint and (
            layout.array(group, "embedding").chunks == (plan.chunk_rows, plan.embedding_dim)
        )
    except (StoreError, KeyError):
        return False


def _is_done(building: Path, chunk: int) -> bool:
    return all(file.exists() for file in layout.chunk_files(building, chunk))


def _compute_chunk(building: str, plan: layout.StorePlan, chunk: int, inputs: list[str]) -> int:
    """Run on a worker: compute one chunk and write it. Returns the number of its rows."""
    from pathlib import Path  # noqa: PLC0415 - typing only above; a worker unpickles this function

    plugin: Any = get_worker().plugins[PLUGIN]
    embedding, logit = plugin.compute(inputs)
    rows = plan.rows_of_chunk(chunk)
    _check(embedding, (len(inputs), plan.embedding_dim), inputs)
    _check(logit, (len(inputs), len(plan.classes)), inputs)
    group = layout.open_group(Path(building), mode="r+")
    layout.array(group, "logit")[rows] = logit.astype(np.float32)
    layout.array(group, "embedding")[rows] = embedding.astype(layout.EMBEDDING_DTYPE)
    return len(inputs)


def _check(values: NDArray[np.float32], shape: tuple[int, int], inputs: list[str]) -> None:
    if values.shape != shape:
        raise StoreError(f"the model returned shape {values.shape}, the store wants {shape}")
    bad = ~(np.abs(values) <= layout.EMBEDDING_LIMIT).all(axis=1)  # NaN compares false
    if bad.any():
        first = inputs[int(np.argmax(bad))]
        raise StoreError(
            f"{int(bad.sum())} slices have features that are not finite in float16, the first is {first}; "
            "the weights have diverged: train the slice CNN again with a lower learning rate"
        )


def _publish(building: Path, path: Path) -> None:
    group = layout.open_group(building, mode="r+")
    group.attrs["complete"] = True
    if path.exists():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        building.rename(path)
        shutil.rmtree(old)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        building.rename(path)
