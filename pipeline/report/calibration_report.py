"""Calibration of the test patients: log loss, calibration error and reliability, before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from ichpipe.common.classes import CLASSES
from ichpipe.common.text_table import format_table
from ichpipe.report.figures import PALETTE, to_png
from ichpipe.scoring.bootstrap import Estimate
from ichpipe.scoring.metrics import BINS, brier, calibration_error, class_log_loss, curves, weighted_log_loss
from ichpipe.scoring.roc import areas

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from ichpipe.scoring.calibration import Calibration

    Floats = NDArray[np.float64]

STEPS = ("before", "after")


def calibration_scores(
    labels: Floats, probabilities: Floats, calibration: Calibration, slice_probabilities: Floats | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the test slices before and after: the content of ``calibration`` in ``metrics/evaluate.json``.

    Labels [n, 6] are 0 or 1; probabilities [n, 6] are those of the network, ``slice_probabilities`` those of its slice
    CNN alone, which a blend needs. ``any_below_subtype`` is the share of
    slices whose ``any`` is below one of the subtypes. Also returns the points of the reliability diagrams: ``step,
    class, predicted, observed, n``, ten bins a class.
    """
    scores: dict[str, Any] = {
        "method": calibration.method,
        "fitted_on": {"split": "val", "patients": calibration.patients, "slices": calibration.slices},
        "temperature": calibration.temperature,
        "as_they_are": calibration.as_they_are,
        "blend": calibration.blend,
        "bins": BINS,
    }
    points = []
    calibrated = calibration.apply(probabilities, slice_probabilities)
    for step, values in zip(STEPS, (probabilities, calibrated), strict=True):
        points += [{"step": step, **row} for row in curves(labels, values)["calibration"]]
        by_class = list(zip(CLASSES, labels.T, values.T, strict=True))
        scores[step] = {
            "weighted_log_loss": weighted_log_loss(labels, values),
            "log_loss": class_log_loss(labels, values),
            "calibration_error": {name: calibration_error(true, column) for name, true, column in by_class},
            "brier": {name: brier(true, column) for name, true, column in by_class},
            "auc": {name: _auc(true, column) for name, true, column in by_class},
            "any_below_subtype": float((values[:, 0] < values[:, 1:].max(axis=1)).mean()),
        }
    return scores, points


def _auc(labels: Floats, probabilities: Floats) -> float | None:
    found = areas(labels, probabilities[:, None])
    return None if found is None else float(found[0][0])


def calibration_text(scores: Mapping[str, Any], model: str = "fine-tuned model") -> str:
    """Return the scores as lines of plain text, at most 80 columns."""
    if scores["method"] == "none" and not scores["blend"]:
        return f"{model}: not calibrated (evaluate.calibration: none)"
    before, after, patients = scores["before"], scores["after"], scores["fitted_on"]["patients"]
    kinds = ("log_loss", "calibration_error")
    rows = [
        [f"  {name}", *(f"{before[kind][name]:.4f} -> {after[kind][name]:.4f}" for kind in kinds)] for name in CLASSES
    ]
    rows.append(["  weighted", f"{before['weighted_log_loss']:.4f} -> {after['weighted_log_loss']:.4f}", ""])
    lines = [f"calibration of the {model} ({scores['method']}, {patients} validation patients)"]
    lines.append(format_table(["", "log loss", "calibration error"], rows))
    lines += [f"  {name} kept as it is: {reason}" for name, reason in scores["as_they_are"].items()]
    for name, share in scores["blend"].items():
        if share < 1.0:
            aucs = [Estimate(step["auc"][name]).text(3) for step in (before, after)]
            lines.append(f"  {name} is {share:.2f} model, {1 - share:.2f} slice CNN: AUC {' -> '.join(aucs)}")
    return "\n".join(lines)


def reliability_figure(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw the reliability diagrams, a panel a class: share of positives over mean probability of each bin; PNG."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, name in zip(panels.flat, CLASSES, strict=True):
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=1)
        for step, colour, line in zip(STEPS, (PALETTE[1], PALETTE[0]), ("--", "-"), strict=True):
            points = [row for row in rows if row["class"] == name and row["step"] == step]
            x, y = [row["predicted"] for row in points], [row["observed"] for row in points]
            axes.plot(x, y, line, color=colour, linewidth=1.2, label=step)
            axes.scatter(x, y, s=[8 + 3 * np.sqrt(row["n"]) for row in points], color=colour, zorder=3)
        axes.set_title(name, fontsize=10)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    figure.supxlabel("mean probability of a bin", fontsize=10)
    figure.supylabel("share of positive slices", fontsize=10)
    figure.suptitle("Reliability on the held-out patients; larger dots: more slices", fontsize=11)
    panels.flat[0].legend(loc="upper left", fontsize=9, frameon=False)
    return to_png(figure)
