"""Arms of stage two beside each other: means and spreads over seeds, and paired differences from a baseline arm.

Patients are resampled once for all arms, so that every difference is paired. With a dozen arms one in twenty intervals
misses by chance alone: the verdict therefore rests on simultaneous intervals (the largest studentised deviation over
all arms in each resample; Westfall & Young 1993, Romano & Wolf 2005), and on the seeds: a difference that is smaller
than twice its standard error over seeds is noise, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ichpipe.common.classes import CLASSES, SUBTYPES
from ichpipe.common.constants import ABBREVIATIONS
from ichpipe.common.errors import DataError, did_you_mean
from ichpipe.scoring.bootstrap import Ranking, percentile_interval, resample, resampled_mean
from ichpipe.scoring.heldout_predictions import LABELS
from ichpipe.scoring.metrics import CLIP, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

SHORT: Final = ABBREVIATIONS | {"any": "any"}

BASELINE: Final = "baseline"
BETTER: Final = "better"
WORSE: Final = "worse"
NOISE: Final = "noise"
OTHER: Final = "not comparable"


@dataclass(frozen=True, eq=False)
class Arm:
    """One arm as it was trained: test predictions of each seed, and the record of its training."""

    name: str
    table: pd.DataFrame  # rows of the test split, with a column ``seed``
    record: dict[str, Any]


@dataclass(frozen=True)
class _Scored:
    """One arm on the slices of the baseline, in their order."""

    losses: Floats  # (seeds, n): weighted log loss of each slice
    by_class: Floats  # (seeds, 6)
    rankings: list[list[Ranking]]  # [class][seed]

    @property
    def of_seeds(self) -> Floats:
        """Weighted log loss of each seed."""
        mean: Floats = self.losses.mean(axis=1)
        return mean


def compare_arms(
    arms: Sequence[Arm], baseline: str, *, bootstrap_samples: int, confidence: float, seed: int
) -> dict[str, Any]:
    """Return the comparison as JSON-like values: ``arms`` in the given order, ``warnings``, and what it rests on.

    An arm that was scored on other slices than the baseline gets its own scores and no difference. Raises DataError
    where there is no arm of the baseline's name.
    """
    base = next((arm for arm in arms if arm.name == baseline), None)
    if base is None:
        names = [arm.name for arm in arms]
        close = did_you_mean(baseline, names)
        raise DataError(f"there is no arm {baseline!r} to compare with; arms here: {', '.join(names) or 'none'}{close}")
    slices = _slices(base)
    groups = {arm.name: _slices(arm) for arm in arms}
    same = [arm for arm in arms if groups[arm.name].sort_values().tolist() == slices.sort_values().tolist()]
    scored = {arm.name: _score(arm, slices if arm in same else groups[arm.name]) for arm in arms}
    patients = _first_seed(base)["patient_id"].to_numpy()
    paired = _paired(scored, [arm.name for arm in same], baseline, patients, bootstrap_samples, confidence, seed)
    rows = [_row(arm, scored[arm.name], paired.get(arm.name)) for arm in arms]
    return {
        "baseline": baseline,
        "n_slices": len(slices),
        "n_patients": len(np.unique(patients)),
        "confidence": confidence,
        "bootstrap_samples": bootstrap_samples,
        "warnings": _warnings(arms, same, base),
        "arms": rows,
    }


def _first_seed(arm: Arm) -> pd.DataFrame:
    chosen: pd.DataFrame = arm.table[arm.table["seed"] == arm.table["seed"].iloc[0]]
    return chosen


def _slices(arm: Arm) -> pd.Series[Any]:
    return _first_seed(arm)["sop_uid"].reset_index(drop=True)


def _score(arm: Arm, slices: pd.Series[Any]) -> _Scored:
    losses, by_class, rankings = [], [], []
    for _, part in arm.table.groupby("seed", sort=True):
        rows = part.set_index("sop_uid").loc[slices]
        true, predicted = rows[LABELS].to_numpy(np.float64), rows[list(CLASSES)].to_numpy(np.float64)
        clipped = np.clip(predicted, CLIP, 1.0 - CLIP)
        each = -np.where(true == 1.0, np.log(clipped), np.log1p(-clipped))
        patient = np.unique(rows["patient_id"].to_numpy(), return_inverse=True)[1]
        losses.append(each @ WEIGHTS)
        by_class.append(each.mean(axis=0))
        rankings.append([Ranking(true[:, one], predicted[:, one], patient) for one in range(len(CLASSES))])
    return _Scored(np.stack(losses), np.stack(by_class), [list(of_class) for of_class in zip(*rankings, strict=True)])


def _paired(
    scored: dict[str, _Scored],
    names: list[str],
    baseline: str,
    patients: NDArray[Any],
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Return value, intervals and verdict of each arm's gain over the baseline; positive is better."""
    base, others = scored[baseline], [name for name in names if name != baseline]
    labels, patient = np.unique(patients, return_inverse=True)
    gains = [base.losses.mean(axis=0) - scored[name].losses.mean(axis=0) for name in others]
    rankings = [scored[name].rankings[0] for name in (baseline, *others)]
    statistics = [resampled_mean(gain, patient, len(labels)) for gain in gains]
    statistics += [ranking.resample for of_arm in rankings for ranking in of_arm]
    found = resample(statistics, len(labels), samples, seed)
    losses, aucs = found[: len(gains)], iter(found[len(gains) :])
    base_auc, *arm_aucs = [np.mean([next(aucs) for _ in of_arm], axis=0) for of_arm in rankings]
    values = [float(gain.mean()) for gain in gains]
    half = _simultaneous(values, losses, confidence)
    result: dict[str, dict[str, Any]] = {baseline: {"verdict": BASELINE}}
    for name, value, draws, width, auc in zip(others, values, losses, half, arm_aucs, strict=True):
        seeds = _seed_error(base, scored[name])
        result[name] = {
            "weighted_log_loss": _interval(value, draws, confidence)
            | {"simultaneous": None if width is None else [value - width, value + width], "seed_error": seeds},
            "auc_any": _interval(_difference(scored[name], base), auc - base_auc, confidence),
            "verdict": _verdict(value, width, seeds),
        }
    return result


