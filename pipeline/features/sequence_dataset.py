"""Series as stage two sees them: cached sequences with labels, in padded batches of like length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ichpipe.common.classes import CLASSES
from ichpipe.common.device import derive_seed, generator
from ichpipe.features import sequence_augmentation
from ichpipe.models.inputs import POSITION, stored_inputs
from ichpipe.models.sequence import mean_logits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd

    from ichpipe.cache.reader import EmbeddingStore
    from ichpipe.features.generations import Features
    from ichpipe.models.sequence import AnySequence
    from ichpipe.params.schema import RegularizeParams

BLOCKS_PER_BUFFER = 8
"""A bounded shuffle fills its buffer with this many runs of neighbours: enough to mix, few enough to read in order."""


class Source(Protocol):
    """One view of one series."""

    def tensors(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return arrays of the cache (T, …) in the precision in which they are stored."""


@dataclass(frozen=True)
class CachedSource:
    """Read from the store when asked for: on a local disk that costs a copy out of the page cache."""

    store: EmbeddingStore
    series_uid: str

    def tensors(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Read and copy."""
        return {name: torch.from_numpy(np.array(self.store.read(self.series_uid, _ARRAY[name]))) for name in names}


_ARRAY = {"embedding": "embedding", "logits": "logit", "pca": "pca"}


@dataclass(frozen=True)
class HeldSource:
    """Held on a device: the same numbers as from the store."""

    held: dict[str, Tensor]

    def tensors(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return what is held."""
        return {name: self.held[name] for name in names}


@dataclass(frozen=True)
class LabelledSeries:
    """One series: where its features are, labels per slice, rows of the index that they belong to."""

    series_uid: str
    rows: np.ndarray[tuple[int], np.dtype[np.intp]]  # positions in the index frame, in slice order
    sources: tuple[Source, ...]  # plain; then, of train series, the views; last the mirror image where it is wanted
    labels: Tensor  # (T, 6); NaN where unknown
    position_mm: Tensor  # (T,), along the slice normal

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.rows)


@dataclass(frozen=True)
class Batch:
    """Series of like length, padded to one."""

    sources: dict[str, Tensor]  # each (B, T, …); zero in the padding
    labels: Tensor  # (B, T, 6); NaN in the padding
    lengths: Tensor  # (B,)

    def to(self, device: torch.device) -> Batch:
        """Move all but the lengths, which packing wants on the CPU."""
        moved = {name: values.to(device) for name, values in self.sources.items()}
        return Batch(moved, self.labels.to(device), self.lengths)


def collect_series(features: Features, index: pd.DataFrame) -> list[LabelledSeries]:
    """Join the cache with the index by UID; nothing is read yet.

    ``index`` holds the wanted series (any subset of the whole), rows ordered by slice_index within each; opening
    ``features`` has shown that the cache holds the same slices in the same order.
    """
    found = []
    labels = torch.from_numpy(index[list(CLASSES)].to_numpy(np.float32, copy=True))
    places = torch.from_numpy(index["position_mm"].to_numpy(np.float32, copy=True))
    splits, folds = index["split"].to_numpy(), index["fold"].to_numpy()
    for series_uid, rows in index.reset_index(drop=True).groupby("series_uid", sort=False).indices.items():
        stores = features.sources(str(splits[rows[0]]), int(folds[rows[0]]))
        sources = tuple(CachedSource(store, str(series_uid)) for store in stores)
        chosen = torch.from_numpy(rows)
        found.append(LabelledSeries(str(series_uid), np.asarray(rows), sources, labels[chosen], places[chosen]))
    return found


def load_to_device(device: torch.device, series: list[LabelledSeries], names: tuple[str, ...]) -> list[LabelledSeries]:
    """Copy all features to a GPU if they take at most half of its free memory; else return the series as they are.

    On a CPU nothing is gained: the store is mapped, and the system keeps it in memory as far as there is room.
    """
    if device.type != "cuda" or not series:
        return series
    first = series[0]
    per_slice = sum(tensor[0].nbytes for tensor in first.sources[0].tensors(names).values())
    size = per_slice * sum(len(one) * len(one.sources) for one in series)
    if size > torch.cuda.mem_get_info(device)[0] // 2:
        return series

    def held(source: Source) -> HeldSource:
        return HeldSource({name: tensor.to(device) for name, tensor in source.tensors(names).items()})

    return [replace(one, sources=tuple(held(source) for source in one.sources)) for one in series]


@dataclass(frozen=True)
class Shuffle:
    """How training draws: ``seed`` and ``epoch`` decide order, views and changes; nothing else does."""

    seed: int
    epoch: int
    regularize: RegularizeParams | None = None
    within: int | None = None  # how many series the shuffle reaches over; None: all


