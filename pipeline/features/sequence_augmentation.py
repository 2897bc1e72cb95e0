"""Random changes of training sequences: drawn first, then applied; the same for the same seed, epoch and series.

RSNA 2019: reversal and stride are from the 1st place, features dropped throughout a series from the 2nd. The contiguous
crop is the paper's (10 slices). Noise is multiplicative (Gaussian dropout, Srivastava et al. 2014, section 10).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ichpipe.common.device import generator

if TYPE_CHECKING:
    from torch import Tensor

    from ichpipe.params.schema import RegularizeParams

FEATURES = {"embedding", "pca"}
"""Sources that noise and dropout change; logits and positions stay."""

SHORTEST = 4
"""A series is not thinned to fewer slices than this."""


@dataclass(frozen=True)
class SequenceDraw:
    """What happens to one series."""

    rows: Tensor  # (n,) int64: the slices that the model sees, in its order
    seed: int  # of noise and dropped features


def draw(section: RegularizeParams, slices: int, seed: int) -> SequenceDraw:
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


def apply(section: RegularizeParams, sources: dict[str, Tensor], drawn: SequenceDraw) -> dict[str, Tensor]:
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


def is_active(section: RegularizeParams) -> bool:
    """Return whether the parameters change anything."""
    return any(section.model_dump().values())
