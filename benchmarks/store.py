"""The store beside a plain memory map of the same data, in one run: writing, reading, opening, growing.

python benchmarks/store.py --out store.json        # RSNA's size: 752,803 x 2048 float16, 21,744 series; 7 GB of disk
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kit
import numpy as np

from ichpipe.cache import layout, maintenance
from ichpipe.cache.chunks import write_rows
from ichpipe.cache.layout import Generation
from ichpipe.cache.location import StoreLocation
from ichpipe.cache.reader import EmbeddingStore
from ichpipe.cache.rows import Rows, encode_uids
from ichpipe.cache.writer import Work, update
from ichpipe.features.dask_client import connect

if TYPE_CHECKING:
    import argparse

CLASSES = ("any", "epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
CHUNK_ROWS = 4096
RANDOM_SERIES = 2000


def run(
    folder: Path,
    n_slices: int,
    n_series: int,
    dim: int,
    *,
    rounds: int = 3,
    with_dvc: bool = True,
    known_lengths: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return all figures; ratios above 1 mean that the store is faster."""
    lengths = series_lengths(n_slices, n_series, known_lengths)
    rows, block = make_rows(lengths), random_block(dim)
    generation = Generation({"weights": "benchmark"}, dim, CLASSES, CHUNK_ROWS)
    path = folder / "embeddings.zarr"
    result: dict[str, Any] = {}
    result["write"] = write_both(folder, path, generation, rows, block, rounds)
    memory_map = np.memmap(folder / "plain.dat", np.float16, "r", shape=(n_slices, dim))
    result["read"] = read_both(path, memory_map, rows)
    del memory_map
    (folder / "plain.dat").unlink()
    result["open"] = open_store(path, generation, rows)
    result["unchanged"] = grow(path, generation, rows, block, changed=0.0)
    result["one_percent_changed"] = grow(path, generation, rows, block, changed=0.01)
    result["upkeep"] = look_after(path)
    result["dvc"] = dvc_times(folder, path) if with_dvc and shutil.which("dvc") else None
    return result


def series_lengths(n_slices: int, n_series: int, known: np.ndarray | None = None) -> np.ndarray:
    """Draw 20 to 60 slices a series, summing exactly to ``n_slices``: from ``known`` lengths, or around the mean."""
    draw = np.random.default_rng(0)
    drawn = draw.gamma(30, n_slices / n_series / 30, n_series) if known is None else draw.choice(known, n_series)
    lengths = np.clip(np.round(drawn), 20, 60).astype(int)
    while (rest := n_slices - int(lengths.sum())) != 0:
        step = 1 if rest > 0 else -1
        free = np.flatnonzero((lengths < 60) if step > 0 else (lengths > 20))
        chosen = draw.choice(free, min(abs(rest), len(free)), replace=False)
        lengths[chosen] += step
    return lengths


def make_rows(lengths: np.ndarray, changed: np.ndarray | None = None) -> Rows:
    """Name the slices; ``changed`` says of each series whether its files have other content."""
    offset = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    n = int(offset[-1])
    source = np.zeros((n, 32), np.uint8)
    numbers = np.arange(n, dtype=np.uint64)
    for part in range(4):  # a cheap stand-in for SHA-256: uniform enough, unique by its first 8 bytes
        mixed = (numbers + part) * np.uint64(0x9E3779B97F4A7C15)
        source[:, 8 * part : 8 * part + 8] = mixed.view(np.uint8).reshape(n, 8)
    if changed is not None:
        source[np.repeat(changed, lengths), 31] ^= 255
        source[np.repeat(changed, lengths), 0] ^= 255
    uids = encode_uids([f"1.2.826.0.1.3680043.10.474.{number:07d}" for number in range(len(lengths))])
    sops = np.zeros((n, 64), np.uint8)
    names = np.array([f"1.2.826.0.1.3680043.10.4.{number:09d}" for number in range(n)], "S34")
    sops[:, :34] = names.view(np.uint8).reshape(n, 34)
    return Rows(sops, source, uids, uids, offset)


def random_block(dim: int) -> np.ndarray:
    """One chunk of features; row r of the data is row r of this, rolled by the chunk's number."""
    return np.random.default_rng(1).normal(size=(CHUNK_ROWS, dim)).astype(np.float16)


