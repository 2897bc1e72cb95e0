"""Write the embedding of every slice of the index to the store; compute only what is not there."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import TYPE_CHECKING

import click

from ichpipe.common.progress import Counter
from ichpipe.stages.options import ahead_option, gpu_option, workers_option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import numpy as np
    import pandas as pd
    from distributed import Client
    from numpy.typing import NDArray

    from ichpipe.cache.location import StoreLocation
    from ichpipe.common.artifacts import Artifacts
    from ichpipe.features.embedder import MakeEmbedder, SliceInputs
    from ichpipe.features.generations import GenerationSpec, View
    from ichpipe.params.schema import Params
    from ichpipe.stages.options import Settings

    Connect = Callable[[], AbstractContextManager[Client]]

log = logging.getLogger("ichpipe")

COLUMNS = ("path", "study_uid", "series_uid", "sop_uid", "file_digest", "split", "fold")
"""What is used of the index; the other half of its bytes stays on disk."""


@click.command("extract")
@gpu_option
@workers_option
@ahead_option
@click.option("--scheduler", metavar="ADDRESS", default=None, help="Dask scheduler that is there, tcp://HOST:PORT.")
@click.pass_obj
def command(settings: Settings, gpu: str, workers: int, loaders: int | None, scheduler: str | None) -> None:
    """Write one embedding per slice to the Zarr store, with Dask. Goes on where it was stopped.

    \b
    Example:
      ichpipe extract --gpu 0
    """
    run(settings.params(), settings.artifacts(), gpu, workers, scheduler, loaders)


def run(
    params: Params,
    artifacts: Artifacts,
    gpu: str = "auto",
    workers: int = 1,
    scheduler: str | None = None,
    loaders: int | None = None,
) -> None:
    """Fill every generation that the parameters ask for; slices whose file and network are known cost nothing.

    ``loaders`` is of each worker: lanes on a CPU, decoding processes beside a GPU; None: all cores of this machine
    together, or one where a scheduler has workers elsewhere.
    """
    from ichpipe.cache.location import StoreLocation
    from ichpipe.common.device import choose_devices
    from ichpipe.features.generations import list_generations, store_url
    from ichpipe.features.prefetch import usual_loaders
    from ichpipe.index.slice_index import read_index

    devices = tuple(str(device) for device in choose_devices(gpu))
    workers = max(workers, len(devices))
    if loaders is None:
        loaders = 1 if scheduler else usual_loaders(devices[0], workers)
    index = read_index(artifacts.index, COLUMNS)
    place = StoreLocation(store_url(params, artifacts))
    with contextlib.ExitStack() as stack:
        connect = _once(stack, workers, scheduler)
        caches = list_generations(params, artifacts, index)
        for cache in caches:
            _fill(params, place, cache, _maker(params, cache, devices, loaders), connect)
    if params.extract.pca is not None:
        _add_components(params, place, caches, index)


def _maker(params: Params, cache: GenerationSpec, devices: tuple[str, ...], loaders: int) -> MakeEmbedder:
    from ichpipe.features.embedder import MakeEmbedder

    size = params.extract.batch_size
    return MakeEmbedder(cache.model_dir.resolve(), devices, size, cache.view, cache.precision, loaders)


def _fill(params: Params, place: StoreLocation, cache: GenerationSpec, maker: MakeEmbedder, connect: Connect) -> None:
    from ichpipe.cache.layout import Generation
    from ichpipe.cache.writer import Work, update
    from ichpipe.features.embedder import SliceInputs
    from ichpipe.models.weights import load_slice_cnn

    section = params.extract
    slices = SliceInputs(cache.index)
    cnn = load_slice_cnn(cache.model_dir)
    generation = Generation(cache.identity(), cnn.embedding_dim, cnn.spec.classes, section.chunk_rows)
    known = functools.partial(_parameters, cache.view, slices) if cache.view else None
    work = Work(slices, maker, connect, known)
    steps = update(place, generation, cache.rows(), work, keep_vanished=section.keep_vanished, on_wait=_say_waiting)
    there = next(steps)
    if there == len(slices):
        log.info("%s: all %d slices are there", cache.describe(), there)
    else:
        log.info("%s: %d of %d slices to compute", cache.describe(), len(slices) - there, len(slices))
    counter = Counter("extract", len(slices) - there, "slice")
    for rows in steps:
        counter.add(rows)
    counter.close()


def _add_components(params: Params, place: StoreLocation, caches: list[GenerationSpec], index: pd.DataFrame) -> None:
    """Fit on the plain train slices alone; the same map for every generation, so that they stay comparable."""
    from ichpipe.cache import pca
    from ichpipe.cache.reader import EmbeddingStore

    assert params.extract.pca is not None  # noqa: S101 - the caller asked
    stores = [EmbeddingStore(place, cache.identity(), cache.rows()) for cache in caches]
    train = index.loc[index["split"] == "train", "series_uid"].unique().tolist()
    found = pca.fit(stores[0], train, params.extract.pca)
    log.info("%d principal components explain %.1f %%", params.extract.pca, 100 * found.explained_variance_ratio.sum())
    for store in stores:
        pca.write(place, store, found, params.extract.chunk_rows)


def _parameters(view: View, slices: SliceInputs, rows: NDArray[np.intp]) -> dict[str, NDArray[np.generic]]:
    from ichpipe.cache.writer import select_inputs
    from ichpipe.features.embedder import view_parameters

    return view_parameters(view, select_inputs(slices, rows))


def _once(stack: contextlib.ExitStack, workers: int, scheduler: str | None) -> Connect:
    """Return what opens the Dask client at its first call, and lends the same one afterwards."""
    clients: list[Client] = []

    @contextlib.contextmanager
    def lend() -> Iterator[Client]:
        from ichpipe.features.dask_client import connect

        if not clients:
            clients.append(stack.enter_context(connect(workers, scheduler)))
        yield clients[0]

    return lend


def _say_waiting() -> None:
    log.info("another process writes this store; waiting for it to finish")
