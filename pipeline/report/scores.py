"""Sections on how good the models are: ladder, curves, calibration, operating points, cases, ablation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from ichpipe.common.classes import CLASSES
from ichpipe.report.charts import Axis, Line, interval_plot, line_plot
from ichpipe.report.page import Section, Table, format_number, format_share
from ichpipe.report.runs import Facts, model_title, rungs_of
from ichpipe.scoring.bootstrap import Estimate
from ichpipe.scoring.heldout_predictions import FINETUNED, LABELS, SLICE_CNN, sequence_name, slice_probabilities_of
from ichpipe.scoring.metrics import reliability
from ichpipe.scoring.pooling import StudyScore, pool
from ichpipe.scoring.roc import operating_points, proportion_interval

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from ichpipe.scoring.calibration import Calibration

TARGET: Final = 0.9  # sensitivity, and specificity, that a threshold is chosen for
RATES: Final = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
AXIS_NAMES: Final = {"fpr": "false positive rate", "tpr": "true positive rate"}
NO_SCORES: Final = "There are no scores yet; run: ichpipe evaluate."


def ladder(facts: Facts) -> Section:
    """Every model on the same held-out patients, with intervals, and paired differences."""
    metrics = facts.metrics
    if metrics is None:
        return Section("ladder", "Models", [NO_SCORES])
    rungs = rungs_of(metrics)
    columns = {"Weighted log loss (lower is better)": [(name, Estimate.of_loss(scores)) for name, scores in rungs]}
    hidden = []
    for unit, kind in (("slice", "auc"), ("study", "study_auc")):
        aucs = [(name, [Estimate.from_json(scores[kind][label]) for label in CLASSES]) for name, scores in rungs]
        columns[f"AUC any, by {unit} (higher is better)"] = [(name, of_any) for name, (of_any, *_) in aucs]
        by_class = [[name, *(estimate.text(3) for estimate in estimates)] for name, estimates in aucs]
        hidden.append(Table(f"AUC by {unit}, per class", ["model", *CLASSES], by_class))
    cells = zip(*columns.values(), strict=True)
    rows = [[row[0][0], *(estimate.text() for _, estimate in row)] for row in cells]
    head = ["model", "weighted log loss", "AUC any, by slice", "AUC any, by study"]
    sizes = dict.fromkeys(("n_slices", "n_studies", "n_patients"), "unknown") | metrics
    counts = "{n_slices} slices, {n_studies} studies, {n_patients} patients".format_map(sizes)
    percent, samples = 100 * facts.params["evaluate"]["confidence"], facts.params["evaluate"]["bootstrap_samples"]
    lines = [
        f"Every model is scored on the same held-out {counts}.",
        f"Brackets and bars: {percent:g} % intervals, patients resampled {samples} times.",
    ]
    paired = [
        [pair, *(Estimate.from_json(gain[key]).text(3) for key in ("weighted_log_loss", "auc_any"))]
        for pair, gain in metrics.get("paired", {}).items()
    ]
    caption = "Paired differences over the same resampled patients; above 0 the first is better"
    hidden.append(Table(caption, ["pair", "weighted log loss", "AUC any"], paired))
    for source, part in metrics.get("sources", {}).items():
        of_source = [
            [name, *(estimate.text() for estimate in (
                Estimate.of_loss(scores), *(Estimate.from_json(scores[kind]["any"]) for kind in ("auc", "study_auc"))
            ))]
            for name, scores in rungs_of(part)
        ]  # fmt: skip
        hidden.append(Table(f"Source {source}, {part['n_patients']} patients", head, of_source))
    return Section(
        "ladder",
        "Models",
        lines,
        tables=[Table("The ladder of models", head, rows)],
        plots=[(title, interval_plot(title, row, title.partition(" (")[0])) for title, row in columns.items()],
        hidden=hidden,
    )


def curve_sections(facts: Facts, arm: str) -> list[Section]:
    """ROC, precision-recall and calibration, one plot a class, of slice CNN, the fine-tuned model's arm, and itself."""
    shown = {SLICE_CNN: 0, sequence_name(arm): 1, FINETUNED: 2}
    return [
        _curves(facts, shown, "roc", "ROC", "fpr", "tpr"),
        _curves(facts, shown, "precision_recall", "Precision and recall", "recall", "precision"),
        _calibration(facts, shown),
    ]


