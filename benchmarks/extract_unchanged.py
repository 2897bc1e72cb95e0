"""How long ``ichpipe extract`` takes where nothing has changed, start of the program included.

python benchmarks/extract_unchanged.py --out unchanged.json        # 752,803 rows
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import store
import torch

from ichpipe.artifacts import Artifacts
from ichpipe.cache.layout import Generation
from ichpipe.cache.place import Place
from ichpipe.cache.writer import Work, update
from ichpipe.caches import Cache
from ichpipe.classes import CLASSES
from ichpipe.cluster import connect
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.models.weights import save_model
from ichpipe.params import PAPER_WINDOWS
from ichpipe.studies import SCHEMA, read_index, write_outputs


def run(folder: Path, n_slices: int, n_series: int) -> dict[str, Any]:
    """Make an index and a full store of that size, then time the command."""
    artifacts = Artifacts(folder)
    torch.manual_seed(0)
    cnn = SliceCnn(spec_for("resnet10t", PAPER_WINDOWS, 64, 0.0))
    save_model(artifacts.slice_cnn, cnn, {})
    index = make_index(store.series_lengths(n_slices, n_series))
    write_outputs(artifacts.index_dir, index, pd.DataFrame({"path": [], "reason": []}), {})
    cache = Cache(artifacts.slice_cnn, read_index(artifacts.index))
    generation = Generation(cache.identity(), cnn.embedding_dim, CLASSES, 4096)
    work = Work(range(n_slices), lambda _worker: zeros(cnn.embedding_dim), lambda: connect(1, None))
    for _ in update(Place(str(artifacts.embeddings)), generation, cache.rows(), work):
        pass
    command = [
        sys.executable,
        "-c",
        "from ichpipe.stages.cli import main; main()",
        "--artifacts",
        str(folder),
        "extract",
    ]
    seconds, output = [], ""
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds.append(round(time.perf_counter() - start, 2))
        output = done.stderr.strip()
    return {"slices": n_slices, "seconds": seconds, "said": output, "machine": store.machine()}


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
    index = pd.DataFrame(frame).assign(transfer_syntax="1.2.840.10008.1.2.1", split="train", fold=0)
    index["slice_index"] = np.concatenate([np.arange(length) for length in lengths])
    return index.reindex(columns=SCHEMA.names, fill_value=0)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slices", type=int, default=752_803)
    parser.add_argument("--series", type=int, default=21_744)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        text = json.dumps(run(folder, options.slices, options.series), indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
