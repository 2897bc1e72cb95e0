"""Stage two's networks: all slices of one series in anatomical order to six logits per slice.

Their interface: ``model(sources, lengths)`` on padded batches, ``model.one_series`` on a single series, ``model.spec``.
Sources are arrays of the cache: ``embedding`` (B, T, D), ``logits`` (B, T, 6) of the slice CNN, ``pca`` (B, T, k) and
``position_mm`` (B, T). Padding, the rest of the batch and its order never change a series' output.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ichpipe.common.constants import THICK_SLICE_MM
from ichpipe.common.device import double_type

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ichpipe.models.header import SequenceSpec

    Sources = dict[str, Tensor]

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
SHORTEST_MM, LONGEST_MM = 20.0, 800.0  # of the position encoding: from four slices of 5 mm to twice the longest head


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


def build_context(spec: SequenceSpec) -> nn.Module:
    """Build the context layer that ``spec.cell`` names."""
    recurrent = ResidualRecurrent if spec.residual else Recurrent
    return {"transformer": Attention, "conv": Convolution}.get(spec.cell, recurrent)(spec)


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


def moving_average_logits(logits: Tensor, lengths: Tensor, kernel: int) -> Tensor:
    """Return the log odds (B, T, 6) of the probabilities averaged over ``kernel`` neighbouring slices, in float64."""
    exported = torch.onnx.is_in_onnx_export()  # ONNX runtime has no pooling of float64
    probabilities = torch.sigmoid(logits.float() if exported else logits.to(double_type(logits.device)))
    return torch.logit(moving_average(probabilities, lengths, kernel), eps=1e-12)


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


class _SeriesNetwork(nn.Module):
    """What all networks over series share."""

    def __init__(self, spec: SequenceSpec) -> None:
        super().__init__()
        self.spec = spec

    def one_series(self, embedding: Tensor, cnn_logits: Tensor, position_mm: Tensor) -> Tensor:
        """Classify the slices of a single series.

        Parameters
        ----------
        embedding, cnn_logits, position_mm
            Output of the slice CNN, (T, D) and (T, 6), in anatomical order; positions along the slice normal (T,), mm.

        Returns
        -------
        Logits (T, 6) in the order of CLASSES.

        """
        sources = {"embedding": embedding, "logits": cnn_logits, POSITION: position_mm.float().to(embedding.device)}
        batch = {name: values.unsqueeze(0) for name, values in self.add_derived(sources).items()}
        length = torch.tensor([len(embedding)])
        if torch.onnx.is_in_onnx_export():  # a plain number would stay in an exported file
            length = torch.ones_like(position_mm, dtype=torch.int64).sum(dim=0, keepdim=True)
        return self(batch, length).squeeze(0)  # type: ignore[no-any-return]

    def add_derived(self, sources: Sources) -> Sources:
        """Add the principal components where the model reads them and ``sources`` hold embeddings alone."""
        if not hasattr(self, "pca_mean"):
            return sources
        centred = sources["embedding"].float() - self.get_buffer("pca_mean")
        return sources | {"pca": centred @ self.get_buffer("pca_components").T}


class SequenceModel(_SeriesNetwork):
    """A context over the slices and one linear head for every slice, its bias zero at the start (the paper's)."""

    def __init__(self, spec: SequenceSpec) -> None:
        super().__init__(spec)
        self.context = build_context(spec)
        self.dropout = nn.Dropout(spec.dropout)
        width = int(self.context.width)  # type: ignore[arg-type]
        self.head = nn.Linear(width + spec.width(spec.skip), len(spec.classes))
        nn.init.zeros_(self.head.bias)
        if "logits" in spec.skip:  # skipped logits pass unchanged at first: learning begins from stage one's answer
            first = width + spec.width(spec.skip[: spec.skip.index("logits")])
            with torch.no_grad():
                self.head.weight[:, first : first + len(spec.classes)] = torch.eye(len(spec.classes))
        if "pca" in spec.inputs + spec.skip:  # stored with the weights, for series that come without a store
            self.register_buffer("pca_mean", torch.zeros(spec.embedding_dim))
            self.register_buffer("pca_components", torch.zeros(spec.pca, spec.embedding_dim))

    def set_principal_components(self, mean: Tensor, components: Tensor) -> None:
        """Set the map (D,), (k, D) that made the input ``pca`` of the training data."""
        self.get_buffer("pca_mean").copy_(mean)
        self.get_buffer("pca_components").copy_(components)

    def forward(self, sources: Sources, lengths: Tensor) -> Tensor:
        """Classify the slices of padded series.

        Parameters
        ----------
        sources, lengths
            ``position_mm`` (B, T), mm, and what the model reads of ``embedding`` (B, T, D), ``logits`` (B, T, 6) and
            ``pca`` (B, T, k); slices of each series (B,), on the CPU.

        Returns
        -------
        Logits (B, T, 6); without meaning beyond the length of a series.

        """
        position_mm = sources[POSITION]
        on_device = lengths.to(position_mm.device)
        inputs = make_inputs(self.spec.inputs, sources, on_device)
        hidden = self.dropout(self.context(inputs, lengths, position_mm))
        if self.spec.skip:
            hidden = torch.cat([hidden, make_inputs(self.spec.skip, sources, on_device)], dim=-1)
        return self.head(hidden)  # type: ignore[no-any-return]


class MovingAverage(_SeriesNetwork):
    """The baseline: the slice CNN's probabilities averaged over neighbouring slices. Nothing is learned."""

    def forward(self, sources: Sources, lengths: Tensor) -> Tensor:
        """See SequenceModel."""
        return moving_average_logits(sources["logits"], lengths, self.spec.kernel)


class SequenceEnsemble(_SeriesNetwork):
    """Several trained networks as one: the mean of their probabilities, over both orders of slices if asked.

    With ``spec.smoothed`` the log odds are the mean of theirs and of the moving average's.
    """

    def __init__(self, spec: SequenceSpec, members: Sequence[SequenceModel | MovingAverage]) -> None:
        super().__init__(spec.model_copy(update={"members": len(members)}))
        self.members = nn.ModuleList(members)

    def forward(self, sources: Sources, lengths: Tensor) -> Tensor:
        """See SequenceModel; the logits are those of the mean probability."""
        logits = [member(sources, lengths) for member in self.members]
        if self.spec.reversed:
            on_device = lengths.to(sources[POSITION].device)
            backwards = {name: reverse(values, on_device) for name, values in sources.items()}
            logits += [reverse(member(backwards, lengths), on_device) for member in self.members]
        joined = mean_logits(torch.stack(logits))
        if not self.spec.smoothed:
            return joined
        smoothed = moving_average_logits(sources["logits"], lengths, self.spec.kernel)
        return (joined + smoothed.to(joined.dtype)) / 2

    def add_derived(self, sources: Sources) -> Sources:
        """Add the components of the first member; all were trained on one store and share them."""
        return self.members[0].add_derived(sources)  # type: ignore[operator, no-any-return]


AnySequence = SequenceModel | MovingAverage | SequenceEnsemble


def build_sequence(spec: SequenceSpec) -> AnySequence:
    """Build the network, or the ensemble, that a spec describes."""
    single = MovingAverage if spec.cell == "average" else SequenceModel
    if spec.members == 1 and not spec.reversed and not spec.smoothed:
        return single(spec)
    return SequenceEnsemble(spec, [single(spec) for _ in range(spec.members)])


def mean_logits(logits: Tensor) -> Tensor:
    """Return the logits (…) of the mean probability over the first axis, computed in log space.

    A single element stays bit by bit as it is.
    """
    if len(logits) == 1:
        return logits[0]
    positive, negative = (torch.logsumexp(F.logsigmoid(sign * logits), dim=0) for sign in (1, -1))
    return positive - negative
