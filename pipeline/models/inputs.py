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
FAR: Final = 4.0  # largest distance that ``spacing`` tells, in nominal slices (20 mm); beyond it there is a gap
STORED: Final = {  # the source from which each input is made
    "embedding": "embedding",
    "deltas": "embedding",
    "logits": "logits",
    "pca": "pca",
    "spacing": POSITION,
    "position": POSITION,
}


def stored_inputs(inputs: Iterable[str]) -> tuple[str, ...]:
    """Return the arrays of the cache that some inputs are made from, each once."""
    return tuple(dict.fromkeys(STORED[name] for name in inputs if STORED[name] != POSITION))


def make_inputs(inputs: tuple[str, ...], sources: dict[str, Tensor], lengths: Tensor) -> Tensor:
    """Concatenate the inputs (B, T, F) in float32; ``lengths`` (B,) on the device of the sources."""
    parts = []
    for name in inputs:
        values = sources[STORED[name]].float()
        if name == "deltas":
            values = _deltas(values, lengths)
        elif name == "spacing":  # (B, T, 2), to both neighbours, in nominal slices; 0 without one (RSNA 2019's 1st)
            values = (_deltas(values.unsqueeze(-1), lengths).abs() / THICK_SLICE_MM).clamp(max=FAR)
        elif name == "position":  # (B, T, 1), by mm: -1 at the lowest position of the series, 1 at the highest
            low, high = extent(values, lengths)
            values = ((values - low) / (high - low).clamp(min=1e-3) * 2 - 1).unsqueeze(-1)
        parts.append(values)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def inside(lengths: Tensor, slices: int) -> Tensor:
    """Return the mask (B, T) that is true where a padded series holds a slice."""
    return torch.arange(slices, device=lengths.device) < lengths[:, None]


def reverse(padded: Tensor, lengths: Tensor) -> Tensor:
    """Reverse the slices of each padded series (B, T, …); its padding stays behind them."""
    number = torch.arange(padded.shape[1], device=padded.device)
    rows = torch.where(inside(lengths, padded.shape[1]), lengths[:, None] - 1 - number, number)  # (B, T)
    return padded[torch.arange(len(padded), device=padded.device)[:, None], rows]


def extent(position_mm: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest position of each series, (B, 1) each."""
    mask = inside(lengths, position_mm.shape[1])
    low, high = position_mm.masked_fill(~mask, torch.inf), position_mm.masked_fill(~mask, -torch.inf)
    return low.amin(dim=1, keepdim=True), high.amax(dim=1, keepdim=True)


def _deltas(values: Tensor, lengths: Tensor) -> Tensor:
    """Return ``[x_t - x_(t-1), x_t - x_(t+1)]`` (B, T, 2D), 0 where there is no neighbour (RSNA 2019's 2nd place)."""
    step = (values[:, 1:] - values[:, :-1]) * inside(lengths, values.shape[1])[:, 1:, None]  # (B, T-1, D)
    edge = torch.zeros_like(values[:, :1])
    return torch.cat([torch.cat([edge, step], dim=1), torch.cat([-step, edge], dim=1)], dim=-1)
