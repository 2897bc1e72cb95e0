"""What calibration does to the test patients: log loss, calibration error and reliability, before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from ichpipe.common.classes import CLASSES
from ichpipe.report.figures import PALETTE, to_png
from ichpipe.scoring.metrics import BINS, brier, calibration_error, class_log_loss, curves, weighted_log_loss

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from ichpipe.scoring.calibration import Calibration

    Floats = NDArray[np.float64]

STEPS = ("before", "after")


def calibration_scores(labels: Floats, probabilities: Floats, calibration: Calibration) -> dict[str, Any]:
    """Score the test slices before and after: the content of ``calibration`` in ``metrics/evaluate.json``.

    Labels (n, 6) are 0 or 1, probabilities (n, 6) those of the network. ``any_below_subtype`` is the share of slices
    whose ``any`` is below one of the subtypes.
    """
    both = dict(zip(STEPS, (probabilities, calibration.apply(probabilities)), strict=True))
    return {
        "method": calibration.method,
        "fitted_on": {"split": "val", "patients": calibration.patients, "slices": calibration.slices},
        "temperature": calibration.temperature,
        "as_they_are": calibration.as_they_are,
        "bins": BINS,
        **{step: _scores(labels, found) for step, found in both.items()},
    }


def reliability_rows(labels: Floats, probabilities: Floats, calibration: Calibration) -> list[dict[str, Any]]:
    """Return the points of the reliability diagrams: ``step, class, predicted, observed, n``, ten bins a class."""
    both = zip(STEPS, (probabilities, calibration.apply(probabilities)), strict=True)
    return [{"step": step, **row} for step, found in both for row in curves(labels, found)["calibration"]]


def calibration_text(scores: Mapping[str, Any]) -> str:
    """Return the scores as lines of plain text, at most 80 columns."""
    if scores["method"] == "none":
        return "fine-tuned model: not calibrated (evaluate.calibration: none)"
    fitted = scores["fitted_on"]
    lines = [
        f"calibration of the fine-tuned model ({scores['method']}, {fitted['patients']} validation patients)",
        f"  {'':<18}{'log loss':>20}{'calibration error':>22}",
        *(_line(name, scores, ("log_loss", "calibration_error")) for name in CLASSES),
    ]
    before, after = (scores[step]["weighted_log_loss"] for step in STEPS)
    lines.append(f"  {'weighted':<18}{before:>10.4f} -> {after:.4f}")
    return "\n".join(lines + [f"  {name} kept as it is: {why}" for name, why in scores["as_they_are"].items()])


def reliability_figure(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw the reliability diagrams, a panel a class: share of positives over mean probability of each bin; PNG."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, name in zip(panels.flat, CLASSES, strict=True):
        _panel(axes, name, [row for row in rows if row["class"] == name])
    figure.supxlabel("mean probability of a bin", fontsize=10)
    figure.supylabel("share of positive slices", fontsize=10)
    figure.suptitle("Reliability on the held-out patients; larger dots: more slices", fontsize=11)
    panels.flat[0].legend(loc="upper left", fontsize=9, frameon=False)
    return to_png(figure)


def _scores(labels: Floats, probabilities: Floats) -> dict[str, Any]:
    pairs = list(zip(CLASSES, labels.T, probabilities.T, strict=True))
    return {
        "weighted_log_loss": weighted_log_loss(labels, probabilities),
        "log_loss": class_log_loss(labels, probabilities),
        "calibration_error": {name: calibration_error(true, found) for name, true, found in pairs},
        "brier": {name: brier(true, found) for name, true, found in pairs},
        "any_below_subtype": float((probabilities[:, 0] < probabilities[:, 1:].max(axis=1)).mean()),
    }


def _line(name: str, scores: Mapping[str, Any], kinds: Sequence[str]) -> str:
    changes = [" -> ".join(f"{scores[step][kind][name]:.4f}" for step in STEPS) for kind in kinds]
    return f"  {name:<18}{changes[0]:>20}{changes[1]:>22}"


def _panel(axes: Axes, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=1)
    for step, colour, line in zip(STEPS, (PALETTE[1], PALETTE[0]), ("--", "-"), strict=True):
        points = [row for row in rows if row["step"] == step]
        x, y = [row["predicted"] for row in points], [row["observed"] for row in points]
        axes.plot(x, y, line, color=colour, linewidth=1.2, label=step)
        axes.scatter(x, y, s=[8 + 3 * np.sqrt(row["n"]) for row in points], color=colour, zorder=3)
    axes.set_title(name, fontsize=10)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
