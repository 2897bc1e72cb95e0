"""Where the model looked: heat maps of the fine-tuned network's score of a slice.

The score explained is the logit of the whole CNN-LSTM for that slice, as a function of that slice's own image; the
embeddings of its neighbours are held fixed. Two steps, which need a few slices' images at a time:

1. Through the sequence model, gradients of the logit with respect to the slice's embedding, averaged on the way from
   the mean embedding of its series to its own (integrated gradients, Sundararajan et al., ICML 2017): the direction
   that says by which features the slice stands out. One gradient at the end of the way localises less well.
2. Through the CNN, LayerCAM (Jiang et al., IEEE TIP 2021) of the output along that direction.

What was measured on the phantom, and why not the slice CNN's own head, stands in docs/report.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from pytorch_grad_cam import LayerCAM
from torch import Tensor, nn

from ichpipe.common.errors import WeightsError
from ichpipe.images.slice_dataset import load_readable, load_slices
from ichpipe.models.sequence import mean_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from ichpipe.models.end_to_end import EndToEnd
    from ichpipe.models.slice_cnn import SliceCnn

Look = tuple[Tensor, Tensor]
"""Embeddings (T, D) and slice-CNN logits (T, 6) of one series, of its images or of their mirror images."""

MAP_SIDE: Final = 12
"""A map has at least so many pixels a side, where the backbone has such a stage: at 4 x 4 nothing is localised."""

STEPS: Final = 8
"""Points of the way from the mean embedding to the slice's own (midpoint rule)."""

CHUNK_SLICES: Final = 16


@dataclass(frozen=True)
class EmbeddedSeries:
    """One series as the sequence model sees it: no image is held."""

    paths: list[str]  # readable files in order
    position_mm: Tensor  # (T,)
    looks: list[Look]
    stride: int  # the sequence model sees every so-many-th slice (``ichpipe.index.thin_slices.stride_of``)
    bad: list[tuple[str, str]]  # path and reason of what can't be decoded

    @torch.no_grad()
    def logits(self, model: EndToEnd) -> Tensor:
        """Return the model's logits (T, 6), as ``ichpipe predict`` gives them."""
        found = torch.empty(len(self.paths), len(model.cnn.spec.classes))
        for first in range(min(self.stride, len(found))):
            part = slice(first, None, self.stride)
            found[part] = _score(model, [(e[part], c[part]) for e, c in self.looks], self.position_mm[part]).cpu()
        return found

    def directions(self, model: EndToEnd, row: int, class_index: int) -> list[Look]:
        """Return by which features one slice's logit rises from the series' mean: (D,) and (6,), per look.

        Summed over looks and features, direction times (own - mean) is the logit minus that of the slice with the
        mean in its place, up to the steps of the integral.
        """
        part, at = slice(row % self.stride, None, self.stride), row // self.stride
        values = [values[part] for look in self.looks for values in look]
        total = [torch.zeros_like(one[at]) for one in values]
        for step in range(STEPS):
            own = [torch.lerp(one.mean(0), one[at], (step + 0.5) / STEPS).requires_grad_() for one in values]
            with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # cuDNN: no backward in evaluation
                replaced = [
                    torch.cat([one[:at], new[None], one[at + 1 :]]) for one, new in zip(values, own, strict=True)
                ]
                logits = _score(model, list(_pairs(replaced)), self.position_mm[part])
                found = torch.autograd.grad(logits[at, class_index], own, allow_unused=True)
            total = [whole if grad is None else whole + grad / STEPS for whole, grad in zip(total, found, strict=True)]
        return list(_pairs(total))


@torch.no_grad()
def embed_series(
    model: EndToEnd, paths: Sequence[str], position_mm: Sequence[float], device: torch.device, stride: int = 1
) -> EmbeddedSeries:
    """Embed a series' files, given in anatomical order; images of CHUNK_SLICES slices are held at a time."""
    model.eval()
    parts: list[list[Look]] = []
    bad: list[tuple[str, str]] = []
    for start in range(0, len(paths), CHUNK_SLICES):
        hu, unreadable = load_readable(list(paths[start : start + CHUNK_SLICES]), model.cnn.spec.size_px)
        bad += unreadable
        if len(hu):
            parts.append([_floats(model.cnn(look)) for look in _looks(model, hu.to(device))])
    unread = {path for path, _ in bad}
    readable = [(path, at) for path, at in zip(paths, position_mm, strict=True) if path not in unread]
    looks = [(torch.cat([e for e, _ in look]), torch.cat([c for _, c in look])) for look in zip(*parts, strict=True)]
    places = torch.tensor([at for _, at in readable], dtype=torch.float64)
    return EmbeddedSeries([path for path, _ in readable], places, looks, stride, bad)


