"""Series as stage two sees them: cached sequences with labels, in padded batches of like length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ichpipe.classes import CLASSES
from ichpipe.models.sequence import select_inputs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd

    from ichpipe.cache.reader import EmbeddingStore
    from ichpipe.caches import Features
    from ichpipe.models.sequence import SequenceModel

BLOCKS_PER_BUFFER = 8
"""A bounded shuffle fills its buffer with this many runs of neighbours: enough to mix, few enough to read in order."""


class Source(Protocol):
    """One view of one series."""

    def tensors(self, inputs: tuple[str, ...]) -> dict[str, Tensor]:
        """Return each input (T, …) in the precision in which it is stored."""


@dataclass(frozen=True)
class CachedSource:
    """Read from the store when asked for: on a local disk that costs a copy out of the page cache."""

    store: EmbeddingStore
    series_uid: str

    def tensors(self, inputs: tuple[str, ...]) -> dict[str, Tensor]:
        """Read and copy."""
        return {name: torch.from_numpy(np.array(self.store.read(self.series_uid, _ARRAY[name]))) for name in inputs}


_ARRAY = {"embedding": "embedding", "logits": "logit", "pca": "pca"}


@dataclass(frozen=True)
class HeldSource:
    """Held on a device: the same numbers as from the store."""

    held: dict[str, Tensor]

    def tensors(self, inputs: tuple[str, ...]) -> dict[str, Tensor]:
        """Return what is held."""
        return {name: self.held[name] for name in inputs}


@dataclass(frozen=True)
class LabelledSeries:
    """One series: where its features are, labels per slice, rows of the index that they belong to."""

    series_uid: str
    rows: np.ndarray[tuple[int], np.dtype[np.intp]]  # positions in the index frame, in slice order
    sources: tuple[Source, ...]  # plain, then augmented views
    labels: Tensor  # (T, 6); NaN where unknown

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.rows)


def read_series(features: Features, index: pd.DataFrame) -> list[LabelledSeries]:
    """Join the cache with the index by UID; nothing is read yet.

    ``index`` holds the wanted series (any subset of the whole), rows ordered by slice_index within each; opening
    ``features`` has shown that the cache holds the same slices in the same order.
    """
    found = []
    labels = torch.from_numpy(index[list(CLASSES)].to_numpy(np.float32, copy=True))
    splits, folds = index["split"].to_numpy(), index["fold"].to_numpy()
    for series_uid, rows in index.reset_index(drop=True).groupby("series_uid", sort=False).indices.items():
        stores = features.sources(str(splits[rows[0]]), int(folds[rows[0]]))
        sources = tuple(CachedSource(store, str(series_uid)) for store in stores)
        found.append(LabelledSeries(str(series_uid), np.asarray(rows), sources, labels[torch.from_numpy(rows)]))
    return found


def hold_on(device: torch.device, series: list[LabelledSeries], inputs: tuple[str, ...]) -> list[LabelledSeries]:
    """Copy all features to a GPU if they take at most half of its free memory; else return the series as they are.

    On a CPU nothing is gained: the store is mapped, and the system keeps it in memory as far as there is room.
    """
    if device.type != "cuda" or not series:
        return series
    first = series[0]
    per_slice = sum(tensor[0].nbytes for tensor in first.sources[0].tensors(inputs).values())
    size = per_slice * sum(len(one) * len(one.sources) for one in series)
    if size > torch.cuda.mem_get_info(device)[0] // 2:
        return series

    def held(source: Source) -> HeldSource:
        return HeldSource({name: tensor.to(device) for name, tensor in source.tensors(inputs).items()})

    return [replace(one, sources=tuple(held(source) for source in one.sources)) for one in series]


def batches(
    series: Sequence[LabelledSeries],
    inputs: tuple[str, ...],
    size: int,
    generator: torch.Generator | None,
    shuffle_series: int | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (features (B, T, F), labels (B, T, 6) NaN in the padding, lengths (B,)).

    With a generator: shuffled, one of each series' views drawn, like lengths together (within pools of 16
    batches), batches shuffled. Without: in the given order, plain. The order depends on the series alone, not on
    where their features are. ``shuffle_series`` bounds how far the shuffle reaches, so that a cache that does not
    fit into memory is read nearly in order.
    """
    for chosen in _choose([len(one) for one in series], size, generator, shuffle_series):
        members = [series[number] for number in chosen]
        views = [_draw_view(member, generator) for member in members]
        picked = [member.sources[view].tensors(inputs) for member, view in zip(members, views, strict=True)]
        found = [select_inputs(inputs, tensors) for tensors in picked]
        lengths = torch.tensor([len(member) for member in members])
        labels = pad_sequence([member.labels for member in members], batch_first=True, padding_value=float("nan"))
        yield pad_sequence(found, batch_first=True), labels, lengths


def _draw_view(member: LabelledSeries, generator: torch.Generator | None) -> int:
    if generator is None or len(member.sources) == 1:
        return 0
    return int(torch.randint(len(member.sources), (1,), generator=generator))


def _choose(
    lengths: list[int], size: int, generator: torch.Generator | None, shuffle_series: int | None
) -> list[list[int]]:
    if generator is None:
        order = list(range(len(lengths)))
        return [order[start : start + size] for start in range(0, len(order), size)]
    groups = []
    for buffer in _buffers(len(lengths), generator, shuffle_series):
        pool, own = size * 16, []
        for start in range(0, len(buffer), pool):
            like = sorted(buffer[start : start + pool], key=lambda number: lengths[number])
            own += [like[at : at + size] for at in range(0, len(like), size)]
        groups += [own[number] for number in torch.randperm(len(own), generator=generator).tolist()]
    return groups


def _buffers(n: int, generator: torch.Generator, shuffle_series: int | None) -> list[list[int]]:
    """Permute 0 … n-1: all at once, or runs of neighbours first and then within buffers of about ``shuffle_series``."""
    if shuffle_series is None or shuffle_series >= n:
        return [torch.randperm(n, generator=generator).tolist()]
    run = max(1, shuffle_series // BLOCKS_PER_BUFFER)
    runs = [range(start, min(start + run, n)) for start in range(0, n, run)]
    order = torch.randperm(len(runs), generator=generator).tolist()
    buffers = []
    for start in range(0, len(order), BLOCKS_PER_BUFFER):
        members = [number for block in order[start : start + BLOCKS_PER_BUFFER] for number in runs[block]]
        buffers.append([members[at] for at in torch.randperm(len(members), generator=generator).tolist()])
    return buffers


@torch.inference_mode()
def predict_rows(
    model: SequenceModel, series: list[LabelledSeries], n_rows: int, device: torch.device, batch_series: int = 32
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return probabilities (n_rows, 6) in the order of the index frame that the series were read with."""
    model.eval()
    result = np.full((n_rows, len(CLASSES)), np.nan)
    start = 0
    for features, _, lengths in batches(series, model.spec.inputs, batch_series, None):
        probabilities = torch.sigmoid(model(features.to(device), lengths).double()).cpu().numpy()
        for offset, length in enumerate(lengths.tolist()):
            result[series[start + offset].rows] = probabilities[offset, :length]
        start += len(lengths)
    return result
