"""Several processes that train one model, as `torchrun` starts them: each takes a share, gradients are summed.

There is no wrapper of the model: step three calls backward several times per optimiser step (see `end_to_end`). So
gradients are summed once, before the step, in one message. One process alone costs nothing.
"""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import distributed

from ichpipe.common.device import accelerator_type, double_type
from ichpipe.common.processes import launched_rank, signals_end_at_once

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import TypeVar

    T = TypeVar("T")

log = logging.getLogger("ichpipe")


@contextmanager
def processes() -> Iterator[None]:
    """Join the other processes of this run where `torchrun` started it; leave them at the end."""
    if launched_rank()[1] == 1 or distributed.is_initialized():
        if os.environ.get("WORLD_SIZE", "1").strip() not in {"", "1"} and not distributed.is_initialized():
            log.warning("WORLD_SIZE is set, but MASTER_ADDR or MASTER_PORT is not: this process trains alone")
        yield
        return
    with signals_end_at_once():
        distributed.init_process_group(distributed.get_default_backend_for_device(accelerator_type() or "cpu"))
    try:
        yield
    finally:
        distributed.destroy_process_group()


def local_gpu(gpu: str) -> str:
    """Return the device of this process: under `torchrun`, ``auto`` is one GPU for each process.

    Processes can't share a Mac's GPU: PyTorch has no backend that sums tensors there. They train on the CPU.
    """
    kind = accelerator_type()
    if launched_rank()[1] == 1 or gpu != "auto" or kind is None:
        return gpu
    return "cpu" if kind == "mps" else os.environ.get("LOCAL_RANK", gpu)


def count() -> int:
    """Return how many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process; 0 writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Let the first process finish the body before the others begin it."""
    if rank() > 0:
        with signals_end_at_once():
            distributed.barrier()
    yield
    if rank() == 0 and count() > 1:
        with signals_end_at_once():
            distributed.barrier()


def share(items: Sequence[T]) -> Sequence[T]:
    """Return the part of a list that this process takes."""
    return items[rank() :: count()]


def all_sum(*values: float) -> tuple[float, ...]:
    """Return sums over the processes."""
    if count() == 1:
        return values
    device = _summing_device()
    sums = torch.tensor(values, dtype=double_type(device), device=device)
    distributed.all_reduce(sums)
    return tuple(sums.tolist())


def mean_of_all(value: torch.Tensor | float, weight: float) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Return the weighted mean over the processes and the sum of the weights; all must call it at the same step.

    The numbers stay on the device, so that a GPU need not be waited for.
    """
    if count() == 1:
        return value, weight
    device = _summing_device()
    number = torch.as_tensor(value, dtype=double_type(device)).detach().to(device)
    parts = torch.stack([number * weight if weight else torch.zeros_like(number), torch.full_like(number, weight)])
    distributed.all_reduce(parts)
    return parts[0] / parts[1].clamp(min=1e-12), parts[1]


def _summing_device() -> torch.device:
    """Return the device of tensors that the processes can sum: gloo sums those of a CPU, other backends a GPU's."""
    return torch.device("cpu" if distributed.get_backend() == "gloo" else accelerator_type() or "cpu")


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its sum over the processes; one that is missing in all of them stays missing."""
    if count() == 1:
        return
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        return
    present = [parameter.grad is not None for parameter in trainable]
    gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in trainable]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor(present).to(gradients[0])])
    distributed.all_reduce(flat)
    *sums, holders = torch.split(flat, [*(gradient.numel() for gradient in gradients), len(trainable)])
    if not all(present):  # reading the numbers makes a GPU wait
        present = [number > 0 for number in holders.tolist()]
    for parameter, gradient, summed, exists in zip(trainable, gradients, sums, present, strict=True):
        parameter.grad = gradient.copy_(summed.view_as(gradient)) if exists else None


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over the processes; all must call it at the same step."""
    if count() > 1:
        distributed.all_reduce(tensor)
    return tensor


def average_statistics(model: torch.nn.Module) -> None:
    """Give all processes the mean of their running statistics (batch norm on a CPU keeps its own in each)."""
    if count() == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            distributed.all_reduce(buffer)
            buffer.div_(count())
