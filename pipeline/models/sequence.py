"""Stage two's network: a recurrent network over the slices of one series, in anatomical order."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ichpipe.classes import CLASSES


class SequenceSpec(BaseModel):
    """All that is needed to build the network again; stored beside its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cell: str
    hidden: int
    layers: int
    bidirectional: bool
    dropout: float
    inputs: tuple[str, ...]
    embedding_dim: int
    pca: int = 0  # principal components, where they are an input
    classes: tuple[str, ...] = CLASSES

    @property
    def input_dim(self) -> int:
        """Features per slice that enter the recurrent network."""
        sizes = {"embedding": self.embedding_dim, "logits": len(self.classes), "pca": self.pca}
        return sum(sizes[name] for name in self.inputs)


class SequenceModel(nn.Module):
    """The paper's ``LSTM(2048, 512, num_layers=2, bidirectional)`` and ``Linear(1024, 6)`` with zero bias."""

    def __init__(self, spec: SequenceSpec) -> None:
        super().__init__()
        self.spec = spec
        cell = {"lstm": nn.LSTM, "gru": nn.GRU}[spec.cell]
        self.recurrent = cell(
            spec.input_dim,
            spec.hidden,
            num_layers=spec.layers,
            bidirectional=spec.bidirectional,
            dropout=spec.dropout if spec.layers > 1 else 0.0,
            batch_first=True,
        )
        self.dropout = nn.Dropout(spec.dropout)
        self.head = nn.Linear(spec.hidden * (2 if spec.bidirectional else 1), len(spec.classes))
        nn.init.zeros_(self.head.bias)
        if "pca" in spec.inputs:  # stored with the weights: without a store, embeddings are all there is
            self.register_buffer("pca_mean", torch.zeros(spec.embedding_dim))
            self.register_buffer("pca_components", torch.zeros(spec.pca, spec.embedding_dim))

    def set_principal_components(self, mean: Tensor, components: Tensor) -> None:
        """Take the map (D,), (k, D) that made the input ``pca`` of the training data."""
        self.get_buffer("pca_mean").copy_(mean)
        self.get_buffer("pca_components").copy_(components)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Map padded features (B, T, input_dim) and lengths (B,) to logits (B, T, 6).

        Packed, so that padding never reaches the recurrence: without it the backward direction would start
        in the padding. Logits beyond a series' length mean nothing.
        """
        packed = pack_padded_sequence(features, lengths.cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = self.recurrent(packed)
        padded, _ = pad_packed_sequence(hidden, batch_first=True, total_length=features.shape[1])  # (B, T, 2H)
        logits: Tensor = self.head(self.dropout(padded))
        return logits

    def one_series(self, embedding: Tensor, cnn_logits: Tensor) -> Tensor:
        """Map one series' embeddings (T, D) and slice-CNN logits (T, 6) to logits (T, 6)."""
        sources = {"embedding": embedding, "logits": cnn_logits}
        if "pca" in self.spec.inputs:
            centred = embedding.float() - self.get_buffer("pca_mean")
            sources["pca"] = centred @ self.get_buffer("pca_components").T
        features = select_inputs(self.spec.inputs, sources)
        lengths = torch.tensor([len(features)])
        output: Tensor = self(features.unsqueeze(0), lengths)
        return output.squeeze(0)


def select_inputs(inputs: tuple[str, ...], sources: dict[str, Tensor]) -> Tensor:
    """Concatenate the chosen inputs along the last axis, in float32."""
    return torch.cat([sources[name].float() for name in inputs], dim=-1)
