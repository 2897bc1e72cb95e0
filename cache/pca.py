"""A small companion of a generation: every row's principal components, and the map that made them.

    <generation>/pca-<name>/    mean (D), components (k, D), explained_variance_ratio (k), embedding (n, k)

The rows stand in the order of the manifest for which they were made; another manifest, and they are not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ichpipe.cache import layout
from ichpipe.cache.errors import StoreError
from ichpipe.cache.fingerprint import name_of_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    import zarr
    from numpy.typing import NDArray

    from ichpipe.cache.location import Place
    from ichpipe.cache.reader import EmbeddingStore

POINTER = "companion"


@dataclass(frozen=True)
class PrincipalComponents:
    """An affine map of embeddings: ``(x - mean) @ components.T``."""

    mean: NDArray[np.float32]  # (D,)
    components: NDArray[np.float32]  # (k, D), orthonormal rows, by falling variance
    explained_variance_ratio: NDArray[np.float32]  # (k,)

    def project(self, embedding: NDArray[Any]) -> NDArray[np.float32]:
        """Map embeddings (n, D) to components (n, k)."""
        return np.asarray((embedding.astype(np.float32) - self.mean) @ self.components.T, dtype=np.float32)

    def name(self, manifest: str) -> str:
        """Name the companion of one manifest."""
        parts = (np.ascontiguousarray(self.mean).tobytes(), np.ascontiguousarray(self.components).tobytes())
        return layout.COMPANION + name_of_bytes(manifest.encode(), *parts)


def fit(store: EmbeddingStore, series_uids: Iterable[str], k: int) -> PrincipalComponents:
    """Fit ``k`` components on some series (the train split's), one pass, exact: sums in float64.

    The sign of each component is fixed: its largest entry is positive. Raises StoreError where there are
    fewer rows or features than ``k``.
    """
    width = store.embedding_dim
    n, total, outer = 0, np.zeros(width), np.zeros((width, width))
    for block in _blocks(store, series_uids):
        n, total = n + len(block), total + block.sum(axis=0)
        outer += block.T @ block
    if k > min(n - 1, width):
        most = min(n - 1, width)
        raise StoreError(f"extract.pca is {k}, but {n} train slices of {width} features give at most {most}")
    mean = total / n
    covariance = outer / n - np.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance)  # rising
    chosen = vectors[:, ::-1][:, :k].T
    largest = np.take_along_axis(chosen, np.abs(chosen).argmax(axis=1)[:, None], axis=1)
    ratio = np.maximum(values[::-1][:k], 0) / max(float(np.trace(covariance)), np.finfo(float).tiny)
    return PrincipalComponents(
        mean.astype(np.float32), (chosen * np.sign(largest)).astype(np.float32), ratio.astype(np.float32)
    )


def _blocks(store: EmbeddingStore, series_uids: Iterable[str], rows: int = 4096) -> Iterable[NDArray[np.float64]]:
    waiting: list[NDArray[np.float64]] = []
    for uid in series_uids:
        waiting.append(store.embedding(uid).astype(np.float64))
        if sum(map(len, waiting)) >= rows:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def write(place: Place, store: EmbeddingStore, found: PrincipalComponents, chunk_rows: int) -> None:
    """Write the companion of all rows of a generation, unless it is there; former ones are removed."""
    with place.writing(), place.lock(lambda: None):
        group = layout.subgroup(layout.open_root(place, write=True), store.generation)
        manifest = str(group.attrs["manifest"])
        name = found.name(manifest)
        if group.attrs.get(POINTER) != name or name not in group:
            place.remove(f"{group.path}/{name}")
            companion = group.require_group(name)
            _fill(companion, store, found, chunk_rows)
            companion.attrs["manifest"] = manifest
            place.sync(f"{group.path}/{name}")
            group.attrs[POINTER] = name
        for other in layout.parts(place, group, layout.COMPANION).keys() - {name}:
            place.remove(f"{group.path}/{other}")


def _fill(group: zarr.Group, store: EmbeddingStore, found: PrincipalComponents, chunk_rows: int) -> None:
    layout.create_small(group, "mean", found.mean, ("feature",))
    layout.create_small(group, "components", found.components, ("component", "feature"))
    layout.create_small(group, "explained_variance_ratio", found.explained_variance_ratio, ("component",))
    array = layout.create_rows(group, "embedding", len(store), len(found.components), chunk_rows)
    start, waiting = 0, np.zeros((0, len(found.components)), np.float16)
    for uid in store.series_uids:
        waiting = np.concatenate([waiting, found.project(store.embedding(uid)).astype(np.float16)])
        while len(waiting) >= chunk_rows:
            array[start : start + chunk_rows] = waiting[:chunk_rows]
            start, waiting = start + chunk_rows, waiting[chunk_rows:]
    if len(waiting):
        array[start:] = waiting


def read(group: zarr.Group) -> tuple[PrincipalComponents, zarr.Array[Any]]:
    """Return the map and the rows' array of a generation's companion; none, or one of other rows, is an error."""
    name = group.attrs.get(POINTER)
    if not isinstance(name, str):
        raise StoreError(f"{group.store_path}: no principal components; set extract.pca and run: ichpipe extract")
    companion = layout.subgroup(group, name)
    if companion.attrs.get("manifest") != group.attrs.get("manifest"):
        raise StoreError(f"{group.store_path}: the principal components are of other rows; run: ichpipe extract")
    parts = (layout.read(companion, part) for part in ("mean", "components", "explained_variance_ratio"))
    return PrincipalComponents(*parts), layout.array(companion, "embedding")
