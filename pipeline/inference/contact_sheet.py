"""Draws a contact sheet of one study: chosen slices in the brain window with heat maps, and P along the head.

The picture holds no identifier: slices have a number and a position in mm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ichpipe.common.classes import CLASSES
from ichpipe.report.figures import BRAIN_WINDOW, PALETTE, POSITIVE, plain_axes, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

HEAT_COLOURS: Final = "inferno"
SKIN_HU: Final = -300  # above: head or headrest; below: air
MAX_OPACITY: Final = 0.65  # of the heat map, where heat and probability are 1
NOTE: Final = (
    "Under each slice the same slice with its heat map: which places raise P above the mean of the series. "
    "Stronger colour, higher P.\nA heat map is no outline of a bleed, and shows the model's reasons, right or wrong."
)


@dataclass(frozen=True)
class SheetData:
    """Content of a sheet: a series of T slices, k of which have a panel."""

    hu: NDArray[np.int16]  # (k, S, S)
    heat: NDArray[np.float32]  # (k, S, S), 0 to 1
    rows: NDArray[np.intp]  # (k,) rows of the slices with a panel, 0 to T - 1
    position_mm: Floats  # (T,)
    probabilities: Floats  # (T, 6), in the order of CLASSES
    framed: NDArray[np.bool_]  # (T,)
    framed_means: str  # as "P(any) at least 0.5"
    title: str
    class_name: str = "any"
    threshold: float | None = None  # drawn as a line
    note: str = NOTE
    columns: int = 6  # of panels
    width_in: float = 11.0


def choose_panels(probability: Floats, position_mm: Floats, panels: int) -> NDArray[np.intp]:
    """Choose at most ``panels`` of the slices (T,), in order: the one with the highest P of each equal stretch in mm.

    A series with no more slices than panels is shown whole.
    """
    count = len(probability)
    if count <= panels:
        return np.arange(count)
    low, high = float(position_mm.min()), float(position_mm.max())
    stretch = np.minimum(((position_mm - low) / max(high - low, 1e-6) * panels).astype(int), panels - 1)
    members = [np.flatnonzero(stretch == number) for number in range(panels)]
    return np.array(sorted(rows[np.argmax(probability[rows])] for rows in members if rows.size), dtype=np.intp)


def contact_sheet(data: SheetData) -> bytes:
    """Draw the sheet as PNG, 100 pixels an inch: each slice plain, and beneath it the same under its heat map."""
    rows, box = -(-len(data.rows) // data.columns), head_box(data.hu)
    height, width = data.hu[0][box].shape
    panel_in = data.width_in / data.columns * 2.0 * height / width + 0.3
    tiles_in, below_in = (0.5 if data.title else 0.1) + rows * panel_in, 2.9
    figure = Figure(figsize=(data.width_in, tiles_in + below_in), layout="constrained", facecolor="white")
    sheet, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[tiles_in, below_in]).flat
    if data.title:
        sheet.suptitle(data.title, fontsize=12)
    grid = sheet.subplots(rows, data.columns, squeeze=False)
    sheet.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.0, hspace=0.0)
    for number, axes in enumerate(grid.flat[: len(data.rows)]):
        _draw_panel(axes, data, number, box)
    for axes in grid.flat[len(data.rows) :]:
        axes.set_axis_off()
    _draw_curve(below.subplots(), data)
    if data.note:
        below.supxlabel(data.note, fontsize=8.5, color="0.3")
    return to_png(figure)


def overlay(grey: Floats, heat: NDArray[np.float32], probability: float) -> Floats:
    """Lay a heat map (S, S) over a grey slice (S, S): RGB (S, S, 3). Opacity grows with heat and probability."""
    colour = colormaps[HEAT_COLOURS](0.25 + 0.75 * heat)[..., :3]
    weight = (MAX_OPACITY * probability * heat)[..., None]
    return np.asarray(np.clip((1.0 - weight) * grey[..., None] + weight * colour, 0.0, 1.0))


def head_box(hu: NDArray[np.int16]) -> tuple[slice, slice]:
    """Return the rows and columns that hold the heads of slices (k, S, S), with a margin; all if there is no head."""
    inside = np.any(hu > SKIN_HU, axis=0)
    if not inside.any():
        return slice(None), slice(None)
    margin = max(1, hu.shape[1] // 40)
    ends = [np.flatnonzero(line)[[0, -1]].tolist() for line in (inside.any(axis=1), inside.any(axis=0))]
    rows, columns = (slice(max(0, first - margin), last + margin + 1) for first, last in ends)
    return rows, columns


def _draw_panel(axes: Axes, data: SheetData, number: int, box: tuple[slice, slice]) -> None:
    row = data.rows[number]
    probability, framed = float(data.probabilities[row, CLASSES.index(data.class_name)]), bool(data.framed[row])
    level, width = BRAIN_WINDOW
    grey = np.clip((data.hu[number].astype(np.float64) - (level - width / 2)) / width, 0.0, 1.0)
    plain = np.repeat(grey[..., None], 3, axis=2)
    pictures = np.concatenate([plain[box], overlay(grey, data.heat[number], probability)[box]])
    axes.imshow(pictures, vmin=0, vmax=1, interpolation="antialiased")
    axes.set(xticks=[], yticks=[])
    label = f"{row} · {data.position_mm[row]:.0f} mm · P {probability:.2f}"
    axes.set_xlabel(label, fontsize=9, labelpad=2, color="#B34700" if framed else "black")
    for spine in axes.spines.values():
        spine.set(visible=framed, edgecolor=POSITIVE, linewidth=3)


def _draw_curve(axes: Axes, data: SheetData) -> None:
    """Draw P by position: a bold line for the explained class, thin ones for the others."""
    order = np.argsort(data.position_mm, kind="stable")
    position_mm = data.position_mm[order]
    steps = np.diff(position_mm) if len(position_mm) > 1 else np.array([5.0])
    edges = position_mm + 0.5 * np.append(steps, steps[-1])[: len(position_mm)]
    for row in np.flatnonzero(data.framed[order]):
        start = edges[row - 1] if row else 2 * position_mm[0] - edges[0]
        axes.axvspan(start, edges[row], color=POSITIVE, alpha=0.18, linewidth=0)
    marker = "." if len(position_mm) < 80 else None
    for number, name in enumerate(CLASSES):
        style: dict[str, Any] = {"color": PALETTE[number % len(PALETTE)], "linewidth": 1.1, "alpha": 0.9}
        if name == data.class_name:
            style = {"color": "black", "linewidth": 2.4, "zorder": 3}
        axes.plot(position_mm, data.probabilities[order, number], label=name, marker=marker, markersize=4, **style)
    if data.threshold is not None:
        axes.axhline(data.threshold, color="0.4", linewidth=1, linestyle="--")
    shown_mm = data.position_mm[data.rows]
    axes.plot(shown_mm, np.full(len(shown_mm), -0.045), "|", color="0.3", markersize=6, clip_on=False)
    handles, _ = axes.get_legend_handles_labels()
    handles.append(Line2D([], [], color=POSITIVE, alpha=0.3, linewidth=8, label=data.framed_means))
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    axes.set(ylim=(-0.06, 1.03), xlabel="position along the slice normal, mm  (ticks: slices shown)", ylabel="P")
    plain_axes(axes, grid="y")
