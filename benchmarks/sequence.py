"""Stage two at RSNA's size, through `ichpipe fit-sequence` itself, beside one epoch end to end per slice.

python benchmarks/sequence.py --out sequence.json \
    --labels stage1_train_part*.csv.gz --headers stage1_test_with_metadata.csv.gz      # 752,803 x 2048; 4 GB of disk
python benchmarks/sequence.py --out sequence.json \
    --labels stage2_train_labels_all.csv.gz --composition stage1_train_series_237k.csv.gz     # real series' labels

Without the tables: RSNA's prevalence and lengths around its mean. Each arm runs as a process of its own; an epoch is
training and validation, timed by the lines that the command logs.
"""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import extract_unchanged
import kit
import numpy as np
import pandas as pd
import simulate
import store
import torch
import yaml

from ichpipe.cache.layout import Generation
from ichpipe.cache.location import StoreLocation
from ichpipe.cache.writer import Work, update
from ichpipe.common.artifacts import Artifacts
from ichpipe.common.classes import CLASSES
from ichpipe.common.device import autocast, choose_device
from ichpipe.common.files import digest_of_file
from ichpipe.features.dask_client import connect
from ichpipe.features.generations import GenerationSpec, open_features
from ichpipe.features.sequence_dataset import Shuffle, collect_series, load_to_device, train_batches
from ichpipe.index.index_writer import write_outputs
from ichpipe.index.slice_index import read_index
from ichpipe.models.end_to_end import EndToEnd, backward_in_chunks
from ichpipe.models.header import SequenceSpec
from ichpipe.models.sequence import build_sequence, stored_inputs
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.models.weights import save_model
from ichpipe.params.schema import PAPER_WINDOWS, load_params
from ichpipe.training.trainer import weighted_bce

if TYPE_CHECKING:
    import argparse

PAPER = {"cell": "lstm", "hidden": 512, "layers": 2, "inputs": ["embedding"], "warmup_epochs": 0.1}
AVERAGE = {"cell": "average", "inputs": ["logits"]}
EPOCH = re.compile(r"epoch (\d+)/\d+: train ([\d.]+), validation ([\d.]+)")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--slices", type=int, default=752_803)
    parser.add_argument("--series", type=int, default=21_744)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-series", type=int, default=32)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--labels", type=Path, nargs="*", default=[])
    parser.add_argument("--headers", type=Path)
    parser.add_argument("--composition", type=Path, help="table ID,series: each study has the labels of a real series")


