"""Write the embedding of every slice of the index to the store."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ichpipe.cache.writer import disagreement, write_store
from ichpipe.cluster import connect
from ichpipe.device import choose_devices
from ichpipe.embedding import MakeEmbedder, fingerprint, plan_store
from ichpipe.models.weights import load_slice_cnn
from ichpipe.progress import Counter
from ichpipe.studies import read_index

if TYPE_CHECKING:
    from ichpipe.artifacts import Artifacts
    from ichpipe.params import Params

log = logging.getLogger("ichpipe")


def run(
    params: Params, artifacts: Artifacts, gpu: str = "auto", workers: int = 1, scheduler: str | None = None
) -> None:
    """Compute what is not in the store yet; a store that is whole and current is left alone."""
    devices = choose_devices(gpu)
    index = read_index(artifacts.index)
    cnn = load_slice_cnn(artifacts.slice_cnn)
    made_by = fingerprint(index, artifacts.slice_cnn, cnn.spec)
    problems = disagreement(artifacts.embeddings, made_by)
    if not problems:
        log.info("%s is whole and current: %d slices", artifacts.embeddings, len(index))
        return
    if artifacts.embeddings.exists():
        log.info("%s is made anew:\n  %s", artifacts.embeddings, "\n  ".join(problems))
    plan = plan_store(index, cnn, made_by, params.extract.chunk_rows)
    maker = MakeEmbedder(
        artifacts.slice_cnn.resolve(), tuple(str(device) for device in devices), params.extract.batch_size
    )
    building = artifacts.resume("embeddings.zarr")
    counter = Counter("extract", plan.n_rows, "slice")
    with connect(max(workers, len(devices)), scheduler) as client:
        for rows in write_store(artifacts.embeddings, building, plan, index["path"].tolist(), maker, client):
            counter.add(rows)
    counter.close()
