"""CT windows: Hounsfield units to image channels, on whatever device the slices are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ichpipe.params.schema import WindowParams


class Windows(nn.Module):
    """Clip to each window and scale it to 0 … 1: one channel per window (Nguyen et al. 2020).

    The bounds are ``level - width / 2`` and ``level + width / 2`` (DICOM PS3.3 C.11.2.1.2.1, without the
    half-unit offset, as the field does).
    """

    low: Tensor
    width: Tensor

    def __init__(self, windows: Sequence[WindowParams]) -> None:
        super().__init__()
        low = torch.tensor([window.level_hu - window.width_hu / 2 for window in windows])
        width = torch.tensor([window.width_hu for window in windows])
        self.register_buffer("low", low.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("width", width.view(1, -1, 1, 1), persistent=False)

    def forward(self, hu: Tensor) -> Tensor:
        """Map HU (N, 1, H, W), any real dtype, to float32 (N, windows, H, W) in 0 … 1."""
        return (hu.float() - self.low).div_(self.width).clamp_(0.0, 1.0)
