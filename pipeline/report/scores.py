"""Parts of the page that say how good the models are: the ladder, curves, calibration, the operating point, arms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ichpipe.common.classes import CLASSES
from ichpipe.report.blocks import NOT_DEFINED, Plot, Section, Table, figure, share, with_interval
from ichpipe.report.charts import Axis, Interval, Line, interval_plot, line_plot
from ichpipe.report.facts import model_title
from ichpipe.scoring.calibration_metrics import reliability
from ichpipe.scoring.heldout_predictions import FINETUNED, LABELS, SLICE_CNN, sequence_name
from ichpipe.scoring.operating_points import operating_points, proportion_interval
from ichpipe.scoring.pooling import pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from ichpipe.report.facts import Facts
    from ichpipe.scoring.pooling import StudyScore

WANTED: Final = 0.9
"""Sensitivity, and specificity, that a threshold is chosen for."""

RATES: Final = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
UNIT: Final = (0.0, 1.0)


def ladder(facts: Facts) -> Section:
    """Every model on the same held-out patients, with intervals, and each rung against the one before."""
    if facts.metrics is None:
        return Section("ladder", "Models", ["There are no scores yet; run: ichpipe evaluate."])
    rungs = rungs_of(facts.metrics)
    counts = "{n_slices} slices, {n_studies} studies, {n_patients} patients".format_map(_counts(facts.metrics))
    kinds = (("AUC any, by slice", "auc"), ("AUC any, by study", "study_auc"))
    plots = [("Weighted log loss (lower is better)", [_loss(name, found) for name, found in rungs])]
    plots += [
        (f"{title} (higher is better)", [_auc(name, found[kind]["any"]) for name, found in rungs])
        for title, kind in kinds
    ]
    rows = [[name, *(with_interval(i.value, i.low, i.high) for i in cells)] for name, cells in _by_model(rungs, plots)]
    lines = [f"Every model is scored on the same held-out {counts}.", _interval_words(facts)]
    return Section(
        "ladder",
        "Models",
        lines,
        tables=[Table("The ladder of models", ["model", "weighted log loss", *(title for title, _ in kinds)], rows)],
        plots=[Plot(title, interval_plot(title, cells, title.partition(" (")[0])) for title, cells in plots],
        hidden=[
            _per_class(rungs, "auc", "AUC by slice"),
            _per_class(rungs, "study_auc", "AUC by study"),
            _paired(facts.metrics),
        ],
    )


def rungs_of(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (title, scores) of each model, from the slice CNN to the fine-tuned one."""
    rungs = [(model_title(SLICE_CNN), metrics[SLICE_CNN])]
    rungs += [(model_title(sequence_name(arm)), found) for arm, found in metrics["sequence"].items()]
    return [*rungs, (model_title(FINETUNED), metrics[FINETUNED])]


def curve_sections(facts: Facts, arm: str) -> list[Section]:
    """ROC, precision-recall and calibration, one plot a class, of slice CNN, the fine-tuned model's arm, and itself."""
    shown = {SLICE_CNN: 0, sequence_name(arm): 1, FINETUNED: 2}
    return [
        _curves(facts, shown, "roc", "ROC", ("fpr", "false positive rate"), ("tpr", "true positive rate")),
        _curves(
            facts, shown, "precision_recall", "Precision and recall", ("recall", "recall"), ("precision", "precision")
        ),
        _calibration(facts, shown),
    ]


def _curves(
    facts: Facts, shown: dict[str, int], kind: str, title: str, x: tuple[str, str], y: tuple[str, str]
) -> Section:
    rows, key = facts.curves[kind], kind.replace("_", "-")
    plots, hidden, without = [], [], []
    for name in CLASSES:
        lines = _lines(rows, shown, name, x[0], y[0])
        if not lines:
            without.append(name)
            continue
        axes = Axis(x[1], *UNIT), Axis(y[1], *UNIT)
        plots.append(Plot(name, line_plot(f"{title}, {name}", lines, *axes, diagonal=kind == "roc")))
        hidden.append(_read_off(lines, f"{title}, {name}: {y[1]} at a given {x[1]}", x[1]))
    said = ["By slice, on the held-out patients."] if plots else []
    if without:
        said.append(
            f"No curve for {', '.join(without)}: "
            + ("no positive or no negative held-out slice." if rows else "not evaluated yet.")
        )
    return Section(key, title, said, legend=_legend(shown, plots), plots=plots, hidden=hidden)


