"""A batch of training images: its slices, their augmentation and CutMix, and the share of this process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from ichpipe.images import augmentation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from ichpipe.params.schema import CutMixParams


@dataclass(frozen=True)
class Cut:
    """One rectangle for the whole batch, and whose pixels each slice gets there."""

    partner: Tensor  # (n,) int64, rows of the batch
    rows: slice  # pixels
    columns: slice
    kept: float  # share of the area, and so of the label, that stays a slice's own

    def images(self, own: Tensor, others: Tensor) -> Tensor:
        """Put the rectangle of ``others`` (n, 1, S, S) into ``own``; returns a new tensor."""
        mixed = own.clone()
        mixed[:, :, self.rows, self.columns] = others[:, :, self.rows, self.columns]
        return mixed

    def labels(self, labels: Tensor) -> Tensor:
        """Mix the labels (n, 6) of the whole batch; a slice with an unknown part is unknown (NaN)."""
        return self.kept * labels + (1 - self.kept) * labels[self.partner]


def draw_cut(params: CutMixParams, n: int, size_px: int, seed: int) -> Cut | None:
    """Draw the rectangle of a batch of ``n`` slices; None where this batch is not mixed.

    The share that stays is Beta(alpha, alpha), corrected where the border clips the rectangle; its centre is uniform.
    """
    draw = np.random.default_rng(seed)
    if params.alpha == 0 or draw.random() >= params.probability:
        return None
    half = math.sqrt(1 - draw.beta(params.alpha, params.alpha)) * size_px / 2
    centres = [float(draw.random()) * size_px for _ in range(2)]
    rows, columns = (slice(max(0, round(at - half)), min(size_px, round(at + half))) for at in centres)
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Cut(torch.from_numpy(draw.permutation(n)), rows, columns, 1 - area / size_px**2)


@dataclass(frozen=True)
class Batch:
    """Slices and what is drawn for them; the augmentation is drawn once, when it is needed."""

    rows: Sequence[int]  # of the data set
    mine: list[int]  # numbers, within the batch, of the slices that this process takes
    cut: Cut | None
    draw: Callable[[], augmentation.AugmentDraw]

    @cached_property
    def drawn(self) -> augmentation.AugmentDraw:
        """Return the augmentation of the whole batch."""
        return self.draw()

    @cached_property
    def needed(self) -> list[int]:
        """Return the numbers of the slices whose pixels are needed here: the own, then those cut into them."""
        partners = self.cut.partner[self.mine].tolist() if self.cut else []
        return list(dict.fromkeys([*self.mine, *partners]))

    @property
    def needed_rows(self) -> list[int]:
        """Return the rows of the data set that are needed here."""
        return [self.rows[number] for number in self.needed]

    def images(self, hu: Tensor, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Make the images of some slices from HU (n, 1, S, S) of the needed ones; the same at every call."""
        offset = {number: row for row, number in enumerate(self.needed)}  # within ``hu``

        def augment(chosen: Sequence[int]) -> Tensor:
            rows = [offset[number] for number in chosen]
            return augmentation.apply(hu[rows].to(device), self.drawn.part(torch.tensor(chosen)))

        own = augment(numbers)
        return self.cut.images(own, augment(self.cut.partner[list(numbers)].tolist())) if self.cut else own

    def labels(self, labels: Tensor) -> Tensor:
        """Return the labels (n, 6) of the whole batch; ``labels`` are those of the data set."""
        own = labels[list(self.rows)]
        return self.cut.labels(own) if self.cut else own


def sample(rows: Sequence[int], size: int | None, generator: torch.Generator) -> Sequence[int]:
    """Return ``size`` contiguous rows around a random one, within the series (Nguyen et al. 2020: 10); None: all."""
    if size is None:
        return rows
    centre = int(torch.randint(len(rows), (1,), generator=generator))
    start = min(max(0, centre - size // 2), max(0, len(rows) - size))
    return rows[start : start + size]
