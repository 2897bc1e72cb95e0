"""Heat maps of the fine-tuned network's score of a slice, and contact sheets that show them.

A map explains the logit as a function of one slice's image; its neighbours stay fixed. docs/report.md has measurements
on the phantom, and why the slice CNN's own head is not explained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from pytorch_grad_cam import LayerCAM
from torch import Tensor, nn

from ichpipe.common.classes import CLASSES
from ichpipe.common.device import autocast
from ichpipe.common.errors import WeightsError
from ichpipe.features.embedder import to_probabilities
from ichpipe.images.slice_dataset import load_readable, load_slices
from ichpipe.index.slice_index import neighbour_rows, slice_files
from ichpipe.index.thin_slices import smooth_thin, stride_of
from ichpipe.inference.contact_sheet import SheetData, choose_panels, contact_sheet
from ichpipe.models.header import spacing_of
from ichpipe.models.sequence import mean_logits
from ichpipe.models.weights import load_predictor
from ichpipe.scoring.pooling import pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ichpipe.images.slice_dataset import Files
    from ichpipe.models.end_to_end import EndToEnd, Ensemble
    from ichpipe.models.slice_cnn import SliceCnn
    from ichpipe.scoring.calibration import Calibration
    from ichpipe.scoring.pooling import StudyScore

Look = tuple[Tensor, Tensor]  # embeddings (T, D) and slice-CNN logits (T, 6) of the images, or of their mirror images
MAP_SIDE: Final = 12  # smallest side of a map in pixels, where the backbone has such a stage: 4 x 4 localises nothing
STEPS: Final = 8  # points of the path from the mean embedding to the slice's own (midpoint rule)
CHUNK_SLICES: Final = 16


@dataclass(frozen=True)
class EmbeddedSeries:
    """One series of T readable slices as the sequence model sees it; holds no image."""

    paths: list[str]  # in order
    files: Sequence[Files]  # of the image of each
    position_mm: Tensor  # (T,)
    looks: list[Look]  # of each network of the model in turn
    stride: int  # the sequence model sees every stride-th slice (``ichpipe.index.thin_slices.stride_of``)
    bad: list[tuple[str, str]]  # path and reason of files that can't be decoded

    @torch.no_grad()
    def logits(self, model: EndToEnd | Ensemble) -> Tensor:
        """Return the model's logits (T, 6), as ``ichpipe predict`` computes them."""
        logits = torch.empty(len(self.paths), len(model.cnn.spec.classes))
        for first in range(min(self.stride, len(logits))):
            part = slice(first, None, self.stride)
            with autocast(self.looks[0][0].device, "auto"):
                scores = _score(model, [(e[part], c[part]) for e, c in self.looks], self.position_mm[part])
            logits[part] = scores.cpu()
        return logits

    def slice_logits(self) -> Tensor:
        """Return the logits (T, 6) of the slice CNN alone."""
        return mean_logits(torch.stack([cnn_logits for _, cnn_logits in self.looks])).cpu()

    def directions(self, model: EndToEnd, row: int, class_index: int) -> list[Look]:
        """Return the integrated gradients (Sundararajan et al., ICML 2017) of one slice's logit, (D,) and (6,) a look.

        The path leads from the mean embedding of the series to the slice's own: a single gradient there localises less
        well. The sum of direction times (own - mean) is the logit's rise over a series with the mean in that slice.
        """
        part, at = slice(row % self.stride, None, self.stride), row // self.stride
        inputs = [values[part] for look in self.looks[: len(model.mirrorings)] for values in look]
        total = [torch.zeros_like(values[at]) for values in inputs]
        for step in range(STEPS):
            own = [torch.lerp(values.mean(0), values[at], (step + 0.5) / STEPS).requires_grad_() for values in inputs]
            with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):  # cuDNN: no backward in evaluation
                replaced = [torch.cat([v[:at], new[None], v[at + 1 :]]) for v, new in zip(inputs, own, strict=True)]
                looks = zip(replaced[::2], replaced[1::2], strict=True)
                logits = _score(model, looks, self.position_mm[part])
                grads = torch.autograd.grad(logits[at, class_index], own, allow_unused=True)
            total = [whole if grad is None else whole + grad / STEPS for whole, grad in zip(total, grads, strict=True)]
        return list(zip(total[::2], total[1::2], strict=True))


