"""CutMix (Yun et al. 2019) over the slices of a batch: a rectangle of one slice into another, labels by area.

Drawn, then applied, like `augmentation`: the same draw gives the same images whatever the chunks of the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
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

    The share that stays is Beta(alpha, alpha), corrected where the rectangle is clipped at the border; its centre is
    uniform.
    """
    draw = np.random.default_rng(seed)
    if params.alpha == 0 or draw.random() >= params.probability:
        return None
    half = math.sqrt(1 - draw.beta(params.alpha, params.alpha)) * size_px / 2
    centres = [float(draw.random()) * size_px for _ in range(2)]
    rows, columns = (slice(max(0, round(at - half)), min(size_px, round(at + half))) for at in centres)
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Cut(torch.from_numpy(draw.permutation(n)), rows, columns, 1 - area / size_px**2)
