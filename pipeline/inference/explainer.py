"""Contact sheets of series with one model: embed, make heat maps, draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ichpipe.common.classes import CLASSES
from ichpipe.features.embedder import to_probabilities
from ichpipe.images.slice_dataset import load_slices
from ichpipe.index.thin_slices import stride_of
from ichpipe.inference.contact_sheet import COLUMNS, WIDTH_IN, SheetData, choose_panels, contact_sheet
from ichpipe.inference.heat_maps import HeatMaps, embed_series
from ichpipe.models.header import spacing_of
from ichpipe.models.weights import load_end_to_end

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from ichpipe.inference.heat_maps import EmbeddedSeries


class Explainer:
    """Makes contact sheets of series with one model."""

    def __init__(self, model_dir: Path, device: torch.device) -> None:
        self.model = load_end_to_end(model_dir).to(device)
        self.device, self.spacing_mm = device, spacing_of(model_dir)
        self.heat_maps = HeatMaps(self.model)

    def embed(self, paths: Sequence[str], position_mm: Sequence[float]) -> EmbeddedSeries:
        """Embed a series as ``predict`` does; of a thin one the sequence model sees interleaved parts."""
        stride = stride_of(np.asarray(position_mm, dtype=np.float64), self.spacing_mm)
        return embed_series(self.model, paths, position_mm, self.device, stride)

    def sheet(
        self, series: EmbeddedSeries, title: str, *, class_name: str, threshold: float, panels: int
    ) -> tuple[bytes, NDArray[np.float64]]:
        """Return the picture and the probabilities (T, 6); slices at the threshold or above are framed."""
        probabilities = to_probabilities(series.logits(self.model))
        own = probabilities[:, CLASSES.index(class_name)]
        highest = int(np.argmax(own))
        at = float(series.position_mm[highest])
        picture = self.draw(
            series,
            probabilities=probabilities,
            title=f"{title}: P({class_name}) up to {own[highest]:.2f}, at {at:.0f} mm",
            framed=own >= threshold,
            framed_means=f"P({class_name}) ≥ {threshold:g}",
            panels=panels,
            class_name=class_name,
            threshold=threshold,
        )
        return picture, probabilities

    def draw(
        self,
        series: EmbeddedSeries,
        *,
        probabilities: NDArray[np.float64],
        panels: int,
        columns: int = COLUMNS,
        width_in: float = WIDTH_IN,
        framed: NDArray[np.bool_],
        class_name: str = "any",
        **words: Any,
    ) -> bytes:
        """Choose slices, make their heat maps and draw; ``words`` are those of SheetData.

        Of each stretch of the head a framed slice is shown before others, and of those the one with the highest P.
        """
        places, column = series.position_mm.numpy(), CLASSES.index(class_name)
        rows = choose_panels(probabilities[:, column] + framed, places, panels)
        data = SheetData(
            hu=load_slices([series.paths[row] for row in rows], self.model.cnn.spec.size_px)[:, 0].numpy(),
            heat=self.heat_maps(series, rows.tolist(), column),
            rows=rows,
            position_mm=places,
            probabilities=probabilities,
            framed=framed,
            class_name=class_name,
            **words,
        )
        return contact_sheet(data, columns, width_in)
