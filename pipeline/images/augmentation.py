"""Random changes of slices in two steps: `draw` decides all randomness, `apply` only follows it.

The same draw applied twice gives the same images, on every device; the end-to-end step relies on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ichpipe.common.constants import AIR_HU

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ichpipe.params.schema import AugmentParams

NODES = 5  # of the warp, along each side


@dataclass(frozen=True)
class AugmentDraw:
    """What happens to each of n slices."""

    affine: Tensor  # (n, 2, 3) output-to-input map in the coordinates of affine_grid
    offset_hu: Tensor  # (n,)
    noise_hu: Tensor  # (n,) standard deviation
    noise_seed: Tensor  # (n,) int64
    warp: Tensor | None = None  # (n, 2, NODES, NODES) displacement of a coarse grid, in the same coordinates
    blur_px: Tensor | None = None  # (n,) standard deviation

    def part(self, rows: slice | Tensor) -> AugmentDraw:
        """Return the draws of some of the slices."""
        return self._each(lambda name: getattr(self, name)[rows])

    @classmethod
    def joined(cls, draws: Sequence[AugmentDraw]) -> AugmentDraw:
        """Return the draws of several series as one; all made with the same parameters."""
        return draws[0]._each(lambda name: torch.cat([getattr(draw, name) for draw in draws]))

    def _each(self, change: Callable[[str], Tensor]) -> AugmentDraw:
        changed: dict[str, Any] = {
            item.name: None if getattr(self, item.name) is None else change(item.name) for item in fields(self)
        }
        return AugmentDraw(**changed)


def draw(params: AugmentParams, n: int, generator: torch.Generator, *, together: bool = False) -> AugmentDraw:
    """Draw the changes of ``n`` slices; ``together`` moves all alike (slices of one series), noise apart."""
    m = 1 if together else n
    uniform = torch.rand((m, 7), generator=generator, dtype=torch.float64)
    signed = 2 * uniform - 1
    flip = torch.where(uniform[:, 0] < params.flip_probability, -1.0, 1.0)
    angle, scale = torch.deg2rad(signed[:, 1] * params.rotation_deg), 1 + signed[:, 2] * params.scale
    cos, sin, shift = torch.cos(angle) / scale, torch.sin(angle) / scale, signed[:, 3:5] * params.shift * 2  # -1 … 1
    rows = [torch.stack([flip * cos, -sin, shift[:, 0]], 1), torch.stack([flip * sin, cos, shift[:, 1]], 1)]
    seeds = torch.randint(2**62, (n,), generator=generator)
    affine = _crop(torch.stack(rows, 1), params, generator).float()
    warp = blur = None
    if params.distortion > 0:
        warp = (2 * torch.rand((m, 2, NODES, NODES), generator=generator) - 1) * params.distortion * 2
        warp = warp.expand(n, 2, NODES, NODES)
    if params.blur_px > 0:
        blur = (torch.rand((m,), generator=generator) * params.blur_px).expand(n)
    offset, noise = (signed[:, 5] * params.offset_hu).float(), (uniform[:, 6] * params.noise_hu).float()
    return AugmentDraw(affine.expand(n, 2, 3), offset.expand(n), noise.expand(n), seeds, warp, blur)


def apply(hu: Tensor, drawn: AugmentDraw) -> Tensor:
    """Apply a draw to HU (n, slices, H, W); returns float32 HU of the same shape, with air where nothing was.

    The noise comes from each slice's own seed, whatever other slices are in the batch.
    """
    grid = F.affine_grid(drawn.affine.to(hu.device), list(hu.shape), align_corners=False)
    if drawn.warp is not None:
        warp = F.interpolate(drawn.warp.to(hu.device), size=hu.shape[-2:], mode="bicubic", align_corners=True)
        grid += warp.permute(0, 2, 3, 1)
    moved = F.grid_sample(hu.float() - AIR_HU, grid, align_corners=False, padding_mode="zeros") + AIR_HU
    if drawn.blur_px is not None:
        moved = _blur(moved, drawn.blur_px.to(hu.device))
    moved += drawn.offset_hu.to(hu.device).view(-1, 1, 1, 1)
    noise = torch.zeros(moved.shape)
    for row, (sigma, seed) in enumerate(zip(drawn.noise_hu.tolist(), drawn.noise_seed.tolist(), strict=True)):
        if sigma > 0:
            noise[row].normal_(0.0, sigma, generator=torch.Generator().manual_seed(seed))
    return moved + noise.to(hu.device)


def _crop(affine: Tensor, params: AugmentParams, generator: torch.Generator) -> Tensor:
    """Crop the moved image and stretch the crop over the whole of it, upside down where drawn so."""
    if params.crop_area == 1 and params.vertical_flip_probability == 0:
        return affine
    uniform = torch.rand((len(affine), 5), generator=generator, dtype=torch.float64)
    area = 1 - uniform[:, 0] * (1 - params.crop_area)
    ratio = torch.exp((2 * uniform[:, 1] - 1) * math.log(params.crop_aspect))
    size = torch.stack([area * ratio, area / ratio], 1).sqrt().clamp(max=1.0)  # (m, 2) share of the sides
    centre = (2 * uniform[:, 2:4] - 1) * (1 - size)
    size[:, 1] *= torch.where(uniform[:, 4] < params.vertical_flip_probability, -1.0, 1.0)
    shift = affine[:, :, 2] + (affine[:, :, :2] * centre[:, None, :]).sum(dim=2)
    return torch.cat([affine[:, :, :2] * size[:, None, :], shift[:, :, None]], dim=2)


def _blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Blur each of (n, slices, H, W) with a Gaussian of its own standard deviation (n,), in pixels."""
    n, reach = len(image), max(1, math.ceil(3 * float(sigma.max())))
    offsets = torch.arange(-reach, reach + 1, device=image.device)
    own = sigma.clamp(min=1e-3)[:, None]
    kernel = torch.exp(-0.5 * (offsets / own) ** 2) * (offsets.abs() <= 3 * own)  # the same beside any other slice
    kernel = (kernel / kernel.sum(dim=1, keepdim=True))[:, None, None, :]  # (n, 1, 1, taps)
    image = F.pad(image.transpose(0, 1), (reach,) * 4, mode="replicate")  # (slices, n, …): a group each
    return F.conv2d(F.conv2d(image, kernel, groups=n), kernel.transpose(2, 3), groups=n).transpose(0, 1)
