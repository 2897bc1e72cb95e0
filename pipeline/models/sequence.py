"""Stage two's networks: all slices of one series in anatomical order to six logits per slice.

Their interface: ``model(sources, lengths)`` on padded batches (`ichpipe.models.inputs`), ``model.one_series`` on a
single series, ``model.spec``. Padding, the rest of the batch and its order never change a series' output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ichpipe.models.contexts import build_context, moving_average
from ichpipe.models.inputs import POSITION, make_inputs, reverse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ichpipe.models.header import SequenceSpec

    Sources = dict[str, Tensor]


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
        sources = {"embedding": embedding, "logits": cnn_logits, POSITION: position_mm.to(embedding.device).float()}
        batch = {name: values.unsqueeze(0) for name, values in self.add_derived(sources).items()}
        length = torch.tensor([len(embedding)])
        if torch.onnx.is_in_onnx_export():  # a plain number would stay in an exported file
            length = torch.ones_like(position_mm, dtype=torch.int64).sum(dim=0, keepdim=True)
        return self(batch, length).squeeze(0)  # type: ignore[no-any-return]

    def add_derived(self, sources: Sources) -> Sources:
        """Add the principal components where the model reads them and ``sources`` hold embeddings alone."""
        return sources


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

    def add_derived(self, sources: Sources) -> Sources:
        """Add the principal components."""
        if "pca" not in self.spec.inputs + self.spec.skip:
            return sources
        centred = sources["embedding"].float() - self.get_buffer("pca_mean")
        return sources | {"pca": centred @ self.get_buffer("pca_components").T}


class MovingAverage(_SeriesNetwork):
    """The baseline: the slice CNN's probabilities averaged over neighbouring slices. Nothing is learned."""

    def forward(self, sources: Sources, lengths: Tensor) -> Tensor:
        """See SequenceModel."""
        exported = torch.onnx.is_in_onnx_export()  # ONNX runtime has no pooling of float64
        probabilities = torch.sigmoid(sources["logits"].float() if exported else sources["logits"].double())
        return torch.logit(moving_average(probabilities, lengths, self.spec.kernel), eps=1e-12)


class SequenceEnsemble(_SeriesNetwork):
    """Several trained networks as one: the mean of their probabilities, over both orders of slices if asked."""

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
        return mean_logits(torch.stack(logits))

    def add_derived(self, sources: Sources) -> Sources:
        """Add the components of the first member; all were trained on one store and share them."""
        return self.members[0].add_derived(sources)  # type: ignore[operator, no-any-return]


AnySequence = SequenceModel | MovingAverage | SequenceEnsemble


def build_sequence(spec: SequenceSpec) -> AnySequence:
    """Build the network, or the ensemble, that a spec describes."""
    single = MovingAverage if spec.cell == "average" else SequenceModel
    if spec.members == 1 and not spec.reversed:
        return single(spec)
    return SequenceEnsemble(spec, [single(spec) for _ in range(spec.members)])


def mean_logits(logits: Tensor) -> Tensor:
    """Return the logits (…) of the mean probability over the first axis, computed in log space."""
    positive, negative = (torch.logsumexp(F.logsigmoid(sign * logits), dim=0) for sign in (1, -1))
    return positive - negative
