"""Compares arms of stage two: means and spreads over seeds, and paired differences from a baseline arm.

With a dozen arms, one in twenty intervals misses by chance. The verdict therefore rests on simultaneous intervals: the
largest studentised deviation over all arms in each resample (Westfall & Young 1993, Romano & Wolf 2005).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ichpipe.common.classes import CLASSES
from ichpipe.common.constants import ABBREVIATIONS
from ichpipe.common.errors import DataError, did_you_mean
from ichpipe.common.text_table import format_table
from ichpipe.scoring.bootstrap import Estimate, Ranking, estimate, resample, resampled_mean
from ichpipe.scoring.heldout_predictions import labels_and_probabilities
from ichpipe.scoring.metrics import WEIGHTS, cross_entropies, describe_undefined_aucs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

BETTER: Final = "better"
WORSE: Final = "worse"
TOO_FEW_SEEDS: Final = "too few seeds"  # beyond noise over patients, but the spread over seeds is unknown


@dataclass(frozen=True, eq=False)
class Arm:
    """One trained arm: test predictions of each seed, and the record of its training."""

    name: str
    table: pd.DataFrame  # rows of the test split, with a column ``seed``
    record: dict[str, Any]


@dataclass(frozen=True)
class _Scores:
    """One arm on the slices of the baseline, in their order."""

    losses: Floats  # (seeds, n): weighted log loss of each slice
    by_class: Floats  # (seeds, 6)
    rankings: list[list[Ranking]]  # [class][seed]
    is_learned: bool  # False: there is nothing to learn, so every seed gives the same

    def mean_auc(self, column: int = 0) -> float | None:
        """Return the AUC of a class, mean over seeds; None where a seed has none."""
        values = [ranking.value for ranking in self.rankings[column] if ranking.value is not None]
        return float(np.mean(values)) if len(values) == len(self.losses) else None

    def seed_variance(self) -> float | None:
        """Return the squared standard error of the mean loss over seeds; None where it is unknown."""
        if not self.is_learned:
            return 0.0
        means = self.losses.mean(axis=1)
        return float(means.var(ddof=1)) / len(means) if len(means) > 1 else None


def compare_arms(
    arms: Sequence[Arm], baseline: str, *, bootstrap_samples: int, confidence: float, seed: int
) -> dict[str, Any]:
    """Return the comparison as JSON-like values: ``arms`` in the given order, ``warnings``, and the settings.

    An arm that was scored on other slices than the baseline gets its own scores and no difference. Raises DataError
    where no arm has the baseline's name.
    """
    names = [arm.name for arm in arms]
    if baseline not in names:
        close = did_you_mean(baseline, names)
        raise DataError(f"there is no arm {baseline!r} to compare with; arms here: {', '.join(names) or 'none'}{close}")
    base = arms[names.index(baseline)]
    first_seed = base.table[base.table["seed"] == base.table["seed"].iloc[0]]
    slices, patients = first_seed["sop_uid"], first_seed["patient_id"].to_numpy()
    uids = sorted(slices)
    own_slices = {arm.name: arm.table["sop_uid"][arm.table["seed"] == arm.table["seed"].iloc[0]] for arm in arms}
    same = [name for name in names if sorted(own_slices[name]) == uids]
    scores = {arm.name: _score(arm, slices if arm.name in same else own_slices[arm.name]) for arm in arms}
    others = [name for name in same if name != baseline]
    scored = [scores[name] for name in others]
    gains = _compare_paired(scores[baseline], scored, patients, bootstrap_samples, confidence, seed)
    verdicts = dict(zip(others, gains, strict=True)) | {baseline: ("baseline", {})}
    of_class = {name: seeds[0] for name, seeds in zip(CLASSES, scores[baseline].rankings, strict=True)}
    one_kind = {name: ranking.n_positive for name, ranking in of_class.items() if ranking.value is None}
    warnings = [undefined] if (undefined := describe_undefined_aucs(one_kind)) else []
    if strangers := [name for name in names if name not in same]:
        warnings.append(f"scored on other slices than {baseline}, so not compared with it: {', '.join(strangers)}")
    if apart := [arm.name for arm in arms if arm.record.get("store") != base.record.get("store")]:
        warnings.append(f"made from another embedding store than {baseline}: {', '.join(apart)}")
    return {
        "baseline": baseline,
        "n_slices": len(slices),
        "n_patients": len(np.unique(patients)),
        "confidence": confidence,
        "bootstrap_samples": bootstrap_samples,
        "warnings": warnings,
        "arms": [_describe(arm, scores[arm.name], *verdicts.get(arm.name, ("not comparable", {}))) for arm in arms],
    }


def _score(arm: Arm, slices: pd.Series[Any]) -> _Scores:
    losses, by_class, rankings = [], [], []
    for _, part in arm.table.groupby("seed", sort=True):
        rows = part.set_index("sop_uid").loc[slices]
        true, predicted = labels_and_probabilities(rows)
        entropies = cross_entropies(true, predicted)
        patient = np.unique(rows["patient_id"].to_numpy(), return_inverse=True)[1]
        losses.append(entropies @ WEIGHTS)
        by_class.append(entropies.mean(axis=0))
        rankings.append([Ranking(*columns, patient) for columns in zip(true.T, predicted.T, strict=True)])
    by_seed = [list(of_class) for of_class in zip(*rankings, strict=True)]
    return _Scores(np.stack(losses), np.stack(by_class), by_seed, arm.record.get("n_parameters") != 0)


def _compare_paired(
    base: _Scores, others: list[_Scores], patients: NDArray[Any], samples: int, confidence: float, seed: int
) -> list[tuple[str, dict[str, Any]]]:
    """Return each arm's verdict, and its gain over the baseline with intervals; positive is better."""
    labels, patient = np.unique(patients, return_inverse=True)
    gains = [base.losses.mean(axis=0) - arm.losses.mean(axis=0) for arm in others]
    rankings = [arm.rankings[0] for arm in (base, *others)]
    statistics = [resampled_mean(gain, patient, len(labels)) for gain in gains]
    statistics += [ranking.resample for of_arm in rankings for ranking in of_arm]
    resampled = resample(statistics, len(labels), samples, seed)
    losses, aucs = resampled[: len(gains)], iter(resampled[len(gains) :])
    base_resampled, *arms_resampled = [np.mean([next(aucs) for _ in of_arm], axis=0) for of_arm in rankings]
    values = [float(gain.mean()) for gain in gains]
    widths: list[float | None] = [None] * len(losses)  # half widths that hold for all arms together
    if losses and len(losses[0]):
        draws_of_arms = np.stack(losses, axis=1)  # (samples, arms)
        error = draws_of_arms.std(axis=0)
        moved = np.abs(draws_of_arms - np.array(values))
        deviation = np.divide(moved, error, out=np.zeros_like(draws_of_arms), where=error > 0)
        critical = float(np.quantile(deviation.max(axis=1), confidence))
        widths = [float(width) for width in critical * error]
    base_auc, result = base.mean_auc(), []
    for arm, value, draws, width, auc_draws in zip(others, values, losses, widths, arms_resampled, strict=True):
        variances = base.seed_variance(), arm.seed_variance()
        seed_error = None if None in variances else math.sqrt(sum(filter(None, variances)))
        verdict = BETTER if value > 0 else WORSE
        if width is None or abs(value) <= width or (seed_error is not None and abs(value) < 2 * seed_error):
            verdict = "noise"
        elif seed_error is None and arm.is_learned:
            verdict = TOO_FEW_SEEDS
        simultaneous = None if width is None else [value - width, value + width]
        auc = arm.mean_auc()
        difference = None if auc is None or base_auc is None else auc - base_auc
        loss = estimate(value, draws, confidence).to_json() | {"simultaneous": simultaneous, "seed_error": seed_error}
        auc_any = estimate(difference, auc_draws - base_resampled, confidence).to_json()
        result.append((verdict, {"weighted_log_loss": loss, "auc_any": auc_any}))
    return result