def _curves(facts: Facts, shown: dict[str, int], kind: str, title: str, x_key: str, y_key: str) -> Section:
    x_name, y_name = (AXIS_NAMES.get(key, key) for key in (x_key, y_key))
    is_roc = kind == "roc"
    by_class = _lines_by_class(facts, shown, kind, x_key, y_key)
    plots, hidden = [], []
    for name, lines in by_class.items():
        svg = line_plot(f"{title}, {name}", lines, Axis(x_name, 0, 1), Axis(y_name, 0, 1), diagonal=is_roc)
        plots.append((name, svg))
        # The table reads curves off at fixed x: the highest y among points that reach so far (for ROC: not farther).
        rows = []
        for rate in RATES:
            row = [f"{rate:g}"]
            for line in lines:
                reached = [y for x, y in line.points if (x <= rate + 1e-9 if is_roc else x >= rate - 1e-9)]
                row.append(format_number(max(reached), 3) if reached else "")
            rows.append(row)
        head = [x_name, *(model_title(line.name) for line in lines)]
        hidden.append(Table(f"{title}, {name}: {y_name} at a given {x_name}", head, rows))
    sentences = ["By slice, on the held-out patients."] if plots else []
    missing = ", ".join(name for name in CLASSES if name not in by_class)
    if missing:
        reason = "no positive or no negative held-out slice" if facts.curves[kind] else "not evaluated yet"
        sentences.append(f"No curve for {missing}: {reason}.")
    legend = _legend(facts, shown, kind)
    return Section(kind.replace("_", "-"), title, sentences, legend=legend, plots=plots, hidden=hidden)


def _calibration(facts: Facts, shown: dict[str, int]) -> Section:
    axes = Axis("predicted probability", 0, 1), Axis("share of positives", 0, 1)
    plots = [
        (name, line_plot(f"Calibration, {name}", lines, *axes, diagonal=True))
        for name, lines in _lines_by_class(facts, shown, "calibration", "predicted", "observed", dots=True).items()
    ]
    if not plots:
        return Section("calibration", "Calibration", [NO_SCORES])
    rows = []
    for row in facts.curves["calibration"]:
        if row["model"] in shown:
            numbers = format_number(row["predicted"], 3), format_number(row["observed"], 3), str(row["n"])
            rows.append([model_title(row["model"]), row["class"], *numbers])
    lines = [
        "On the diagonal a probability equals the share of positives: one in five slices of P 0.2 bleeds. Curves and "
        "figures are of the networks' own probabilities, before calibration."
    ]
    hidden = [Table("Calibration in ten bins", ["model", "class", "mean P", "share positive", "slices"], rows)]
    tables = [] if facts.test is None else [_reliability(facts.test)]
    return Section("calibration", "Calibration", lines, tables, _legend(facts, shown, "calibration"), plots, hidden)


def _reliability(test: pd.DataFrame) -> Table:
    labels = test[LABELS].to_numpy(np.float64)
    scores = reliability(labels, test[list(CLASSES)].to_numpy(np.float64))
    kinds = {"Brier score": "brier", "calibration error": "calibration_error", "average precision": "average_precision"}
    rows = []
    for name, positive in zip(CLASSES, labels.sum(axis=0), strict=True):
        numbers = [format_number(scores[kind][name]) for kind in kinds.values()]
        rows.append([name, *numbers, format_share(int(positive), len(test))])
    return Table("Fine-tuned model, by slice", ["class", *kinds, "positive slices"], rows)


def _lines_by_class(
    facts: Facts, shown: dict[str, int], kind: str, x: str, y: str, *, dots: bool = False
) -> dict[str, list[Line]]:
    """Return the lines of the shown models; a class without a line is left out."""
    by_class: dict[str, list[Line]] = {}
    for name in CLASSES:
        for model, look in shown.items():
            rows = [row for row in facts.curves[kind] if row["model"] == model and row["class"] == name]
            if rows:
                by_class.setdefault(name, []).append(Line(model, [(r[x], r[y]) for r in rows], look, dots))
    return by_class


