"""Parts of the page that say what was done: at a glance, the data, learning curves, and how the run was made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import yaml

from ichpipe.common.classes import CLASSES
from ichpipe.report.blocks import Plot, Section, Table, figure, seconds, share, with_interval
from ichpipe.report.charts import Axis, Line, axis_over, line_plot
from ichpipe.report.facts import model_title
from ichpipe.report.scores import rungs_of
from ichpipe.scoring.heldout_predictions import FINETUNED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ichpipe.report.facts import Facts

SPLITS: Final = {"train": "training", "val": "validation", "test": "held out"}
SIZES: Final = ("patients", "studies", "series", "slices")
SEEDS: Final = ("phantom", "prepare", "fit-slices", "finetune", "evaluate")


def glance(facts: Facts) -> Section:
    """The fine-tuned model's figures, and whether the rung before was as good."""
    tiles = []
    if facts.metrics is not None:
        final = facts.metrics[FINETUNED]
        low, high = final.get("weighted_log_loss_ci") or (None, None)
        tiles.append(("weighted log loss, fine-tuned", figure(final["weighted_log_loss"]), _bounds(low, high)))
        for name, kind in (("AUC any by slice, fine-tuned", "auc"), ("AUC any by study, fine-tuned", "study_auc")):
            found = final[kind]["any"]
            remark = _bounds(found["ci_low"], found["ci_high"])
            tiles.append((name, figure(found["value"], 3), remark or "no positive or no negative"))
    if facts.summary is not None:
        remark = f"{facts.summary['slices']:,} slices, {facts.summary['rejected']:,} files rejected"
        tiles.append(("patients", f"{facts.summary['patients']:,}", remark))
    lines = _best(facts.metrics) if facts.metrics is not None else ["This run has not been evaluated yet."]
    if facts.records.get(FINETUNED, {}).get("best_epoch") == 0:
        lines.append("Fine-tuning was no better in validation than its start, so the start was kept.")
    return Section("glance", "At a glance", lines, tiles=tiles)


def data(facts: Facts) -> Section:
    """Patients, studies, slices and prevalence by split; what was rejected and why."""
    found = facts.summary
    if found is None:
        return Section("data", "Data", ["There is no index of slices; run: ichpipe prepare."])
    splits = [(words, found["splits"][name]) for name, words in SPLITS.items() if name in found.get("splits", {})]
    sizes = [[words, *(f"{part[name]:,}" for name in SIZES)] for words, part in splits]
    sizes.append(["all", *(f"{found[name]:,}" for name in SIZES)])
    everything = [*splits, ("all", found)]
    positive = [[label, *(_prevalence(part, label) for _, part in everything)] for label in CLASSES]
    tables = [
        Table("Size, by split; a patient stands in one split only", ["split", *SIZES], sizes),
        Table("Positive slices", ["class", *(words for words, _ in everything)], positive),
    ]
    if found["rejected_by_reason"]:
        reasons = [[reason, f"{count:,}"] for reason, count in found["rejected_by_reason"].items()]
        tables.append(Table("Files that were not used, and why", ["reason", "files"], reasons))
    return Section("data", "Data", _data_lines(found), tables)


def learning(facts: Facts) -> Section:
    """Training and validation loss by epoch, one plot a model; the epoch that was kept is named."""
    plots, rows = [], []
    learned = {name: rows for name, rows in facts.histories.items() if any(r["train_loss"] is not None for r in rows)}
    for name, history in learned.items():
        trained = [(float(r["epoch"]), r["train_loss"]) for r in history if r["train_loss"] is not None]
        checked = [(float(r["epoch"]), r["val_loss"]) for r in history]
        lines = [Line("training", trained, 0, dots=True), Line("validation", checked, 1, dots=True)]
        epochs = Axis("epoch", min(e for e, _ in checked) - 0.3, max(e for e, _ in checked) + 0.3, whole=True)
        title = model_title(name)
        losses = axis_over("weighted log loss", [loss for _, loss in trained + checked])
        plots.append(Plot(title, line_plot(f"Learning curve, {title}", lines, epochs, losses)))
        best = min(checked, key=lambda point: float(point[1]))[0]
        for row in history:
            mark = "kept" if row["epoch"] == best else ""
            rows.append([title, str(row["epoch"]), _loss(row["train_loss"]), _loss(row["val_loss"]), mark])
    if not plots:
        return Section("learning", "Learning curves", ["Nothing has been trained yet; run: ichpipe fit-slices."])
    said = [
        "Weighted log loss by epoch; the epoch with the lowest validation loss is kept. Epoch 0 is the start. Training "
        "loss is taken while weights change, under dropout and augmentation.",
        *(f"{model_title(name)}: nothing to learn, so no curve." for name in facts.histories if name not in learned),
    ]
    table = Table("Learning curves", ["model", "epoch", "training", "validation", "kept"], rows)
    legend = [("training", 0), ("validation", 1)]
    return Section("learning", "Learning curves", said, legend=legend, plots=plots, hidden=[table])


