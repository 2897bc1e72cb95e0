"""Inputs of a sequence model for each slice, made from the arrays of the cache.

Sources are padded to one length: ``embedding`` (B, T, D), ``logits`` (B, T, 6) of the slice CNN, ``pca`` (B, T, k) and
``position_mm`` (B, T) along the slice normal. Padding never reaches a real slice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from ichpipe.common.constants import THICK_SLICE_MM

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

POSITION: Final = "position_mm"

STORED: Final = {
    "embedding": "embedding",
    "deltas": "embedding",
    "logits": "logits",
    "pca": "pca",
    "spacing": POSITION,
    "position": POSITION,
}
"""The source from which each input is made."""

FAR: Final = 4.0
"""Distances above this many nominal slices (20 mm) are all told as this: a gap."""


def stored_inputs(inputs: Iterable[str]) -> tuple[str, ...]:
    """Return the arrays of the cache that some inputs are made from, each once."""
    return tuple(dict.fromkeys(STORED[name] for name in inputs if STORED[name] != POSITION))


def make_inputs(inputs: tuple[str, ...], sources: dict[str, Tensor], lengths: Tensor) -> Tensor:
    """Concatenate the inputs (B, T, F) in float32; ``lengths`` (B,) on the device of the sources."""
    parts = [_MAKE[name](sources[STORED[name]].float(), lengths) for name in inputs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def inside(lengths: Tensor, slices: int) -> Tensor:
    """Return the mask (B, T) that is true where a padded series holds a slice."""
    return torch.arange(slices, device=lengths.device) < lengths[:, None]


def reverse(padded: Tensor, lengths: Tensor) -> Tensor:
    """Turn each padded series (B, T, …) round, its padding staying behind."""
    places = torch.arange(padded.shape[1], device=padded.device)
    turned = torch.where(inside(lengths, padded.shape[1]), lengths[:, None] - 1 - places, places)  # (B, T)
    return padded[torch.arange(len(padded), device=padded.device)[:, None], turned]


def _same(values: Tensor, _lengths: Tensor) -> Tensor:
    return values


def _deltas(values: Tensor, lengths: Tensor) -> Tensor:
    """Return ``[x_t - x_(t-1), x_t - x_(t+1)]`` (B, T, 2D), 0 where there is no neighbour (RSNA 2019's 2nd place)."""
    step = values[:, 1:] - values[:, :-1]  # (B, T-1, D)
    step = step * inside(lengths, values.shape[1])[:, 1:, None]
    edge = torch.zeros_like(values[:, :1])
    return torch.cat([torch.cat([edge, step], dim=1), torch.cat([-step, edge], dim=1)], dim=-1)


def _spacing(position_mm: Tensor, lengths: Tensor) -> Tensor:
    """Return the distance to both neighbours (B, T, 2) in nominal slices of 5 mm, at most 4; 0 where there is none.

    RSNA 2019's 1st place gave its sequence model the slice spacing.
    """
    return (_deltas(position_mm.unsqueeze(-1), lengths).abs() / THICK_SLICE_MM).clamp(max=FAR)


def _position(position_mm: Tensor, lengths: Tensor) -> Tensor:
    """Return each slice's place in its series (B, T, 1): -1 at the lowest position, 1 at the highest, by mm."""
    low, high = extent(position_mm, lengths)
    span = (high - low).clamp(min=1e-3)
    return ((position_mm - low) / span * 2 - 1).unsqueeze(-1)


def extent(position_mm: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest position of each series, (B, 1) each."""
    mask = inside(lengths, position_mm.shape[1])
    low = position_mm.masked_fill(~mask, torch.inf).amin(dim=1, keepdim=True)
    high = position_mm.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True)
    return low, high


_MAKE: Final = {
    "embedding": _same,
    "logits": _same,
    "pca": _same,
    "deltas": _deltas,
    "spacing": _spacing,
    "position": _position,
}
