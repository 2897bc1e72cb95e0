"""How long ``ichpipe score`` takes on as many slices as RSNA's stage-1 training set, start of the program included.

python benchmarks/score.py --out score.json        # 674,258 slices, 17,000 patients; 350 MB of disk
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import kit
import numpy as np
import pandas as pd

from ichpipe.common.classes import CLASSES

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

PREVALENCE = (0.1440, 0.0041, 0.0483, 0.0352, 0.0476, 0.0630)


BARE = """
import pandas as pd
from sklearn.metrics import log_loss, roc_auc_score
names = {names!r}
labels, found = (pd.read_csv(path).set_index("sop_uid") for path in ("labels.csv", "predictions.csv"))
found = found.loc[labels.index]
[(log_loss(labels[name], found[name]), roc_auc_score(labels[name], found[name])) for name in names]
"""
"""What a user would write: no intervals, no checks, and the tables are wide."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--slices", type=int, default=674_258)
    parser.add_argument("--patients", type=int, default=17_000)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run it."""
    return run(folder, options.slices, options.patients)


def ratios(result: dict[str, Any]) -> dict[str, float | None]:
    """Pick the ratios."""
    return {f"{name}, times as long": seconds / result["bare_seconds"] for name, seconds in result["seconds"].items()}


def run(folder: Path, n_slices: int, n_patients: int) -> dict[str, Any]:
    """Make tables of that size in three forms, and time the command on pairs of them."""
    labels, predictions = make_tables(n_slices, n_patients)
    labels.to_parquet(folder / "index.parquet")
    wide(labels, folder / "labels.csv")
    wide(predictions, folder / "predictions.csv")
    long(labels, folder / "labels-long.csv")
    long(predictions, folder / "submission.csv")
    pairs = {
        "by patient, wide predictions": ("predictions.csv", "index.parquet"),
        "by patient, submission": ("submission.csv", "index.parquet"),
        "by slice, wide tables": ("predictions.csv", "labels.csv"),
        "by slice, submission and Kaggle's labels": ("submission.csv", "labels-long.csv"),
    }
    timed = {name: scored(folder, *pair) for name, pair in pairs.items()}
    bare = seconds_of(folder, [sys.executable, "-c", BARE.format(names=CLASSES)])
    megabytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"n_slices": n_slices, "seconds": timed, "bare_seconds": bare, "largest_process_mb": round(megabytes)}


def make_tables(n_slices: int, n_patients: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return labels of RSNA's prevalence and predictions (AUC near .97), the latter in another order of rows."""
    generator = np.random.default_rng(0)
    uids = [f"ID_{number:09x}" for number in range(n_slices)]
    patients = np.sort(generator.integers(n_patients, size=n_slices))
    names = [f"P{number:06d}" for number in patients]
    true = generator.random((n_slices, 6)) < PREVALENCE
    true[:, 0] = true[:, 1:].any(axis=1)
    found = 1.0 / (1.0 + np.exp(3.0 - 2.7 * true - generator.normal(size=true.shape)))
    groups = pd.DataFrame({"sop_uid": uids, "patient_id": names, "series_uid": names})
    labels = groups.join(pd.DataFrame(true.astype(float), columns=list(CLASSES)))
    predictions = groups[["sop_uid"]].join(pd.DataFrame(found, columns=list(CLASSES)))
    return labels, predictions.iloc[generator.permutation(n_slices)]


def wide(table: pd.DataFrame, path: Path) -> None:
    """Write one row a slice, without patients."""
    table[["sop_uid", *CLASSES]].to_csv(path, index=False, float_format="%.6g")


def long(table: pd.DataFrame, path: Path) -> None:
    """Write Kaggle's form, six rows a slice."""
    rows = table.melt(id_vars="sop_uid", value_vars=list(CLASSES), var_name="class", value_name="Label")
    rows.insert(0, "ID", rows["sop_uid"] + "_" + rows["class"])
    rows[["ID", "Label"]].to_csv(path, index=False, float_format="%.6g")


def scored(folder: Path, predictions: str, labels: str) -> float:
    """Return the seconds of one call."""
    return seconds_of(folder, kit.ichpipe("score", predictions, labels, "--format", "rsna"))


def seconds_of(folder: Path, command: list[str]) -> float:
    """Return the seconds that a program takes."""
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return round(time.perf_counter() - start, 2)


BENCHMARK = kit.Benchmark(
    "pandas and scikit-learn: log loss and AUC of two wide tables, without intervals", measure, ratios, add_options,
    {"slices": 600, "patients": 30},
)  # fmt: skip

if __name__ == "__main__":
    BENCHMARK.main(__file__, __doc__)
