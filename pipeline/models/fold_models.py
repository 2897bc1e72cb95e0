"""Out-of-fold slice CNNs: number f is trained on the train patients of all folds but f."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ichpipe.common.artifacts import MODEL_FILE
from ichpipe.common.errors import WeightsError
from ichpipe.models.header import read_header, require_made_from

if TYPE_CHECKING:
    from pathlib import Path

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.params.schema import Params


def fold_numbers(params: Params) -> list[int]:
    """Return the folds that have a slice CNN of their own: none where ``fit-slices.folds`` is 0.

    A CNN is more certain of the slices it was fitted on, so a sequence model trains on embeddings of each train
    patient by the CNN that left this patient's fold out. ``prepare.test_fold`` has none: every CNN leaves it out.
    """
    return [fold for fold in range(params.fit_slices.folds) if fold != params.prepare.test_fold]


def fold_models(artifacts: Artifacts, params: Params, index_digest: str) -> dict[int, Path]:
    """Return the model folder of each of `fold_numbers`, checked to be what its name says.

    ``index_digest`` is the SHA-256 of the index file. Raises MissingFileError where a model is absent, WeightsError
    where one was trained on another index or left out another fold; both name the file and the remedy.
    """
    command, folders = "ichpipe fit-slices", {fold: artifacts.fold_cnn(fold) for fold in fold_numbers(params)}
    for fold, folder in folders.items():
        require_made_from(folder, {"index": index_digest}, command)
        made_from = read_header(folder).made_from
        left_out, folds = made_from.get("excluded_fold"), made_from.get("folds")
        if (left_out, folds) != (str(fold), str(params.fit_slices.folds)):
            patients = "on all folds" if None in (left_out, folds) else f"without fold {left_out} of {folds}"
            raise WeightsError(
                f"{folder / MODEL_FILE} was trained {patients}, wanted without fold {fold} of "
                f"{params.fit_slices.folds}: it may have seen the slices that it is to embed; run: {command}"
            )
    return folders
