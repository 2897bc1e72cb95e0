"""Random changes of slices, in two steps: draw (all randomness, recorded), then apply (none).

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
    affine = _affine(
        flip,
        torch.deg2rad(signed[:, 1] * params.rotation_deg),
        1 + signed[:, 2] * params.scale,
        signed[:, 3:5] * params.shift * 2,  # the image spans -1 … 1
    )
    seeds = torch.randint(2**62, (n,), generator=generator)
    affine = _cropped(affine, params, generator)
    return AugmentDraw(
        affine.float().expand(n, 2, 3),
        (signed[:, 5] * params.offset_hu).float().expand(n),
        (uniform[:, 6] * params.noise_hu).float().expand(n),
        seeds,
        *(None if part is None else part.expand(n, *part.shape[1:]) for part in _soft(params, m, generator)),
    )


def apply(hu: Tensor, drawn: AugmentDraw) -> Tensor:
    """Apply a draw to HU (n, 1, H, W); returns float32 HU of the same shape, air where nothing was."""
    grid = F.affine_grid(drawn.affine.to(hu.device), list(hu.shape), align_corners=False)
    if drawn.warp is not None:
        warp = F.interpolate(drawn.warp.to(hu.device), size=hu.shape[-2:], mode="bicubic", align_corners=True)
        grid += warp.permute(0, 2, 3, 1)
    moved = F.grid_sample(hu.float() - AIR_HU, grid, align_corners=False, padding_mode="zeros") + AIR_HU
    if drawn.blur_px is not None:
        moved = _blurred(moved, drawn.blur_px.to(hu.device))
    moved += drawn.offset_hu.to(hu.device).view(-1, 1, 1, 1)
    return moved + _noise(drawn, moved.shape[-2:]).to(hu.device)


def _cropped(affine: Tensor, params: AugmentParams, generator: torch.Generator) -> Tensor:
    """Crop the moved image and stretch the crop over the whole of it, upside down where drawn so."""
    if params.crop_area == 1 and params.vertical_flip_probability == 0:
        return affine
    uniform = torch.rand((len(affine), 5), generator=generator, dtype=torch.float64)
    area = 1 - uniform[:, 0] * (1 - params.crop_area)
    ratio = torch.exp((2 * uniform[:, 1] - 1) * math.log(params.crop_aspect))
    size = torch.stack([area * ratio, area / ratio], 1).sqrt().clamp(max=1.0)  # (m, 2) share of the sides
    centre = (2 * uniform[:, 2:4] - 1) * (1 - size)
    size[:, 1] *= torch.where(uniform[:, 4] < params.vertical_flip_probability, -1.0, 1.0)
    linear = affine[:, :, :2] * size[:, None, :]
    shift = affine[:, :, 2] + (affine[:, :, :2] * centre[:, None, :]).sum(dim=2)
    return torch.cat([linear, shift[:, :, None]], dim=2)


def _soft(params: AugmentParams, m: int, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
    """Draw the warp and the blur; None where the parameters ask for none."""
    warp = blur = None
    if params.distortion > 0:
        warp = (2 * torch.rand((m, 2, NODES, NODES), generator=generator) - 1) * params.distortion * 2
    if params.blur_px > 0:
        blur = torch.rand((m,), generator=generator) * params.blur_px
    return warp, blur


def _blurred(image: Tensor, sigma: Tensor) -> Tensor:
    """Blur each of (n, 1, H, W) with a Gaussian of its own (n,), in pixels."""
    reach = max(1, math.ceil(3 * float(sigma.max())))
    places = torch.arange(-reach, reach + 1, device=image.device)
    own = sigma.clamp(min=1e-3)[:, None]
    kernel = torch.exp(-0.5 * (places / own) ** 2) * (places.abs() <= 3 * own)  # whatever the others' reach
    kernel = (kernel / kernel.sum(dim=1, keepdim=True))[:, None, None, :]  # (n, 1, 1, taps)
    n = len(image)
    image = F.pad(image.transpose(0, 1), (reach,) * 4, mode="replicate")  # (1, n, …): a group each
    image = F.conv2d(F.conv2d(image, kernel, groups=n), kernel.transpose(2, 3), groups=n)
    return image.transpose(0, 1)


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
