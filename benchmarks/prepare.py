"""``prepare`` on archives of several sizes: headers a second beside bare pydicom, time and memory as they grow.

python benchmarks/prepare.py --headers stage1_test_with_metadata.csv.gz --sizes 75000 750000 --out prepare.json
The largest size takes 4 GB of disk for small files, and a million inodes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import archives
import kit
import numpy as np
import pydicom

from ichpipe.common.files import digest_of_file
from ichpipe.dicom.archive import list_files
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.index.scan import CHUNK_FILES, read_headers

if TYPE_CHECKING:
    import argparse

ROUNDS = 5


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--headers", type=Path, help="Table of real headers; made up if not given.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[75_000, 750_000])
    parser.add_argument("--sample", type=int, default=20_000, help="Files of the comparison with bare pydicom.")
    parser.add_argument("--workers", type=int, default=2)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run every size."""
    headers = archives.read_headers(options.headers) if options.headers else archives.make_headers()
    sizes = {}
    for size in options.sizes:
        sizes[size] = run(folder / str(size), headers, size, options.sample, options.workers)
        shutil.rmtree(folder / str(size))
    return {"headers": "real" if options.headers else "made up", "sizes": sizes}


def ratios(result: dict[str, Any]) -> dict[str, float | None]:
    """Pick the ratios; above 1 we are faster."""
    found = {}
    for size, one in result["sizes"].items():
        found[f"reader, {size} slices"] = one["bare_pydicom"]["ratio"]
        found[f"whole command, {size} slices"] = one["ratio_of_the_whole_command"]
    return found


def run(folder: Path, headers: Any, n_slices: int, n_sample: int, workers: int) -> dict[str, Any]:
    """Make an archive and measure on it."""
    archives.write_archive(folder, headers, n_slices)
    if len(list_files([folder / "dicom"]).files) != n_slices:
        raise SystemExit("the archive lacks slices")
    result = {"bare_pydicom": beside_pydicom(folder, n_sample)}
    result["one_worker"] = prepare(folder, "one", 1)
    result["again"] = prepare(folder, "one", 1)
    result["workers"] = {"workers": workers} | prepare(folder, "many", workers)
    result["stopped"] = stopped(folder, result["one_worker"]["seconds"])
    whole = 1e6 * result["one_worker"]["seconds"] / n_slices
    result["microseconds_a_slice"] = round(whole, 1)
    result["ratio_of_the_whole_command"] = round(result["bare_pydicom"]["bare_microseconds"] / whole, 3)
    same = {name: _outputs(folder, name) for name in ("one", "many", "stopped")}
    if len(set(same.values())) != 1:
        raise SystemExit(f"outputs differ: {same}")
    return result


def beside_pydicom(folder: Path, n_sample: int) -> dict[str, Any]:
    """Read the same files by turns, in one process: ``dcmread(stop_before_pixels=True)``, and our reader."""
    files = list_files([folder / "dicom"]).files
    chosen = [files[row] for row in np.linspace(0, len(files) - 1, min(n_sample, len(files))).astype(int)]
    for one in chosen:
        Path(one.path).read_bytes()  # into memory
    seconds: dict[str, list[float]] = {"bare": [], "ours": []}
    parts = np.array_split(np.arange(len(chosen)), ROUNDS)
    for part in parts:
        few = [chosen[row] for row in part]
        for name, read in (("bare", bare), ("ours", read_headers)):
            start = time.perf_counter()
            read(few)
            seconds[name].append((time.perf_counter() - start) / len(few))
    both = {name: 1e6 * float(np.median(values)) for name, values in seconds.items()}
    return {
        "bare_microseconds": round(both["bare"], 1),
        "ours_microseconds": round(both["ours"], 1),
        "headers_a_second": round(1e6 / both["ours"]),
        "ratio": round(both["bare"] / both["ours"], 3),
    }


def bare(files: list[Any]) -> None:
    """Parse headers, and look at nothing in them."""
    with quiet_pydicom():
        for one in files:
            pydicom.dcmread(one.path, stop_before_pixels=True)


def prepare(folder: Path, name: str, workers: int) -> dict[str, Any]:
    """Run the command; seconds, and the peak of memory of its largest process."""
    start = time.perf_counter()
    process = _start(folder, name, workers)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"prepare: exit code {process.returncode}")
    return {"seconds": round(time.perf_counter() - start, 1), "peak_mb": round(usage.ru_maxrss / 1024)}


def stopped(folder: Path, seconds: float) -> dict[str, Any]:
    """Kill the command after a third of its time, and run it again."""
    process = _start(folder, "stopped", 1)
    time.sleep(max(seconds / 3, 1.0))
    process.send_signal(signal.SIGKILL)
    process.wait()
    parts = len(list((folder / "stopped" / ".resume" / "prepare").glob("headers-*.parquet")))
    return {"files_read_before": parts * CHUNK_FILES} | prepare(folder, "stopped", 1)


def _start(folder: Path, name: str, workers: int) -> subprocess.Popen[bytes]:
    settings = {"dicom_dir": folder / "dicom", "labels": folder / "stage_2_train.csv"}
    values = [part for key, value in settings.items() for part in ("--set", f"prepare.{key}={value}")]
    command = ["--quiet", "--artifacts", str(folder / name), *values, "prepare", "--workers", str(workers)]
    code = f"from ichpipe.stages.cli import main\nif __name__ == '__main__': main({command!r})"
    script = folder / f"{name}.py"
    script.write_text(code)  # a file, since processes that are started anew want one
    return subprocess.Popen([sys.executable, str(script)], cwd=folder)


def _outputs(folder: Path, name: str) -> tuple[str, ...]:
    index = folder / name / "index"
    found = tuple(digest_of_file(path) for path in sorted(index.iterdir()))
    shutil.rmtree(folder / name)
    return found


BENCHMARK = kit.Benchmark(
    "pydicom.dcmread(stop_before_pixels=True) of the same files", measure, ratios, add_options,
    {"sizes": [600], "sample": 100},
)  # fmt: skip

if __name__ == "__main__":
    BENCHMARK.main(__file__, __doc__)
