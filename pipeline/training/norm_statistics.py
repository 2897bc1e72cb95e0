"""Statistics of batch norm that follow the weights while slice CNN and sequence model learn end to end."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ichpipe.training.distributed import sum_over_processes

if TYPE_CHECKING:
    from collections.abc import Iterator


class NormStatistics:
    """Mean and variance of each batch norm that learns, moved after every optimiser step by what the step has seen.

    Within a step they are fixed, so no slice depends on another, and the gradient in chunks stays exact. With fixed
    statistics for a whole training the activations drift: on the phantom, at a learning rate of 2e-4, the train loss
    rose from .12 to .25 within one epoch.

    Parameters
    ----------
    network
        The slice CNN, with batch norm in evaluation mode.
    momentum
        Share of the new in mean and variance, in [0, 1]; 0: they stay as they are.

    """

    def __init__(self, network: nn.Module, momentum: float) -> None:
        self.network, self.momentum = network, momentum
        self._sums: dict[nn.Module, Tensor] = {}  # (3, channels): sums, sums of squares, counts

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Look at what each batch norm gets in passes without a graph: every slice of a step goes through one."""
        norms = _learning_norms(self.network) if self.momentum else []
        hooks = [norm.register_forward_pre_hook(self._collect) for norm in norms]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def update(self) -> None:
        """Move the statistics by all slices since the last call, those of all processes; all must call it."""
        for norm in _learning_norms(self.network) if self.momentum else []:
            mean, variance = norm.running_mean, norm.running_var
            seen = self._sums.pop(norm, torch.zeros(3, len(mean), device=mean.device))
            sums, squares, counts = sum_over_processes(seen).unbind()
            new_mean = torch.where(counts > 0, sums / counts, mean)  # a step may hold no known label
            new_variance = torch.where(counts > 0, (squares / counts - new_mean.square()).clamp(min=0.0), variance)
            mean.lerp_(new_mean, self.momentum)
            variance.lerp_(new_variance, self.momentum)

    def _collect(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            return
        values = inputs[0].float()
        others = [dim for dim in range(values.ndim) if dim != 1]
        sums, squares = values.sum(others), values.square().sum(others)
        seen = torch.stack([sums, squares, torch.full_like(sums, values.numel() / values.shape[1])])
        self._sums[norm] = self._sums[norm] + seen if norm in self._sums else seen


def _learning_norms(network: nn.Module) -> list[Any]:
    """Return the batch norms with statistics that have a parameter to learn: others stay as stage one left them."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in norms if norm.track_running_stats and any(p.requires_grad for p in norm.parameters())]
