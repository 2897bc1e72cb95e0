"""Context layers of the sequence models: recurrence, attention or convolution over the slices of a series.

Each maps features (B, T, F), lengths (B,) and positions (B, T) in mm to (B, T, ``width``), whatever the padding.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ichpipe.models.inputs import extent, inside

if TYPE_CHECKING:
    from collections.abc import Callable

    from ichpipe.models.header import SequenceSpec

# Wavelengths of the position encoding: from four slices of 5 mm to twice the longest head scan.
SHORTEST_MM, LONGEST_MM = 20.0, 800.0


def build_context(spec: SequenceSpec) -> nn.Module:
    """Build the context layer that ``spec.cell`` names."""
    if spec.cell == "transformer":
        return Attention(spec)
    if spec.cell == "conv":
        return Convolution(spec)
    return ResidualRecurrent(spec) if spec.residual else Recurrent(spec)


class Recurrent(nn.Module):
    """LSTM or GRU over the slices of a series; 2 x 512 bidirectional LSTM is the paper's (Nguyen et al. 2020)."""

    def __init__(self, spec: SequenceSpec) -> None:
        super().__init__()
        self.width = spec.hidden * (2 if spec.bidirectional else 1)
        self.recurrent = _cell(spec, spec.input_dim, spec.layers)

    def forward(self, features: Tensor, lengths: Tensor, _position_mm: Tensor) -> Tensor:
        """See the module."""
        return _run(self.recurrent, features, lengths)


class ResidualRecurrent(nn.Module):
    """Two recurrent layers whose outputs, and a ReLU layer on each, are summed (RSNA 2019's 2nd place)."""

    def __init__(self, spec: SequenceSpec) -> None:
        super().__init__()
        self.width = spec.hidden * (2 if spec.bidirectional else 1)
        self.first, self.second = _cell(spec, spec.input_dim, 1), _cell(spec, self.width, 1)
        self.after_first, self.after_second = (nn.Linear(self.width, self.width) for _ in range(2))

    def forward(self, features: Tensor, lengths: Tensor, _position_mm: Tensor) -> Tensor:
        """See the module."""
        first = _run(self.first, features, lengths)
        second = _run(self.second, first, lengths)
        return first + second + F.relu(self.after_first(first)) + F.relu(self.after_second(second))


class Attention(nn.Module):
    """A Transformer encoder (pre-norm) that is given the position of a slice in mm, not its number."""

    def __init__(self, spec: SequenceSpec) -> None:
        super().__init__()
        self.width = spec.hidden
        self.project = nn.Linear(spec.input_dim, spec.hidden)
        layer = nn.TransformerEncoderLayer(
            spec.hidden, spec.heads, 2 * spec.hidden, spec.dropout, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, spec.layers, nn.LayerNorm(spec.hidden), enable_nested_tensor=False)

    def forward(self, features: Tensor, lengths: Tensor, position_mm: Tensor) -> Tensor:
        """See the module."""
        mask = inside(lengths.to(features.device), features.shape[1])
        tokens = self.project(features) + encode_position(position_mm, lengths.to(features.device), self.width)
        return self.encoder(tokens, src_key_padding_mask=~mask)  # type: ignore[no-any-return]


def encode_position(position_mm: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Return sines and cosines (B, T, width) of the distance in mm from the middle of the series.

    Wavelengths rise in a geometric series from 20 to 800 mm (Vaswani et al. 2017, with millimetres for numbers).
    """
    low, high = extent(position_mm, lengths)
    offset_mm = position_mm.float() - (low + high) / 2  # (B, T)
    logs = torch.linspace(math.log(SHORTEST_MM), math.log(LONGEST_MM), (width + 1) // 2, device=offset_mm.device)
    angle = offset_mm.unsqueeze(-1) * logs.neg().exp() * 2 * math.pi
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[..., :width]


class Convolution(nn.Module):
    """Residual 1-D convolutions over the slices; beyond either end of a series there is zero, as in its padding."""

    def __init__(self, spec: SequenceSpec) -> None:
        super().__init__()
        self.width = spec.hidden
        self.project = nn.Linear(spec.input_dim, spec.hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(spec.hidden) for _ in range(spec.layers))
        self.layers = nn.ModuleList(
            nn.Conv1d(spec.hidden, spec.hidden, spec.kernel, padding=spec.kernel // 2) for _ in range(spec.layers)
        )
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, features: Tensor, lengths: Tensor, _position_mm: Tensor) -> Tensor:
        """See the module."""
        mask = inside(lengths.to(features.device), features.shape[1]).unsqueeze(-1)
        hidden: Tensor = self.project(features)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            normed = norm(hidden) * mask
            hidden = hidden + self.dropout(F.relu(layer(normed.transpose(1, 2)).transpose(1, 2)))
        return hidden


def moving_average(values: Tensor, lengths: Tensor, kernel: int) -> Tensor:
    """Average values (B, T, C) over ``kernel`` neighbouring slices; at an end over those that exist."""
    mask = inside(lengths.to(values.device), values.shape[1])[:, None].to(values.dtype)  # (B, 1, T)
    summed = F.avg_pool1d(values.transpose(1, 2) * mask, kernel, stride=1, padding=kernel // 2)
    share = F.avg_pool1d(mask, kernel, stride=1, padding=kernel // 2).clamp(min=1 / (2 * kernel))
    return (summed / share).transpose(1, 2)


def _cell(spec: SequenceSpec, inputs: int, layers: int) -> nn.RNNBase:
    kind: Callable[..., nn.RNNBase] = {"lstm": nn.LSTM, "gru": nn.GRU}[spec.cell]
    dropout = spec.dropout if layers > 1 else 0.0
    return kind(inputs, spec.hidden, layers, batch_first=True, dropout=dropout, bidirectional=spec.bidirectional)


def _run(recurrent: nn.RNNBase, features: Tensor, lengths: Tensor) -> Tensor:
    """Run over each series alone: packed, so that the backward direction does not start in the padding."""
    slices = features.shape[1]
    if int(lengths.min()) == slices:  # no padding, and faster so
        hidden: Tensor = recurrent(features)[0]
    else:
        packed = pack_padded_sequence(features, lengths.cpu(), batch_first=True, enforce_sorted=False)
        hidden = pad_packed_sequence(recurrent(packed)[0], batch_first=True, total_length=slices)[0]
    return hidden  # (B, T, width)
