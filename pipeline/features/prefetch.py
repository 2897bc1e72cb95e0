"""Work in flight at one time: in threads of this process, or decoded ahead by others; never more than a few batches."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ichpipe.common.errors import UnreadableDicomError
from ichpipe.common.processes import follow_the_parent
from ichpipe.images.slice_dataset import load_slices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from threading import Lock

    from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_LOADERS: Final = 16
"""Decoding processes for one GPU: as many decode JPEG lossless faster than an H100 takes slices of 512 px."""

PIECE_SLICES: Final = 16
"""Slices that a loader hands over at a time: 8 MB at 512 px."""


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usual_loaders(device: str, workers: int) -> int:
    """Return how many loaders one of ``workers`` processes on this machine should have for a device."""
    share = max(1, usable_cores() // max(1, workers))
    return share if device == "cpu" else min(share, MOST_LOADERS)


class Lanes:
    """Threads in which torch uses one thread each, so that they fill the cores side by side.

    Batches side by side waste nothing where threads inside one batch would wait for each other, and a sum is added up
    in the same order whatever the number of lanes.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._threads_before = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(count, "lane", initializer=torch.set_num_threads, initargs=(1,))

    def map(self, function: Callable[[Item], Result], items: Sequence[Item], turn: Lock) -> list[Result]:
        """Apply a function to all items, in order.

        Another thread that waits for its ``turn`` comes in when the last item has been taken on: no lane idles.
        """
        done: list[Result] = []
        waiting: deque[Any] = deque()
        with turn:
            for item in items:
                if len(waiting) >= 2 * self.count:
                    done.append(waiting.popleft().result())
                waiting.append(self._pool.submit(function, item))
        done.extend(future.result() for future in waiting)
        return done

    def close(self) -> None:
        """End the threads when they have done what they are at; torch has its former number again."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(self._threads_before)


class Loader:
    """Processes that decode slices ahead of a GPU, which launches its work from the thread that waits here.

    Not threads: launching needs Python's lock hundreds of times a batch. ``count`` 0, or a process that may have no
    children, decodes in this one.
    """

    def __init__(self, size_px: int, count: int) -> None:
        self._todo: list[tuple[str, ...]] = []
        count = 0 if multiprocessing.current_process().daemon else count
        self._loader: DataLoader[Any] = DataLoader(
            _Pieces(size_px),
            batch_size=None,
            sampler=self._todo,
            num_workers=count,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context="spawn" if count else None,
            worker_init_fn=follow_the_parent,
            persistent_workers=count > 0,
        )

    def batches(self, paths: Sequence[str], size: int, device: torch.device) -> Iterator[Tensor]:
        """Yield int16 HU (up to ``size``, 1, size_px, size_px) on the device. Raises UnreadableDicomError.

        Copies go out of pinned memory and are not waited for.
        """
        starts = range(0, len(paths), size)
        batches = [_cut(paths[start : start + size]) for start in starts]
        self._todo[:] = [piece for batch in batches for piece in batch]
        pieces = iter(self._loader)
        for batch in batches:
            yield torch.cat([_sound(next(pieces)).to(device, non_blocking=True) for _ in batch])


class _Pieces(Dataset[Any]):
    """Slices by their paths; what is wrong with a file comes back as text, without a loader's traceback."""

    def __init__(self, size_px: int) -> None:
        self.size_px = size_px

    def __getitem__(self, paths: tuple[str, ...]) -> Tensor | str:
        """Read some slices, int16 HU (n, 1, size, size)."""
        try:
            return load_slices(paths, self.size_px)
        except UnreadableDicomError as error:
            return str(error)


def _cut(paths: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(paths[start : start + PIECE_SLICES]) for start in range(0, len(paths), PIECE_SLICES)]


def _sound(piece: Tensor | str) -> Tensor:
    if isinstance(piece, str):
        raise UnreadableDicomError(piece)
    return piece
