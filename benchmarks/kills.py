"""Kill an extraction at random moments, over and over, and compare what comes out with an undisturbed one.

python benchmarks/kills.py --kills 50 --out kills.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ichpipe.cache import upkeep
from ichpipe.cache.errors import StoreError
from ichpipe.cache.place import Place
from ichpipe.cache.reader import EmbeddingStore

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import store_kit as kit


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), options.kills, options.seed)
    text = json.dumps(result, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


def run(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Return counts; every store is finished, verified and compared row by row and chunk file by chunk file.

    Each store takes some kills until it is whole; then the next one begins, until there were ``kills``.
    """
    draw = random.Random(seed)  # noqa: S311
    n_series, done, stores, wrong_reads = 40, 0, 0, 0
    whole = folder / "whole"
    _finish(whole, n_series)
    slices = kit.Slices([3] * n_series)
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
        kit.assert_holds(path, slices)
        same_rows &= _rows(path) == _rows(whole)
        same_files &= _chunks(path) == _chunks(whole)
        if problems := upkeep.verify(Place(str(path))):
            raise SystemExit(f"damage: {problems}")
    return {
        "kills": done,
        "stores": stores,
        "wrong_numbers_read_after_a_kill": wrong_reads,
        "rows_identical_to_an_undisturbed_store": same_rows,
        "chunk_files_identical": same_files,
    }


def _program(path: Path, n_series: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(kit.__file__)), str(path), str(n_series)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _finish(path: Path, n_series: int) -> None:
    process = _program(path, n_series)
    process.communicate()
    if process.returncode != 0:
        raise SystemExit("a run that nobody killed failed")


def _refused_or_right(path: Path, slices: Any) -> bool:
    with contextlib.suppress(StoreError):
        try:
            kit.assert_holds(path, slices)
        except AssertionError:
            return False
    return True


def _rows(path: Path) -> list[bytes]:
    store = EmbeddingStore(path)
    found = [store.series(uid) for uid in sorted(store.series_uids)]
    return [np.ascontiguousarray(part).tobytes() for one in found for part in (one.embedding, one.logit)]


def _chunks(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in kit.chunk_files(path)}


if __name__ == "__main__":
    main()