def ratios(result: dict[str, Any]) -> dict[str, float | None]:
    """Pick the ratio."""
    return {"end to end, times as long": result["end_to_end_epoch_over_cached_epoch"]}


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Make index, network and store, then train arms on them, and measure an end-to-end step beside them."""
    tables = [pd.read_csv(path) for path in options.labels]
    rows = simulate.label_rows(tables)
    series = simulate.real_series(pd.read_csv(options.composition), pd.concat(tables)) if options.composition else []
    known = _real_lengths(options.headers) if options.headers else None
    lengths = store.series_lengths(options.slices, options.series, known)
    made = simulate.simulate(lengths, rows, series=series)
    recipe = {"epochs": options.epochs, "batch_series": options.batch_series, "precision": options.precision}
    arms = {
        "slice-cnn": AVERAGE | {"kernel": 1},
        "moving-average": AVERAGE | {"kernel": 3},
        "paper": PAPER | recipe,
    }
    params_file = write_params(folder, options, arms)
    artifacts = Artifacts(folder / "artifacts")
    written = write_store(artifacts, made, options)
    fits = {arm: fit(folder, params_file, arm) for arm in arms}
    compared = command(folder, params_file, "compare", "--baseline", "slice-cnn")
    epoch = min(one["seconds"] for one in fits["paper"]["epochs"])
    step = end_to_end(options)
    train_slices = fits["paper"]["train_slices"] = written.pop("train_slices")
    return {
        "threads": torch.get_num_threads(),
        "labels": describe(made, rows),
        "write": written,
        "loading": loading(params_file, artifacts),
        "arms": fits,
        "compare": json.loads((folder / "artifacts" / "compare" / "arms.json").read_text()),
        "compare_seconds": compared["seconds"],
        "end_to_end": step,
        "slices_per_second": train_slices / epoch,
        "end_to_end_epoch_over_cached_epoch": step["seconds_per_slice"] * train_slices / epoch,
    }


def write_params(folder: Path, options: argparse.Namespace, arms: dict[str, Any]) -> Path:
    """Write the parameters of the run."""
    params = {
        "prepare": {"size_px": options.size},
        "fit-slices": {"backbone": options.backbone},
        "sequence": arms,
        "finetune": {"arm": "paper"},
        "evaluate": {"bootstrap_samples": 1000},
    }
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(params), encoding="utf-8")
    return path


def write_store(artifacts: Artifacts, made: simulate.Simulated, options: argparse.Namespace) -> dict[str, Any]:
    """Write index, an untrained network of the right shape, and the simulated rows under its name."""
    index = extract_unchanged.make_index(made.lengths)
    index[list(CLASSES)] = made.labels
    index["position_mm"], index["spacing_mm"] = index["slice_index"] * 5.0, 5.0
    series = np.repeat(np.arange(len(made.lengths)), made.lengths)
    index["split"] = np.select([series % 10 == 0, series % 20 == 1], ["test", "val"], "train")  # RSNA: 10.4 % test
    write_outputs(artifacts.index_dir, index, pd.DataFrame({"path": [], "reason": []}), {})
    torch.manual_seed(0)
    cnn = SliceCnn(spec_for(options.backbone, PAPER_WINDOWS, options.size, 0.0))
    save_model(artifacts.slice_cnn, cnn, {"index": digest_of_file(artifacts.index)})
    cache = GenerationSpec(artifacts.slice_cnn, read_index(artifacts.index))
    generation = Generation(cache.identity(), cnn.embedding_dim, CLASSES, 4096)

    def compute(numbers: Any) -> Any:
        chosen = np.asarray(numbers)
        return made.embedding(chosen, cnn.embedding_dim), made.logits(chosen)

    start = time.perf_counter()
    work = Work(range(len(index)), lambda _worker: compute, lambda: connect(1, None))
    for _ in update(StoreLocation(str(artifacts.embeddings)), generation, cache.rows(), work):
        pass
    return {"seconds": round(time.perf_counter() - start, 1), "train_slices": int((index["split"] == "train").sum())}


def fit(folder: Path, params_file: Path, arm: str) -> dict[str, Any]:
    """Train one arm by the command; seconds of each epoch of training and validation, and peak memory."""
    done = command(folder, params_file, "fit-sequence", "--arm", arm)
    ends = [(float(stamp), EPOCH.search(line)) for stamp, line in done["lines"]]
    epochs, before = [], None
    for stamp, found in ends:
        if found:
            epochs.append({"train_loss": float(found[2]), "val_loss": float(found[3]), "at": stamp})
    record = json.loads((folder / "artifacts" / "sequence" / arm / "record.json").read_text())
    starts = [done["seconds"] - record["wall_seconds"], *(one["at"] for one in epochs)]
    for one, before in zip(epochs, starts, strict=False):
        one["seconds"] = round(one.pop("at") - before, 1)
    return {"seconds": done["seconds"], "peak_mb": done["peak_mb"], "epochs": epochs, "record": record["seeds"]}


def command(folder: Path, params_file: Path, *words: str) -> dict[str, Any]:
    """Run a command of ours; its seconds, its lines with the time at which each came, and peak memory so far."""
    start = time.perf_counter()
    line = kit.ichpipe("--params", params_file, "--artifacts", folder / "artifacts", *words)
    lines: list[tuple[float, str]] = []
    with subprocess.Popen(
        line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ
    ) as process:
        lines = [(time.perf_counter() - start, said.rstrip()) for said in process.stderr or ()]
    if process.returncode:
        raise RuntimeError(f"{words}: " + "\n".join(said for _, said in lines))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"seconds": round(time.perf_counter() - start, 1), "lines": lines, "peak_mb": round(peak)}


def loading(params_file: Path, artifacts: Artifacts) -> dict[str, Any]:
    """Time one epoch of batches without a network: what the data costs beside the training on it."""
    params = load_params(params_file)
    section, index = params.sequence["paper"], read_index(artifacts.index)
    features = open_features(params, artifacts, index, section)
    train = collect_series(features, index[index["split"] == "train"])
    names = stored_inputs(section.all_inputs)
    held = load_to_device(choose_device("auto"), train, names)
    seconds = []
    for epoch in (1, 2):  # the first also compares every chunk's checksum
        start = time.perf_counter()
        total = sum(
            int(batch.lengths.sum()) for batch in train_batches(held, names, section.batch_series, Shuffle(0, epoch))
        )
        seconds.append(time.perf_counter() - start)
    size = total * features.plain.embedding_dim * 2
    return {"seconds": [round(one, 1) for one in seconds], "gigabytes_per_second": round(size / seconds[1] / 1e9, 2)}


def end_to_end(options: argparse.Namespace, slices: int = 8, chunk: int = 4) -> dict[str, Any]:
    """Time the exact gradient of a series end to end (two passes over the slices), without decoding, per slice."""
    device = choose_device("auto")
    cnn = SliceCnn(spec_for(options.backbone, PAPER_WINDOWS, options.size, 0.0))
    spec = SequenceSpec(
        cell="lstm", hidden=512, layers=2, bidirectional=True, dropout=0.0, inputs=("embedding",),
        embedding_dim=cnn.embedding_dim,
    )  # fmt: skip
    model = EndToEnd(cnn, build_sequence(spec)).to(device).train()
    hu = torch.randint(-1000, 1000, (slices, 1, options.size, options.size), dtype=torch.int16, device=device)
    labels, places = torch.zeros(slices, 6, device=device), torch.arange(slices, device=device) * 5.0
    parts = [functools.partial(hu.__getitem__, slice(at, at + chunk)) for at in range(0, slices, chunk)]
    seconds = {}
    for precision in ("fp32", options.precision):
        context = functools.partial(autocast, device, precision)
        for _ in range(2):
            start = time.perf_counter()
            backward_in_chunks(model, parts, places, functools.partial(_loss, labels), context=context, seed=0)
            if device.type != "cpu":
                torch.accelerator.synchronize()
            seconds[precision] = (time.perf_counter() - start) / slices
    fastest = min(seconds.values())
    return {"slices": slices, "chunk_slices": chunk, "by_precision": seconds, "seconds_per_slice": fastest}


def _loss(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return weighted_bce(logits.float(), labels)


def describe(made: simulate.Simulated, rows: np.ndarray) -> dict[str, Any]:
    """Return what was drawn beside what the tables hold."""
    return {
        "slices": len(made.labels),
        "series": len(made.lengths),
        "prevalence": dict(zip(CLASSES, made.labels.mean(axis=0).round(4).tolist(), strict=True)),
        "prevalence_of_the_table": dict(zip(CLASSES, rows.mean(axis=0).round(4).tolist(), strict=True)),
        "linear_head_loss": made.linear_loss,
        "signal_strength": made.strength,
    }


def _real_lengths(headers: Path) -> np.ndarray:
    table = pd.read_csv(headers, usecols=["SOPInstanceUID", "SeriesInstanceUID"]).drop_duplicates("SOPInstanceUID")
    return table.groupby("SeriesInstanceUID").size().to_numpy()


BENCHMARK = kit.Benchmark(
    "an epoch of stage two on cached embeddings", run, ratios, add_options,
    {"slices": 12_000, "series": 346, "backbone": "resnet10t", "size": 32, "batch_series": 8, "precision": "fp32"},
)  # fmt: skip

if __name__ == "__main__":
    BENCHMARK.main(__file__, __doc__)