def _simultaneous(values: list[float], draws: list[Floats], confidence: float) -> list[float | None]:
    """Return the half width of each arm's interval that holds for all arms together; None without resamples."""
    if not draws or not len(draws[0]):
        return [None] * len(draws)
    matrix = np.stack(draws, axis=1)  # (samples, arms)
    error = matrix.std(axis=0)
    moved = np.abs(matrix - np.array(values))
    deviation = np.divide(moved, error, out=np.zeros_like(matrix), where=error > 0)
    critical = float(np.quantile(deviation.max(axis=1), confidence))
    return [float(width) for width in critical * error]


def _seed_error(base: _Scored, arm: _Scored) -> float | None:
    """Return the standard error of a difference of means over seeds; None where either has a single one."""
    if min(len(base.losses), len(arm.losses)) < 2:
        return None
    parts = [one.of_seeds.var(ddof=1) / len(one.losses) for one in (base, arm)]
    return math.sqrt(sum(parts))


def _verdict(value: float, width: float | None, seed_error: float | None) -> str:
    if width is None or abs(value) <= width or (seed_error is not None and abs(value) < 2 * seed_error):
        return NOISE
    return BETTER if value > 0 else WORSE


def _difference(arm: _Scored, base: _Scored) -> float | None:
    found = [_mean_auc(one.rankings[0]) for one in (arm, base)]
    return None if None in found else found[0] - found[1]  # type: ignore[operator]


def _mean_auc(rankings: list[Ranking]) -> float | None:
    values = [ranking.value for ranking in rankings]
    return None if None in values else float(np.mean(values))  # type: ignore[arg-type]


def _interval(value: float | None, draws: Floats, confidence: float) -> dict[str, Any]:
    low, high = (percentile_interval(draws, confidence) or (None, None)) if value is not None else (None, None)
    return {"value": value, "ci_low": low, "ci_high": high}


