"""Random changes of slices, in two steps: draw (all randomness, recorded), then apply (none).

The same draw applied twice gives the same images, on every device; the end-to-end step relies on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from ichpipe.params import AugmentParams

AIR_HU = -1000.0


@dataclass(frozen=True)
class AugmentDraw:
    """What happens to each of n slices."""

    affine: Tensor  # (n, 2, 3) output-to-input map in the coordinates of affine_grid
    offset_hu: Tensor  # (n,)
    noise_hu: Tensor  # (n,) standard deviation
    noise_seed: Tensor  # (n,) int64

    def part(self, rows: slice) -> AugmentDraw:
        """Return the draws of some of the slices."""
        return AugmentDraw(self.affine[rows], self.offset_hu[rows], self.noise_hu[rows], self.noise_seed[rows])


def draw(params: AugmentParams, n: int, generator: torch.Generator, *, together: bool = False) -> AugmentDraw:
    """Draw the changes of ``n`` slices; ``together`` moves all alike (slices of one series), noise apart."""
    m = 1 if together else n
    uniform = torch.rand((m, 7), generator=generator, dtype=torch.float64)
    signed = 2 * uniform - 1
    flip = torch.where(uniform[:, 0] < params.flip_probability, -1.0, 1.0)
    affine = _affine(
        flip,
        torch.deg2rad(signed[:, 1] * params.rotation_deg),
        1 + signed[:, 2] * params.scale,
        signed[:, 3:5] * params.shift * 2,  # the image spans -1 … 1
    )
    seeds = torch.randint(2**62, (n,), generator=generator)
    return AugmentDraw(
        affine.float().expand(n, 2, 3),
        (signed[:, 5] * params.offset_hu).float().expand(n),
        (uniform[:, 6] * params.noise_hu).float().expand(n),
        seeds,
    )


def apply(hu: Tensor, drawn: AugmentDraw) -> Tensor:
    """Apply a draw to HU (n, 1, H, W); returns float32 HU of the same shape, air where nothing was."""
    grid = F.affine_grid(drawn.affine.to(hu.device), list(hu.shape), align_corners=False)
    moved = F.grid_sample(hu.float() - AIR_HU, grid, align_corners=False, padding_mode="zeros") + AIR_HU
    moved += drawn.offset_hu.to(hu.device).view(-1, 1, 1, 1)
    return moved + _noise(drawn, moved.shape[-2:]).to(hu.device)


def _affine(flip: Tensor, angle: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = [torch.stack([flip * cos, -sin, shift[:, 0]], 1), torch.stack([flip * sin, cos, shift[:, 1]], 1)]
    return torch.stack(rows, 1)


def _noise(drawn: AugmentDraw, size: torch.Size) -> Tensor:
    """Noise from each slice's own seed: independent of which other slices are in the batch."""
    noise = torch.zeros((len(drawn.noise_hu), 1, *size))
    for row, (sigma, seed) in enumerate(zip(drawn.noise_hu.tolist(), drawn.noise_seed.tolist(), strict=True)):
        if sigma > 0:
            own = torch.Generator().manual_seed(seed)
            noise[row].normal_(0.0, sigma, generator=own)
    return noise
