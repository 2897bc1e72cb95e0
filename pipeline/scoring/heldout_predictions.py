"""Held-out predictions: one table a model, marked with the model that made it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ichpipe.common.artifacts import MODEL_FILE, PREDICTIONS_FILE
from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.common.files import atomic_path, digest_of_file, require_file

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

MODEL_KEY = b"ichpipe.model"
POOLED = "pooled"  # mark of predictions by the models of several folds
KEYS = ["split", "patient_id", "study_uid", "series_uid", "sop_uid", "slice_index", "position_mm"]
LABELS = [f"label_{name}" for name in CLASSES]
SLICE_COLUMNS = [f"slice_{name}" for name in CLASSES]  # probabilities of the slice CNN inside an end-to-end model
SLICE_CNN = "slice_cnn"
FINETUNED = "finetuned"
ENSEMBLE = "ensemble"


class CalibratedModel(NamedTuple):
    """How files and texts name a model that `evaluate` calibrates."""

    title: str
    command: str  # that makes it
    scores: str  # of its calibration, a key of metrics/evaluate.json
    plot: str  # its reliability diagrams, in plots/


CALIBRATED = {
    FINETUNED: CalibratedModel("fine-tuned model", "ichpipe finetune", "calibration", "reliability"),
    ENSEMBLE: CalibratedModel("ensemble", "ichpipe ensemble", "ensemble_calibration", "reliability_ensemble"),
}


def sequence_name(arm: str) -> str:
    """Return the name of an arm's predictions."""
    return f"sequence-{arm}"


def pair_name(later: str, earlier: str) -> str:
    """Return the name of a comparison of two models, a key of ``paired`` in ``evaluate.json``."""
    return f"{later} against {earlier}"


def known_slices(index: pd.DataFrame, split: str) -> pd.DataFrame:
    """Return the rows of the series of a split whose labels are all known."""
    chosen = index[index["split"] == split]
    unknown = chosen["series_uid"][chosen[list(CLASSES)].isna().any(axis=1)]
    return chosen[~chosen["series_uid"].isin(unknown)].reset_index(drop=True)


def held_out(index: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that a model predicts once it is trained: validation, then test."""
    return pd.concat([known_slices(index, split) for split in ("val", "test")], ignore_index=True)


def make_table(
    index: pd.DataFrame, probabilities: NDArray[np.float64], slice_probabilities: NDArray[np.float64] | None = None
) -> pd.DataFrame:
    """Join the identifiers and labels of the held-out slices with probabilities (n, 6).

    ``slice_probabilities`` (n, 6) are those of the slice CNN inside an end-to-end model.
    """
    if np.isnan(probabilities).any():
        missing = index["series_uid"].iloc[int(np.argmax(np.isnan(probabilities).any(axis=1)))]
        raise DataError(f"series {missing} has no prediction; run: ichpipe extract")
    table = index[KEYS].reset_index(drop=True)
    table[list(CLASSES)] = probabilities
    table[LABELS] = index[list(CLASSES)].to_numpy()
    if slice_probabilities is not None:
        table[SLICE_COLUMNS] = slice_probabilities
    return table


def labels_and_probabilities(table: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both as arrays (n, 6), columns in the order of CLASSES."""
    return table[LABELS].to_numpy(np.float64), table[list(CLASSES)].to_numpy(np.float64)


def slice_probabilities_of(table: pd.DataFrame) -> NDArray[np.float64] | None:
    """Return the slice CNN's own probabilities (n, 6); None where an older ichpipe wrote the table without them."""
    if not set(SLICE_COLUMNS) <= set(table.columns):
        return None
    return table[SLICE_COLUMNS].to_numpy(np.float64)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write one model's predictions as parquet."""
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False)


def write_predictions(table: pd.DataFrame, folder: Path, mark: str) -> None:
    """Write a model's predictions of the held-out slices with the mark of their maker (`model_mark`, POOLED)."""
    whole = pa.Table.from_pandas(table, preserve_index=False)
    marked = whole.replace_schema_metadata({**(whole.schema.metadata or {}), MODEL_KEY: mark})
    with atomic_path(folder / PREDICTIONS_FILE) as temporary:
        pq.write_table(marked, temporary)


def model_mark(folder: Path) -> str:
    """Return the digest of the model in a folder (SHA-256); POOLED without a model."""
    path = folder / MODEL_FILE
    return digest_of_file(path) if path.exists() else POOLED


def read_predictions(folder: Path, command: str) -> pd.DataFrame:
    """Read what the model in ``folder`` predicts; DataError if another model made the file, or it is incomplete."""
    path = require_file(folder / PREDICTIONS_FILE, f"run: {command}")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no whole parquet file ({error}); run: {command}") from error
    if (table.schema.metadata or {}).get(MODEL_KEY) != model_mark(folder).encode():
        raise DataError(f"{path} does not come from the model beside it; run: {command}")
    frame: pd.DataFrame = table.to_pandas()
    return frame


def own_predictions(table: pd.DataFrame, *, average_seeds: bool) -> pd.DataFrame:
    """Return an arm's test predictions without ``seed``: the first seed's, or the mean over all."""
    test = table[table["split"] == "test"]
    parts = [part.reset_index(drop=True) for _, part in test.groupby("seed", sort=False)]
    own = parts[0].drop(columns=["seed"])
    if average_seeds:
        own[list(CLASSES)] = np.mean([part[list(CLASSES)].to_numpy() for part in parts], axis=0)
    return own