def _row(arm: Arm, scored: _Scored, paired: dict[str, Any] | None) -> dict[str, Any]:
    losses, record = scored.of_seeds, arm.record
    seconds = [one["seconds"] for one in record.get("seeds", [])]
    return {
        "arm": arm.name,
        "seeds": sorted(int(number) for number in arm.table["seed"].unique()),
        "weighted_log_loss": {
            "mean": float(losses.mean()),
            "sd": float(losses.std(ddof=1)) if len(losses) > 1 else None,
            "of_seeds": losses.tolist(),
        },
        "log_loss": dict(zip(CLASSES, scored.by_class.mean(axis=0).tolist(), strict=True)),
        "auc": {name: _mean_auc(found) for name, found in zip(CLASSES, scored.rankings, strict=True)},
        "gain": {key: value for key, value in paired.items() if key != "verdict"} if paired else {},
        "verdict": paired["verdict"] if paired else OTHER,
        "n_parameters": record.get("n_parameters"),
        "seconds_per_seed": float(np.mean(seconds)) if seconds else None,
    }


def _warnings(arms: Sequence[Arm], same: list[Arm], base: Arm) -> list[str]:
    others = [arm.name for arm in arms if arm not in same]
    found = []
    if others:
        found.append(f"scored on other slices than {base.name}, so not compared with it: {', '.join(others)}")
    store = base.record.get("store")
    if apart := [arm.name for arm in arms if arm.record.get("store") != store]:
        found.append(f"made from another embedding store than {base.name}: {', '.join(apart)}")
    return found


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """Return two markdown tables, the warnings, and what the figures mean; ``comparison`` is from `compare_arms`."""
    percent = f"{100 * comparison['confidence']:g} %"
    arms = comparison["arms"]
    head = ["arm", "seeds", "weighted log loss", f"gain [{percent}]", "verdict"]
    head += [f"AUC {SHORT[name]}" for name in CLASSES] + ["parameters", "s / seed"]
    rows = [_format_arm(row) for row in arms]
    losses = [[row["arm"], *(_format_number(row["log_loss"][name]) for name in CLASSES)] for row in arms]
    notes = [f"**Warning**: {warning}." for warning in comparison["warnings"]]
    return "\n".join(
        [
            _format_table(head, rows),
            "",
            f"{comparison['n_slices']} slices of {comparison['n_patients']} patients. Gain: weighted log loss of "
            f"{comparison['baseline']} minus that of the arm, mean over seeds; positive is better. Intervals: patients "
            f"resampled {comparison['bootstrap_samples']} times, paired. Verdict: noise unless the interval that holds "
            "for all arms together leaves out 0 and the gain is at least twice its standard error over seeds.",
            *notes,
            "",
            _format_table(["log loss", *(SHORT[name] for name in CLASSES)], losses),
        ]
    )


def _format_arm(row: Mapping[str, Any]) -> list[str]:
    loss, gain = row["weighted_log_loss"], row["gain"].get("weighted_log_loss")
    spread = "" if loss["sd"] is None else f" ± {_format_number(loss['sd'])}"
    return [
        row["arm"],
        str(len(row["seeds"])),
        _format_number(loss["mean"]) + spread,
        "" if gain is None else _format_gain(gain),
        row["verdict"],
        *(_format_number(row["auc"][name], 3) for name in ("any", *SUBTYPES)),
        "" if row["n_parameters"] is None else f"{row['n_parameters']:,}",
        "" if row["seconds_per_seed"] is None else f"{row['seconds_per_seed']:.1f}",
    ]


def _format_gain(gain: Mapping[str, Any]) -> str:
    low, high = gain["ci_low"], gain["ci_high"]
    interval = "" if low is None else f" [{low:+.4f}, {high:+.4f}]"
    return f"{gain['value']:+.4f}{interval}"


def _format_number(value: float | None, digits: int = 4) -> str:
    return "not defined" if value is None else f"{value:.{digits}f}"


def _format_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table whose columns line up in plain text, too."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    first, *rest = widths

    def line(cells: Sequence[str]) -> str:
        ends = [cells[0].ljust(first), *(cell.rjust(width) for cell, width in zip(cells[1:], rest, strict=True))]
        return f"| {' | '.join(ends)} |"

    rule = "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in rest)])
    return "\n".join([line(head), f"|{rule}|", *(line(row) for row in rows)])