class HeatMaps:
    """Makes heat maps of chosen slices of an embedded series, by LayerCAM (Jiang et al., IEEE TIP 2021)."""

    def __init__(self, model: EndToEnd) -> None:
        self.model = model.eval()
        layer, to_map = target_layer(model.cnn)
        self._cam = LayerCAM(_Joint(model.cnn), [layer], to_map)

    def __call__(self, series: EmbeddedSeries, rows: Sequence[int], class_index: int) -> NDArray[np.float32]:
        """Return maps (len(rows), size, size), 0 … 1, each scaled to its own range; 0 throughout where nothing speaks
        for the class.
        """
        starts = range(0, len(rows), CHUNK_SLICES)
        parts = [self._chunk(series, rows[at : at + CHUNK_SLICES], class_index) for at in starts]
        size = self.model.cnn.spec.size_px
        return np.concatenate(parts) if parts else np.zeros((0, size, size), np.float32)

    def _chunk(self, series: EmbeddedSeries, rows: Sequence[int], class_index: int) -> NDArray[np.float32]:
        directions = [series.directions(self.model, row, class_index) for row in rows]
        hu = load_slices([series.paths[row] for row in rows], self.model.cnn.spec.size_px)
        maps = []
        for number, look in enumerate(_looks(self.model, hu.to(series.looks[0][0].device))):
            targets = [_Along(torch.cat(direction[number])) for direction in directions]
            with torch.enable_grad():
                found = self._cam(look, targets)
            maps.append(found[..., ::-1] if number else found)  # the second look is the mirror image
        self._cam.model.zero_grad(set_to_none=True)
        return np.asarray(np.mean(maps, axis=0), dtype=np.float32)


class _Joint(nn.Module):
    """HU (N, 1, S, S) to embedding and logits side by side (N, D + 6): one output for the library to follow."""

    def __init__(self, cnn: SliceCnn) -> None:
        super().__init__()
        self.cnn = cnn

    def forward(self, hu: Tensor) -> Tensor:
        return torch.cat(self.cnn(hu), dim=1)


@dataclass(frozen=True)
class _Along:
    """The output's component along a direction: its gradient is the direction, which is the chain rule."""

    direction: Tensor

    def __call__(self, output: Tensor) -> Tensor:
        return output @ self.direction


def target_layer(cnn: SliceCnn) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return the layer to explain, and what turns its output into maps (N, C, h, w).

    By timm's ``feature_info`` the last stage whose maps are MAP_SIDE pixels a side or more; of a transformer without
    stages the input of the last block, since after it patches that are not pooled have no gradient. Raises
    WeightsError, naming the backbone, where there is neither.
    """
    backbone: Any = cnn.backbone
    name, stages = cnn.spec.backbone, _stages(cnn.backbone)
    if not stages:
        raise WeightsError(f"{name}: timm does not say which of its layers hold maps, so there is no heat map of it")
    fine = [stage for stage in stages if cnn.spec.size_px // stage[1] >= MAP_SIDE] or stages[:1]
    module, _, channels = fine[-1]
    layer = backbone.get_submodule(module)
    if len(stages) > 1 and len({step for _, step, _ in stages}) == 1:  # one resolution throughout
        layer = getattr(layer, "norm1", None)
        if layer is None:
            raise WeightsError(f"{name}: its blocks have no norm1 to take heat maps from; no heat map of it")
    prefix = int(getattr(backbone, "num_prefix_tokens", 0) or 0)
    return layer, lambda output: _to_maps(output, channels, prefix, name)


def _stages(backbone: Any) -> list[tuple[str, int, int]]:
    """Name, reduction and channels of each stage that timm names and that is there."""
    info = getattr(backbone, "feature_info", None) or []
    rows = info if isinstance(info, list) else info.info
    there = dict(backbone.named_modules())
    return [(r["module"], int(r["reduction"]), int(r["num_chs"])) for r in rows if r["module"] in there]


def _to_maps(output: Tensor, channels: int, prefix: int, name: str) -> Tensor:
    """Turn (N, C, h, w), (N, h, w, C) or tokens (N, prefix + h w, C) into (N, C, h, w)."""
    if output.ndim == 4 and output.shape[1] == channels:
        return output
    if output.ndim == 4 and output.shape[-1] == channels:
        return output.permute(0, 3, 1, 2)
    if output.ndim == 3 and output.shape[-1] == channels:
        side = math.isqrt(output.shape[1] - prefix)
        if side * side == output.shape[1] - prefix:
            return output[:, prefix:].transpose(1, 2).reshape(len(output), channels, side, side)
    raise WeightsError(f"{name}: its layers give {tuple(output.shape[1:])}, which is no map; take another backbone")


def _pairs(flat: list[Tensor]) -> Iterator[Look]:
    yield from zip(flat[0::2], flat[1::2], strict=True)


def _score(model: EndToEnd, looks: Sequence[Look], position_mm: Tensor) -> Tensor:
    found = [model.sequence.one_series(embedding, cnn_logits, position_mm) for embedding, cnn_logits in looks]
    return (mean_logits(torch.stack(found)) if len(found) > 1 else found[0]).float()


def _looks(model: EndToEnd, hu: Tensor) -> list[Tensor]:
    return [hu, hu.flip(-1)] if model.sequence.spec.mirrored else [hu]


def _floats(pair: Look) -> Look:
    return pair[0].float(), pair[1].float()
