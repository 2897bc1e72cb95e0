"""``ichpipe extract``: write the embedding of every slice of the index to the store; compute only missing rows."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from typing import TYPE_CHECKING

import click

from ichpipe.common.progress import Counter
from ichpipe.stages.options import gpu_option, workers_option

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from distributed import Client

    from ichpipe.cache.location import StoreLocation
    from ichpipe.common.artifacts import Artifacts
    from ichpipe.features.embedder import MakeEmbedder
    from ichpipe.features.generations import GenerationSpec
    from ichpipe.params.schema import ExtractParams, Params
    from ichpipe.stages.options import Settings

log = logging.getLogger("ichpipe")

COLUMNS = ["path", "study_uid", "series_uid", "sop_uid", "file_digest", "position_mm", "split", "fold", "slices_only"]
"""Columns that are read: half of the index's bytes."""


@click.command("extract")
@gpu_option
@workers_option
@click.option(
    "--loaders",
    type=click.IntRange(min=0),
    envvar="ICHPIPE_LOADERS",
    help="Of each worker: batches side by side on a CPU, decoding processes beside a GPU [all cores].",
)
@click.option("--scheduler", metavar="ADDRESS", help="A running Dask scheduler, tcp://HOST:PORT.")
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
    workers: int = 0,
    scheduler: str | None = None,
    loaders: int | None = None,
) -> None:
    """Fill every generation that the parameters ask for; slices with a known file and network cost nothing.

    On a CPU ``workers`` processes of Dask read, decode and compute; 0 and 1 are this process. With GPUs there is one
    Dask worker a GPU, and ``workers`` processes decode for them. ``loaders`` is per Dask worker: lanes on a CPU,
    decoding processes beside a GPU. None: what ``workers`` says, else all cores of this machine divided by the number
    of Dask workers, and 1 where a scheduler has workers elsewhere.
    """
    from ichpipe.cache import pca
    from ichpipe.cache.location import StoreLocation
    from ichpipe.cache.reader import EmbeddingStore
    from ichpipe.common.device import choose_devices
    from ichpipe.features.embedder import MakeEmbedder
    from ichpipe.features.generations import list_generations, store_url
    from ichpipe.features.prefetch import usual_loaders
    from ichpipe.index.slice_index import read_index

    devices = tuple(str(device) for device in choose_devices(gpu))
    on_cpu = devices[0] == "cpu"
    n_dask = max(workers, 1) if on_cpu else len(devices)
    if loaders is None:
        loaders = 1 if scheduler else usual_loaders(devices[0], n_dask)
        if workers and not on_cpu and not scheduler:
            loaders = math.ceil(workers / n_dask)
    index = read_index(artifacts.index, COLUMNS)
    index = index[~index["slices_only"]]
    location = StoreLocation(store_url(params, artifacts))
    section = params.extract
    generations = list_generations(params, artifacts, index)
    with contextlib.ExitStack() as stack:

        @functools.cache
        def open_client() -> Client:
            from ichpipe.features.dask_client import connect

            return stack.enter_context(connect(n_dask, scheduler))

        for spec in generations:
            model = spec.model_dir.resolve()
            maker = MakeEmbedder(model, devices, section.batch_size, spec.view, spec.precision, loaders)
            _fill(section, location, spec, maker, lambda: contextlib.nullcontext(open_client()))
    if section.pca is None:
        return
    # Fitted on the plain train slices alone; one map for every generation keeps them comparable.
    stores = [EmbeddingStore(location, spec.identity(), spec.rows()) for spec in generations]
    train = index.loc[index["split"] == "train", "series_uid"].unique().tolist()
    components = pca.fit(stores[0], train, section.pca)
    explained = 100 * components.explained_variance_ratio.sum()
    log.info("%d principal components explain %.1f %%", section.pca, explained)
    for store in stores:
        pca.write(location, store, components, section.chunk_rows)


def _fill(
    section: ExtractParams,
    location: StoreLocation,
    spec: GenerationSpec,
    maker: MakeEmbedder,
    connect: Callable[[], AbstractContextManager[Client]],
) -> None:
    from ichpipe.cache.layout import Generation
    from ichpipe.cache.writer import Work, select_inputs, update
    from ichpipe.features.embedder import SliceInputs, view_parameters
    from ichpipe.models.weights import load_slice_cnn

    slices, view = SliceInputs(spec.index, spec.neighbours), spec.view
    cnn = load_slice_cnn(spec.model_dir)
    generation = Generation(spec.identity(), cnn.embedding_dim, cnn.spec.classes, section.chunk_rows)
    parameters = (lambda rows: view_parameters(view, select_inputs(slices, rows))) if view else None
    work = Work(slices, maker, connect, parameters)
    on_wait = functools.partial(log.info, "another process writes this store; waiting for it to finish")
    steps = update(location, generation, spec.rows(), work, keep_vanished=section.keep_vanished, on_wait=on_wait)
    missing = len(slices) - next(steps)
    state = f"{missing} of {len(slices)} slices to compute" if missing else f"all {len(slices)} slices are there"
    log.info("%s: %s", spec.describe(), state)
    with Counter("extract", missing, "slice") as counter:
        for rows in steps:
            counter.add(rows)