@torch.no_grad()
def embed_series(
    model: EndToEnd | Ensemble,
    paths: Sequence[str],
    position_mm: Sequence[float],
    device: torch.device,
    stride: int = 1,
) -> EmbeddedSeries:
    """Embed a series' files, given in anatomical order; at most CHUNK_SLICES images are in memory."""
    model.eval()
    parts, bad = [], []
    files = slice_files(paths, neighbour_rows(np.asarray(position_mm), model.cnn.spec.neighbours, stride))
    for start in range(0, len(paths), CHUNK_SLICES):
        hu, unreadable = load_readable(list(files[start : start + CHUNK_SLICES]), model.cnn.spec.framing)
        bad += unreadable
        if len(hu):
            with autocast(device, "auto"):  # as `predict` does
                images = hu.to(device)
                looks_of = [(network, image) for network in model.networks for image in _looks_at(network, images)]
                outputs = [network.cnn(image) for network, image in looks_of]
            parts.append([(embedding.float(), logits.float()) for embedding, logits in outputs])
    unread = {path for path, _ in bad}
    rows = [row for row, path in enumerate(paths) if path not in unread]
    read_files: Sequence[Files] = [paths[row] for row in rows]
    if model.cnn.spec.neighbours:  # a slice stands for its neighbour that can't be decoded
        read_files = [tuple(paths[row] if path in unread else path for path in files[row]) for row in rows]
    looks = [(torch.cat([e for e, _ in look]), torch.cat([c for _, c in look])) for look in zip(*parts, strict=True)]
    positions = torch.tensor([position_mm[row] for row in rows], dtype=torch.float64)
    return EmbeddedSeries([paths[row] for row in rows], read_files, positions, looks, stride, bad)


class HeatMaps:
    """Makes heat maps: LayerCAM (Jiang et al., IEEE TIP 2021) of the CNN's output along a slice's directions.

    Of an ensemble they are those of its first network.
    """

    def __init__(self, model: EndToEnd | Ensemble) -> None:
        model = self.model = model.eval().networks[0]
        layer, to_maps = target_layer(model.cnn)
        self._cam = LayerCAM(_JoinedOutputs(model.cnn), [layer], to_maps)

    def __call__(self, series: EmbeddedSeries, rows: Sequence[int], class_index: int) -> NDArray[np.float32]:
        """Return maps (len(rows), size, size), each scaled to 0 … 1; all 0 where nothing speaks for the class."""
        framing = self.model.cnn.spec.framing
        chunks = [np.zeros((0, framing.size_px, framing.size_px), np.float32)]
        for start in range(0, len(rows), CHUNK_SLICES):
            chunk = rows[start : start + CHUNK_SLICES]
            directions = [series.directions(self.model, row, class_index) for row in chunk]
            hu = load_slices([series.files[row] for row in chunk], framing).to(series.looks[0][0].device)
            maps = []
            for number, images in enumerate(_looks_at(self.model, hu)):
                # The gradient of the output's component along a direction is the direction: the chain rule.
                along = [torch.cat(direction[number]) for direction in directions]
                with torch.enable_grad():
                    heat = self._cam(images, [lambda output, to=to: output @ to for to in along])
                maps.append(heat[..., ::-1] if number else heat)
            self._cam.model.zero_grad(set_to_none=True)
            chunks.append(np.asarray(np.mean(maps, axis=0), dtype=np.float32))
        return np.concatenate(chunks)


class _JoinedOutputs(nn.Module):
    """HU (N, slices, S, S) to embedding and logits side by side (N, D + 6): LayerCAM takes one output."""

    def __init__(self, cnn: SliceCnn) -> None:
        super().__init__()
        self.cnn = cnn

    def forward(self, hu: Tensor) -> Tensor:
        return torch.cat(self.cnn(hu), dim=1)


