"""Embeddings of slices by stage one's network: on the fly, and as the compute function of the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ichpipe.artifacts import MODEL_FILE
from ichpipe.cache.fingerprint import FORMAT_VERSION, digest_rows
from ichpipe.cache.layout import StorePlan
from ichpipe.cache.reader import EmbeddingStore
from ichpipe.device import autocast
from ichpipe.errors import WeightsError
from ichpipe.feeding import load_readable, load_slices
from ichpipe.files import digest_of_file
from ichpipe.models.weights import load_slice_cnn, read_header
from ichpipe.windows import PREPROCESSING_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from ichpipe.models.end_to_end import EndToEnd
    from ichpipe.models.slice_cnn import SliceCnn, SliceCnnSpec


class SliceEmbedder:
    """Maps DICOM files to embeddings (n, D) and logits (n, 6), float32."""

    def __init__(self, cnn: SliceCnn, device: torch.device, batch_size: int) -> None:
        self.cnn = cnn.to(device).eval()
        self.device = device
        self.batch_size = batch_size

    @torch.inference_mode()
    def __call__(self, paths: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Read and embed; a file that can't be read raises UnreadableDicomError with its name."""
        outputs = [
            self._batch(paths[start : start + self.batch_size]) for start in range(0, len(paths), self.batch_size)
        ]
        embedding = torch.cat([output[0] for output in outputs])
        logits = torch.cat([output[1] for output in outputs])
        return embedding.numpy(), logits.numpy()

    def _batch(self, paths: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        hu = load_slices(paths, self.cnn.spec.size_px).to(self.device)
        with autocast(self.device, "auto"):
            embedding, logits = self.cnn(hu)
        return embedding.float().cpu(), logits.float().cpu()


@dataclass(frozen=True)
class MakeEmbedder:
    """Builds a SliceEmbedder on a Dask worker: only this small description is sent."""

    model_dir: Path
    devices: tuple[str, ...]
    batch_size: int

    def __call__(self, worker_number: int) -> Callable[[Sequence[str]], tuple[Any, Any]]:
        """Load the model on the device that falls to this worker."""
        device = torch.device(self.devices[worker_number % len(self.devices)])
        return SliceEmbedder(load_slice_cnn(self.model_dir), device, self.batch_size)


def fingerprint(index: pd.DataFrame, model_dir: Path, spec: SliceCnnSpec) -> dict[str, Any]:
    """Name all that decides the content of a store; readers and `extract` compare it field by field."""
    rows = zip(index["series_uid"], index["sop_uid"], index["file_digest"], strict=True)
    return {
        "format_version": FORMAT_VERSION,
        "preprocessing_version": PREPROCESSING_VERSION,
        "weights": digest_of_file(model_dir / MODEL_FILE),
        "backbone": spec.backbone,
        "windows": [[window.level_hu, window.width_hu] for window in spec.windows],
        "size_px": spec.size_px,
        "n_slices": len(index),
        "rows": digest_rows(rows),
    }


def open_store(path: Path, model_dir: Path, index: pd.DataFrame) -> EmbeddingStore:
    """Open the store and refuse it where it is not that of this slice CNN and index."""
    header = read_header(model_dir, "run: ichpipe fit-slices")
    if header.slice_cnn is None:
        raise WeightsError(f"{model_dir} holds a {header.kind} model; run: ichpipe fit-slices")
    return EmbeddingStore(path, fingerprint(index, model_dir, header.slice_cnn))


def plan_store(index: pd.DataFrame, cnn: SliceCnn, made_by: dict[str, Any], chunk_rows: int) -> StorePlan:
    """Lay out the rows of a store: those of the index, in its order."""
    lengths = index.groupby("series_uid", sort=False).size()
    return StorePlan(
        sop_uids=tuple(index["sop_uid"]),
        series_uids=tuple(str(uid) for uid in lengths.index),
        series_lengths=tuple(int(length) for length in lengths),
        embedding_dim=cnn.embedding_dim,
        classes=cnn.spec.classes,
        chunk_rows=chunk_rows,
        fingerprint=made_by,
    )


@torch.inference_mode()
def classify_series(
    model: EndToEnd, paths: list[str], device: torch.device, chunk_slices: int = 32
) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    """Return float32 logits (readable slices, 6) of one series, and (path, reason) of what can't be decoded.

    Images of ``chunk_slices`` slices are held at one time; the sequence model sees the whole series.
    """
    size, outputs, bad = model.cnn.spec.size_px, [], []
    model.eval()
    with autocast(device, "auto"):
        for start in range(0, len(paths), chunk_slices):
            hu, unreadable = load_readable(paths[start : start + chunk_slices], size)
            bad += unreadable
            if len(hu):
                outputs.append(model.cnn(hu.to(device)))
        if not outputs:
            return torch.empty((0, len(model.cnn.spec.classes))), bad
        embedding, cnn_logits = (torch.cat([output[part] for output in outputs]).float() for part in (0, 1))
        logits = model.sequence.one_series(embedding, cnn_logits)
    return logits.float(), bad


def to_probabilities(logits: torch.Tensor) -> NDArray[np.float64]:
    """Return the sigmoid of logits (n, 6), in float64."""
    return torch.sigmoid(logits.double()).cpu().numpy()
