"""Model card: ``config.json``, and a page for people beside the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ichpipe.common.artifacts import MODEL_FILE, RECORD_FILE
from ichpipe.common.classes import CLASSES
from ichpipe.common.files import digest_of_file, read_json
from ichpipe.scoring.bootstrap import Estimate
from ichpipe.scoring.heldout_predictions import read_predictions
from ichpipe.scoring.model_ladder import score_table

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
    """Describe the end-to-end model or ensemble in ``folder`` as the content of ``config.json``.

    ``network`` is what the model file says (``Header.description``). The scores are those of its own predictions of the
    held-out patients, as ``evaluate`` gives them; without labelled test patients ``metrics["test"]`` is None.
    """
    record = read_json(folder / RECORD_FILE)
    training_data: dict[str, Any] = {"dataset": dataset}
    for split in ("train", "val", "test"):
        rows = index[index["split"] == split]
        training_data[split] = {
            "patients": int(rows["patient_id"].nunique()),
            "studies": int(rows["study_uid"].nunique()),
            "slices": len(rows),
            "positive_slices": {name: int((rows[name] == 1).sum()) for name in CLASSES},
        }
    table = read_predictions(folder, "ichpipe ensemble" if network["kind"] == "ensemble" else "ichpipe finetune")
    table = table[table["split"] == "test"]
    test = None if table.empty else score_table(table, evaluate) | {"study_score": evaluate.study_score}
    return {
        **network,
        "model_sha256": digest_of_file(folder / MODEL_FILE),
        "training_data": training_data,
        "metrics": {"validation": {"weighted_log_loss": record["val_loss"]}, "test": test},
        "training": {name: record[name] for name in ("params", "device", "versions", "commit")},
        "intended_use": INTENDED,
        "limits": list(LIMITS),
    }


def card_text(card: dict[str, Any]) -> str:
    """Return the card as a page (markdown)."""
    cnn, sequence, data, test = card["slice_cnn"], card["sequence"], card["training_data"], card["metrics"]["test"]
    windows = ", ".join(f"{window['level_hu']:g}/{window['width_hu']:g}" for window in cnn["windows"])
    head = f", a square around the head at {cnn['mm_per_px']:g} mm a pixel" if "mm_per_px" in cnn else ""
    beside = f", neighbouring slices on each side: {cnn['neighbours']}" if "neighbours" in cnn else ""
    direction = ", bidirectional" if sequence["bidirectional"] else ""
    lines = [
        f"# Intracranial haemorrhage on head CT, slice by slice\n\n{card['intended_use']}\n",
        *(f"* {limit}" for limit in card["limits"]),
        "\n| | |\n|---|---|",
        f"| slice CNN | {cnn['backbone']}, {cnn['size_px']} px{head}{beside}, windows (level/width, HU) {windows} |",
        f"| sequence model | {sequence['cell']}, {sequence['layers']} x {sequence['hidden']}{direction}, "
        f"inputs {', '.join(sequence['inputs'])} |",
        *([f"| ensemble | mean of {count} such networks |"] if (count := len(card.get("networks", []))) else []),
        f"| output | probabilities of {', '.join(card['classes'])}, in this order |",
        f"| weights | {MODEL_FILE}, SHA-256 {card['model_sha256']} |",
    ]
    for split in ("train", "val", "test"):
        sizes = ", ".join(f"{data[split][key]} {key}" for key in ("patients", "studies", "slices"))
        positive = ", ".join(f"{name} {number}" for name, number in data[split]["positive_slices"].items())
        lines.append(f"| {split} | {sizes} ({positive}) |")
    lines += [f"| data | {data['dataset']} |", ""]
    if test:
        lines.append(
            f"Held-out patients: weighted log loss {Estimate.of_loss(test).text()}. Scores are of the network's own "
            f"probabilities, before calibration; a study's score is the {test['study_score']} over its slices.\n"
        )
        lines.append("| class | AUC, slice | AUC, study |\n|---|---|---|")
        for name in CLASSES:
            aucs = [Estimate.from_json(test[kind][name]) for kind in ("auc", "study_auc")]
            lines.append(f"| {name} | {' | '.join('–' if auc.value is None else auc.text(3) for auc in aucs)} |")
    else:
        lines.append("No labelled patients were held out: nothing is known of its accuracy.")
    lines += ["", "`ichpipe predict DICOM --out DIR --model THIS_FOLDER` runs it; nothing in this folder is unpickled."]
    return "\n".join(lines) + "\n"
