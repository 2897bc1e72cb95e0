"""Scores that compare several models on the same held-out patients, and the ladder of models as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.index.thin_slices import smooth_thin
from ichpipe.scoring.heldout_predictions import FINETUNED, LABELS, SLICE_CNN, sequence_name
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
    """
    settings = section.bootstrap()
    first = next(iter(tables.values()))
    overlap &= frozenset(first["patient_id"])  # a patient whose labels are not all known is not scored
    scores = {name: _score(table, section) for name, table in tables.items()}
    for name, table in tables.items() if overlap else ():
        rest = table[~table["patient_id"].isin(overlap)]
        scores[name]["without_overlap"] = _score(rest, section) if len(rest) else None
    prefix = sequence_name("")
    arms = {name.removeprefix(prefix): value for name, value in scores.items() if name.startswith(prefix)}
    pairs = [(SLICE_CNN, sequence_name(arm)) for arm in arms]
    pairs += [(SLICE_CNN, FINETUNED), (sequence_name(finetuned_arm), FINETUNED)]
    return {
        SLICE_CNN: scores[SLICE_CNN],
        "sequence": arms,
        FINETUNED: scores[FINETUNED],
        "paired": {f"{later} against {earlier}": compare(tables, earlier, later, settings) for earlier, later in pairs},
        "n_slices": len(first),
        "n_studies": int(first["study_uid"].nunique()),
        "n_patients": int(first["patient_id"].nunique()),
        **(_overlap(first, overlap) if overlap else {}),
    }


def _overlap(table: pd.DataFrame, patients: frozenset[str]) -> dict[str, Any]:
    rows = table["patient_id"].isin(patients)
    return {"overlap": {"patients": int(table.loc[rows, "patient_id"].nunique()), "slices_in_test": int(rows.sum())}}


def compare(tables: dict[str, pd.DataFrame], earlier: str, later: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Compare two models on the same slices; other slices in the two tables are an error."""
    first, second = tables[earlier], tables[later]
    if first["sop_uid"].tolist() != second["sop_uid"].tolist():
        raise DataError(f"{earlier} and {later} were scored on different slices; run: ichpipe evaluate")
    labels, probabilities, patients, _ = _arrays(first)
    return paired_difference(labels, probabilities, second[list(CLASSES)].to_numpy(), patients, **settings)


def ladder_text(metrics: dict[str, Any]) -> str:
    """Return the ladder of models as a table of plain text."""
    rows = [("slice CNN", metrics[SLICE_CNN])]
    rows += [(f"sequence, {arm}", values) for arm, values in metrics["sequence"].items()]
    rows += [("fine-tuned", metrics[FINETUNED])]
    head = f"{'model':<24}{'weighted log loss':>28}{'AUC any, slice':>26}{'AUC any, study':>26}"
    lines = [_line(name, values) for name, values in rows]
    counts = f"{metrics['n_slices']} slices, {metrics['n_studies']} studies, {metrics['n_patients']} patients held out"
    counts += _overlap_text(metrics, rows)
    paired = [_paired_line(name, value) for name, value in metrics["paired"].items()]
    return "\n".join(
        [head, *lines, "", counts, "paired bootstrap over patients (positive: the first is better)", *paired]
    )


def _overlap_text(metrics: dict[str, Any], rows: list[tuple[str, Any]]) -> str:
    if "overlap" not in metrics:
        return ""
    without = [
        f"{name} {values['without_overlap']['weighted_log_loss']:.4f} (with {values['weighted_log_loss']:.4f})"
        for name, values in rows
        if values["without_overlap"]
    ]
    who = "{patients} patients ({slices_in_test} slices) who have slices outside the test set too (not trained on)"
    found = ", ".join(without) or "nobody is left"
    return f"\nlog loss without the {who.format(**metrics['overlap'])}: {found}"


def _score(table: pd.DataFrame, section: EvaluateParams) -> dict[str, Any]:
    smooth = smooth_series(table)
    return score(*_arrays(table), **section.bootstrap(), study_score=section.study_score, study_probabilities=smooth)


def smooth_series(table: pd.DataFrame) -> NDArray[np.float64]:
    """Return the probabilities (n, 6) of a table with those of thin series averaged along z."""
    values = np.array(table[list(CLASSES)], dtype=np.float64)
    places = table["position_mm"].to_numpy(np.float64)
    for rows in table.groupby("series_uid", sort=False).indices.values():
        values[rows] = smooth_thin(values[rows], places[rows])
    return values


def _arrays(table: pd.DataFrame) -> tuple[Any, Any, Any, Any]:
    labels, probabilities = table[LABELS].to_numpy(), table[list(CLASSES)].to_numpy()
    return labels, probabilities, table["patient_id"].to_numpy(), table["series_uid"].to_numpy()


def _line(name: str, values: dict[str, Any]) -> str:
    low, high = values.get("weighted_log_loss_ci") or (None, None)
    loss = _interval(values["weighted_log_loss"], low, high)
    aucs = [values[kind]["any"] for kind in ("auc", "study_auc")]
    return f"{name:<24}{loss:>28}" + "".join(f"{_interval(a['value'], a['ci_low'], a['ci_high']):>26}" for a in aucs)


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "not defined"
    return f"{value:.4f}" if low is None or high is None else f"{value:.4f} [{low:.4f}, {high:.4f}]"


def _paired_line(name: str, value: dict[str, Any]) -> str:
    loss, auc = value["weighted_log_loss"], value["auc_any"]
    return (
        f"  {name}: log loss {_interval(loss['value'], loss['ci_low'], loss['ci_high'])}"
        f", AUC any {_interval(auc['value'], auc['ci_low'], auc['ci_high'])}"
    )
