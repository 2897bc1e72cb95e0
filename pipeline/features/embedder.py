"""Embeds slices with the slice CNN: on the fly, and as the compute function of the store."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from threading import BoundedSemaphore, Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ichpipe.common.device import autocast, derive_seed, generator
from ichpipe.common.errors import UnreadableDicomError
from ichpipe.common.progress import track
from ichpipe.dicom.dataset import is_compressed
from ichpipe.features.prefetch import Lanes, Loader
from ichpipe.images import augmentation
from ichpipe.images.slice_dataset import load_readable, load_slices
from ichpipe.index.slice_index import TextColumn, index_neighbours, neighbour_rows, slice_files
from ichpipe.models.folding import folded
from ichpipe.models.sequence import mean_logits
from ichpipe.models.weights import load_slice_cnn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from ichpipe.features.generations import View
    from ichpipe.images.slice_dataset import Files
    from ichpipe.models.end_to_end import EndToEnd, Ensemble
    from ichpipe.models.slice_cnn import SliceCnn


@dataclass(frozen=True)
class SliceInput:
    """The facts of one slice that a worker needs."""

    path: str
    series_uid: str
    file_digest: str
    beside: tuple[str, ...] = ()  # its own file between those of its neighbours, where the network sees them

    @property
    def files(self) -> Files:
        """The files of its image."""
        return self.beside or self.path

    def __str__(self) -> str:
        """Name the file, for messages."""
        return self.path


class SliceInputs(Sequence[SliceInput]):
    """The rows of an index as `SliceInput`, each made on access, since most rows are in the store already."""

    def __init__(self, index: pd.DataFrame, neighbours: int = 0) -> None:
        self._columns: Any = [TextColumn(index[name]) for name in ("path", "series_uid", "file_digest")]
        self._rows = index_neighbours(index, neighbours) if neighbours else None

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self._columns[0])

    def __getitem__(self, row: int | slice) -> Any:
        """Return one input, or a list of them."""
        if isinstance(row, slice):
            beside = [self._beside(number) for number in range(*row.indices(len(self)))]
            texts = [column[row] for column in self._columns]
            return [SliceInput(*each) for each in zip(*texts, beside, strict=True)]
        path, series_uid, file_digest = (column[row] for column in self._columns)
        return SliceInput(path, series_uid, file_digest, self._beside(row))

    def _beside(self, row: int) -> tuple[str, ...]:
        return () if self._rows is None else tuple(self._columns[0][near] for near in self._rows[row].tolist())


CPU_BATCH = 16  # slices per forward pass: larger batches of 512 px are no faster and take more memory in each lane
CPU_BATCH_PX = 64 * 128**2  # pixels per forward pass of small images, whose Python time would hold up other lanes


def lane_batch(size_px: int, most: int) -> int:
    """Return how many slices of ``size_px`` a lane embeds at a time, at most ``most``."""
    return min(most, max(CPU_BATCH, CPU_BATCH_PX // size_px**2))


class SliceEmbedder:
    """Maps slices to embeddings (n, D) and logits (n, 6), float32; under a view, after its augmentation.

    Every forward pass has the same shape (the last slice fills up a short batch) and, on a CPU, one thread. So the
    bytes of a row depend neither on the rows beside it nor on the number of lanes and workers. Batch normalisation is
    folded into the convolutions. Several threads may call; they take turns.

    ``batch_size`` is an upper limit on a CPU. ``loaders`` are lanes on a CPU, decoding processes beside a GPU.
    ``precision`` is ``extract.precision`` of the parameters. The ``cnn`` is moved to the device.
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
        self.cnn = folded(cnn).to(device)  # folded where it was loaded: what can be folded is the same on every device
        self.device, self.view, self.precision = device, view, precision
        cpu = device.type == "cpu"
        self.batch_size = lane_batch(cnn.spec.size_px, batch_size) if cpu else batch_size
        self._turn, self._reading = Lock(), BoundedSemaphore(max(1, loaders // 2))
        self._lanes = Lanes(max(1, loaders)) if cpu else None
        self._loader = None if cpu else Loader(cnn.spec.framing, loaders)

    def __call__(self, slices: Sequence[SliceInput]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Read and embed slices. Raises UnreadableDicomError, which names the file."""
        starts = range(0, len(slices), self.batch_size)
        if self._lanes is None:
            assert self._loader is not None  # noqa: S101 - not closed
            parts = [slices[start : start + self.batch_size] for start in starts]
            with self._turn:  # the GPU queues all batches; none is copied back before
                batches = self._loader.batches([item.files for item in slices], self.batch_size, self.device)
                outputs = [self._embed(hu, part) for hu, part in zip(batches, parts, strict=True)]
            embedding, logits = (torch.cat(tensors).cpu().numpy() for tensors in zip(*outputs, strict=True))
            return embedding, logits
        # Filled by the lanes: hundreds of small results that wait for each other would fragment the heap.
        embedding, logits = (
            np.empty((len(slices), width), np.float32) for width in (self.cnn.embedding_dim, len(self.cnn.spec.classes))
        )

        def fill(start: int) -> None:
            part = slices[start : start + self.batch_size]
            # Reading uncompressed files is Python's work, which only half of the lanes do at a time: more would
            # contend for its lock. A codec releases the lock. The first file decides for its batch.
            with nullcontext() if is_compressed(part[0].path) else self._reading:
                hu = load_slices([item.files for item in part], self.cnn.spec.framing)
            rows = slice(start, start + len(part))
            embedding[rows], logits[rows] = (output.numpy() for output in self._embed(hu, part))

        self._lanes.map(fill, starts, self._turn)
        return embedding, logits

    def close(self) -> None:
        """End threads and processes."""
        if self._lanes is not None:
            self._lanes.close()
        self._loader = None

    @torch.inference_mode()
    def _embed(self, hu: torch.Tensor, slices: Sequence[SliceInput]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.view is not None:
            hu = augmentation.apply(hu, view_draw(self.view, slices))
        lacking = self.batch_size - len(hu)
        if lacking:
            hu = torch.cat([hu, hu[-1:].expand(lacking, *hu.shape[1:])])
        with autocast(self.device, self.precision):
            embedding, logits = self.cnn(hu)
        return embedding[: len(slices)].float(), logits[: len(slices)].float()


def view_draw(view: View, slices: Sequence[SliceInput]) -> augmentation.AugmentDraw:
    """Draw what a view does to slices: one change for each series, and noise for each file."""
    uids = [item.series_uid for item in slices]
    draws = {
        uid: augmentation.draw(view.augment, 1, generator(view.seed, "view", view.number, uid))
        for uid in dict.fromkeys(uids)
    }
    seeds = [derive_seed(view.seed, "view-noise", view.number, item.file_digest) for item in slices]
    joined = augmentation.AugmentDraw.joined([draws[uid] for uid in uids])
    return replace(joined, noise_seed=torch.tensor(seeds, dtype=torch.int64))


def view_parameters(view: View, slices: Sequence[SliceInput]) -> dict[str, NDArray[Any]]:
    """Return a view's draws as arrays, to be stored beside its rows.

    ``augmentation`` (n, 8), float32: the affine map of `AugmentDraw` row by row, HU offset, noise (HU, standard
    deviation), then, if the parameters ask for them, 50 displacements of the warp and the blur (pixels);
    ``noise_seed`` (n, 1), int64.
    """
    draw = view_draw(view, slices)
    drawn = (draw.affine, draw.offset_hu, draw.noise_hu, draw.warp, draw.blur_px)
    columns = [part.flatten(1) if part.ndim > 1 else part.view(-1, 1) for part in drawn if part is not None]
    return {"augmentation": torch.cat(columns, 1).numpy(), "noise_seed": draw.noise_seed.view(-1, 1).numpy()}


@dataclass(frozen=True)
class MakeEmbedder:
    """Builds a `SliceEmbedder` on a Dask worker; only this small description is sent."""

    model_dir: Path
    devices: tuple[str, ...]
    batch_size: int
    view: View | None = None
    precision: str = "auto"
    loaders: int = 1

    def __call__(self, worker_number: int) -> SliceEmbedder:
        """Load the model on the device of this worker."""
        device = torch.device(self.devices[worker_number % len(self.devices)])
        cnn = load_slice_cnn(self.model_dir)
        return SliceEmbedder(cnn, device, self.batch_size, self.view, loaders=self.loaders, precision=self.precision)


@torch.inference_mode()
def embed_hu(cnn: SliceCnn, hu: torch.Tensor, device: torch.device, batch_size: int = 64) -> torch.Tensor:
    """Map HU (n, slices, size, size) to float32 embeddings (n, D) on the CPU; ``cnn`` is on ``device``."""
    with autocast(device, "auto"):
        parts = [cnn.eval().embed(part.to(device)).float().cpu() for part in torch.split(hu, batch_size)]
    return torch.cat(parts)


def classify_series(
    model: EndToEnd | Ensemble,
    paths: list[str],
    position_mm: Sequence[float],
    device: torch.device,
    chunk_slices: int = 32,
    stride: int = 1,
) -> tuple[torch.Tensor, list[tuple[str, str]]]:
    """Return float32 logits (readable slices, 6) of one series, and (path, reason) of what can't be decoded.

    Arguments are those of `classify_twice`.
    """
    logits, _, bad = classify_twice(model, paths, position_mm, device, chunk_slices, stride)
    return logits, bad


@torch.inference_mode()
def classify_twice(
    model: EndToEnd | Ensemble,
    paths: list[str],
    position_mm: Sequence[float],
    device: torch.device,
    chunk_slices: int = 32,
    stride: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[str, str]]]:
    """Classify one series by the whole model and by its slice CNN alone.

    Returns the float32 logits (readable slices, 6) of both, and (path, reason) of what can't be decoded. ``paths`` and
    ``position_mm`` (along the slice normal) are in slice order; ``chunk_slices`` images are in memory at a time. The
    sequence model sees the whole series, or each of its ``stride`` interleaved parts
    (`ichpipe.index.thin_slices.stride_of`).
    """
    unreadable: list[tuple[str, str]] = []
    readable_mm: list[float] = []

    neighbours = neighbour_rows(np.asarray(position_mm), model.cnn.spec.neighbours, stride)
    files = slice_files(paths, neighbours)

    def read_chunks() -> Iterator[torch.Tensor]:
        for start in range(0, len(paths), chunk_slices):
            hu, bad = load_readable(files[start : start + chunk_slices], model.cnn.spec.framing)
            unreadable.extend(bad)
            if len(hu):
                yield hu
        bad_paths = {path for path, _ in unreadable}
        readable_mm.extend(mm for mm, path in zip(position_mm, paths, strict=True) if path not in bad_paths)

    return *_classify(model, read_chunks(), readable_mm, device, stride), unreadable


@torch.inference_mode()
def classify_hu(
    model: EndToEnd | Ensemble,
    hu: torch.Tensor,
    position_mm: Sequence[float],
    device: torch.device,
    chunk_slices: int = 32,
    stride: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both logits (n, 6) of a series of int16 HU (n, slices, size, size); else as `classify_twice`."""
    return _classify(model, torch.split(hu, chunk_slices), position_mm, device, stride)


def _classify(
    model: EndToEnd | Ensemble,
    chunks: Iterable[torch.Tensor],
    position_mm: Sequence[float],
    device: torch.device,
    stride: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classify the slices of ``chunks``; ``position_mm`` is complete only after the last chunk was read.

    Logits are those of the mean probability over the networks, and over both looks where the model averages over
    mirror images.
    """
    model.eval()
    looks = [(network, mirror) for network in model.networks for mirror in network.mirrorings]
    embedded = []
    with autocast(device, "auto"):
        for chunk in chunks:
            hu = chunk.to(device)
            embedded.append([network.cnn(hu.flip(-1) if mirror else hu) for network, mirror in looks])
        if not embedded:
            nothing = torch.empty((0, len(model.cnn.spec.classes)))
            return nothing, nothing
        results, cnn_results, mm = [], [], torch.tensor(position_mm)
        for (network, _), outputs in zip(looks, zip(*embedded, strict=True), strict=True):
            embedding, cnn_logits = (torch.cat(parts).float() for parts in zip(*outputs, strict=True))
            logits = torch.empty_like(cnn_logits)
            for first in range(min(stride, len(logits))):
                rows = slice(first, None, stride)
                logits[rows] = network.sequence.one_series(embedding[rows], cnn_logits[rows], mm[rows]).float()
            results.append(logits)
            cnn_results.append(cnn_logits)
        return mean_logits(torch.stack(results)), mean_logits(torch.stack(cnn_results))


def to_probabilities(logits: torch.Tensor) -> NDArray[np.float64]:
    """Return the sigmoid of logits (n, 6), in float64."""
    return torch.sigmoid(logits.cpu().double()).numpy()


def predict_held_out(
    model: EndToEnd | Ensemble, rows: pd.DataFrame, device: torch.device
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return probabilities (rows, 6) from the images, of the model and of its slice CNN alone.

    ``rows`` are of the index, those of one series in slice order. Raises UnreadableDicomError, which names the file.
    """
    result, of_cnn = (np.full((len(rows), len(model.cnn.spec.classes)), np.nan) for _ in range(2))
    groups = rows.groupby("series_uid", sort=False).indices
    for positions in track(groups.values(), "predict", len(groups), "series"):
        paths, position_mm = (rows[name].iloc[positions].tolist() for name in ("path", "position_mm"))
        logits, cnn_logits, bad = classify_twice(model, paths, position_mm, device)
        if bad:
            raise UnreadableDicomError(bad[0][1])
        result[positions], of_cnn[positions] = to_probabilities(logits), to_probabilities(cnn_logits)
    return result, of_cnn
