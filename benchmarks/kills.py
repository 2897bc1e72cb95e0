"""Kill an extraction at random moments, over and over, and compare what comes out with an undisturbed one.

python benchmarks/kills.py --kills 50 --out kills.json
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kit
import numpy as np

from ichpipe.cache import maintenance
from ichpipe.cache.errors import StoreError
from ichpipe.cache.location import StoreLocation
from ichpipe.cache.reader import EmbeddingStore

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import store_kit

if TYPE_CHECKING:
    import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run it."""
    return run(folder, options.kills, options.seed)


def ratios(result: dict[str, Any]) -> dict[str, float | None]:
    """Pick the ratio."""
    return {
        "share of kills after which a wrong number was read": result["wrong_numbers_read_after_a_kill"]
        / result["kills"]
    }


def run(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Return counts; every store is finished, verified and compared row by row and chunk file by chunk file.

    Each store takes some kills until it is whole; then the next one begins, until there were ``kills``.
    """
    draw = random.Random(seed)  # noqa: S311
    n_series, done, stores, wrong_reads = 40, 0, 0, 0
    whole = folder / "whole"
    _finish(whole, n_series)
    slices = store_kit.Slices([3] * n_series)
    same_rows = same_files = True
    while done < kills:
        path = folder / f"store-{stores}"
        stores += 1
        while True:
            process = _program(path, n_series)
            assert process.stdout is not None
            process.stdout.readline()  # it has begun
            time.sleep(draw.uniform(0, 0.5))
            killed = process.poll() is None
            process.kill()
            process.communicate()
            done += killed
            wrong_reads += not _refused_or_right(path, slices)
            if not killed or done >= kills:
                break
        _finish(path, n_series)
        store_kit.assert_holds(path, slices)
        same_rows &= _rows(path) == _rows(whole)
        same_files &= _chunks(path) == _chunks(whole)
        if problems := maintenance.verify(StoreLocation(str(path))):
            raise SystemExit(f"damage: {problems}")
    return {
        "kills": done,
        "stores": stores,
        "wrong_numbers_read_after_a_kill": wrong_reads,
        "rows_identical_to_an_undisturbed_store": same_rows,
        "chunk_files_identical": same_files,
    }


def _program(path: Path, n_series: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(store_kit.__file__)), str(path), str(n_series)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _finish(path: Path, n_series: int) -> None:
    process = _program(path, n_series)
    process.communicate()
    if process.returncode != 0:
        raise SystemExit("a run that nobody killed failed")


def _refused_or_right(path: Path, slices: Any) -> bool:
    with contextlib.suppress(StoreError):
        try:
            store_kit.assert_holds(path, slices)
        except AssertionError:
            return False
    return True


def _rows(path: Path) -> list[bytes]:
    store = EmbeddingStore(path)
    found = [store.series(uid) for uid in sorted(store.series_uids)]
    return [np.ascontiguousarray(part).tobytes() for one in found for part in (one.embedding, one.logit)]


def _chunks(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in store_kit.chunk_files(path)}


BENCHMARK = kit.Benchmark("a store that nobody disturbed", measure, ratios, add_options, {"kills": 2})

if __name__ == "__main__":
    BENCHMARK.main(__file__, __doc__)