def _legend(facts: Facts, shown: dict[str, int], kind: str) -> list[tuple[str, int]]:
    drawn = {row["model"] for row in facts.curves[kind]}
    return [(model_title(name), look) for name, look in shown.items() if name in drawn]


def operating(facts: Facts, study_score: StudyScore) -> Section:
    """Confusion of the fine-tuned model by study, at thresholds chosen on the validation patients.

    Scores and thresholds are those of ``predict``: calibrated, thin series averaged, pooled by ``study_score``.
    """
    key, title = "operating", "Operating points"
    if facts.test is None:
        return Section(key, title, ["The fine-tuned model has not predicted the test patients; run: ichpipe finetune."])
    truth, score = of_studies(facts.test, study_score, facts.calibration)
    val_truth, val_score = truth[:0], score[:0]
    if facts.val is not None:
        val_truth, val_score = of_studies(facts.val, study_score, facts.calibration)
    patients = facts.test.drop_duplicates("series_uid")["patient_id"]
    independent = bool(patients.is_unique)
    tables = []
    for words in ("sensitivity", "specificity"):
        rows = []
        for column, name in enumerate(CLASSES):
            points = operating_points(val_truth[:, column], val_score[:, column], wanted=TARGET)
            if (point := points[f"high_{words}"]) is None:
                rows.append([name, "none: no positive or no negative in validation", *[""] * 6])
            elif point["threshold"] is None:
                rows.append([name, "none: any would call too many negatives positive", *[""] * 6])
            else:
                positive, shown = truth[:, column] == 1, format_threshold(point["threshold"])
                called = score[:, column] >= float(shown)
                rows.append([name, shown, *_confusion(positive, called, independent=independent)])
        head = ["class", "threshold", "true positive", "false negative", "false positive", "true negative"]
        head += ["sensitivity", "specificity"]
        tables.append(Table(f"Threshold for {words} of at least {TARGET:g} in validation", head, rows))
    lines = [
        f"A study is called positive where its score ({study_score} over slices, fine-tuned model) reaches the "
        f"threshold. Thresholds are chosen on the {len(val_truth)} validation studies; counted here are the "
        f"{len(truth)} held-out ones.",
        _describe_scale(facts.calibration),
        "Brackets: exact 95 % intervals (Clopper and Pearson)."
        if independent
        else f"No intervals: {len(truth)} studies of {patients.nunique()} patients are not independent cases.",
    ]
    if facts.val is None:
        lines.append("No validation patient has been predicted, so there is no threshold.")
    return Section(key, title, lines, tables)


def _describe_scale(calibration: Calibration | None) -> str:
    """Say on which scale scores and thresholds are: that of ``predict``."""
    if calibration is None:
        how = "not calibrated: there is no calibration.json beside the model (ichpipe evaluate writes it)"
    elif not calibration.mapped:
        how = f"not calibrated: calibration.json has no map ({calibration.method})"
    elif len(calibration.mapped) < len(CLASSES):
        how = f"calibrated by {calibration.method} for {', '.join(calibration.mapped)} alone"
    else:
        how = f"calibrated by {calibration.method}"
    return f"Scores and thresholds are {how}. They are those that predict reports and --threshold compares."


def _confusion(positive: NDArray[np.bool_], called: NDArray[np.bool_], *, independent: bool) -> list[str]:
    true_pos, false_neg = int((called & positive).sum()), int((~called & positive).sum())
    false_pos, true_neg = int((called & ~positive).sum()), int((~called & ~positive).sum())
    rates = []
    for part, whole in ((true_pos, true_pos + false_neg), (true_neg, true_neg + false_pos)):
        bounds = proportion_interval(part, whole) if independent else ()
        rates.append(Estimate(part / whole if whole else None, *bounds).text(2))
    return [*map(str, (true_pos, false_neg, false_pos, true_neg)), *rates]


def format_threshold(threshold: float) -> str:
    """Return a threshold rounded down to six digits: the case that it was chosen from still reaches it."""
    text = f"{threshold:.6g}"
    if float(text) <= threshold:
        return text
    return f"{float(text) - 10.0 ** (math.floor(math.log10(threshold)) - 5):.6g}"


