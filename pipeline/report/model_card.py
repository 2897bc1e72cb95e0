"""What a model is, was trained on, can and can't do: ``config.json`` and a page for people beside the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ichpipe.common.artifacts import MODEL_FILE, RECORD_FILE
from ichpipe.common.classes import CLASSES
from ichpipe.common.files import digest_of_file, read_json
from ichpipe.scoring import metrics
from ichpipe.scoring.heldout_predictions import LABELS, read_predictions

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from ichpipe.params.schema import EvaluateParams

INTENDED = (
    "Research on intracranial haemorrhage in non-contrast head CT of adults: a probability for each slice of a series, "
    "for any haemorrhage and five subtypes."
)
LIMITS = (
    "Not a medical device. Never for decisions about a patient.",
    "Probabilities hold for data like the training data; other scanners, protocols, ages and prevalences shift them.",
    "Trained on labels of single slices: it says where along the head, not where in the image.",
    "`ichpipe predict` refuses what the header shows to be no plain head CT; what the pixels show is not judged.",
)


def make_card(
    folder: Path, network: dict[str, Any], index: pd.DataFrame, dataset: str, evaluate: EvaluateParams
) -> dict[str, Any]:
    """Describe the end-to-end model in ``folder``; ``network`` is what its file says (``Header.description``).

    Scores are those of its own predictions on the held-out patients, which carry its digest; without labelled test
    patients there are none.
    """
    record = read_json(folder / RECORD_FILE)
    return {
        **network,
        "model_sha256": digest_of_file(folder / MODEL_FILE),
        "training_data": {"dataset": dataset} | {split: _counts(index, split) for split in ("train", "val", "test")},
        "metrics": {"validation": {"weighted_log_loss": record["val_loss"]}, "test": _scores(folder, evaluate)},
        "training": {name: record[name] for name in ("params", "device", "versions", "commit")},
        "intended_use": INTENDED,
        "limits": list(LIMITS),
    }


def card_text(card: dict[str, Any]) -> str:
    """Return the card as a page (markdown)."""
    cnn, sequence, test = card["slice_cnn"], card["sequence"], card["metrics"]["test"]
    windows = ", ".join(f"{one['level_hu']:g}/{one['width_hu']:g}" for one in cnn["windows"])
    lines = [
        "# Intracranial haemorrhage on head CT, slice by slice",
        "",
        card["intended_use"],
        "",
        *(f"* {limit}" for limit in card["limits"]),
        "",
        "| | |",
        "|---|---|",
        f"| slice CNN | {cnn['backbone']}, {cnn['size_px']} px, windows (level/width, HU) {windows} |",
        f"| sequence model | {sequence['cell']}, {sequence['layers']} x {sequence['hidden']}"
        f"{', bidirectional' if sequence['bidirectional'] else ''}, inputs {', '.join(sequence['inputs'])} |",
        f"| output | probabilities of {', '.join(card['classes'])}, in this order |",
        f"| weights | {MODEL_FILE}, SHA-256 {card['model_sha256']} |",
        *(f"| {split} | {_sentence(card['training_data'][split])} |" for split in ("train", "val", "test")),
        f"| data | {card['training_data']['dataset']} |",
        "",
        *(_score_lines(test) if test else ["No labelled patients were held out: nothing is known of its accuracy."]),
        "",
        "`ichpipe predict DICOM --out DIR --model THIS_FOLDER` runs it; nothing in this folder is unpickled.",
    ]
    return "\n".join(lines) + "\n"


def _counts(index: pd.DataFrame, split: str) -> dict[str, Any]:
    rows = index[index["split"] == split]
    return {
        "patients": int(rows["patient_id"].nunique()),
        "studies": int(rows["study_uid"].nunique()),
        "slices": len(rows),
        "positive_slices": {name: int((rows[name] == 1).sum()) for name in CLASSES},
    }


def _scores(folder: Path, evaluate: EvaluateParams) -> dict[str, Any] | None:
    table = read_predictions(folder, "ichpipe finetune")
    table = table[table["split"] == "test"]
    if table.empty:
        return None
    labels, values = table[LABELS].to_numpy(), table[list(CLASSES)].to_numpy(np.float64)
    groups = table["patient_id"].to_numpy(), table["series_uid"].to_numpy()
    return metrics.score(labels, values, *groups, **evaluate.bootstrap())


def _sentence(counts: dict[str, Any]) -> str:
    positive = ", ".join(f"{name} {number}" for name, number in counts["positive_slices"].items())
    return f"{counts['patients']} patients, {counts['studies']} studies, {counts['slices']} slices ({positive})"


def _score_lines(test: dict[str, Any]) -> list[str]:
    low, high = test["weighted_log_loss_ci"]
    head = f"Held-out patients: weighted log loss {test['weighted_log_loss']:.4f} [{low:.4f}, {high:.4f}]."
    rows = [f"| {name} | {_interval(test['auc'][name])} | {_interval(test['study_auc'][name])} |" for name in CLASSES]
    return [head, "", "| class | AUC, slice | AUC, study |", "|---|---|---|", *rows]


def _interval(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "–"
    text = f"{found['value']:.3f}"
    return text if found["ci_low"] is None else f"{text} [{found['ci_low']:.3f}, {found['ci_high']:.3f}]"
