"""How long ``ichpipe extract`` takes where nothing has changed, start of the program included.

python benchmarks/extract_unchanged.py --out unchanged.json        # 752,803 rows
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import kit
import numpy as np
import pandas as pd
import store
import torch

from ichpipe.cache.layout import Generation
from ichpipe.cache.location import StoreLocation
from ichpipe.cache.writer import Work, update
from ichpipe.common.artifacts import Artifacts
from ichpipe.common.classes import CLASSES
from ichpipe.features.dask_client import connect
from ichpipe.features.generations import GenerationSpec
from ichpipe.index.index_writer import write_outputs
from ichpipe.index.slice_index import SCHEMA, read_index
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.models.weights import save_model
from ichpipe.params.schema import PAPER_WINDOWS

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


def run(folder: Path, n_slices: int, n_series: int) -> dict[str, Any]:
    """Make an index and a full store of that size, then time the command."""
    artifacts = Artifacts(folder)
    torch.manual_seed(0)
    cnn = SliceCnn(spec_for("resnet10t", PAPER_WINDOWS, 64, 0.0))
    save_model(artifacts.slice_cnn, cnn, {})
    index = make_index(store.series_lengths(n_slices, n_series))
    write_outputs(artifacts.index_dir, index, pd.DataFrame({"path": [], "reason": []}), {})
    cache = GenerationSpec(artifacts.slice_cnn, read_index(artifacts.index))
    generation = Generation(cache.identity(), cnn.embedding_dim, CLASSES, 4096)
    work = Work(range(n_slices), lambda _worker: zeros(cnn.embedding_dim), lambda: connect(1, None))
    for _ in update(StoreLocation(str(artifacts.embeddings)), generation, cache.rows(), work):
        pass
    bare = [sys.executable, "-c", f"import torch, pandas; pandas.read_parquet({str(artifacts.index)!r})"]
    seconds, bare_seconds, output = [], [], ""
    for _ in range(3):
        bare_seconds.append(timed(bare)[0])
        taken, output = timed(kit.ichpipe("--artifacts", folder, "extract"))
        seconds.append(taken)
    return {"slices": n_slices, "seconds": seconds, "bare_seconds": bare_seconds, "said": output}


def timed(command: list[str]) -> tuple[float, str]:
    """Run a program; its seconds, and what it said on standard error."""
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return round(time.perf_counter() - start, 2), done.stderr.strip()


def zeros(dim: int) -> Any:
    """Return a compute function whose rows are all zero."""
    return lambda inputs: (np.zeros((len(inputs), dim), np.float32), np.zeros((len(inputs), len(CLASSES)), np.float32))


def make_index(lengths: np.ndarray) -> pd.DataFrame:
    """Return an index of series of these lengths, one a patient, without files."""
    n = int(lengths.sum())
    series = np.repeat([f"1.2.826.0.1.3680043.{number:07d}" for number in range(len(lengths))], lengths)
    frame = dict.fromkeys(("patient_id", "study_uid", "series_uid"), series)
    frame["sop_uid"] = np.array([f"ID_{number:09x}" for number in range(n)])
    frame["path"] = np.array([f"stage_2_train/ID_{number:09x}.dcm" for number in range(n)])
    frame["file_digest"] = np.array([f"{number:064x}"[::-1] for number in range(n)])
    index = pd.DataFrame(frame).assign(transfer_syntax="1.2.840.10008.1.2.1", split="train", fold=0, source="")
    index["slice_index"] = np.concatenate([np.arange(length) for length in lengths])
    return index.reindex(columns=SCHEMA.names, fill_value=0)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--slices", type=int, default=752_803)
    parser.add_argument("--series", type=int, default=21_744)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run it."""
    return run(folder, options.slices, options.series)


def ratios(result: dict[str, Any]) -> dict[str, float | None]:
    """Pick the ratio."""
    return {"times as long": min(result["seconds"]) / min(result["bare_seconds"])}


BENCHMARK = kit.Benchmark(
    "a program that imports torch and pandas and reads the index", measure, ratios, add_options,
    {"slices": 3000, "series": 87},
)  # fmt: skip

if __name__ == "__main__":
    BENCHMARK.main(__file__, __doc__)
