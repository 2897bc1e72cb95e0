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
