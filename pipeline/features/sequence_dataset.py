"""Series of cached embeddings with labels, changed at random, in padded batches of similar length.

RSNA 2019: reversal and stride are from the 1st place, features dropped throughout a series from the 2nd. The contiguous
crop is the paper's (10 slices). Noise is multiplicative (Gaussian dropout, Srivastava et al. 2014, section 10).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ichpipe.common.classes import CLASSES
from ichpipe.common.device import derive_seed, free_memory, generator
from ichpipe.models.sequence import POSITION, mean_logits, stored_inputs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd

    from ichpipe.cache.reader import EmbeddingStore
    from ichpipe.features.generations import Features
    from ichpipe.models.sequence import AnySequence
    from ichpipe.params.schema import RegularizeParams

RUNS_PER_BUFFER = 8  # of neighbours, in a bounded shuffle: enough to mix, few enough to read in order
BATCHES_PER_POOL = 16  # series are sorted by length within a pool
FEATURES = {"embedding", "pca"}  # sources that noise and dropout change; logits and positions stay
SHORTEST = 4  # a series is not thinned to fewer slices than this


@dataclass(frozen=True)
class CachedSource:
    """Arrays of one view of one series, read from the store on demand: locally a copy out of the page cache."""

    store: EmbeddingStore
    series_uid: str

    def __getitem__(self, name: str) -> Tensor:
        """Return an array (T, …) in the precision in which it is stored."""
        return torch.from_numpy(np.array(self.store.read(self.series_uid, "logit" if name == "logits" else name)))


Source = CachedSource | dict[str, Tensor]  # the latter on a device


@dataclass(frozen=True)
class LabelledSeries:
    """One series of T slices with its labels."""

    series_uid: str
    rows: np.ndarray[tuple[int], np.dtype[np.intp]]  # in the index frame, in slice order
    sources: tuple[Source, ...]  # plain; then, of train series, the views; last the mirror image if it is read
    labels: Tensor  # (T, 6); NaN where unknown
    position_mm: Tensor  # (T,), along the slice normal

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.rows)


@dataclass(frozen=True)
class Batch:
    """B series, padded to T slices."""

    sources: dict[str, Tensor]  # each (B, T, …); zero in the padding
    labels: Tensor  # (B, T, 6); NaN in the padding
    lengths: Tensor  # (B,)

    def to(self, device: torch.device) -> Batch:
        """Move all but the lengths, which `pack_padded_sequence` needs on the CPU."""
        moved = {name: values.to(device) for name, values in self.sources.items()}
        return Batch(moved, self.labels.to(device), self.lengths)


def collect_series(features: Features, index: pd.DataFrame) -> list[LabelledSeries]:
    """Find each series of ``index`` in the store; nothing is read yet.

    ``index`` is any subset of the whole index, its rows ordered by slice_index within each series. `open_features` has
    shown that the store holds the same slices in the same order.
    """
    labels = torch.from_numpy(index[list(CLASSES)].to_numpy(np.float32, copy=True))
    position_mm = torch.from_numpy(index["position_mm"].to_numpy(np.float32, copy=True))
    splits, folds = index["split"].to_numpy(), index["fold"].to_numpy()
    series = []
    for key, rows in index.reset_index(drop=True).groupby("series_uid", sort=False).indices.items():
        uid, stores = str(key), features.sources(str(splits[rows[0]]), int(folds[rows[0]]))
        sources = tuple(CachedSource(store, uid) for store in stores)
        at = torch.from_numpy(rows)
        series.append(LabelledSeries(uid, np.asarray(rows), sources, labels[at], position_mm[at]))
    return series


def load_to_device(device: torch.device, series: list[LabelledSeries], names: tuple[str, ...]) -> list[LabelledSeries]:
    """Copy all features to a GPU if they take at most half of its free memory; else return the series unchanged.

    A CPU gains nothing: the store is mapped, and the system keeps it in memory as far as possible.
    """
    if device.type == "cpu" or not series:
        return series
    slice_bytes = sum(series[0].sources[0][name][0].nbytes for name in names)
    total_bytes = slice_bytes * sum(len(item) * len(item.sources) for item in series)
    if total_bytes > free_memory(device) // 2:
        return series

    return [
        replace(item, sources=tuple({name: source[name].to(device) for name in names} for source in item.sources))
        for item in series
    ]


@dataclass(frozen=True)
class SequenceDraw:
    """Random changes of one series: the same for the same seed, epoch and series."""

    rows: Tensor  # (n,) int64: the slices that the model sees, in its order
    seed: int  # of noise and dropped features


def draw_changes(section: RegularizeParams, slices: int, seed: int) -> SequenceDraw:
    """Draw for a series of ``slices`` slices: stride, then crop, then order."""
    drawn = generator(seed, "sequence")
    stride, offset, centre, turned = torch.rand(4, generator=drawn).tolist()
    rows = torch.arange(slices)
    if stride < section.stride2_probability and slices >= 2 * SHORTEST:
        rows = rows[int(offset * 2) :: 2]
    if section.crop_slices is not None and len(rows) > section.crop_slices:
        first = int(centre * len(rows)) - section.crop_slices // 2
        first = min(max(first, 0), len(rows) - section.crop_slices)
        rows = rows[first : first + section.crop_slices]
    return SequenceDraw(rows.flip(0) if turned < section.reverse_probability else rows, seed)


def apply_changes(section: RegularizeParams, sources: dict[str, Tensor], drawn: SequenceDraw) -> dict[str, Tensor]:
    """Return the sources (T, …) of one series as drawn: (n, …) each."""
    result = {name: values[drawn.rows] for name, values in sources.items()}
    if not section.feature_noise and not section.feature_dropout:
        return result
    for name in result.keys() & FEATURES:
        values, random = result[name].float(), generator(drawn.seed, name)
        factor = torch.ones_like(values)
        if section.feature_noise:
            noise = torch.randn(values.shape, generator=random) * section.feature_noise
            factor = factor + noise.to(values.device)
        if section.feature_dropout:
            kept = torch.rand(values.shape[-1], generator=random) >= section.feature_dropout
            factor = factor * kept.to(values.device) / (1 - section.feature_dropout)
        result[name] = values * factor
    return result


@dataclass(frozen=True)
class Shuffle:
    """How training draws: ``seed`` and ``epoch`` alone decide order, views and changes."""

    seed: int
    epoch: int
    regularize: RegularizeParams | None = None
    within: int | None = None  # number of series that the shuffle reaches over; None: all


def train_batches(
    series: Sequence[LabelledSeries], names: tuple[str, ...], size: int, shuffle: Shuffle
) -> Iterator[Batch]:
    """Yield shuffled batches: of each series one of its views, changed as `draw_changes` says.

    Similar lengths come together (within pools), and the batches are shuffled. Seed, epoch and UID alone decide how a
    series is changed, not its batch. ``within`` limits the reach of the shuffle, so that a store that does not fit
    into memory is read nearly in order.
    """
    if shuffle.regularize and not any(shuffle.regularize.model_dump().values()):
        shuffle = replace(shuffle, regularize=None)
    order = generator(shuffle.seed, "order", shuffle.epoch)
    batches: list[list[int]] = []
    for buffer in shuffle_in_buffers(len(series), order, shuffle.within):
        batches_of_buffer = []
        for start in range(0, len(buffer), BATCHES_PER_POOL * size):
            pool = sorted(buffer[start : start + BATCHES_PER_POOL * size], key=lambda number: len(series[number]))
            batches_of_buffer += [pool[at : at + size] for at in range(0, len(pool), size)]
        shuffled = torch.randperm(len(batches_of_buffer), generator=order).tolist()
        batches += [batches_of_buffer[number] for number in shuffled]
    for numbers in batches:
        yield _collate([_draw(series[number], names, shuffle) for number in numbers])


def plain_batches(
    series: Sequence[LabelledSeries], names: tuple[str, ...], size: int, source: int = 0
) -> Iterator[Batch]:
    """Yield batches in the given order, of one source of each series (0: plain), unchanged."""
    for start in range(0, len(series), size):
        yield _collate([_read(item, names, source) for item in series[start : start + size]])


Example = tuple[dict[str, Tensor], Tensor]  # sources and labels of one series


def _read(series: LabelledSeries, names: tuple[str, ...], source: int) -> Example:
    tensors = {name: series.sources[source][name] for name in names}
    position_mm = series.position_mm.to(next(iter(tensors.values())).device) if tensors else series.position_mm
    return tensors | {POSITION: position_mm}, series.labels


def _draw(series: LabelledSeries, names: tuple[str, ...], shuffle: Shuffle) -> Example:
    seed = derive_seed(shuffle.seed, "series", shuffle.epoch, series.series_uid)
    views = len(series.sources)
    view = 0 if views == 1 else int(torch.randint(views, (1,), generator=generator(seed, "view")))
    sources, labels = _read(series, names, view)
    if shuffle.regularize is None:
        return sources, labels
    drawn = draw_changes(shuffle.regularize, len(series), seed)
    return apply_changes(shuffle.regularize, sources, drawn), labels[drawn.rows]


def _collate(examples: list[Example]) -> Batch:
    sources = {
        name: pad_sequence([tensors[name] for tensors, _ in examples], batch_first=True) for name in examples[0][0]
    }
    labels = pad_sequence([labels for _, labels in examples], batch_first=True, padding_value=float("nan"))
    return Batch(sources, labels, torch.tensor([len(labels) for _, labels in examples]))


def shuffle_in_buffers(n: int, order: torch.Generator, within: int | None) -> list[list[int]]:
    """Permute 0 … n-1: all at once, or runs of neighbours first and then within buffers of about ``within``."""
    if within is None or within >= n:
        return [torch.randperm(n, generator=order).tolist()]
    run = max(1, within // RUNS_PER_BUFFER)
    runs = [range(start, min(start + run, n)) for start in range(0, n, run)]
    run_order = torch.randperm(len(runs), generator=order).tolist()
    buffers = []
    for start in range(0, len(run_order), RUNS_PER_BUFFER):
        members = [member for number in run_order[start : start + RUNS_PER_BUFFER] for member in runs[number]]
        buffers.append([members[at] for at in torch.randperm(len(members), generator=order).tolist()])
    return buffers


@torch.inference_mode()
def predict_batches(
    model: AnySequence, series: Sequence[LabelledSeries], device: torch.device, size: int = 32
) -> Iterator[tuple[Tensor, Batch]]:
    """Yield logits (B, T, 6) in the given order, each with its batch; the mean probability over several sources."""
    model.eval()
    names = stored_inputs(model.spec.all_inputs)
    for start in range(0, len(series), size):
        part = series[start : start + size]
        views = min(len(item.sources) for item in part)
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
        probabilities = torch.sigmoid(logits.cpu().double()).numpy()
        for offset, length in enumerate(batch.lengths.tolist()):
            result[series[start + offset].rows] = probabilities[offset, :length]
        start += len(batch.lengths)
    return result
