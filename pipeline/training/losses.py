"""The training loss: the metric of RSNA 2019 on logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ichpipe.common.classes import METRIC_WEIGHTS


def weighted_bce_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over slices of the weighted binary cross entropy, ``sum_c w_c BCE_c / 7``.

    ``logits`` and ``labels`` are (n, 6) in the order of CLASSES; w(any) = 2, the others 1. The divisor is the
    sum of the weights, 7, not the 6 classes (which would turn 0.06434 into 0.07507). A slice with an unknown label
    (NaN) counts nothing.
    """
    weights = torch.tensor(METRIC_WEIGHTS, device=logits.device)
    labelled = ~labels.isnan().any(dim=1)
    loss = F.binary_cross_entropy_with_logits(logits[labelled].float(), labels[labelled].float(), reduction="none")
    return (loss * weights).sum() / weights.sum()


def weighted_bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the slices with known labels of `weighted_bce_sum`; NaN where there is none."""
    return weighted_bce_sum(logits, labels) / (~labels.isnan().any(dim=1)).sum()
