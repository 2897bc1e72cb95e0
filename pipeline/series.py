"""Series as stage two sees them: cached sequences with labels, in padded batches of like length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ichpipe.classes import CLASSES
from ichpipe.errors import DataError
from ichpipe.models.sequence import select_inputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

    from ichpipe.cache.reader import EmbeddingStore
    from ichpipe.models.sequence import SequenceModel


@dataclass(frozen=True)
class LabelledSeries:
    """One series: features and labels per slice, rows of the index that they belong to."""

    series_uid: str
    rows: np.ndarray[tuple[int], np.dtype[np.intp]]  # positions in the index frame, in slice order
    features: Tensor  # (T, F) float32
    labels: Tensor  # (T, 6); NaN where unknown


def read_series(store: EmbeddingStore, index: pd.DataFrame, inputs: tuple[str, ...]) -> list[LabelledSeries]:
    """Join the cached rows with the index by UID; a disagreement of the two is an error.

    ``index`` holds the wanted series (any subset of the whole), rows ordered by slice_index within each.
    """
    found = []
    uids = index["sop_uid"].to_numpy()
    labels = torch.from_numpy(index[list(CLASSES)].to_numpy(np.float32, copy=True))
    for series_uid, rows in index.reset_index(drop=True).groupby("series_uid", sort=False).indices.items():
        cached = store.series(str(series_uid))
        if list(cached.sop_uids) != uids[rows].tolist():
            raise DataError(
                f"series {series_uid}: slices in {store.path} are not those of the index; run: ichpipe extract"
            )
        features = select_inputs(inputs, torch.from_numpy(cached.embedding), torch.from_numpy(cached.logit))
        found.append(LabelledSeries(str(series_uid), np.asarray(rows), features, labels[torch.from_numpy(rows)]))
    return found


def batches(
    series: list[LabelledSeries], size: int, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (features (B, T, F), labels (B, T, 6) NaN in the padding, lengths (B,)).

    With a generator: shuffled, then like lengths together (within pools of 16 batches), batches shuffled.
    Without: in the given order.
    """
    for chosen in _choose(series, size, generator):
        members = [series[number] for number in chosen]
        lengths = torch.tensor([len(member.features) for member in members])
        features = pad_sequence([member.features for member in members], batch_first=True)
        labels = pad_sequence([member.labels for member in members], batch_first=True, padding_value=float("nan"))
        yield features, labels, lengths


def _choose(series: list[LabelledSeries], size: int, generator: torch.Generator | None) -> list[list[int]]:
    if generator is None:
        order = list(range(len(series)))
        return [order[start : start + size] for start in range(0, len(order), size)]
    order = torch.randperm(len(series), generator=generator).tolist()
    pool, groups = size * 16, []
    for start in range(0, len(order), pool):
        like = sorted(order[start : start + pool], key=lambda number: len(series[number].features))
        groups += [like[at : at + size] for at in range(0, len(like), size)]
    return [groups[number] for number in torch.randperm(len(groups), generator=generator).tolist()]


@torch.inference_mode()
def predict_rows(
    model: SequenceModel, series: list[LabelledSeries], n_rows: int, device: torch.device, batch_series: int = 32
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return probabilities (n_rows, 6) in the order of the index frame that the series were read with."""
    model.eval()
    result = np.full((n_rows, len(CLASSES)), np.nan)
    start = 0
    for features, _, lengths in batches(series, batch_series, None):
        probabilities = torch.sigmoid(model(features.to(device), lengths).double()).cpu().numpy()
        for offset, length in enumerate(lengths.tolist()):
            result[series[start + offset].rows] = probabilities[offset, :length]
        start += len(lengths)
    return result
