"""Refuses a model whose inputs have changed.

A model trained under another split may have seen the patients that are held out now. A sequence model fed with
another network's embeddings gives meaningless numbers. Shapes show neither; ``made_from`` shows both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ichpipe.common.artifacts import MODEL_FILE, RECORD_FILE
from ichpipe.common.errors import IchpipeError, WeightsError
from ichpipe.common.files import read_json
from ichpipe.models.header import read_header

if TYPE_CHECKING:
    from pathlib import Path

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.params.schema import Params

MEANING = {
    "index": "index (slices, labels or split)",
    "embeddings": "embedding store",
    "slice_cnn": "slice CNN",
    "sequence": "sequence model",
}


def require_made_from(folder: Path, digests: dict[str, str], command: str) -> None:
    """Refuse the model in ``folder`` unless its inputs have these ``digests`` (SHA-256, by name).

    Raises WeightsError that names each input that differs and the ``command`` that trains the model anew.
    """
    made_from = read_header(folder, f"run: {command}").made_from
    changed = [MEANING.get(name, name) for name, digest in digests.items() if made_from.get(name) != digest]
    if changed:
        inputs = " and another ".join(changed)
        raise WeightsError(f"{folder / MODEL_FILE} was trained on another {inputs} than there is now; run: {command}")


def is_fitted(folder: Path, params: dict[str, Any], made_from: dict[str, str]) -> bool:
    """Return whether the model in ``folder`` was trained with these parameters on these inputs, and written whole.

    The record is written last. Code is not compared: a new version of this package alone retrains nothing.
    """
    try:
        require_made_from(folder, made_from, "")
        return bool(read_json(folder / RECORD_FILE)["params"] == params)
    except (IchpipeError, KeyError, TypeError):
        return False


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
