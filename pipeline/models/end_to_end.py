"""Slice CNN and sequence model joined, with the exact gradient of a whole series in bounded memory."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ichpipe.common.device import derive_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from ichpipe.models.sequence import AnySequence
    from ichpipe.models.slice_cnn import SliceCnn


class EndToEnd(nn.Module):
    """HU of one whole series in anatomical order to six logits per slice."""

    def __init__(self, cnn: SliceCnn, sequence: AnySequence) -> None:
        super().__init__()
        self.cnn = cnn
        self.sequence = sequence

    def train(self, mode: bool = True) -> EndToEnd:
        """Switch mode; batch norm stays in evaluation mode, with the statistics of stage one.

        A series is no fair batch (its slices are neighbours), and frozen statistics are what makes the
        chunked gradient equal the full one.
        """
        super().train(mode)
        for module in self.cnn.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, hu: Tensor, position_mm: Tensor) -> Tensor:
        """Map HU (T, 1, size, size) and positions (T,) to logits (T, 6), with one graph over everything."""
        embedding, cnn_logits = self.cnn(hu)
        return self.sequence.one_series(embedding, cnn_logits, position_mm)


def backward_in_chunks(
    model: EndToEnd,
    chunks: Sequence[Callable[[], Tensor]],
    position_mm: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    *,
    context: Callable[[], AbstractContextManager[object]],
    seed: int,
    scale: float = 1.0,
) -> float:
    """Accumulate the gradient of ``scale * loss_of(logits)`` over a series that is held only in chunks.

    ``chunks`` are functions that return the HU (n, 1, size, size) of consecutive slices, the same at every
    call; ``position_mm`` (T,) holds the positions of all slices. Pass one embeds all slices without a graph; the
    sequence model gives the loss and its gradient with respect to embeddings and slice logits; pass two embeds each
    chunk again with a graph and hands that gradient on. Equal to plain backpropagation since nothing couples slices
    inside the CNN (batch norm is frozen) and dropout draws the same numbers in both passes. Returns the unscaled loss.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        parts = [_embed(model, chunk(), seed, number, context) for number, chunk in enumerate(chunks)]
    embedding = torch.cat([part[0] for part in parts]).requires_grad_()
    cnn_logits = torch.cat([part[1] for part in parts]).requires_grad_()
    with _fixed_random(seed, -1, device), context():
        loss = loss_of(model.sequence.one_series(embedding, cnn_logits, position_mm))
    (loss * scale).backward()  # type: ignore[no-untyped-call]
    if not any(parameter.requires_grad for parameter in model.cnn.parameters()):
        return float(loss.detach())
    start = 0
    for number, chunk in enumerate(chunks):
        outputs = _embed(model, chunk(), seed, number, context)
        stop = start + len(outputs[0])
        gradients = (embedding.grad, cnn_logits.grad)
        used = [(out, grad[start:stop]) for out, grad in zip(outputs, gradients, strict=True) if grad is not None]
        torch.autograd.backward([out for out, _ in used], [grad for _, grad in used])
        start = stop
    return float(loss.detach())


def _embed(
    model: EndToEnd,
    hu: Tensor,
    seed: int,
    number: int,
    context: Callable[[], AbstractContextManager[object]],
) -> tuple[Tensor, Tensor]:
    with _fixed_random(seed, number, hu.device), context():
        embedding, cnn_logits = model.cnn(hu)
    return embedding.float(), cnn_logits.float()


@contextmanager
def _fixed_random(seed: int, number: int, device: torch.device) -> Iterator[None]:
    """Dropout inside draws the same numbers whenever seed and number are the same; outside nothing changes."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "chunk", number))
        yield