def part_of(block: np.ndarray, numbers: range) -> np.ndarray:
    """Return rows of the whole data set."""
    return np.roll(block, numbers.start // CHUNK_ROWS, axis=0)[: len(numbers)]


class Compute:
    """Hands out prepared rows, as a network would; counts them in a file."""

    def __init__(self, block: np.ndarray, journal: Path) -> None:
        self.block, self.journal = block, journal

    def run(self, inputs: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows whose numbers are ``inputs``, as if they had been computed."""
        with self.journal.open("a") as handle:
            handle.write(f"{len(inputs)}\n")
        values = part_of(self.block, range(inputs[0], inputs[0] + len(inputs)))
        return values, np.zeros((len(inputs), len(CLASSES)), np.float32)


def write_both(
    folder: Path, path: Path, generation: Generation, rows: Rows, block: np.ndarray, rounds: int
) -> dict[str, Any]:
    """Write memory map and store in turns; each is on the disk (sync of all files) before the clock stops.

    The other one's files are removed just before, so that both find the same memory free: on a virtual machine pages
    that were used a moment ago are several times faster than fresh ones.
    """
    plain, stored, chunks, computed = [], [], [], 0
    with connect(1, None) as client:
        _write_plain(folder / "plain.dat", len(rows), block)  # not counted
        for _ in range(rounds):
            (folder / "plain.dat").unlink()
            os.sync()
            start = time.perf_counter()
            computed = _update(path, generation, rows, block, contextlib.nullcontext(client))
            os.sync()
            stored.append(time.perf_counter() - start)
            shutil.rmtree(path)
            os.sync()
            chunks.append(_timed(lambda: _write_chunks(path, generation, rows, block)))
            shutil.rmtree(path)
            os.sync()
            plain.append(_timed(lambda: _write_plain(folder / "plain.dat", len(rows), block)))
        _update(path, generation, rows, block, contextlib.nullcontext(client))
    size = len(rows) * generation.embedding_dim * 2 / 1e6
    return {
        "memory_map_seconds": [round(seconds, 2) for seconds in plain],
        "store_through_dask_seconds": [round(seconds, 2) for seconds in stored],
        "store_chunks_alone_seconds": [round(seconds, 2) for seconds in chunks],
        "memory_map_mb_per_s": round(size / float(np.median(plain)), 1),
        "store_through_dask_mb_per_s": round(size / float(np.median(stored)), 1),
        "store_chunks_alone_mb_per_s": round(size / float(np.median(chunks)), 1),
        "ratio_through_dask": round(float(np.median(plain) / np.median(stored)), 3),
        "ratio_chunks_alone": round(float(np.median(plain) / np.median(chunks)), 3),
        "rows_computed": computed,
    }


def _write_chunks(path: Path, generation: Generation, rows: Rows, block: np.ndarray) -> None:
    """Write the rows as a worker does, without the scheduler."""
    place = StoreLocation(path)
    group = layout.create_generation(layout.create_root(place), generation)
    segment = layout.create_segment(group, rows.source, generation.chunk_rows, {})
    for part in segment.chunks:
        logit = np.zeros((part.stop - part.start, len(CLASSES)), np.float32)
        values = {"embedding": part_of(block, range(part.start, part.stop)), "logit": logit}
        write_rows(place, f"{group.path}/{segment.name}", part, values, range(len(logit)))
    os.sync()


def _write_plain(path: Path, n: int, block: np.ndarray) -> None:
    plain = np.memmap(path, np.float16, "w+", shape=(n, block.shape[1]))
    for first in range(0, n, CHUNK_ROWS):
        numbers = range(first, min(first + CHUNK_ROWS, n))
        plain[first : first + len(numbers)] = part_of(block, numbers)
    plain.flush()
    os.sync()


def _update(path: Path, generation: Generation, rows: Rows, block: np.ndarray, client: Any) -> int:
    """Fill the generation; return how many rows were computed."""
    journal = path.with_name("journal.txt")
    journal.unlink(missing_ok=True)
    compute = Compute(block, journal)
    work = Work(range(len(rows)), lambda _worker: compute.run, lambda: client)
    for _ in update(StoreLocation(path), generation, rows, work):
        pass
    return sum(map(int, journal.read_text().split())) if journal.exists() else 0


def read_both(path: Path, plain: np.ndarray, rows: Rows) -> dict[str, Any]:
    """Copy every series into one buffer: an epoch in stored order, and random series; the pages are warm for both."""
    store = EmbeddingStore(path)
    uids, offset = store.series_uids, rows.offset.tolist()
    buffer = np.empty((int(np.diff(rows.offset).max()), plain.shape[1]), np.float16)

    def from_plain(number: int) -> None:
        buffer[: offset[number + 1] - offset[number]] = plain[offset[number] : offset[number + 1]]

    def from_store(number: int) -> None:
        found = store.embedding(uids[number])
        buffer[: len(found)] = found

    everything = range(len(uids))
    _seconds(from_plain, everything)  # warm
    first = _seconds(from_store, everything)  # every chunk is checked in here
    pairs = [(_seconds(from_plain, everything), _seconds(from_store, everything)) for _ in range(3)]
    plain_seconds, store_seconds = (min(column) for column in zip(*pairs, strict=True))
    some = np.random.default_rng(2).integers(0, len(uids), RANDOM_SERIES).tolist()
    random_pairs = [(_each(from_plain, some), _each(from_store, some)) for _ in range(3)]
    plain_ms, store_ms = (1000 * min(column) for column in zip(*random_pairs, strict=True))
    size = plain.size * 2 / 1e6
    return {
        "epoch_memory_map_mb_per_s": round(size / plain_seconds, 1),
        "epoch_store_mb_per_s": round(size / store_seconds, 1),
        "epoch_ratio": round(plain_seconds / store_seconds, 3),
        "first_epoch_with_checks_mb_per_s": round(size / first, 1),
        "first_epoch_ratio": round(plain_seconds / first, 3),
        "random_series_memory_map_ms": round(plain_ms, 4),
        "random_series_store_ms": round(store_ms, 4),
        "random_series_times_slower": round(store_ms / plain_ms, 2),
    }


def _seconds(read: Any, numbers: Any) -> float:
    start = time.perf_counter()
    for number in numbers:
        read(number)
    return time.perf_counter() - start


def _each(read: Any, numbers: list[int]) -> float:
    """Return the median time of one series."""
    return float(np.median([_seconds(read, (number,)) for number in numbers]))


def open_store(path: Path, generation: Generation, rows: Rows) -> dict[str, Any]:
    """Open it three times, alone and with every row required."""
    alone = min(_timed(lambda: EmbeddingStore(path, generation.identity)) for _ in range(3))
    required = min(_timed(lambda: EmbeddingStore(path, generation.identity, rows)) for _ in range(3))
    files = [file for file in path.rglob("*") if file.is_file()]
    return {
        "seconds": round(alone, 3),
        "seconds_with_rows_required": round(required, 3),
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
    }


def _timed(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def grow(path: Path, generation: Generation, rows: Rows, block: np.ndarray, changed: float) -> dict[str, Any]:
    """Update with a share of the series changed; rows are counted, not timed."""
    lengths = np.diff(rows.offset)
    chosen = np.zeros(len(lengths), bool)
    chosen[np.random.default_rng(3).permutation(len(lengths))[: round(changed * len(lengths))]] = True
    later = make_rows(lengths, chosen)
    start = time.perf_counter()
    computed = _update(path, generation, later, block, connect(1, None) if chosen.any() else contextlib.nullcontext())
    seconds = time.perf_counter() - start
    return {
        "series_changed": int(chosen.sum()),
        "rows_changed": int(lengths[chosen].sum()),
        "rows_computed": computed,
        "seconds": round(seconds, 2),
    }


def look_after(path: Path) -> dict[str, Any]:
    """Time `info` and `verify`, which reads every byte."""
    place = StoreLocation(str(path))
    problems: list[Any] = []
    info = _timed(lambda: maintenance.info(place))
    verify = _timed(lambda: problems.extend(maintenance.verify(place)))
    return {"info_seconds": round(info, 2), "verify_seconds": round(verify, 2), "problems": len(problems)}


def dvc_times(folder: Path, path: Path) -> dict[str, Any]:
    """Time ``dvc add`` and ``dvc status`` in a repository of their own, with hard links."""

    def call(*arguments: str) -> float:
        return _timed(lambda: subprocess.run(arguments, cwd=folder, check=True, capture_output=True))

    call("git", "init", "-q")
    call("dvc", "init", "-q")
    call("dvc", "config", "cache.type", "hardlink,copy")
    return {
        "add_seconds": round(call("dvc", "add", "-q", path.name), 1),
        "status_seconds": round(call("dvc", "status", "-q"), 1),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--slices", type=int, default=752_803)
    parser.add_argument("--series", type=int, default=21_744)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--lengths", type=Path, help="text file, one series' number of slices a line, to draw from")
    parser.add_argument("--rounds", type=int, default=3, help="of writing")
    parser.add_argument("--no-dvc", action="store_true")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run all parts."""
    known = np.loadtxt(options.lengths, dtype=int) if options.lengths else None
    sizes = options.slices, options.series, options.dim
    return run(folder, *sizes, rounds=options.rounds, with_dvc=not options.no_dvc, known_lengths=known)


def ratios(result: dict[str, Any]) -> dict[str, float | None]:
    """Pick the ratios; above 1 the store is faster, but for random series, where it is times as long."""
    return {
        "write through Dask": result["write"]["ratio_through_dask"],
        "epoch": result["read"]["epoch_ratio"],
        "first epoch, checksums compared": result["read"]["first_epoch_ratio"],
        "random series, times as long": result["read"]["random_series_times_slower"],
    }


BENCHMARK = kit.Benchmark(
    "one plain numpy.memmap of the same rows", measure, ratios, add_options,
    {"slices": 6000, "series": 173, "dim": 16, "rounds": 1, "no_dvc": True},
)  # fmt: skip

if __name__ == "__main__":
    BENCHMARK.main(__file__, __doc__)