def _calibration(facts: Facts, shown: dict[str, int]) -> Section:
    plots, rows = [], []
    for name in CLASSES:
        lines = _lines(facts.curves["calibration"], shown, name, "predicted", "observed", dots=True)
        if lines:
            axes = Axis("predicted probability", *UNIT), Axis("share of positives", *UNIT)
            plots.append(Plot(name, line_plot(f"Calibration, {name}", lines, *axes, diagonal=True)))
    for row in facts.curves["calibration"]:
        if row["model"] in shown:
            cells = (figure(row["predicted"], 3), figure(row["observed"], 3), str(row["n"]))
            rows.append([model_title(row["model"]), row["class"], *cells])
    said = ["How far probabilities can be taken at their word: on the diagonal, one in five slices of P 0.2 bleeds."]
    hidden = [Table("Calibration in ten bins", ["model", "class", "mean P", "share positive", "slices"], rows)]
    if not plots:
        return Section("calibration", "Calibration", ["There are no scores yet; run: ichpipe evaluate."])
    tables = [] if facts.test is None else [_reliability(facts.test)]
    return Section("calibration", "Calibration", said, tables, _legend(shown, plots), plots, hidden)


def operating(facts: Facts, study_score: StudyScore) -> Section:
    """Confusion of the fine-tuned model by study, at thresholds chosen on the validation patients."""
    key, title = "operating", "Operating points"
    if facts.test is None:
        return Section(key, title, ["The fine-tuned model has not predicted the test patients; run: ichpipe finetune."])
    truth, score = of_studies(facts.test, study_score)
    tables, notes = [], []
    for kind, words in (("high_sensitivity", "sensitivity"), ("high_specificity", "specificity")):
        rows = []
        for column, name in enumerate(CLASSES):
            threshold = _threshold(facts.val, study_score, column, kind)
            rows.append([name, *_confusion(truth[:, column] == 1, score[:, column], threshold)])
        head = ["class", "threshold", "true positive", "false negative", "false positive", "true negative"]
        head += ["sensitivity", "specificity"]
        tables.append(Table(f"Threshold for {words} of at least {WANTED:g} in validation", head, rows))
    if facts.val is None:
        notes.append("No validation patient has been predicted, so there is no threshold.")
    lines = [
        f"A study is called positive where its score ({study_score} over slices, fine-tuned model) reaches the "
        f"threshold. Thresholds are chosen on the {_count(facts.val)} validation studies; counted here are the "
        f"{len(truth)} held-out ones. Brackets: exact 95 % intervals (Clopper and Pearson).",
        *notes,
    ]
    return Section(key, title, lines, tables)


def ablation(facts: Facts) -> Section:
    """The arms of stage two beside each other."""
    key, title, found = "ablation", "Ablation: arms of the sequence model", facts.comparison
    if found is None:
        return Section(key, title, ["Arms have not been compared; run: ichpipe compare."])
    rows, gains = [], []
    for row in found["arms"]:
        loss, gain = row["weighted_log_loss"], row["gain"].get("weighted_log_loss")
        spread = "" if loss["sd"] is None else f" ± {loss['sd']:.4f}"
        cells = [str(len(row["seeds"])), figure(loss["mean"]) + spread, "" if gain is None else _signed(gain)]
        cells += [
            row["verdict"],
            figure(row["auc"]["any"], 3),
            "" if row["n_parameters"] is None else f"{row['n_parameters']:,}",
        ]
        rows.append([row["arm"], *cells])
        if gain is not None:
            gains.append(Interval(row["arm"], gain["value"], gain["ci_low"], gain["ci_high"]))
    head = ["arm", "seeds", "weighted log loss", f"gain over {found['baseline']}", "verdict", "AUC any", "parameters"]
    lines = [
        f"Gain: weighted log loss of {found['baseline']} minus that of the arm, over {found['n_patients']} patients; "
        "above 0 the arm is better. It is called noise unless it holds for all arms together and beyond the spread of "
        "seeds.",
        *(f"Warning: {warning}." for warning in found["warnings"]),
    ]
    name = f"Gain over {found['baseline']}, weighted log loss"
    plots = [Plot(name, interval_plot(name, gains, "gain", zero=True, digits=4))] if gains else []
    return Section(key, title, lines, [Table("Arms, mean over seeds ± standard deviation", head, rows)], plots=plots)


