"""What ``ichpipe extract`` costs per slice, in time and memory, as the archive grows.

python benchmarks/growth.py --out growth.json        # 1,000 to 50,000 slices, and 752,803; 3 GB of disk

Every size is a process of its own. "Above start" is the most memory it held less what it held with all libraries
loaded. Files are small and the network is tiny, so that rows and names, which grow, weigh as much as they can. At
RSNA's size all rows but a sample are in the store before: the index is whole, the disk is not.
"""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import archives
import extract_unchanged
import kit
import pandas as pd
import store
import torch

from ichpipe.cache.layout import Generation
from ichpipe.cache.location import StoreLocation
from ichpipe.cache.writer import Work, update
from ichpipe.common.artifacts import Artifacts
from ichpipe.common.classes import CLASSES
from ichpipe.common.files import digest_of_file
from ichpipe.features.dask_client import connect
from ichpipe.features.generations import GenerationSpec
from ichpipe.index.index_writer import write_outputs
from ichpipe.index.slice_index import read_index
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.models.weights import save_model
from ichpipe.params.schema import PAPER_WINDOWS, Params, PrepareParams
from ichpipe.stages import extract, prepare

if TYPE_CHECKING:
    import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 50_000])
    parser.add_argument("--whole", type=int, default=752_803, help="slices of the sampled archive; 0: none")
    parser.add_argument("--sample", type=int, default=10_000, help="slices computed there")
    parser.add_argument("--backbone", default="resnet10t")
    parser.add_argument("--size", type=int, default=32, help="pixels a side, of files and network")
    parser.add_argument("--one", type=Path, help="extract below these artifacts in this process, and print the cost")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure every size."""
    sizes = []
    for n_slices in options.sizes:
        artifacts = make_archive(folder / str(n_slices), n_slices, options)
        sizes.append({"slices": n_slices, "computed": n_slices, **apart(artifacts)})
        shutil.rmtree(folder / str(n_slices))
    if options.whole:
        artifacts = make_archive(folder / "whole", options.sample, options)
        fill_up(artifacts, options.whole)
        sizes.append({"slices": options.whole, "computed": options.sample, **apart(artifacts)})
    return {"sizes": sizes}


def make_archive(folder: Path, n_slices: int, options: argparse.Namespace) -> Artifacts:
    """Write files, index and an untrained network."""
    archives.write_archive(folder, archives.make_headers(), n_slices, options.size)
    artifacts = Artifacts(folder / "artifacts")
    labels = str(folder / "stage_2_train.csv")
    params = PrepareParams(dicom_dir=str(folder / "dicom"), labels=labels, size_px=options.size)
    prepare.run(params, artifacts.index_dir, 1, artifacts.resume("prepare"))
    torch.manual_seed(0)
    cnn = SliceCnn(spec_for(options.backbone, PAPER_WINDOWS, options.size, 0.0))
    save_model(artifacts.slice_cnn, cnn, {"index": digest_of_file(artifacts.index)})
    return artifacts


def fill_up(artifacts: Artifacts, n_slices: int) -> None:
    """Add slices without files to the index until there are ``n_slices``, and rows of zeros for them to the store."""
    real = read_index(artifacts.index)
    rest = n_slices - len(real)
    made = extract_unchanged.make_index(store.series_lengths(rest, round(rest / 34.6)))
    cnn_dim = SliceCnn(spec_for("resnet10t", PAPER_WINDOWS, 32, 0.0)).embedding_dim
    cache = GenerationSpec(artifacts.slice_cnn, made)
    generation = Generation(cache.identity(), cnn_dim, CLASSES, 4096)
    zeros = extract_unchanged.zeros(cnn_dim)
    work = Work(range(rest), lambda _worker: zeros, lambda: connect(1, None))
    for _ in update(StoreLocation(str(artifacts.embeddings)), generation, cache.rows(), work):
        pass
    both = pd.concat([real, made]).sort_values(["series_uid", "slice_index"], kind="stable")
    write_outputs(artifacts.index_dir, both, pd.DataFrame({"path": [], "reason": []}), {})


def apart(artifacts: Artifacts) -> dict[str, float]:
    """Extract in a process of its own."""
    line = [sys.executable, __file__, "--one", str(artifacts.root)]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=kit.own_heap())
    result: dict[str, float] = json.loads(done.stdout)
    return result


def one(root: Path) -> dict[str, float]:
    """Extract in this process: seconds, and memory in MiB."""
    with connect(1, None):  # what is loaded lazily
        pass
    gc.collect()
    start, before = time.perf_counter(), kit.status_mb()
    extract.run(Params(), Artifacts(root), "cpu")
    seconds = time.perf_counter() - start
    return {
        "seconds": round(seconds, 2),
        "start_mb": round(before, 1),
        "peak_mb": round(kit.status_mb("VmHWM"), 1),
    }


def ratios(result: dict[str, Any]) -> dict[str, float | None]:
    """Pick the ratios, each to the smallest size: memory, and time of a further slice beside the whole time of one."""
    first, *later = result["sizes"]
    found: dict[str, float | None] = {}
    for size in later:
        name = f"{size['slices']:,} slices"
        found[f"{name}, peak memory"] = size["peak_mb"] / first["peak_mb"]
        above = [one["peak_mb"] - one["start_mb"] for one in (size, first)]
        found[f"{name}, peak memory above start"] = above[0] / above[1]
        each = [one["seconds"] / one["computed"] for one in (size, first)]
        found[f"{name}, time per computed slice"] = each[0] / each[1]
    return found


BENCHMARK = kit.Benchmark(
    "the smallest archive", measure, ratios, add_options,
    {"sizes": [100, 400], "whole": 2_000, "sample": 200},
)  # fmt: skip

if __name__ == "__main__":
    options = BENCHMARK.parse(__doc__, sys.argv[1:])
    if options.one:
        print(json.dumps(one(options.one)))
    else:
        BENCHMARK.main(__file__, __doc__)
