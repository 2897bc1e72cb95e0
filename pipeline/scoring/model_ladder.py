"""Scores several models on the same held-out patients, and writes the ladder of models as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.common.text_table import format_table
from ichpipe.index.thin_slices import smooth_thin
from ichpipe.scoring.bootstrap import Estimate
from ichpipe.scoring.heldout_predictions import ENSEMBLE, FINETUNED, LABELS, SLICE_CNN, pair_name, sequence_name
from ichpipe.scoring.metrics import paired_difference, score

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from ichpipe.params.schema import EvaluateParams


def score_all(
    tables: dict[str, pd.DataFrame],
    section: EvaluateParams,
    finetuned_arm: str,
    overlap: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Score every model on the same slices: the content of ``metrics/evaluate.json``.

    ``paired`` compares each rung of the ladder with the one before, by a bootstrap over patients: a positive
    ``weighted_log_loss`` or ``auc_any`` means the later model is better. ``overlap`` names patients who have slices
    outside the test set too, on which nothing was trained: each model is then scored ``without_overlap`` as well.
    Without a table of the fine-tuned model, or of the ensemble, its scores are None, and no pair names it.
    """
    first = next(iter(tables.values()))
    overlap &= frozenset(first["patient_id"])  # a patient whose labels are not all known is not scored
    scores = {name: score_table(table, section) for name, table in tables.items()}
    for name, table in tables.items() if overlap else ():
        rest = table[~table["patient_id"].isin(overlap)]
        scores[name]["without_overlap"] = score_table(rest, section) if len(rest) else None
    columns = list(CLASSES)
    prefix = sequence_name("")
    arms = {name.removeprefix(prefix): value for name, value in scores.items() if name.startswith(prefix)}
    pairs = [(SLICE_CNN, sequence_name(arm)) for arm in arms]
    if FINETUNED in tables:
        pairs += [(SLICE_CNN, FINETUNED), (sequence_name(finetuned_arm), FINETUNED)]
    if ENSEMBLE in tables:
        pairs.append((FINETUNED if FINETUNED in tables else sequence_name(finetuned_arm), ENSEMBLE))
    paired = {}
    for earlier, later in pairs:
        before, after = tables[earlier], tables[later]
        if before["sop_uid"].tolist() != after["sop_uid"].tolist():
            raise DataError(f"{earlier} and {later} were scored on different slices; run: ichpipe evaluate")
        paired[pair_name(later, earlier)] = paired_difference(
            before[LABELS], before[columns], after[columns], before["patient_id"], **section.bootstrap()
        )
    metrics = {
        SLICE_CNN: scores[SLICE_CNN],
        "sequence": arms,
        FINETUNED: scores.get(FINETUNED),
        ENSEMBLE: scores.get(ENSEMBLE),
        "paired": paired,
        "n_slices": len(first),
        "n_studies": int(first["study_uid"].nunique()),
        "n_patients": int(first["patient_id"].nunique()),
    }
    if overlap:
        slices_in_test = int(first["patient_id"].isin(overlap).sum())
        metrics["overlap"] = {"patients": len(overlap), "slices_in_test": slices_in_test}
    return metrics


def ladder_text(metrics: dict[str, Any]) -> str:
    """Return the ladder of models as a table of plain text."""
    models = {"slice CNN": metrics[SLICE_CNN]}
    models |= {f"sequence, {arm}": scores for arm, scores in metrics["sequence"].items()}
    models |= {"fine-tuned": metrics[FINETUNED]} if metrics[FINETUNED] else {}
    models |= {"ensemble": metrics[ENSEMBLE]} if metrics.get(ENSEMBLE) else {}
    rows = []
    for name, scores in models.items():
        loss = Estimate.of_loss(scores)
        aucs = [Estimate.from_json(scores[kind]["any"]) for kind in ("auc", "study_auc")]
        rows.append([name, *(figure.text() for figure in (loss, *aucs))])
    lines = [format_table(["model", "weighted log loss", "AUC any, slice", "AUC any, study"], rows), ""]
    if not metrics[FINETUNED]:
        lines.append("fine-tuned: not scored and not calibrated, because there is none; run: ichpipe finetune")
    lines.append("{n_slices} slices, {n_studies} studies, {n_patients} patients held out".format_map(metrics))
    if "overlap" in metrics:
        without = [
            f"{name} {scores['without_overlap']['weighted_log_loss']:.4f} (with {scores['weighted_log_loss']:.4f})"
            for name, scores in models.items()
            if scores["without_overlap"]
        ]
        who = "{patients} patients ({slices_in_test} slices) who have slices outside the test set too (not trained on)"
        losses = ", ".join(without) or "nobody is left"
        lines.append(f"log loss without the {who.format_map(metrics['overlap'])}: {losses}")
    lines.append("paired bootstrap over patients (positive: the first is better)")
    for name, gain in metrics["paired"].items():
        loss, auc = (Estimate.from_json(gain[key]) for key in ("weighted_log_loss", "auc_any"))
        lines.append(f"  {name}: log loss {loss.text()}, AUC any {auc.text()}")
    for name, part in metrics.get("sources", {}).items():
        lines += ["", f"source {name}", ladder_text(part)]
    return "\n".join(lines)


def score_table(table: pd.DataFrame, section: EvaluateParams) -> dict[str, Any]:
    """Score one model's predictions; its study AUC pools slices as ``predict`` does, thin series averaged before."""
    columns = table[LABELS], table[list(CLASSES)], table["patient_id"], table["series_uid"]
    smooth = smooth_series(table)
    return score(*columns, **section.bootstrap(), study_score=section.study_score, study_probabilities=smooth)


def smooth_series(table: pd.DataFrame) -> NDArray[np.float64]:
    """Return the probabilities (n, 6) of a table with those of thin series averaged along z."""
    values = np.array(table[list(CLASSES)], dtype=np.float64)
    positions_mm = table["position_mm"].to_numpy(np.float64)
    for rows in table.groupby("series_uid", sort=False).indices.values():
        values[rows] = smooth_thin(values[rows], positions_mm[rows])
    return values
