"""Pictures of a run as PNG bytes: the same input gives the same bytes on the same versions.

Drawn with matplotlib's objects, without pyplot: no global state, no display. The palette is Okabe and Ito's, for
colour-blind readers. Each model keeps its colour in every picture.
"""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ichpipe.common.classes import CLASSES
from ichpipe.common.constants import ABBREVIATIONS
from ichpipe.report.runs import rungs_of
from ichpipe.scoring.arm_comparison import BETTER, WORSE
from ichpipe.scoring.bootstrap import Estimate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

PALETTE: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
LINES: Final = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
POSITIVE: Final = "#D55E00"  # frame and shade of slices that are labelled positive
BRAIN_WINDOW: Final = (40.0, 80.0)  # level and width in HU (Nguyen et al. 2020)
MAX_TILES: Final = 40
MAX_COLUMNS: Final = 10
ARM_LOOK = {BETTER: (PALETTE[2], "o"), WORSE: (PALETTE[5], "s")}  # by verdict; all other arms are grey and hollow


def ladder(metrics: Mapping[str, Any]) -> bytes:
    """Draw slice CNN, each sequence arm and fine-tuned model: weighted log loss and AUC of ``any``, with intervals.

    ``metrics`` is the content of ``metrics/evaluate.json``. A value of None is drawn as "not defined".
    """
    titles, scores = zip(*rungs_of(metrics), strict=True)
    losses = [Estimate.of_loss(model) for model in scores]
    figure = Figure(figsize=(12, 1.7 + 0.55 * len(titles)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    _draw_rungs(panels[0], titles, losses, "weighted log loss  (lower is better)")
    for axes, kind, unit in ((panels[1], "auc", "slice"), (panels[2], "study_auc", "study")):
        aucs = [Estimate.from_json(model[kind]["any"]) for model in scores]
        _draw_rungs(axes, titles, aucs, f"AUC any, by {unit}  (higher is better)")
    patients = f", {metrics['n_patients']} patients" if "n_patients" in metrics else ""
    counts = f"{metrics['n_slices']} slices, {metrics['n_studies']} studies{patients}"
    figure.suptitle(f"The same held-out patients for every model: {counts}; bars: bootstrap over patients", fontsize=11)
    return to_png(figure)


def _draw_rungs(axes: Axes, names: Sequence[str], estimates: Sequence[Estimate], title: str) -> None:
    """Draw one dot with its interval per model, from the top down, the number written above."""
    for row, estimate in enumerate(estimates):
        colour, value = PALETTE[row % len(PALETTE)], estimate.value
        if value is None:
            axes.text(0.5, row, "not defined", transform=axes.get_yaxis_transform(), ha="center", va="center")
            continue
        if estimate.interval is not None:
            axes.plot(estimate.interval, [row, row], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.plot([value], [row], "o", color=colour, markersize=7)
        axes.annotate(f"{value:.4f}", (value, row), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.65)
    axes.set_title(title, fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.15)
    plain_axes(axes, grid="x")
    if all(estimate.value is None for estimate in estimates):
        axes.set_xticks([])


def roc(points: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Draw ROC curves, one panel a class and one line a model; rows as from ``ichpipe.scoring.metrics.curves``."""
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, name in zip(panels.flat, CLASSES, strict=True):
        axes.plot([0, 1], [0, 1], color="0.75", linewidth=1, zorder=0)
        by_model = {model: [row for row in rows if row["class"] == name] for model, rows in points.items()}
        for number, (model, rows) in enumerate(by_model.items()):
            axes.plot([row["fpr"] for row in rows], [row["tpr"] for row in rows], label=model, **_style(number))
        if not any(by_model.values()):
            axes.text(0.5, 0.5, "no positive or no negative", ha="center", va="center", backgroundcolor="white")
        axes.set_title(name, fontsize=10)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        plain_axes(axes, grid="both")
    return _finish_panels(figure, panels, "false positive rate (1 - specificity)", "true positive rate (sensitivity)")


def learning_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Draw weighted log loss in training and validation by epoch, one panel a model that has epochs.

    Rows hold ``epoch``, ``train_loss`` (None before the first step) and ``val_loss``; the best is marked. Models
    without epochs are named below the panels.
    """
    steps = {name: [row for row in rows if row["train_loss"] is not None] for name, rows in histories.items()}
    drawn = [name for name, trained in steps.items() if trained]
    columns = min(4, max(1, len(drawn)))
    rows = max(1, -(-len(drawn) // columns))
    figure = Figure(figsize=(max(3.3 * columns, 4.5), 0.5 + 2.9 * rows), layout="constrained")
    untrained = "; ".join(name for name in histories if name not in drawn)
    remarks = textwrap.wrap(f"no epochs: {untrained}", 42 * columns) if untrained else []
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(drawn) :]:
        axes.set_axis_off()
    for axes, name in zip(panels.flat, drawn, strict=False):
        history, trained = histories[name], steps[name]
        axes.plot([r["epoch"] for r in trained], [r["train_loss"] for r in trained], label="training", **_style(0, "o"))
        axes.plot([r["epoch"] for r in history], [r["val_loss"] for r in history], label="validation", **_style(1, "s"))
        best = min(history, key=lambda row: float(row["val_loss"]))
        epoch, loss = best["epoch"], best["val_loss"]
        axes.plot([epoch], [loss], "o", mfc="none", mec="black", ms=11, ls="none", label="best")
        axes.annotate(f"{loss:.4f}", (epoch, loss), (0, 9), textcoords="offset points", ha="center")
        axes.set_title(name, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.margins(x=0.1, y=0.15)
        plain_axes(axes, grid="y")
    return _finish_panels(figure, panels, "\n".join(["epoch", *remarks]), "weighted log loss")


def study_sheet(
    hu: Sequence[NDArray[np.int16]], probabilities: Mapping[str, ArrayLike], labels: ArrayLike, title: str
) -> bytes:
    """Draw a series as a contact sheet in the brain window, and beneath it each model's P(any) by slice.

    ``hu`` holds n slices [rows, columns] in order, ``probabilities`` [n, 6] per model, ``labels`` [n, 6] 0 or 1.
    Positive slices are framed and named by subtype. A long series shows evenly spaced slices; the curves show all.
    """
    truth = np.asarray(labels, dtype=np.float64)
    shown = np.unique(np.linspace(0, len(hu) - 1, min(len(hu), MAX_TILES)).round().astype(int))
    rows = -(-len(shown) // MAX_COLUMNS)
    columns = -(-len(shown) // rows)
    figure = Figure(figsize=(13, 0.6 + 1.45 * rows + 2.9), layout="constrained", facecolor="white")
    sheet, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.45 * rows + 0.4, 2.9]).flat
    sheet.suptitle(title, fontsize=11)
    tiles = sheet.subplots(rows, columns, squeeze=False)
    sheet.get_layout_engine().set(w_pad=0.02, h_pad=0.03, wspace=0.0, hspace=0.0)
    for axes in tiles.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, index in zip(tiles.flat, shown, strict=False):
        _draw_tile(axes, hu[index], truth[index], int(index))
    _draw_probabilities(below.subplots(), probabilities, truth[:, 0])
    return to_png(figure)


def _draw_tile(axes: Axes, hu: NDArray[np.int16], truth: NDArray[np.float64], index: int) -> None:
    """Draw one slice, its number, and where it is positive a frame and the subtypes beneath."""
    level, width = BRAIN_WINDOW
    axes.imshow(hu, cmap="gray", vmin=level - width / 2, vmax=level + width / 2, interpolation="antialiased")
    axes.set(xticks=[], yticks=[])
    axes.text(0.03, 0.97, str(index), color="white", fontsize=7, va="top", transform=axes.transAxes)
    positive = truth[0] == 1
    if positive:
        names = [ABBREVIATIONS[name] for name, label in zip(CLASSES[1:], truth[1:], strict=True) if label == 1]
        axes.set_xlabel(" ".join(names), color=POSITIVE, fontsize=8, labelpad=2)
    for spine in axes.spines.values():
        spine.set(visible=positive, edgecolor=POSITIVE, linewidth=2.5)


def _draw_probabilities(axes: Axes, probabilities: Mapping[str, ArrayLike], positive: NDArray[np.float64]) -> None:
    for index in np.flatnonzero(positive == 1):
        axes.axvspan(index - 0.5, index + 0.5, color=POSITIVE, alpha=0.18, linewidth=0)
    handles = []
    for number, (model, values) in enumerate(probabilities.items()):
        curve = np.asarray(values, dtype=np.float64)[:, 0]
        handles += axes.plot(np.arange(len(curve)), curve, label=model, **_style(number, "o"))
    shade = Patch(color=POSITIVE, alpha=0.18, label="labelled positive")
    axes.legend(handles=[shade, *handles], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    axes.set(xlim=(-0.5, len(positive) - 0.5), ylim=(-0.02, 1.02), xlabel="slice index", ylabel="P(any)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain_axes(axes, grid="y")


def _style(number: int, marker: str | None = None) -> dict[str, Any]:
    """Return the look of line ``number``; colour and dashes both differ."""
    style = {"color": PALETTE[number % len(PALETTE)], "linestyle": LINES[number % len(LINES)], "linewidth": 1.8}
    return style | ({"marker": marker, "markersize": 3.5} if marker else {})


def plain_axes(axes: Axes, grid: str) -> None:
    """Hide the top and right spines; draw a light grid along ``grid`` (x, y or both)."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.9", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def _finish_panels(figure: Figure, panels: NDArray[Any], x: str, y: str) -> bytes:
    """Name both axes of all panels, put their legend above, and render."""
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    handles, names = panels.flat[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(names)), frameon=False, fontsize=9)
    return to_png(figure)


def to_png(figure: Figure) -> bytes:
    """Return a PNG without matplotlib's version and the date; it goes through Agg, without a display."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def arms_figure(comparison: Mapping[str, Any]) -> bytes:
    """Draw each arm's weighted log loss by seed, and its gain over the baseline with both intervals; PNG.

    ``comparison`` is the content of ``compare/arms.json``.
    """
    arms = comparison["arms"]
    figure = Figure(figsize=(12, 1.9 + 0.42 * len(arms)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for y, arm in enumerate(arms):
        loss, gain = arm["weighted_log_loss"], arm["gain"].get("weighted_log_loss")
        left.plot(loss["of_seeds"], [y] * len(loss["of_seeds"]), "o", color=PALETTE[0], ms=5, alpha=0.6)
        left.plot([loss["mean"]], [y], "|", color="black", ms=16, mew=2)
        if gain is None:
            right.text(0, y, f" {arm['verdict']}", va="center", fontsize=9, color="0.4")
            continue
        colour, marker = ARM_LOOK.get(arm["verdict"], ("0.45", "o"))
        if gain["simultaneous"] is not None:
            right.plot(gain["simultaneous"], [y, y], color=colour, linewidth=1)
        if gain["ci_low"] is not None:
            right.plot([gain["ci_low"], gain["ci_high"]], [y, y], color=colour, linewidth=3)
        fill = colour if arm["verdict"] in ARM_LOOK else "white"
        right.plot([gain["value"]], [y], marker, color=colour, mfc=fill, ms=8)
    right.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(range(len(arms)), [arm["arm"] for arm in arms])
    left.invert_yaxis()
    left.set_xlabel("weighted log loss  (lower is better; a dot a seed, a bar their mean)")
    right.set_xlabel(f"gain over {comparison['baseline']}  (to the right: better; thin: all arms together)")
    for axes in (left, right):
        plain_axes(axes, grid="x")
    counts = f"{comparison['n_slices']} slices, {comparison['n_patients']} patients"
    figure.suptitle(f"{counts}; filled: beyond noise, hollow: noise or too few seeds", fontsize=11)
    return to_png(figure)
