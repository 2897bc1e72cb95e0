"""Out-of-fold slice CNNs: number f is trained on the train patients of all folds but f.

A CNN is more certain of the slices it was fitted on: a sequence model would learn from embeddings unlike new ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ichpipe.common.artifacts import MODEL_FILE
from ichpipe.common.errors import TrainingError, WeightsError
from ichpipe.models.header import require_made_from

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.params.schema import Params

COMMAND = "ichpipe fit-slices"


def fold_numbers(params: Params) -> list[int]:
    """Return the folds that have a CNN of their own: none where ``fit-slices.folds`` is 0.

    ``prepare.test_fold`` has none either: its patients are all held out, so that every CNN leaves them out.
    """
    return [fold for fold in range(params.fit_slices.folds) if fold != params.prepare.test_fold]


def rows_of_fold(index: pd.DataFrame, fold: int) -> pd.DataFrame:
    """Return the train rows of one fold (row labels kept): those that the CNN of this fold never saw."""
    return index[(index["split"] == "train") & (index["fold"] == fold)]


def part_rows(train: pd.DataFrame, fold: int) -> tuple[list[int], list[int]]:
    """Split the positions 0 … n-1 of labelled train rows into those of other folds and those of this one.

    Raises TrainingError where either part is empty.
    """
    inside = train["fold"].to_numpy() == fold
    for rows, fault in ((inside, "holds none"), (~inside, "holds them all, and nothing is left to train on")):
        if not rows.any():
            raise TrainingError(
                f"fit-slices.folds: of {len(train)} train slices with labels, fold {fold} {fault}; "
                "set fit-slices.folds to 0, or lower it and prepare.folds (or add patients), then run: ichpipe prepare"
            )
    return np.flatnonzero(~inside).tolist(), np.flatnonzero(inside).tolist()


def made_from_without(index_digest: str, fold: int, folds: int) -> dict[str, str]:
    """Return what the header of a fold's CNN records: digest of the index file (SHA-256), fold left out, folds."""
    return {"index": index_digest, "excluded_fold": str(fold), "folds": str(folds)}


def fold_models(artifacts: Artifacts, params: Params, index_digest: str) -> dict[int, Path]:
    """Return the model folder of each of `fold_numbers`, checked to be what its name says.

    ``index_digest`` is the SHA-256 of the index file. Raises MissingFileError where a model is absent, WeightsError
    where one was trained on another index or left out another fold; both name the file and the remedy.
    """
    folders = {fold: artifacts.fold_cnn(fold) for fold in fold_numbers(params)}
    for fold, folder in folders.items():
        made_from = require_made_from(folder, {"index": index_digest}, COMMAND)
        left_out, folds = made_from.get("excluded_fold"), made_from.get("folds")
        if (left_out, folds) != (str(fold), str(params.fit_slices.folds)):
            patients = "on all folds" if None in (left_out, folds) else f"without fold {left_out} of {folds}"
            raise WeightsError(
                f"{folder / MODEL_FILE} was trained {patients}, wanted without fold {fold} of "
                f"{params.fit_slices.folds}: it may have seen the slices that it is to embed; run: {COMMAND}"
            )
    return folders
