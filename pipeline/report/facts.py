"""Reads the files of a run for the page. A missing file is a gap on the page, not an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ichpipe.common.artifacts import HISTORY_FILE, PREDICTIONS_FILE, RECORD_FILE
from ichpipe.common.files import read_json
from ichpipe.scoring.heldout_predictions import FINETUNED, SLICE_CNN, read_predictions, sequence_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd

    from ichpipe.common.artifacts import Artifacts


@dataclass(frozen=True)
class Facts:
    """All that the page is made of, apart from pictures; None or empty where the run has no such file."""

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


def rungs_of(metrics: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (title, scores) of each model, from the slice CNN to the fine-tuned one."""
    rungs = [(model_title(SLICE_CNN), metrics[SLICE_CNN])]
    rungs += [(model_title(sequence_name(arm)), scores) for arm, scores in metrics["sequence"].items()]
    return [*rungs, (model_title(FINETUNED), metrics[FINETUNED])]


def read_facts(artifacts: Artifacts, arms: Sequence[str], params: dict[str, Any]) -> Facts:
    """Read the files of a run; a torn file is an error that names it (DataError)."""
    folders = {SLICE_CNN: artifacts.slice_cnn}
    folders |= {sequence_name(arm): artifacts.sequence(arm) for arm in arms}
    folders |= {FINETUNED: artifacts.finetuned}
    splits: dict[str, pd.DataFrame] = {}
    if (artifacts.finetuned / PREDICTIONS_FILE).exists():
        predictions = read_predictions(artifacts.finetuned, "ichpipe finetune")
        splits = {str(split): rows.reset_index(drop=True) for split, rows in predictions.groupby("split")}
    kinds = ("roc", "precision_recall", "calibration")
    return Facts(
        summary=_read_optional(artifacts.index_dir / "summary.json"),
        metrics=_read_optional(artifacts.metrics),
        curves={kind: _read_optional(artifacts.plots / f"{kind}.json") or [] for kind in kinds},
        histories={name: rows for name, path in folders.items() if (rows := _read_optional(path / HISTORY_FILE))},
        records={name: record for name, path in folders.items() if (record := _read_optional(path / RECORD_FILE))},
        comparison=_read_optional(artifacts.comparison / "arms.json"),
        test=splits.get("test"),
        val=splits.get("val"),
        params=params,
    )


def _read_optional(path: Path) -> Any:
    return read_json(path) if path.exists() else None
