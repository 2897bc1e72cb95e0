"""What a run left behind, read for the page. A file that is not there is a gap on the page, not an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ichpipe.common.artifacts import HISTORY_FILE, PREDICTIONS_FILE, RECORD_FILE
from ichpipe.common.files import read_json
from ichpipe.scoring.heldout_predictions import FINETUNED, SLICE_CNN, read_predictions, sequence_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd

    from ichpipe.common.artifacts import Artifacts


@dataclass(frozen=True)
class Facts:
    """All that the page is made of, apart from pictures. None and empty: not there."""

    summary: dict[str, Any] | None  # index/summary.json
    metrics: dict[str, Any] | None  # metrics/evaluate.json
    curves: dict[str, list[dict[str, Any]]]  # roc, precision_recall, calibration: rows with model and class
    histories: dict[str, list[dict[str, Any]]]  # by the name of the model
    records: dict[str, dict[str, Any]]  # by the name of the model
    comparison: dict[str, Any] | None  # compare/arms.json
    test: pd.DataFrame | None  # the fine-tuned model's predictions of the test slices
    val: pd.DataFrame | None  # … of the validation slices
    params: dict[str, Any]


def model_title(name: str) -> str:
    """Return a model's name as people write it."""
    return {SLICE_CNN: "slice CNN", FINETUNED: "fine-tuned"}.get(name, name.replace("sequence-", "sequence, ", 1))


def read_facts(artifacts: Artifacts, arms: Sequence[str], params: dict[str, Any]) -> Facts:
    """Read what is there of a run; a torn file is an error that names it (DataError)."""
    folders = {SLICE_CNN: artifacts.slice_cnn}
    folders |= {sequence_name(arm): artifacts.sequence(arm) for arm in arms}
    folders |= {FINETUNED: artifacts.finetuned}
    histories = {name: _optional(folder / HISTORY_FILE) for name, folder in folders.items()}
    records = {name: _optional(folder / RECORD_FILE) for name, folder in folders.items()}
    kinds = ("roc", "precision_recall", "calibration")
    test, val = _predictions(artifacts)
    return Facts(
        summary=_optional(artifacts.index_dir / "summary.json"),
        metrics=_optional(artifacts.metrics),
        curves={kind: _optional(artifacts.plots / f"{kind}.json") or [] for kind in kinds},
        histories={name: found for name, found in histories.items() if found},
        records={name: found for name, found in records.items() if found},
        comparison=_optional(artifacts.comparison / "arms.json"),
        test=test,
        val=val,
        params=params,
    )


def _optional(path: Path) -> Any:
    return read_json(path) if path.exists() else None


def _predictions(artifacts: Artifacts) -> tuple[pd.DataFrame | None, pd.DataFrame | None]:
    """Return test and validation predictions of the fine-tuned model; None where there are none."""
    if not (artifacts.finetuned / PREDICTIONS_FILE).exists():
        return None, None
    table = read_predictions(artifacts.finetuned, "ichpipe finetune")
    parts = [table[table["split"] == split].reset_index(drop=True) for split in ("test", "val")]
    test, val = (None if part.empty else part for part in parts)
    return test, val
