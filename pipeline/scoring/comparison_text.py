"""The comparison of arms as markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ichpipe.common.classes import CLASSES, SUBTYPES
from ichpipe.common.constants import ABBREVIATIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SHORT = ABBREVIATIONS | {"any": "any"}


def comparison_text(found: Mapping[str, Any]) -> str:
    """Return two markdown tables, the warnings, and what the figures mean; ``found`` is of `compare_arms`."""
    percent = f"{100 * found['confidence']:g} %"
    arms = found["arms"]
    head = ["arm", "seeds", "weighted log loss", f"gain [{percent}]", "verdict"]
    head += [f"AUC {SHORT[name]}" for name in CLASSES] + ["parameters", "s / seed"]
    rows = [_scores(row) for row in arms]
    losses = [[row["arm"], *(_number(row["log_loss"][name]) for name in CLASSES)] for row in arms]
    notes = [f"**Warning**: {warning}." for warning in found["warnings"]]
    return "\n".join(
        [
            _table(head, rows),
            "",
            f"{found['n_slices']} slices of {found['n_patients']} patients. Gain: weighted log loss of "
            f"{found['baseline']} minus that of the arm, mean over seeds; positive is better. Intervals: patients "
            f"resampled {found['bootstrap_samples']} times, paired. Verdict: noise unless the interval that holds for "
            "all arms together leaves out 0 and the gain is at least twice its standard error over seeds.",
            *notes,
            "",
            _table(["log loss", *(SHORT[name] for name in CLASSES)], losses),
        ]
    )


def _scores(row: Mapping[str, Any]) -> list[str]:
    loss, gain = row["weighted_log_loss"], row["gain"].get("weighted_log_loss")
    spread = "" if loss["sd"] is None else f" ± {_number(loss['sd'])}"
    return [
        row["arm"],
        str(len(row["seeds"])),
        _number(loss["mean"]) + spread,
        "" if gain is None else _gain(gain),
        row["verdict"],
        *(_number(row["auc"][name], 3) for name in ("any", *SUBTYPES)),
        "" if row["n_parameters"] is None else f"{row['n_parameters']:,}",
        "" if row["seconds_per_seed"] is None else f"{row['seconds_per_seed']:.1f}",
    ]


def _gain(gain: Mapping[str, Any]) -> str:
    low, high = gain["ci_low"], gain["ci_high"]
    interval = "" if low is None else f" [{low:+.4f}, {high:+.4f}]"
    return f"{gain['value']:+.4f}{interval}"


def _number(value: float | None, digits: int = 4) -> str:
    return "not defined" if value is None else f"{value:.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table whose columns line up in plain text, too."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    first, *rest = widths

    def line(cells: Sequence[str]) -> str:
        ends = [cells[0].ljust(first), *(cell.rjust(width) for cell, width in zip(cells[1:], rest, strict=True))]
        return f"| {' | '.join(ends)} |"

    rule = "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in rest)])
    return "\n".join([line(head), f"|{rule}|", *(line(row) for row in rows)])