def of_studies(table: pd.DataFrame, study_score: StudyScore) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return labels and scores (series, 6) of a table of slices, in the order in which series come."""
    from ichpipe.scoring.model_ladder import smooth_series  # noqa: PLC0415 - scikit-learn and scipy, for this alone

    groups = table.groupby("series_uid", sort=False)
    place, count = np.asarray(groups.ngroup(), dtype=np.intp), groups.ngroups
    return pool(table[LABELS].to_numpy(np.float64), place, count), pool(smooth_series(table), place, count, study_score)


def _threshold(val: pd.DataFrame | None, study_score: StudyScore, column: int, kind: str) -> float | None:
    if val is None:
        return None
    truth, score = of_studies(val, study_score)
    found = operating_points(truth[:, column], score[:, column], wanted=WANTED)[kind]
    return None if found is None else found["threshold"]


def _confusion(positive: NDArray[np.bool_], score: NDArray[np.float64], threshold: float | None) -> list[str]:
    if threshold is None:
        return ["none: no positive or no negative in validation", *[""] * 6]
    called = score >= threshold
    counts = [
        int((a & b).sum())
        for a, b in ((called, positive), (~called, positive), (called, ~positive), (~called, ~positive))
    ]
    true_pos, false_neg, false_pos, true_neg = counts
    rates = [_rate(true_pos, true_pos + false_neg), _rate(true_neg, true_neg + false_pos)]
    return [figure(threshold, 3), *map(str, counts), *rates]


def _rate(part: int, whole: int) -> str:
    if not whole:
        return NOT_DEFINED
    low, high = proportion_interval(part, whole)
    return with_interval(part / whole, low, high, 2)


def _lines(
    rows: Sequence[dict[str, Any]], shown: dict[str, int], name: str, x: str, y: str, *, dots: bool = False
) -> list[Line]:
    found = {model: [(r[x], r[y]) for r in rows if r["model"] == model and r["class"] == name] for model in shown}
    return [Line(model, points, shown[model], dots) for model, points in found.items() if points]


def _read_off(lines: Sequence[Line], caption: str, x: str) -> Table:
    """Read curves off at fixed places: the highest y among points that reach so far (for ROC: not farther)."""
    roc = x == "false positive rate"
    rows = []
    for at in RATES:
        inside = [[py for px, py in line.points if (px <= at + 1e-9 if roc else px >= at - 1e-9)] for line in lines]
        rows.append([f"{at:g}", *(figure(max(values), 3) if values else "" for values in inside)])
    return Table(caption, [x, *(model_title(line.name) for line in lines)], rows)


def _legend(shown: dict[str, int], plots: Sequence[Plot]) -> list[tuple[str, int]]:
    return [(model_title(name), look) for name, look in shown.items()] if plots else []


def _reliability(test: pd.DataFrame) -> Table:
    found = reliability(test[LABELS].to_numpy(np.float64), test[list(CLASSES)].to_numpy(np.float64))
    names = (
        ("Brier score", "brier"),
        ("calibration error", "calibration_error"),
        ("average precision", "average_precision"),
    )
    rows = [[name, *(figure(found[key][name]) for _, key in names)] for name in CLASSES]
    positive = test[LABELS].to_numpy().sum(axis=0).astype(int)
    rows = [[*row, share(int(count), len(test))] for row, count in zip(rows, positive, strict=True)]
    return Table("Fine-tuned model, by slice", ["class", *(name for name, _ in names), "positive slices"], rows)


def _count(table: pd.DataFrame | None) -> int:
    return 0 if table is None else int(table["series_uid"].nunique())


def _counts(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: metrics.get(name, "unknown") for name in ("n_slices", "n_studies", "n_patients")}


def _interval_words(facts: Facts) -> str:
    section = facts.params["evaluate"]
    percent, times = f"{100 * section['confidence']:g} %", section["bootstrap_samples"]
    return f"Brackets and bars: {percent} intervals, patients resampled {times} times."


def _loss(name: str, found: dict[str, Any]) -> Interval:
    low, high = found.get("weighted_log_loss_ci") or (None, None)
    return Interval(name, found["weighted_log_loss"], low, high)


def _auc(name: str, found: dict[str, Any]) -> Interval:
    return Interval(name, found["value"], found["ci_low"], found["ci_high"])


def _by_model(
    rungs: list[tuple[str, Any]], plots: list[tuple[str, list[Interval]]]
) -> list[tuple[str, list[Interval]]]:
    return [(name, [cells[number] for _, cells in plots]) for number, (name, _) in enumerate(rungs)]


def _per_class(rungs: list[tuple[str, Any]], kind: str, caption: str) -> Table:
    rows = [[name, *(_text_of(found[kind][label]) for label in CLASSES)] for name, found in rungs]
    return Table(f"{caption}, per class", ["model", *CLASSES], rows)


def _paired(metrics: dict[str, Any]) -> Table:
    rows = [
        [name, _text_of(found["weighted_log_loss"]), _text_of(found["auc_any"])]
        for name, found in metrics.get("paired", {}).items()
    ]
    caption = "Paired differences over the same resampled patients; above 0 the first is better"
    return Table(caption, ["pair", "weighted log loss", "AUC any"], rows)


def _text_of(found: dict[str, Any]) -> str:
    return with_interval(found["value"], found["ci_low"], found["ci_high"], 3)


def _signed(gain: dict[str, Any]) -> str:
    bounds = "" if gain["ci_low"] is None else f" [{gain['ci_low']:+.4f}, {gain['ci_high']:+.4f}]"
    return f"{gain['value']:+.4f}{bounds}"