@dataclass(frozen=True)
class Case:
    """One held-out series, and why it is shown."""

    series_uid: str
    kind: str
    score: float


def choose_cases(series: pd.Series, positive: NDArray[np.bool_], score: NDArray[np.float64], count: int) -> list[Case]:
    """Choose ``count`` of each kind by the study's score. No study is chosen twice.

    ``series`` [n] are Series Instance UIDs, ``positive`` [n] says which have a bleed, ``score`` [n] is P(any).
    """
    kinds = (
        ("Worst misses: a bleed, and the lowest score", positive, score),
        ("Worst false alarms: no bleed, and the highest score", ~positive, -score),
        ("Best finds: a bleed, and the highest score", positive, -score),
    )
    cases: list[Case] = []
    for kind, group, order in kinds:
        chosen = {case.series_uid for case in cases}
        rows = [row for row in np.argsort(order, kind="stable") if group[row] and series.iloc[row] not in chosen]
        cases += [Case(str(series.iloc[row]), kind, float(score[row])) for row in rows[:count]]
    return cases


def ablation(facts: Facts) -> Section:
    """The arms of stage two beside each other."""
    key, title, comparison = "ablation", "Ablation: arms of the sequence model", facts.comparison
    if comparison is None:
        return Section(key, title, ["Arms have not been compared; run: ichpipe compare."])
    baseline = comparison["baseline"]
    rows, gains = [], []
    for arm in comparison["arms"]:
        loss, gain, gain_text = arm["weighted_log_loss"], arm["gain"].get("weighted_log_loss"), ""
        if gain is not None:
            gain_text = Estimate.from_json(gain).text(sign="+")
            gains.append((arm["arm"], Estimate.from_json(gain)))
        spread = "" if loss["sd"] is None else f" ± {loss['sd']:.4f}"
        parameters = "" if arm["n_parameters"] is None else f"{arm['n_parameters']:,}"
        cells = [arm["arm"], str(len(arm["seeds"]) or "none"), format_number(loss["mean"]) + spread, gain_text]
        rows.append([*cells, arm["verdict"], format_number(arm["auc"]["any"], 3), parameters])
    head = ["arm", "seeds", "weighted log loss", f"gain over {baseline}", "verdict", "AUC any", "parameters"]
    lines = [
        f"Gain: weighted log loss of {baseline} minus that of the arm, over {comparison['n_patients']} patients; "
        "above 0 the arm is better. It is called noise unless it holds for all arms together and beyond the spread of "
        "seeds. With one seed that spread is unknown, and seeds are too few for a verdict. An arm that learns nothing "
        "has no seed; its interval alone decides where the baseline has one.",
        *(f"Warning: {warning}." for warning in comparison["warnings"]),
    ]
    name = f"Gain over {baseline}, weighted log loss"
    plots = [(name, interval_plot(name, gains, "gain", zero=True, digits=4))] if gains else []
    return Section(key, title, lines, [Table("Arms, mean over seeds ± standard deviation", head, rows)], plots=plots)


def calibrate(table: pd.DataFrame, calibration: Calibration | None) -> pd.DataFrame:
    """Return a table of slices with the probabilities that ``predict`` reports."""
    if calibration is None:
        return table
    values = calibration.apply(table[list(CLASSES)].to_numpy(np.float64), slice_probabilities_of(table))
    return table.assign(**dict(zip(CLASSES, values.T, strict=True)))


def of_studies(
    table: pd.DataFrame, study_score: StudyScore, calibration: Calibration | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return labels and scores (series, 6) of a table of slices, in the order in which series come.

    Slices are calibrated first, as by ``predict``.
    """
    from ichpipe.scoring.model_ladder import smooth_series  # noqa: PLC0415 - scikit-learn and scipy, for this alone

    table = calibrate(table, calibration)
    groups = table.groupby("series_uid", sort=False)
    group, count = np.asarray(groups.ngroup(), dtype=np.intp), groups.ngroups
    return pool(table[LABELS].to_numpy(np.float64), group, count), pool(smooth_series(table), group, count, study_score)
