"""Embeddings of slices by stage one's network: on the fly, and as the compute function of the store."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from threading import BoundedSemaphore, Lock
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

from ichpipe.common.device import autocast, derive_seed, generator
from ichpipe.dicom.dataset import is_compressed
from ichpipe.features.prefetch import Lanes, Loader
from ichpipe.images import augmentation
from ichpipe.images.slice_dataset import load_readable, load_slices
from ichpipe.index.slice_index import TextColumn
from ichpipe.models.folding import folded
from ichpipe.models.sequence import mean_logits
from ichpipe.models.weights import load_slice_cnn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from ichpipe.features.generations import View
    from ichpipe.models.end_to_end import EndToEnd
    from ichpipe.models.slice_cnn import SliceCnn


@dataclass(frozen=True)
class SliceInput:
    """What a worker needs to know of one slice."""

    path: str
    series_uid: str
    file_digest: str

    def __str__(self) -> str:
        """Name the file, for messages."""
        return self.path


class SliceInputs(Sequence[SliceInput]):
    """The rows of an index as `SliceInput`, each made on access, since most rows are in the store already."""

    def __init__(self, index: pd.DataFrame) -> None:
        self._columns = [TextColumn(index[name]) for name in ("path", "series_uid", "file_digest")]

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self._columns[0])

    @overload
    def __getitem__(self, row: int) -> SliceInput: ...

    @overload
    def __getitem__(self, row: slice) -> list[SliceInput]: ...

    def __getitem__(self, row: int | slice) -> SliceInput | list[SliceInput]:
        """Return one input, or several."""
        if isinstance(row, slice):
            return [SliceInput(*texts) for texts in zip(*(column[row] for column in self._columns), strict=True)]
        return SliceInput(*(column[row] for column in self._columns))


CPU_BATCH = 16
"""Slices per forward pass on a CPU: more of 512 px are no faster, and take more memory in each lane."""

CPU_BATCH_PX = 64 * 128**2
"""Pixels per forward pass on a CPU, where that makes more slices: beside small images Python itself takes time, and
holds up the other lanes while it does."""


def lane_batch(size_px: int, most: int) -> int:
    """Return how many slices of a size a lane takes at a time, ``most`` at the most."""
    return min(most, max(CPU_BATCH, CPU_BATCH_PX // size_px**2))


class SliceEmbedder:
    """Maps slices to embeddings (n, D) and logits (n, 6), float32; under a view, after its augmentation.

    Every forward pass has the same shape (a batch that is not full is filled up with its last slice) and, on a CPU,
    one thread: so the bytes of a row depend neither on the rows beside it nor on how many lanes and workers there are.
    Batch normalisation is folded into the convolutions. Several threads may call; they take turns. ``loaders``: lanes
    on a CPU, decoding processes beside a GPU.
    """

    def __init__(
        self,
        cnn: SliceCnn,
        device: torch.device,
        batch_size: int,
        view: View | None = None,
        *,
        loaders: int = 1,
        precision: str = "auto",
    ) -> None:
        self.cnn = folded(cnn.to(device))
        self.device, self.view, self.precision = device, view, precision
        cpu = device.type == "cpu"
        self.batch_size = lane_batch(cnn.spec.size_px, batch_size) if cpu else batch_size
        self._turn, self._reading = Lock(), BoundedSemaphore(max(1, loaders // 2))
        self._lanes = Lanes(max(1, loaders)) if cpu else None
        self._loader = None if cpu else Loader(cnn.spec.size_px, loaders)

    def __call__(self, slices: Sequence[SliceInput]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Read and embed; a file that can't be read raises UnreadableDicomError with its name."""
        starts = range(0, len(slices), self.batch_size)
        parts = [slices[start : start + self.batch_size] for start in starts]
        if self._lanes is None:
            outputs = self._ahead(parts)
            embedding, logits = (torch.cat([output[which] for output in outputs]).cpu().numpy() for which in (0, 1))
            return embedding, logits
        # Filled by the lanes: hundreds of small results that wait for each other would scatter over the heap.
        embedding, logits = (
            np.empty((len(slices), width), np.float32) for width in (self.cnn.embedding_dim, len(self.cnn.spec.classes))
        )

        def fill(start: int, part: Sequence[SliceInput]) -> None:
            rows = slice(start, start + len(part))
            embedding[rows], logits[rows] = (output.numpy() for output in self._read(part))

        self._lanes.map(lambda one: fill(*one), list(zip(starts, parts, strict=True)), self._turn)
        return embedding, logits

    def close(self) -> None:
        """End threads and processes."""
        if self._lanes is not None:
            self._lanes.close()
        self._loader = None

    def _read(self, slices: Sequence[SliceInput]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read and embed one batch. Half of the lanes read at a time, unless a codec does most of it.

        Reading files without compression is Python's work, and two threads that hand its lock to each other are slower
        than one; meanwhile the other lanes compute, which needs the lock less. One file speaks for its batch.
        """
        paths = [one.path for one in slices]
        with nullcontext() if is_compressed(paths[0]) else self._reading:
            hu = load_slices(paths, self.cnn.spec.size_px)
        return self._batch(hu, slices)

    def _ahead(self, parts: Sequence[Sequence[SliceInput]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Queue one batch after the other on a GPU; nothing comes back before all are queued."""
        assert self._loader is not None  # noqa: S101 - not a CPU, not closed
        paths = [one.path for part in parts for one in part]
        with self._turn:
            batches = self._loader.batches(paths, self.batch_size, self.device)
            return [self._batch(hu, part) for hu, part in zip(batches, parts, strict=True)]

    @torch.inference_mode()
    def _batch(self, hu: torch.Tensor, slices: Sequence[SliceInput]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.view is not None:
            hu = augmentation.apply(hu, view_draw(self.view, slices))
        lacking = self.batch_size - len(hu)
        if lacking:
            hu = torch.cat([hu, hu[-1:].expand(lacking, *hu.shape[1:])])
        with autocast(self.device, self.precision):
            embedding, logits = self.cnn(hu)
        return embedding[: len(slices)].float(), logits[: len(slices)].float()


def view_draw(view: View, slices: Sequence[SliceInput]) -> augmentation.AugmentDraw:
    """Draw what a view does to slices: one change a series, noise of its own for every file."""
    uids = [one.series_uid for one in slices]
    of_series = {
        uid: augmentation.draw(view.augment, 1, generator(view.seed, "view", view.number, uid))
        for uid in dict.fromkeys(uids)
    }
    seeds = [derive_seed(view.seed, "view-noise", view.number, one.file_digest) for one in slices]
    joined = augmentation.AugmentDraw.joined([of_series[uid] for uid in uids])
    return replace(joined, noise_seed=torch.tensor(seeds, dtype=torch.int64))


def view_parameters(view: View, slices: Sequence[SliceInput]) -> dict[str, NDArray[Any]]:
    """Return a view's draws as arrays to be stored beside its rows.

    ``augmentation`` (n, 8), float32: the affine map of `AugmentDraw` row by row, HU offset, noise (HU, standard
    deviation), then, where the parameters ask for them, 50 displacements of the warp and the blur (pixels);
    ``noise_seed`` (n, 1), int64.
    """
    draw = view_draw(view, slices)
    drawn = (draw.affine, draw.offset_hu, draw.noise_hu, draw.warp, draw.blur_px)
    columns = [part.flatten(1) if part.ndim > 1 else part.view(-1, 1) for part in drawn if part is not None]
    return {"augmentation": torch.cat(columns, 1).numpy(), "noise_seed": draw.noise_seed.view(-1, 1).numpy()}


@dataclass(frozen=True)
class MakeEmbedder:
    """Builds a SliceEmbedder on a Dask worker: only this small description is sent."""

    model_dir: Path
    devices: tuple[str, ...]
    batch_size: int
    view: View | None = None
    precision: str = "auto"
    loaders: int = 1

    def __call__(self, worker_number: int) -> SliceEmbedder:
        """Load the model on the device that falls to this worker."""
        device = torch.device(self.devices[worker_number % len(self.devices)])
        cnn = load_slice_cnn(self.model_dir)
        return SliceEmbedder(cnn, device, self.batch_size, self.view, loaders=self.loaders, precision=self.precision)


@torch.inference_mode()
def embed_hu(cnn: SliceCnn, hu: torch.Tensor, device: torch.device, batch_size: int = 64) -> torch.Tensor:
    """Map HU (n, 1, size, size) to float32 embeddings (n, D) on the CPU; ``cnn`` is on ``device``."""
    with autocast(device, "auto"):
        parts = [cnn.eval().embed(part.to(device)).float().cpu() for part in torch.split(hu, batch_size)]
    return torch.cat(parts)


@torch.inference_mode()
def classify_series(
    model: EndToEnd,
    paths: list[str],
    position_mm: Sequence[float],
    device: torch.device,
    chunk_slices: int = 32,
    stride: int = 1,
) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    """Return float32 logits (readable slices, 6) of one series, and (path, reason) of what can't be decoded.

    Images of ``chunk_slices`` slices are held at one time; the sequence model sees the whole series, or each of its
    ``stride`` interleaved parts (``ichpipe.index.thin_slices.stride_of``).
    """
    bad: list[tuple[str, str]] = []

    def chunks() -> Iterator[torch.Tensor]:
        for start in range(0, len(paths), chunk_slices):
            hu, unreadable = load_readable(paths[start : start + chunk_slices], model.cnn.spec.size_px)
            bad.extend(unreadable)
            if len(hu):
                yield hu

    embedded = _embed_chunks(model, chunks(), device)
    unread = {path for path, _ in bad}
    places = torch.tensor([at for at, path in zip(position_mm, paths, strict=True) if path not in unread])
    return _classify(model, embedded, places, device, stride), bad


@torch.inference_mode()
def classify_hu(
    model: EndToEnd,
    hu: torch.Tensor,
    position_mm: Sequence[float],
    device: torch.device,
    chunk_slices: int = 32,
    stride: int = 1,
) -> torch.Tensor:
    """Return float32 logits (n, 6) of one series given as HU (n, 1, size, size), int16; else as `classify_series`."""
    embedded = _embed_chunks(model, torch.split(hu, chunk_slices), device)
    return _classify(model, embedded, torch.tensor(position_mm), device, stride)


Embedded = tuple[torch.Tensor, torch.Tensor]


def _embed_chunks(model: EndToEnd, chunks: Iterable[torch.Tensor], device: torch.device) -> list[list[Embedded]]:
    model.eval()
    with autocast(device, "auto"):
        return [_looks(model, chunk.to(device)) for chunk in chunks]


def _classify(
    model: EndToEnd, embedded: list[list[Embedded]], position_mm: torch.Tensor, device: torch.device, stride: int
) -> torch.Tensor:
    if not embedded:
        return torch.empty((0, len(model.cnn.spec.classes)))
    with autocast(device, "auto"):
        found = [_join(model, list(look), position_mm, stride) for look in zip(*embedded, strict=True)]
        return mean_logits(torch.stack(found)) if len(found) > 1 else found[0]


def _looks(model: EndToEnd, hu: torch.Tensor) -> list[Embedded]:
    """Embed slices as they are and, if the sequence model averages over both, mirrored."""
    looks = [hu, hu.flip(-1)] if model.sequence.spec.mirrored else [hu]
    return [model.cnn(look) for look in looks]


def _join(model: EndToEnd, parts: list[Embedded], position_mm: torch.Tensor, stride: int) -> torch.Tensor:
    embedding, cnn_logits = (torch.cat([part[which] for part in parts]).float() for which in (0, 1))
    logits = torch.empty_like(cnn_logits)
    for first in range(min(stride, len(logits))):
        rows = slice(first, None, stride)
        logits[rows] = model.sequence.one_series(embedding[rows], cnn_logits[rows], position_mm[rows]).float()
    return logits


def to_probabilities(logits: torch.Tensor) -> NDArray[np.float64]:
    """Return the sigmoid of logits (n, 6), in float64."""
    return torch.sigmoid(logits.double()).cpu().numpy()
