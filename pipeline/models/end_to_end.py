"""Slice CNN and sequence model joined, with the exact gradient of a whole series in bounded memory."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ichpipe.common.device import derive_seed
from ichpipe.common.errors import WeightsError

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

    @property
    def networks(self) -> Sequence[EndToEnd]:
        """The networks whose probabilities are averaged: this one."""
        return [self]

    @property
    def mirrorings(self) -> tuple[bool, ...]:
        """The images that the model averages over: as they are (False), and mirrored (True)."""
        return (False, True) if self.sequence.spec.mirrored else (False,)

    def train(self, mode: bool = True) -> EndToEnd:
        """Switch mode; batch norm stays in evaluation mode.

        The slices of a series are no fair batch, and with statistics that are fixed within a step the chunked gradient
        equals the full one.
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


class Ensemble(nn.Module):
    """Several end-to-end networks of one description as one model: the mean of their probabilities."""

    networks: Sequence[EndToEnd]

    def __init__(self, networks: Sequence[EndToEnd]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)  # type: ignore[assignment] # a sequence of these modules
        first = networks[0]
        for number, network in enumerate(networks[1:], 2):
            if (network.cnn.spec, network.sequence.spec) != (first.cnn.spec, first.sequence.spec):
                raise WeightsError(
                    f"network {number} of the ensemble has another description (backbone, windows, size or arm) than "
                    "the first; train them with the same parameters"
                )

    @property
    def cost(self) -> str:
        """How many networks predict, and for how much time."""
        count, passes = len(self.networks), sum(len(network.mirrorings) for network in self.networks)
        mirrored = ", on the images and on their mirror images" if passes > count else ""
        return f"{count} network{'s' * (count != 1)}{mirrored}: about {passes} times the time of one"

    @property
    def cnn(self) -> SliceCnn:
        """The first network's slice CNN; the others take the same images."""
        return self.networks[0].cnn

    @property
    def sequence(self) -> AnySequence:
        """The first network's sequence model."""
        return self.networks[0].sequence


def backward_in_chunks(
    model: EndToEnd,
    chunks: Sequence[Callable[[], Tensor]],
    position_mm: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    *,
    context: Callable[[], AbstractContextManager[object]],
    seed: int,
    scale: float = 1.0,
    slice_weight: float = 0.0,
) -> float:
    """Accumulate the gradient of a loss over a series that is held only in chunks.

    The loss is ``scale * (loss_of(logits) + slice_weight * loss_of(logits of the slice CNN))``.

    Pass one embeds all slices without a graph. The sequence model gives the loss and its gradient with respect to
    embeddings and slice logits. Pass two embeds each chunk again with a graph and backpropagates that gradient. This
    equals plain backpropagation: nothing couples slices inside the CNN (batch norm is in evaluation mode), and dropout
    draws the same numbers in both passes.

    Parameters
    ----------
    model, chunks
        The network; functions that return the HU (n, slices, size, size) of consecutive slices, the same at every call.
    position_mm, loss_of
        Positions of all slices along the slice normal (T,), mm; maps logits (T, 6) to the loss.
    context, seed, scale
        Makes the context of each forward pass, such as autocast; seed of dropout; factor of the gradient.
    slice_weight
        Weight of the auxiliary loss on the slice CNN's own logits; 0: none.

    Returns
    -------
    ``loss_of(logits)`` of the sequence model, unscaled.

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
    total = loss + slice_weight * loss_of(cnn_logits) if slice_weight else loss
    (total * scale).backward()  # type: ignore[no-untyped-call]
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
    of_gpu: dict[str, Any] = {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**({"devices": []} if device.type == "cpu" else of_gpu)):
        torch.manual_seed(derive_seed(seed, "chunk", number))
        yield
