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
        self.cnn, self.sequence = cnn, sequence

    def train(self, mode: bool = True) -> EndToEnd:
        """Switch mode; batch norm stays in evaluation mode, with the statistics of stage one.

        The slices of a series are no fair batch, and frozen statistics make the chunked gradient equal to the full one.
        """
        super().train(mode)
        for module in self.cnn.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, hu: Tensor, position_mm: Tensor) -> Tensor:
        """Classify the slices of one series, with one graph over everything.

        Parameters
        ----------
        hu, position_mm
            Hounsfield units (T, slices, size, size); positions along the slice normal (T,), mm.

        Returns
        -------
        Logits (T, 6) in the order of CLASSES.

        """
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

    Pass one embeds all slices without a graph. The sequence model gives the loss and its gradient with respect to
    embeddings and slice logits. Pass two embeds each chunk again with a graph and backpropagates that gradient. This
    equals plain backpropagation: nothing couples slices inside the CNN (batch norm is frozen), and dropout draws the
    same numbers in both passes.

    Parameters
    ----------
    model, chunks
        The network; functions that return the HU (n, slices, size, size) of consecutive slices, the same at every call.
    position_mm, loss_of
        Positions of all slices along the slice normal (T,), mm; maps logits (T, 6) to the loss.
    context, seed, scale
        Makes the context of each forward pass, such as autocast; seed of dropout; factor of the gradient.

    Returns
    -------
    The loss, unscaled.

    """
    device = next(model.parameters()).device

    def embed(number: int) -> tuple[Tensor, Tensor]:
        hu = chunks[number]()
        with repeat_random(seed, number, device), context():
            embedding, cnn_logits = model.cnn(hu)
        return embedding.float(), cnn_logits.float()

    with torch.no_grad():
        parts = [embed(number) for number in range(len(chunks))]
    embedding, cnn_logits = (torch.cat(tensors).requires_grad_() for tensors in zip(*parts, strict=True))
    with repeat_random(seed, -1, device), context():
        loss = loss_of(model.sequence.one_series(embedding, cnn_logits, position_mm))
    (loss * scale).backward()  # type: ignore[no-untyped-call]
    if any(parameter.requires_grad for parameter in model.cnn.parameters()):
        start = 0
        for number, (part, _) in enumerate(parts):
            rows = slice(start, start + len(part))
            gradients = (embedding.grad, cnn_logits.grad)
            used = [(out, grad[rows]) for out, grad in zip(embed(number), gradients, strict=True) if grad is not None]
            torch.autograd.backward([out for out, _ in used], [grad for _, grad in used])
            start += len(part)
    return float(loss.detach())


@contextmanager
def repeat_random(seed: int, number: int, device: torch.device) -> Iterator[None]:
    """Draw the same numbers inside (dropout) whenever seed and number are the same; nothing changes outside."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "chunk", number))
        yield
