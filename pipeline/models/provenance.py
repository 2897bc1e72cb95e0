"""Refuses a model whose inputs have changed.

A model trained under another split may have seen the patients that are held out now, and a sequence model fed with
another network's embeddings gives numbers that mean nothing. Shapes show neither; ``made_from`` shows both.
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


def require_made_from(folder: Path, wanted: dict[str, str], command: str) -> None:
    """Refuse the model in ``folder`` unless its inputs have the digests ``wanted`` (by name, SHA-256).

    Raises WeightsError that names each input that differs and the ``command`` that trains the model anew.
    """
    found = read_header(folder, f"run: {command}").made_from
    other = [MEANING.get(name, name) for name, digest in wanted.items() if found.get(name) != digest]
    if other:
        what = " and another ".join(other)
        raise WeightsError(f"{folder / MODEL_FILE} was trained on another {what} than there is now; run: {command}")


def is_fitted(folder: Path, params: dict[str, Any], made_from: dict[str, str]) -> bool:
    """Say whether the model in ``folder`` was trained with these parameters on these inputs, and written whole.

    The record is written last. Code is not compared: a new version of this package trains nothing anew by itself.
    """
    try:
        require_made_from(folder, made_from, "")
        return bool(read_json(folder / RECORD_FILE)["params"] == params)
    except (IchpipeError, KeyError, TypeError):
        return False