def provenance(facts: Facts) -> Section:
    """Commit, seeds, versions, device, wall time and parameters of the run."""
    records = facts.records
    if not records:
        return Section("run", "How it was made", ["No record of training is there; run: ichpipe fit-slices."])
    times = [
        [model_title(name), _wall(found), str(found.get("device", "unknown")), figure(found.get("val_loss"))]
        for name, found in records.items()
    ]
    known = [found["wall_seconds"] for found in records.values() if found.get("wall_seconds") is not None]
    times.append(["all of these", seconds(sum(known)), "", ""])
    facts_of_run = [["commit", _all(found.get("commit") or "unknown" for found in records.values())]]
    facts_of_run += [["seeds", _seeds(facts.params)], ["energy", "unknown: it was not measured"]]
    versions = sorted({(name, text) for found in records.values() for name, text in found.get("versions", {}).items()})
    return Section(
        "run",
        "How it was made",
        ["Wall time is that of training, as each stage recorded it; prepare, extract and evaluate record none."],
        [
            Table("The run", ["what", "value"], facts_of_run, words=True),
            Table("Training", ["model", "wall time", "device", "validation loss"], times),
            Table("Versions", ["package", "version"], versions, words=True),
        ],
        preformatted=yaml.safe_dump(facts.params, sort_keys=False, width=88, allow_unicode=True),
    )


def _best(metrics: dict[str, Any]) -> list[str]:
    losses = [(name, figure(found["weighted_log_loss"])) for name, found in rungs_of(metrics)]
    lowest = min(losses, key=lambda rung: float(rung[1]))[1]
    names = " and ".join(name for name, loss in losses if loss == lowest)
    lines = [f"Lowest weighted log loss of {len(losses)} models: {names}, {lowest}."]
    for pair, value in metrics.get("paired", {}).items():
        loss = value["weighted_log_loss"]
        if pair.startswith(FINETUNED) and loss["ci_low"] is not None:
            other = model_title(pair.rpartition(" against ")[2])
            apart = (
                "0 lies outside: a difference" if loss["ci_low"] > 0 or loss["ci_high"] < 0 else "0 lies inside: noise"
            )
            gain = with_interval(loss["value"], loss["ci_low"], loss["ci_high"])
            lines.append(f"Gain of fine-tuned over {other} in weighted log loss: {gain} ({apart}).")
    return lines


def _data_lines(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['files']:,} files gave {found['slices']:,} slices; {found['rejected']:,} files were rejected."]
    if found["rejected"]:
        lines.append("index/rejected.csv names each rejected file.")
    if found.get("ties") or found.get("gaps"):
        lines.append(
            f"{found['ties']:,} slices share a place with the one before; {found['gaps']:,} gaps in "
            f"{found['series_with_gaps']:,} series."
        )
    if found.get("lossy"):
        lines.append(f"{found['lossy']:,} slices were compressed with loss.")
    return lines


def _prevalence(part: dict[str, Any], label: str) -> str:
    found = part["prevalence"][label]
    return share(found["positive"], found["known"]) if found["known"] else "no label known"


def _bounds(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _wall(found: dict[str, Any]) -> str:
    return seconds(found["wall_seconds"]) if found.get("wall_seconds") is not None else "unknown"


def _all(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _seeds(params: dict[str, Any]) -> str:
    found = [f"{name} {params[name]['seed']}" for name in SEEDS if name in params]
    for arm, section in params.get("sequence", {}).items():
        first, count = section.get("seed", 0), section.get("seeds", 1)
        found.append(f"{arm} {first}" if count == 1 else f"{arm} {first} to {first + count - 1}")
    return ", ".join(found)
