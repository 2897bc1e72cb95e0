"""Bounded prefetching of batches: by threads of this process, or by decoding processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ichpipe.common.device import pins_memory
from ichpipe.common.errors import UnreadableDicomError
from ichpipe.common.processes import follow_the_parent
from ichpipe.images.slice_dataset import load_slices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from threading import Lock

    from torch import Tensor

    from ichpipe.images.slice_dataset import Files
    from ichpipe.models.header import Framing

Item = TypeVar("Item")

MOST_LOADERS: Final = 16  # for one GPU: as many decode JPEG lossless faster than an H100 takes slices of 512 px
PIECE_SLICES: Final = 16  # that a loader hands over at a time: 8 MB at 512 px


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usual_loaders(device: str, workers: int) -> int:
    """Return the number of loaders for each of ``workers`` processes on this machine."""
    share = max(1, usable_cores() // max(1, workers))
    return share if device == "cpu" else min(share, MOST_LOADERS)


class Lanes:
    """Threads in which torch uses one thread each.

    Batches side by side use the cores better than threads inside one batch, which wait for each other. And a sum is
    added up in the same order for any number of lanes.
    """

    def __init__(self, count: int) -> None:
        self._threads_before = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(count, "lane", initializer=torch.set_num_threads, initargs=(1,))

    def map(self, function: Callable[[Item], object], items: Sequence[Item], turn: Lock) -> None:
        """Apply a function to all items; raise its first error.

        ``turn`` keeps the items of one caller together: one finishes, and writes, while the next one computes.
        """
        with turn:
            results = self._pool.map(function, items)
        list(results)

    def close(self) -> None:
        """Cancel what is queued, and restore torch's number of threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(self._threads_before)


class Loader:
    """Processes that decode slices ahead of a GPU; threads would contend for Python's lock with its launches.

    With ``count`` 0, or in a process that may have no children, slices are decoded in this process.
    """

    def __init__(self, framing: Framing, count: int) -> None:
        self._todo: list[tuple[Files, ...]] = []
        count = 0 if multiprocessing.current_process().daemon else count
        self._loader: DataLoader[Any] = DataLoader(
            _Pieces(framing),
            batch_size=None,
            sampler=self._todo,
            num_workers=count,
            pin_memory=pins_memory(),
            multiprocessing_context="spawn" if count else None,
            worker_init_fn=follow_the_parent,
            persistent_workers=count > 0,
        )

    def batches(self, paths: Sequence[Files], size: int, device: torch.device) -> Iterator[Tensor]:
        """Yield int16 HU (up to ``size``, files of each slice, side, side) on the device. Raises UnreadableDicomError.

        Copies out of pinned memory run in the background.
        """
        counts = []  # of pieces in each batch
        self._todo.clear()
        for start in range(0, len(paths), size):
            batch = paths[start : start + size]
            pieces = [tuple(batch[at : at + PIECE_SLICES]) for at in range(0, len(batch), PIECE_SLICES)]
            self._todo += pieces
            counts.append(len(pieces))
        loaded = iter(self._loader)
        for count in counts:
            tensors = []
            for piece in itertools.islice(loaded, count):
                if isinstance(piece, str):
                    raise UnreadableDicomError(piece)
                tensors.append(piece.to(device, non_blocking=True))
            yield torch.cat(tensors)


class _Pieces(Dataset[Any]):
    """Reads slices by their paths; an error comes back as text, without a loader's traceback."""

    def __init__(self, framing: Framing) -> None:
        self.framing = framing

    def __getitem__(self, paths: tuple[Files, ...]) -> Tensor | str:
        """Read some slices, int16 HU (n, files of each, size, size)."""
        try:
            return load_slices(paths, self.framing)
        except UnreadableDicomError as error:
            return str(error)
