"""Fits principal components of a generation's embeddings and stores every row under them.

    <generation>/pca-<name>/    mean (D,), components (k, D), explained_variance_ratio (k,), embedding (n, k)

The rows are in the order of one manifest; readers refuse them under another manifest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ichpipe.cache import layout
from ichpipe.cache.errors import StoreError
from ichpipe.cache.reader import PCA_POINTER, EmbeddingStore, PrincipalComponents

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from ichpipe.cache.location import StoreLocation

BLOCK_ROWS = 4096  # in memory at a time, in float64


def fit(store: EmbeddingStore, series_uids: Iterable[str], k: int) -> PrincipalComponents:
    """Fit ``k`` components on some series in one pass, exactly: sums are float64.

    The largest entry of each component is positive. Raises StoreError if there are fewer rows or features than ``k``.
    """
    width = store.embedding_dim
    n, total, outer = 0, np.zeros(width), np.zeros((width, width))
    parts: list[NDArray[np.float64]] = []
    uids = list(series_uids)
    for uid in uids:
        parts.append(store.embedding(uid).astype(np.float64))
        if sum(map(len, parts)) >= BLOCK_ROWS or uid == uids[-1]:
            block, parts = np.concatenate(parts), []
            n, total = n + len(block), total + block.sum(axis=0)
            outer += block.T @ block
    most = min(n - 1, width)
    if k > most:
        raise StoreError(f"extract.pca is {k}, but {n} train slices of {width} features give at most {most}; lower it")
    mean = total / n
    covariance = outer / n - np.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance)  # in rising order
    components = vectors[:, ::-1][:, :k].T
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    ratio = np.maximum(values[::-1][:k], 0) / max(float(np.trace(covariance)), np.finfo(float).tiny)
    return PrincipalComponents(
        mean.astype(np.float32), (components * np.sign(largest)).astype(np.float32), ratio.astype(np.float32)
    )


def write(location: StoreLocation, store: EmbeddingStore, components: PrincipalComponents, chunk_rows: int) -> None:
    """Store the components of all rows of a generation unless they exist already; remove former ones."""
    with location.writing():
        group = layout.subgroup(layout.open_root(location, write=True), store.generation)
        manifest = str(group.attrs["manifest"])
        values = [np.ascontiguousarray(array).tobytes() for array in (components.mean, components.components)]
        name = layout.PCA + layout.name_of_bytes(manifest.encode(), *values)
        if group.attrs.get(PCA_POINTER) != name or name not in group:
            location.remove(f"{group.path}/{name}")
            folder = group.require_group(name)
            layout.create_small(folder, "mean", components.mean, ("feature",))
            layout.create_small(folder, "components", components.components, ("component", "feature"))
            layout.create_small(folder, "explained_variance_ratio", components.explained_variance_ratio, ("component",))
            k = len(components.components)
            rows: Any = layout.create_rows(folder, "embedding", len(store), k, chunk_rows)
            start, pending = 0, np.zeros((0, k), np.float16)
            for uid in store.series_uids:
                pending = np.concatenate([pending, components.project(store.embedding(uid)).astype(np.float16)])
                while len(pending) >= chunk_rows:
                    rows[start : start + chunk_rows] = pending[:chunk_rows]
                    start, pending = start + chunk_rows, pending[chunk_rows:]
            if len(pending):
                rows[start:] = pending
            folder.attrs["manifest"] = manifest
            location.sync(f"{group.path}/{name}")
            group.attrs[PCA_POINTER] = name
        for other in layout.parts(location, group, layout.PCA).keys() - {name}:
            location.remove(f"{group.path}/{other}")