def _describe(arm: Arm, scores: _Scores, verdict: str, gain: dict[str, Any]) -> dict[str, Any]:
    losses = scores.losses.mean(axis=1)
    seconds = [seed["seconds"] for seed in arm.record.get("seeds", [])]
    return {
        "arm": arm.name,
        "seeds": sorted(int(number) for number in arm.table["seed"].unique()) if scores.is_learned else [],
        "weighted_log_loss": {
            "mean": float(losses.mean()),
            "sd": float(losses.std(ddof=1)) if scores.is_learned and len(losses) > 1 else None,
            "of_seeds": losses.tolist(),
        },
        "log_loss": dict(zip(CLASSES, scores.by_class.mean(axis=0).tolist(), strict=True)),
        "auc": {name: scores.mean_auc(column) for column, name in enumerate(CLASSES)},
        "gain": gain,
        "verdict": verdict,
        "n_parameters": arm.record.get("n_parameters"),
        "seconds_per_seed": float(np.mean(seconds)) if seconds else None,
    }


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """Return two markdown tables, the warnings, and what the figures mean; ``comparison`` is from `compare_arms`."""
    short = [ABBREVIATIONS[name] if name != "any" else name for name in CLASSES]
    head = ["arm", "seeds", "weighted log loss", f"gain [{100 * comparison['confidence']:g} %]", "verdict"]
    head += [*(f"AUC {name}" for name in short), "parameters", "s / seed"]
    rows, losses = [], []
    for row in comparison["arms"]:
        loss, gain = row["weighted_log_loss"], row["gain"].get("weighted_log_loss")
        spread = "" if loss["sd"] is None else f" ± {loss['sd']:.4f}"
        gain_text = "" if gain is None else Estimate.from_json(gain).text(sign="+")
        cells = [row["arm"], str(len(row["seeds"]) or "none"), f"{loss['mean']:.4f}{spread}", gain_text, row["verdict"]]
        cells += [Estimate(row["auc"][name]).text(3) for name in CLASSES]
        cells.append("" if row["n_parameters"] is None else f"{row['n_parameters']:,}")
        cells.append("" if row["seconds_per_seed"] is None else f"{row['seconds_per_seed']:.1f}")
        rows.append(cells)
        losses.append([row["arm"], *(f"{row['log_loss'][name]:.4f}" for name in CLASSES)])
    lines = [
        format_table(head, rows, markdown=True),
        "",
        f"{comparison['n_slices']} slices of {comparison['n_patients']} patients. Gain: weighted log loss of "
        f"{comparison['baseline']} minus that of the arm, mean over seeds; positive is better. Intervals: patients "
        f"resampled {comparison['bootstrap_samples']} times, paired. Verdict: noise unless the interval that holds "
        "for all arms together leaves out 0 and the gain is at least twice its standard error over seeds. That error "
        "needs two seeds of both arms; with fewer, the verdict is that seeds are too few. An arm that learns nothing "
        "has no seed and adds nothing to that error; against a baseline of one seed the interval alone decides.",
        *(f"**Warning**: {warning}." for warning in comparison["warnings"]),
        "",
        format_table(["log loss", *short], losses, markdown=True),
    ]
    return "\n".join(lines)
