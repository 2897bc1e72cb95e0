"""The training loss: the metric of RSNA 2019 on logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ichpipe.common.classes import METRIC_WEIGHTS


def weighted_bce_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over slices of the weighted binary cross entropy, ``sum_c w_c BCE_c / 7``.

    ``logits`` and ``labels`` are (n, 6) in the order of CLASSES; w(any) = 2, the others 1. The divisor is the
    sum of the weights, 7; dividing by 6 classes instead is a known trap (it turns 0.06434 into 0.07507).
    A slice with an unknown label (NaN) counts nothing.
    """
    weights = torch.tensor(METRIC_WEIGHTS, device=logits.device)
    known = ~labels.isnan().any(dim=1)
    loss = F.binary_cross_entropy_with_logits(logits[known].float(), labels[known].float(), reduction="none")
    return (loss * weights).sum() / weights.sum()


def weighted_bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the slices with known labels of `weighted_bce_sum`; NaN where there is none."""
    known = (~labels.isnan().any(dim=1)).sum()
    return weighted_bce_sum(logits, labels) / known
