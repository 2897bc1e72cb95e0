"""From DICOM files to tensors of Hounsfield units of one size."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ichpipe.common.device import pins_memory
from ichpipe.common.errors import IchpipeError, UnreadableDicomError
from ichpipe.common.processes import follow_the_parent, interrupts_stay_here
from ichpipe.dicom import hounsfield
from ichpipe.images.framing import frame

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from ichpipe.images.framing import Image
    from ichpipe.models.header import Framing

Files = str | Path | tuple[str, ...]  # the file of a slice, or those of its neighbours with its own in the middle
NEAR: int = 32  # decoded files that slices read together share, as neighbours
HOLD_BYTES = 2**30  # a data set whose slices take at most so many bytes as int16 is held in memory once it is decoded


def own_file(files: Files) -> str | Path:
    """Return the file of a slice: it stands between those of its neighbours, or alone."""
    return files[len(files) // 2] if isinstance(files, tuple) else files


def load_slice(files: Files, framing: Framing) -> Tensor:
    """Read one slice, or a slice between its neighbours, as int16 HU (files, size, size)."""
    return _load(files, framing, _decode)


def load_slices(slices: Sequence[Files], framing: Framing) -> Tensor:
    """Read slices as int16 HU (n, files of each, size, size)."""
    decode = functools.lru_cache(maxsize=NEAR)(_decode)
    return torch.stack([_load(files, framing, decode) for files in slices])


def load_readable(slices: Sequence[Files], framing: Framing) -> tuple[Tensor, list[tuple[str, str]]]:
    """Like `load_slices`, leaving out what can't be decoded: returns also (path, reason) of those.

    A slice stands for its neighbour that can't be decoded.
    """
    decode, loaded, bad = functools.lru_cache(maxsize=NEAR)(_decode), [], []

    def fault(path: str | Path) -> str:
        try:
            decode(path, framing)
        except UnreadableDicomError as error:
            return str(error)
        return ""

    for files in slices:
        own = str(own_file(files))
        if reason := fault(own):
            bad.append((own, reason))
        else:
            beside = files if isinstance(files, tuple) else (own,)
            loaded.append(_load(tuple(own if fault(path) else path for path in beside), framing, decode))
    return torch.stack(loaded) if loaded else torch.empty((0, 1, framing.size_px, framing.size_px)), bad


def _load(files: Files, framing: Framing, decode: Callable[..., Image]) -> Tensor:
    return frame([decode(path, framing) for path in (files if isinstance(files, tuple) else (files,))], framing)


def _decode(path: str | Path, framing: Framing) -> Image:
    """Return HU and the spacing that the framing needs; without it, HU of square pixels."""
    if framing.mm_per_px is not None:
        hu, spacing_mm = hounsfield.read_spaced_hu(Path(path), scanned=True)
        if spacing_mm is not None:
            return hu, spacing_mm
    return hounsfield.read_square_hu(Path(path), scanned=True), None


class SliceDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Slices with labels: HU int16 (files of each, size, size), labels (6,), row number ().

    ``read`` returns the HU of a path, such as `PixelCache.read`; without it files are decoded. A set that fits into
    memory is decoded once and held by the process that trains; decoding processes hold nothing (`batch_loader`).
    """

    def __init__(
        self,
        paths: Sequence[Files],
        labels: NDArray[np.float32],
        framing: Framing,
        read: Callable[..., Tensor] | None = None,
    ) -> None:
        self.paths, self.framing, self.read = list(paths), framing, read
        self.labels = torch.from_numpy(np.ascontiguousarray(labels))
        files = sum(len(each) if isinstance(each, tuple) else 1 for each in self.paths)
        # None: too large, and read again every epoch.
        self.held: dict[int, Tensor] | None = {} if files * framing.size_px**2 * 2 <= HOLD_BYTES else None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the held slices behind: a decoding process would fill a copy that nobody reads."""
        return self.__dict__ | {"held": None}

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Read one slice, or return it if it is held."""
        hu = None if self.held is None else self.held.get(row)
        if hu is None:
            hu = self.read(self.paths[row]) if self.read else load_slice(self.paths[row], self.framing)
            if self.held is not None:
                self.held[row] = hu
        return hu, self.labels[row], torch.tensor(row)


def batches_of(order: Sequence[int], size: int) -> list[list[int]]:
    """Cut an order into batches; a single row left over joins the batch before it.

    Batch normalisation has no variance to take over one slice whose last feature map is 1 x 1 (PyTorch refuses it).
    """
    batches = [list(order[start : start + size]) for start in range(0, len(order), size)]
    if len(batches) > 1 and len(batches[-1]) == 1:
        last = batches.pop()
        batches[-1] += last
    return batches


def batch_loader(
    dataset: SliceDataset, batches: Sequence[Sequence[int]], workers: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Load the given rows batch by batch, decoded by ``workers`` processes ahead of their use (0: in this one).

    The processes get only rows that the data set doesn't hold yet. They leave Ctrl-C to this one, which ends them.
    """
    held = dataset.held
    loads = [[row for row in batch if held is None or row not in held] for batch in batches] if workers else []
    missing = [rows for rows in loads if rows]
    workers = workers if missing else 0
    pinned = pins_memory()
    if not workers:
        return iter(DataLoader(dataset, batch_sampler=batches, pin_memory=pinned))  # type: ignore[arg-type]
    loader: DataLoader[Any] = DataLoader(
        _Batches(dataset),
        batch_size=None,
        sampler=missing,
        num_workers=workers,
        pin_memory=pinned,
        multiprocessing_context="spawn",
        worker_init_fn=follow_the_parent,
    )
    with interrupts_stay_here():
        loaded = _raise_errors(iter(loader))
    return loaded if held is None else _hold(dataset, held, batches, loads, loaded)


class _Batches(Dataset[Any]):
    """Reads whole batches in a decoding process; an error comes back as it is, not as a text with a traceback."""

    def __init__(self, dataset: SliceDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, rows: list[int]) -> Any:
        """Return one batch, or the error of a file."""
        try:
            return default_collate([self.dataset[row] for row in rows])
        except (IchpipeError, OSError) as error:
            return error


def _raise_errors(loaded: Iterator[Any]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for batch in loaded:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _hold(
    dataset: SliceDataset,
    held: dict[int, Tensor],
    batches: Sequence[Sequence[int]],
    loads: Sequence[Sequence[int]],
    loaded: Iterator[tuple[Tensor, Tensor, Tensor]],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Hold the slices that arrive from decoding processes, and complete each batch by those that are held already."""
    for batch, rows in zip(batches, loads, strict=True):
        if rows:
            arrived = next(loaded)
            held.update((row, hu.clone()) for row, hu in zip(rows, arrived[0], strict=True))  # not shared memory
        if len(rows) == len(batch):
            yield arrived
        else:
            yield torch.stack([held[row] for row in batch]), dataset.labels[list(batch)], torch.tensor(batch)
