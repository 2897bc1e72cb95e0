"""The comparison of arms as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from ichpipe.report.figures import PALETTE, plain_axes, to_png
from ichpipe.scoring.arm_comparison import BETTER, WORSE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes

LOOK = {BETTER: (PALETTE[2], "o"), WORSE: (PALETTE[5], "s")}
"""Colour and marker by verdict; whatever is neither is grey and hollow."""


def arms_figure(found: Mapping[str, Any]) -> bytes:
    """Draw each arm's weighted log loss by seed, and its gain over the baseline with both intervals."""
    arms = found["arms"]
    figure = Figure(figsize=(12, 1.9 + 0.42 * len(arms)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, row in enumerate(arms):
        loss = row["weighted_log_loss"]
        left.plot(loss["of_seeds"], [place] * len(loss["of_seeds"]), "o", color=PALETTE[0], ms=5, alpha=0.6)
        left.plot([loss["mean"]], [place], "|", color="black", ms=16, mew=2)
        _gain(right, place, row)
    right.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(range(len(arms)), [row["arm"] for row in arms])
    left.invert_yaxis()
    left.set_xlabel("weighted log loss  (lower is better; a dot a seed, a bar their mean)")
    right.set_xlabel(f"gain over {found['baseline']}  (to the right: better; thin: all arms together)")
    for axes in (left, right):
        plain_axes(axes, grid="x")
    counts = f"{found['n_slices']} slices, {found['n_patients']} patients"
    figure.suptitle(f"{counts}; filled: beyond noise, hollow: noise", fontsize=11)
    return to_png(figure)


def _gain(axes: Axes, place: int, row: Mapping[str, Any]) -> None:
    gain = row["gain"].get("weighted_log_loss")
    if gain is None:
        axes.text(0, place, f" {row['verdict']}", va="center", fontsize=9, color="0.4")
        return
    colour, marker = LOOK.get(row["verdict"], ("0.45", "o"))
    if gain["simultaneous"] is not None:
        axes.plot(gain["simultaneous"], [place, place], color=colour, linewidth=1)
    if gain["ci_low"] is not None:
        axes.plot([gain["ci_low"], gain["ci_high"]], [place, place], color=colour, linewidth=3)
    fill = colour if row["verdict"] in LOOK else "white"
    axes.plot([gain["value"]], [place], marker, color=colour, mfc=fill, ms=8)