def train_batches(
    series: Sequence[LabelledSeries], names: tuple[str, ...], size: int, shuffle: Shuffle
) -> Iterator[Batch]:
    """Yield shuffled batches: of each series one of its views, changed as `sequence_augmentation` draws.

    Like lengths come together (within pools of 16 batches), and the batches are shuffled. What a series looks like
    depends on seed, epoch and its UID alone, not on its batch. ``within`` bounds how far the shuffle reaches, so that
    a cache that does not fit into memory is read nearly in order.
    """
    order = generator(shuffle.seed, "order", shuffle.epoch)
    changes = shuffle.regularize if shuffle.regularize and sequence_augmentation.is_active(shuffle.regularize) else None
    for chosen in _choose([len(one) for one in series], size, order, shuffle.within):
        drawn = [_drawn(series[number], names, shuffle, changes) for number in chosen]
        yield _collate(drawn)


def plain_batches(
    series: Sequence[LabelledSeries], names: tuple[str, ...], size: int, source: int = 0
) -> Iterator[Batch]:
    """Yield batches in the given order, of one source of each series (0: plain), nothing drawn."""
    for start in range(0, len(series), size):
        yield _collate([_taken(one, names, source) for one in series[start : start + size]])


Taken = tuple[dict[str, Tensor], Tensor]


def _taken(one: LabelledSeries, names: tuple[str, ...], source: int) -> Taken:
    found = one.sources[source].tensors(names)
    place = one.position_mm.to(next(iter(found.values())).device) if found else one.position_mm
    return found | {POSITION: place}, one.labels


def _drawn(one: LabelledSeries, names: tuple[str, ...], shuffle: Shuffle, changes: RegularizeParams | None) -> Taken:
    seed = derive_seed(shuffle.seed, "series", shuffle.epoch, one.series_uid)
    views = len(one.sources)
    view = 0 if views == 1 else int(torch.randint(views, (1,), generator=generator(seed, "view")))
    sources, labels = _taken(one, names, view)
    if changes is None:
        return sources, labels
    drawn = sequence_augmentation.draw(changes, len(one), seed)
    return sequence_augmentation.apply(changes, sources, drawn), labels[drawn.rows]


def _collate(taken: list[Taken]) -> Batch:
    names = taken[0][0].keys()
    sources = {name: pad_sequence([one[0][name] for one in taken], batch_first=True) for name in names}
    labels = pad_sequence([one[1] for one in taken], batch_first=True, padding_value=float("nan"))
    return Batch(sources, labels, torch.tensor([len(one[1]) for one in taken]))


def _choose(lengths: list[int], size: int, order: torch.Generator, within: int | None) -> list[list[int]]:
    groups = []
    for buffer in _buffers(len(lengths), order, within):
        pool, own = size * 16, []
        for start in range(0, len(buffer), pool):
            like = sorted(buffer[start : start + pool], key=lambda number: lengths[number])
            own += [like[at : at + size] for at in range(0, len(like), size)]
        groups += [own[number] for number in torch.randperm(len(own), generator=order).tolist()]
    return groups


def _buffers(n: int, generator: torch.Generator, within: int | None) -> list[list[int]]:
    """Permute 0 … n-1: all at once, or runs of neighbours first and then within buffers of about ``within``."""
    if within is None or within >= n:
        return [torch.randperm(n, generator=generator).tolist()]
    run = max(1, within // BLOCKS_PER_BUFFER)
    runs = [range(start, min(start + run, n)) for start in range(0, n, run)]
    order = torch.randperm(len(runs), generator=generator).tolist()
    buffers = []
    for start in range(0, len(order), BLOCKS_PER_BUFFER):
        members = [number for block in order[start : start + BLOCKS_PER_BUFFER] for number in runs[block]]
        buffers.append([members[at] for at in torch.randperm(len(members), generator=generator).tolist()])
    return buffers


@torch.inference_mode()
def predict_batches(
    model: AnySequence, series: Sequence[LabelledSeries], device: torch.device, size: int = 32
) -> Iterator[tuple[Tensor, Batch]]:
    """Yield logits (B, T, 6) in the given order, each with its batch; over a series' sources their mean probability."""
    model.eval()
    names = stored_inputs(model.spec.inputs + model.spec.skip)
    for start in range(0, len(series), size):
        part = series[start : start + size]
        views = min(len(one.sources) for one in part)
        batches = [next(plain_batches(part, names, size, source)).to(device) for source in range(views)]
        logits = [model(batch.sources, batch.lengths).float() for batch in batches]
        yield mean_logits(torch.stack(logits)) if views > 1 else logits[0], batches[0]


def predict_rows(
    model: AnySequence, series: list[LabelledSeries], n_rows: int, device: torch.device
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return probabilities (n_rows, 6) in the order of the index frame that the series were read with."""
    result = np.full((n_rows, len(CLASSES)), np.nan)
    start = 0
    for logits, batch in predict_batches(model, series, device):
        probabilities = torch.sigmoid(logits.double()).cpu().numpy()
        for offset, length in enumerate(batch.lengths.tolist()):
            result[series[start + offset].rows] = probabilities[offset, :length]
        start += len(batch.lengths)
    return result