def target_layer(cnn: SliceCnn) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return the layer to explain, and a function that turns its output into maps (N, C, h, w).

    The layer is the last stage of timm's ``feature_info`` with maps of MAP_SIDE pixels a side or more. For a
    transformer without stages it is the input of the last block, because patches that are not pooled have no gradient
    after it. Raises WeightsError where the backbone has neither.
    """
    backbone: Any = cnn.backbone
    name, info = cnn.spec.backbone, getattr(backbone, "feature_info", None) or []
    modules = dict(backbone.named_modules())
    stages = [stage for stage in (info if isinstance(info, list) else info.info) if stage["module"] in modules]
    if not stages:
        raise WeightsError(f"{name}: timm names no layer with feature maps, so heat maps are not available")
    fine = [stage for stage in stages if cnn.spec.size_px // int(stage["reduction"]) >= MAP_SIDE] or stages[:1]
    layer, channels = modules[fine[-1]["module"]], int(fine[-1]["num_chs"])
    if len(stages) > 1 and len({stage["reduction"] for stage in stages}) == 1:  # one resolution throughout
        layer = getattr(layer, "norm1", None)
        if layer is None:
            raise WeightsError(f"{name}: its blocks have no layer norm1, so heat maps are not available")
    prefix = int(getattr(backbone, "num_prefix_tokens", 0) or 0)

    def to_maps(output: Tensor) -> Tensor:
        if output.ndim == 4 and output.shape[1] == channels:
            return output
        if output.ndim == 4 and output.shape[-1] == channels:
            return output.permute(0, 3, 1, 2)
        if output.ndim == 3 and output.shape[-1] == channels:  # tokens (N, prefix + h w, C)
            side = math.isqrt(output.shape[1] - prefix)
            if side * side == output.shape[1] - prefix:
                return output[:, prefix:].transpose(1, 2).reshape(len(output), channels, side, side)
        shape = tuple(output.shape[1:])
        raise WeightsError(f"{name}: its layers give {shape}, which is no map; use another fit-slices.backbone")

    return layer, to_maps


class Explainer:
    """Makes contact sheets of series with one model."""

    def __init__(self, model_dir: Path, device: torch.device, calibration: Calibration | None = None) -> None:
        self.model = load_predictor(model_dir).to(device)
        self.device, self.spacing_mm = device, spacing_of(model_dir)
        self.heat_maps, self.calibration = HeatMaps(self.model), calibration

    def embed(self, paths: Sequence[str], position_mm: Sequence[float]) -> EmbeddedSeries:
        """Embed a series as ``predict`` does: the sequence model sees a thin one as interleaved parts."""
        stride = stride_of(np.asarray(position_mm, dtype=np.float64), self.spacing_mm)
        return embed_series(self.model, paths, position_mm, self.device, stride)

    def predict(
        self, series: EmbeddedSeries, study_score: StudyScore = "max"
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return what ``predict`` reports: probabilities of the slices (T, 6), and of the study (6,).

        Both are calibrated, and thin series are averaged along z, as for the places and the score of ``predict``.
        """
        values = to_probabilities(series.logits(self.model))
        if self.calibration:
            values = self.calibration.apply(values, to_probabilities(series.slice_logits()))
        values = smooth_thin(values, series.position_mm.numpy())
        return values, pool(values, np.zeros(len(values), dtype=np.intp), 1, study_score)[0]

    def sheet(
        self,
        series: EmbeddedSeries,
        probabilities: NDArray[np.float64],
        title: str,
        *,
        class_name: str,
        threshold: float,
        panels: int,
    ) -> bytes:
        """Return the sheet as PNG; slices whose probability (T, 6) is at the threshold or above have a frame."""
        own = probabilities[:, CLASSES.index(class_name)]
        return self.draw(
            series,
            probabilities=probabilities,
            title=title,
            framed=own >= threshold,
            framed_means=f"P({class_name}) ≥ {threshold:g}",
            panels=panels,
            class_name=class_name,
            threshold=threshold,
        )

    def draw(
        self,
        series: EmbeddedSeries,
        *,
        probabilities: NDArray[np.float64],
        panels: int,
        framed: NDArray[np.bool_],
        class_name: str = "any",
        **fields: Any,
    ) -> bytes:
        """Choose slices, make their heat maps and draw them as PNG; ``fields`` are further ones of SheetData.

        Each stretch of the head shows the framed slice with the highest P, or any slice if none is framed.
        """
        position_mm, column = series.position_mm.numpy(), CLASSES.index(class_name)
        rows = choose_panels(probabilities[:, column] + framed, position_mm, panels)
        hu = load_slices([series.paths[row] for row in rows], self.model.cnn.spec.framing)
        data = SheetData(
            hu=hu[:, 0].numpy(),
            heat=self.heat_maps(series, rows.tolist(), column),
            rows=rows,
            position_mm=position_mm,
            probabilities=probabilities,
            framed=framed,
            class_name=class_name,
            **fields,
        )
        return contact_sheet(data)


def _score(model: EndToEnd | Ensemble, looks: Iterable[Look], position_mm: Tensor) -> Tensor:
    networks = [network for network in model.networks for _ in network.mirrorings]
    logits = [
        network.sequence.one_series(embedding, cnn_logits, position_mm)
        for network, (embedding, cnn_logits) in zip(networks, looks, strict=True)
    ]
    return mean_logits(torch.stack(logits)).float()


def _looks_at(network: EndToEnd, hu: Tensor) -> list[Tensor]:
    return [hu.flip(-1) if mirror else hu for mirror in network.mirrorings]
