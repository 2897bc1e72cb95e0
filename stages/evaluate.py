"""Score slice CNN, every sequence arm and the fine-tuned model on the same held-out patients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ichpipe.artifacts import HISTORY_FILE, MODEL_FILE
from ichpipe.caches import made_by, open_features
from ichpipe.classes import CLASSES
from ichpipe.device import choose_device
from ichpipe.embedding import classify_series, to_probabilities
from ichpipe.errors import DataError, UnreadableDicomError
from ichpipe.feeding import load_slices
from ichpipe.figures import ladder, learning_curves, roc, study_sheet
from ichpipe.files import atomic_path, digest_of, digest_of_file, read_json, write_json, write_text
from ichpipe.lineage import require_made_from
from ichpipe.metrics import curves
from ichpipe.models.weights import load_end_to_end, load_sequence
from ichpipe.predictions import (
    FINETUNED,
    LABELS,
    SLICE_CNN,
    ladder_text,
    make_table,
    score_all,
    sequence_name,
    write_table,
)
from ichpipe.progress import track
from ichpipe.series import predict_rows, read_series
from ichpipe.studies import read_index

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    import torch
    from numpy.typing import NDArray

    from ichpipe.artifacts import Artifacts
    from ichpipe.params import Params
    from ichpipe.series import LabelledSeries


def run(params: Params, artifacts: Artifacts, gpu: str = "auto") -> str:
    """Write metrics, plots and predictions; return the ladder of models as a table of text."""
    device = choose_device(gpu)
    index = read_index(artifacts.index)
    held_out = known_slices(index, "test")
    features = open_features(params, artifacts, index)
    _require_one_run(params, artifacts, index)
    series = read_series(features, held_out)
    tables = {SLICE_CNN: make_table(held_out, _slice_probabilities(series, len(held_out)))}
    for arm in params.sequence:
        model = load_sequence(artifacts.sequence(arm)).to(device)
        tables[sequence_name(arm)] = make_table(held_out, predict_rows(model, series, len(held_out), device))
    tables[FINETUNED] = make_table(held_out, _finetuned_probabilities(artifacts, held_out, device))
    overlap = frozenset(index.loc[index["split"].isna(), "patient_id"])
    metrics = score_all(tables, params.evaluate, params.finetune.arm, overlap)
    write_json(artifacts.metrics, metrics)
    for name, table in tables.items():
        write_table(table, artifacts.predictions / f"{name}.parquet")
    write_plots(artifacts.plots, metrics, tables)
    _write_learning_curves(artifacts, list(params.sequence))
    _write_study_sheet(artifacts.plots / "study.png", held_out, tables)
    text = ladder_text(metrics)
    write_text(artifacts.metrics.with_name("ladder.txt"), text + "\n")
    return text


def known_slices(index: pd.DataFrame, split: str) -> pd.DataFrame:
    """Return the series of a split whose labels are all known; none is an error."""
    chosen = index[index["split"] == split]
    unknown = chosen["series_uid"][chosen[list(CLASSES)].isna().any(axis=1)]
    chosen = chosen[~chosen["series_uid"].isin(unknown)].reset_index(drop=True)
    if chosen.empty:
        raise DataError(f"the {split} split holds no series with labels; check prepare.labels and the split's fraction")
    return chosen


def write_plots(folder: Path, metrics: dict[str, Any], tables: dict[str, pd.DataFrame]) -> None:
    """Write ROC, precision-recall and calibration points as JSON for DVC, and the pictures of them."""
    points = {name: curves(table[LABELS].to_numpy(), table[list(CLASSES)].to_numpy()) for name, table in tables.items()}
    for kind in ("roc", "precision_recall", "calibration"):
        rows = [{"model": name, **row} for name, found in points.items() for row in found[kind]]
        write_json(folder / f"{kind}.json", rows)
    _write_png(folder / "ladder.png", ladder(metrics))
    _write_png(folder / "roc.png", roc({name: found["roc"] for name, found in points.items()}))


def _require_one_run(params: Params, artifacts: Artifacts, slices: pd.DataFrame) -> None:
    """Refuse models of another split, or of another network's embeddings: their scores would look like any other."""
    index = digest_of_file(artifacts.index)
    require_made_from(artifacts.slice_cnn, {"index": index}, "ichpipe fit-slices")
    for arm, section in params.sequence.items():
        made_from = {"index": index, "embeddings": digest_of(made_by(params, artifacts, slices, section))}
        require_made_from(artifacts.sequence(arm), made_from, f"ichpipe fit-sequence --arm {arm}")
    parts = {"slice_cnn": artifacts.slice_cnn, "sequence": artifacts.sequence(params.finetune.arm)}
    digests = {name: digest_of_file(folder / MODEL_FILE) for name, folder in parts.items()}
    require_made_from(artifacts.finetuned, {"index": index, **digests}, "ichpipe finetune")


def _slice_probabilities(series: list[LabelledSeries], n_rows: int) -> NDArray[np.float64]:
    result = np.full((n_rows, len(CLASSES)), np.nan)
    for one in series:
        result[one.rows] = to_probabilities(one.sources[0].tensors(("logits",))["logits"])
    return result


def _finetuned_probabilities(artifacts: Artifacts, index: pd.DataFrame, device: torch.device) -> NDArray[np.float64]:
    model = load_end_to_end(artifacts.finetuned).to(device)
    result = np.full((len(index), len(CLASSES)), np.nan)
    groups = index.groupby("series_uid", sort=False).indices
    for rows in track(groups.values(), "evaluate", len(groups), "series"):
        logits, bad = classify_series(model, index["path"].iloc[rows].tolist(), device)
        if bad:
            raise UnreadableDicomError(bad[0][1])
        result[rows] = to_probabilities(logits)
    return result


def _write_learning_curves(artifacts: Artifacts, arms: list[str]) -> None:
    folders = {"slice CNN": artifacts.slice_cnn} | {f"sequence, {arm}": artifacts.sequence(arm) for arm in arms}
    folders["fine-tuned"] = artifacts.finetuned
    histories = {name: read_json(folder / HISTORY_FILE) for name, folder in folders.items()}
    rows = [{"model": name, **line} for name, lines in histories.items() for line in lines]
    write_json(artifacts.plots / "learning_curves.json", rows)
    _write_png(artifacts.plots / "learning_curves.png", learning_curves(histories))


def _write_study_sheet(target: Path, held_out: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> None:
    """Show the held-out series with the median number of positive slices among those that have any."""
    counts = held_out.groupby("series_uid")["any"].sum().sort_values(kind="stable")
    positive = counts[counts > 0] if (counts > 0).any() else counts
    uid = positive.index[len(positive) // 2]
    rows = held_out["series_uid"] == uid
    hu = load_slices(held_out["path"][rows].tolist(), 256).numpy()[:, 0]
    probabilities = {name: table[list(CLASSES)].to_numpy()[rows] for name, table in tables.items()}
    labels = held_out[list(CLASSES)].to_numpy()[rows]
    _write_png(target, study_sheet(hu, probabilities, labels, f"held-out series {uid}"))


def _write_png(target: Path, content: bytes) -> None:
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)
