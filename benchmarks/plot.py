"""Pictures of what the benchmarks wrote: ``python -m benchmarks plot FOLDER --out docs``.

Each PNG carries date, commit, processor and versions of the run that it shows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes

DPI = 110
OURS, THEIRS, GREY = "#1f6f8b", "#c77d3a", "#8a8f94"
PARTS = {"list": "read headers", "fill": "embed and cache", "epoch": "first epoch"}
NAMES = {
    "ichpipe": "ichpipe",
    "npz": "DataLoader,\nnumpy.savez",
    "memmap": "memory map,\nrow table",
    "monai": "MONAI\nPersistentDataset",
}


def main(words: list[str]) -> int:
    """Draw every picture for which there is a result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, help="folder of JSON files")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args(words)
    for path in draw_all(options.results, options.out):
        print(path)
    return 0


def draw_all(results: Path, out: Path) -> list[Path]:
    """Draw what there is; return the files written."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}
    drawn = []
    for name, draw in DRAWN.items():
        if name in found:
            drawn.append(_save(draw(found[name]), out / f"speed-{name}.png"))
    with_ratios = {name: one for name, one in found.items() if one.get("ratios")}
    if with_ratios:
        drawn.append(_save(overview(with_ratios), out / "speed-ratios.png"))
    return drawn


def alternatives(written: dict[str, Any]) -> Figure:
    """Bars of both arms, the first in its parts; what is left is start and imports."""
    result = written["result"]
    figure, (left, right) = _figure(written, 2, 3.4)
    for row, (name, rounds) in enumerate(reversed(result["rounds"].items())):
        best = min((one["first"] for one in rounds), key=lambda one: one["seconds"])
        rest, at = best["seconds"] - sum(best[part] for part in PARTS), 0.0
        for shade, (label, seconds) in enumerate(
            {"start": rest, **{word: best[part] for part, word in PARTS.items()}}.items()
        ):
            left.barh(
                row, seconds, left=at, color=(GREY, "#7fb7be", OURS, THEIRS)[shade], label=label if row == 0 else None
            )
            at += seconds
        left.text(at, row, f" {at:.0f} s", va="center", fontsize=8)
        second = result["seconds"][name]["second"]
        right.barh(row, second, color=OURS if name == "ichpipe" else GREY)
        right.text(second, row, f" {second:.1f} s", va="center", fontsize=8)
    for axes, title in (
        (left, f"DICOM files to the end of the first epoch ({result['slices']:,} slices)"),
        (right, "second arm, a new process"),
    ):
        axes.set_yticks(range(len(result["rounds"])), [NAMES[name] for name in reversed(result["rounds"])], fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("seconds", fontsize=8)
        axes.set_xlim(0, axes.get_xlim()[1] * 1.12)
    left.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False)
    return figure


def growth(written: dict[str, Any]) -> Figure:
    """Peak memory and time of a computed slice by the size of the archive."""
    sizes = written["result"]["sizes"]
    figure, (left, right) = _figure(written, 2, 3.0)
    at = [one["slices"] for one in sizes]
    left.plot(at, [one["peak_mb"] for one in sizes], "o-", color=OURS, label="peak of the process")
    left.plot(at, [one["start_mb"] for one in sizes], "o--", color=GREY, label="libraries loaded")
    left.set_ylim(0)
    left.legend(fontsize=8, frameon=False, loc="lower right")
    left.set_title("memory of extract, MiB", fontsize=9)
    right.plot(at, [1000 * one["seconds"] / one["computed"] for one in sizes], "o-", color=OURS)
    right.set_ylim(0)
    right.set_title("milliseconds per computed slice, start of Dask included", fontsize=9)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("slices in the index", fontsize=8)
    return figure


def cluster(written: dict[str, Any]) -> Figure:
    """Seconds of all tasks on one, two, four workers, and with one killed."""
    runs = {name: one for name, one in written["result"]["runs"].items() if "seconds_of_tasks" in one}
    figure, (axes,) = _figure(written, 1, 2.6)
    for row, (name, one) in enumerate(reversed(runs.items())):
        axes.barh(row, one["seconds_of_tasks"], color=THEIRS if "killed" in name else OURS)
        same = "same bytes" if one["same_bytes"] else "OTHER BYTES"
        again = f", {one['started_again']} of {one['tasks']} tasks started twice" if one["started_again"] else ""
        axes.text(
            one["seconds_of_tasks"], row, f" {one['seconds_of_tasks']:.1f} s, {same}{again}", va="center", fontsize=8
        )
    axes.set_yticks(range(len(runs)), list(reversed(runs)), fontsize=8)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.6)
    axes.set_xlabel(f"seconds from the first task to the last; {written['machine']['cores']} cores", fontsize=8)
    return figure


def overview(found: dict[str, Any]) -> Figure:
    """Every ratio of every benchmark on one logarithmic axis."""
    rows = [(f"{name}: {word}", value) for name, one in found.items() for word, value in one["ratios"].items() if value]
    figure, (axes,) = _figure(next(iter(found.values())), 1, 0.7 + 0.2 * len(rows))
    for row, (_, value) in enumerate(reversed(rows)):
        axes.plot([1, value], [row, row], color=GREY, linewidth=1)
        axes.plot(value, row, "o", color=OURS, markersize=4)
        axes.text(value, row, f"  {value:.3g}", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.05, *(value for _, value in rows)) / 1.5, max(20.0, *(value for _, value in rows)) * 4)
    axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)], fontsize=7)
    axes.set_xlabel("ratio to the baseline of the same run", fontsize=8)
    return figure


DRAWN: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "alternatives": alternatives,
    "growth": growth,
    "cluster": cluster,
}


def _figure(written: dict[str, Any], columns: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    versions = written["versions"]
    machine = written["machine"]
    about = f"{written['date'][:10]}, commit {written['commit']}, {machine['cores']} cores {machine['cpu']}, "
    about += f"Python {versions['python']}, torch {versions['torch']}, zarr {versions['zarr']}, dask {versions['dask']}"
    figure.text(0.995, -0.02, about, ha="right", va="top", fontsize=6, color=GREY)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure.savefig(path, dpi=DPI, bbox_inches="tight", pil_kwargs={"optimize": True}, metadata={"Software": None})
    return path
