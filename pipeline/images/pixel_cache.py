"""Decoded slices on disk, for archives that take longer to decode than the device takes to learn.

One Zarr array of int16 HU (slices, size, size) in shards of 256 slices. It pays for JPEG lossless and JPEG 2000, not
for uncompressed files (docs/benchmarks.md). A shard that exists is whole: a stopped run continues. The name holds the
digests of the files: splits and folds of the same files share one cache; another size or preprocessing has its own.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from ichpipe.common.errors import DataError
from ichpipe.common.files import digest_of
from ichpipe.common.processes import process_pool
from ichpipe.common.progress import track
from ichpipe.images.slice_dataset import Files, load_slices, own_file
from ichpipe.index.slice_index import index_neighbours, slice_files, source_digests
from ichpipe.models.header import PREPROCESSING_VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from torch import Tensor

    from ichpipe.models.header import Framing

SHARD_SLICES = 256


class PixelCache:
    """Reads slices of a filled cache by the path of their file; may be sent to decoding processes."""

    def __init__(self, folder: Path, rows: dict[str, int]) -> None:
        self.folder, self.rows = folder, rows
        self._array: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open array behind: each process opens its own."""
        return self.__dict__ | {"_array": None}

    def read(self, files: Files) -> Tensor:
        """Return int16 HU (files, size, size). A damaged chunk raises DataError."""
        path = str(own_file(files))
        if self._array is None:
            self._array = zarr.open_array(self.folder, mode="r")
        try:
            pixels = np.asarray(self._array[self.rows[path]])
        except (ValueError, RuntimeError, OSError) as error:
            raise DataError(f"{self.folder} is damaged at {path} ({error}); delete the folder and run again") from error
        return torch.from_numpy(pixels).reshape(-1, pixels.shape[1], pixels.shape[1])


def fill_pixel_cache(
    folder: Path, index: pd.DataFrame, framing: Framing, workers: int = 0, neighbours: int = 0
) -> PixelCache:
    """Decode the missing slices of all files of an index, with ``workers`` processes (0: in this one).

    A file whose pixels can't be read raises UnreadableDicomError with its name.
    """
    sources = list(source_digests(index, neighbours))
    files: Sequence[Files] = slice_files(index["path"].tolist(), index_neighbours(index, neighbours))
    files_of = dict(sorted(zip(sources, files, strict=True)))
    digests, slices = list(files_of), list(files_of.values())
    name = digest_of({"files": digests, "preprocessing": PREPROCESSING_VERSION, **framing.identity()})
    rows_px, size_px = framing.size_px * (1 + 2 * neighbours), framing.size_px  # neighbours lie below each other
    target = folder / f"pixels-{size_px}-{name[:16]}.zarr"
    if not (target / "zarr.json").exists():
        zarr.create_array(
            target,
            shape=(len(digests), rows_px, size_px),
            chunks=(1, rows_px, size_px),
            shards=(max(1, min(SHARD_SLICES, len(digests))), rows_px, size_px),
            dtype="int16",
            fill_value=0,
            compressors=[BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle"), Crc32cCodec()],
            config={"write_empty_chunks": True},
        )
    starts = range(0, len(slices), SHARD_SLICES)
    missing = [start for start in starts if not (target / f"c/{start // SHARD_SLICES}/0/0").exists()]
    tasks = [(target, start, slices[start : start + SHARD_SLICES], framing) for start in missing]
    several = workers > 0 and len(tasks) > 1
    with process_pool(min(workers, len(tasks))) if several else nullcontext() as pool:
        for _ in track((pool.map if pool else map)(_write_shard, tasks), "decode", len(tasks), "shard"):
            pass
    row_of = {digest: row for row, digest in enumerate(digests)}
    return PixelCache(target, {path: row_of[source] for path, source in zip(index["path"], sources, strict=True)})


def _write_shard(task: tuple[Path, int, Sequence[Files], Framing]) -> None:
    """Write one shard: zarr writes it under another name and renames it."""
    target, start, slices, framing = task
    array = zarr.open_array(target, mode="r+", config={"write_empty_chunks": True})
    array[start : start + len(slices)] = load_slices(slices, framing).flatten(1, 2).numpy()
