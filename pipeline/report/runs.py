"""Reads the files of a run; sections on what was done: at a glance, data, learning curves, how the run was made.

A missing file is a gap on the page, not an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import yaml

from ichpipe.common.artifacts import HISTORY_FILE, MODEL_FILE, PREDICTIONS_FILE, RECORD_FILE
from ichpipe.common.classes import CLASSES
from ichpipe.common.files import read_json
from ichpipe.report.charts import Axis, Line, axis_over, line_plot
from ichpipe.report.page import Section, Table, format_duration, format_number, format_share
from ichpipe.scoring.bootstrap import Estimate
from ichpipe.scoring.calibration import read_calibration
from ichpipe.scoring.heldout_predictions import (
    ENSEMBLE,
    FINETUNED,
    SLICE_CNN,
    pair_name,
    read_predictions,
    sequence_name,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.scoring.calibration import Calibration

SPLITS: Final = {"train": "training", "val": "validation", "test": "held out"}
SIZES: Final = ("patients", "studies", "series", "slices")
SEEDS: Final = ("phantom", "prepare", "fit-slices", "finetune", "evaluate")


@dataclass(frozen=True)
class Facts:
    """All that the page is made of, apart from pictures; None or empty where the run has no such file."""

    summary: dict[str, Any] | None  # index/summary.json
    metrics: dict[str, Any] | None  # metrics/evaluate.json
    curves: dict[str, list[dict[str, Any]]]  # roc, precision_recall, calibration: rows with model and class
    histories: dict[str, list[dict[str, Any]]]  # by the name of the model
    records: dict[str, dict[str, Any]]  # by the name of the model
    comparison: dict[str, Any] | None  # compare/arms.json
    test: pd.DataFrame | None  # the fine-tuned model's predictions of the test slices
    val: pd.DataFrame | None  # … of the validation slices
    calibration: Calibration | None  # of the fine-tuned model
    params: dict[str, Any]


def model_title(name: str) -> str:
    """Return a model's name as people write it."""
    return {SLICE_CNN: "slice CNN", FINETUNED: "fine-tuned"}.get(name, name.replace("sequence-", "sequence, ", 1))


def rungs_of(metrics: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (title, scores) of each model, from the slice CNN to the fine-tuned one and the ensemble, if scored."""
    rungs = [(model_title(SLICE_CNN), metrics[SLICE_CNN])]
    rungs += [(model_title(sequence_name(arm)), scores) for arm, scores in metrics["sequence"].items()]
    return rungs + [(model_title(name), metrics[name]) for name in (FINETUNED, ENSEMBLE) if metrics.get(name)]


def read_facts(artifacts: Artifacts, arms: Sequence[str], params: dict[str, Any]) -> Facts:
    """Read the files of a run; a torn file, or a calibration of another model, is an error that names it."""
    folders = {SLICE_CNN: artifacts.slice_cnn}
    folders |= {sequence_name(arm): artifacts.sequence(arm) for arm in arms}
    folders |= {FINETUNED: artifacts.finetuned}
    splits: dict[str, pd.DataFrame] = {}
    if (artifacts.finetuned / PREDICTIONS_FILE).exists():
        predictions = read_predictions(artifacts.finetuned, "ichpipe finetune")
        splits = {str(split): rows.reset_index(drop=True) for split, rows in predictions.groupby("split")}
    kinds = ("roc", "precision_recall", "calibration")
    return Facts(
        summary=_read_optional(artifacts.index_dir / "summary.json"),
        metrics=_read_optional(artifacts.metrics),
        curves={kind: _read_optional(artifacts.plots / f"{kind}.json") or [] for kind in kinds},
        histories={name: rows for name, path in folders.items() if (rows := _read_optional(path / HISTORY_FILE))},
        records={name: record for name, path in folders.items() if (record := _read_optional(path / RECORD_FILE))},
        comparison=_read_optional(artifacts.comparison / "arms.json"),
        test=splits.get("test"),
        val=splits.get("val"),
        calibration=read_calibration(artifacts.finetuned) if (artifacts.finetuned / MODEL_FILE).exists() else None,
        params=params,
    )


def _read_optional(path: Path) -> Any:
    return read_json(path) if path.exists() else None


def glance(facts: Facts) -> Section:
    """The fine-tuned model's figures, and whether the rung before was as good."""
    tiles = []
    lines = ["This run has not been evaluated yet."]
    if facts.metrics is not None:
        lines = _compare_models(facts.metrics)
        if facts.metrics[FINETUNED]:
            tiles += _score_tiles(facts.metrics[FINETUNED])
        else:
            lines.append("The fine-tuned model was not scored; run: ichpipe finetune, then ichpipe evaluate.")
    if facts.summary is not None:
        remark = f"{facts.summary['slices']:,} slices, {facts.summary['rejected']:,} files rejected"
        tiles.append(("patients", f"{facts.summary['patients']:,}", remark))
    record = facts.records.get(FINETUNED, {})
    if record.get("params", {}).get("keep") == "last":
        before, after = (format_number(record.get(key)) for key in ("val_loss_before", "val_loss"))
        lines.append(f"Fine-tuning kept its last epoch: validation loss {before} before, {after} after.")
    elif record.get("best_epoch") == 0:
        lines.append("Fine-tuning was no better in validation than its start, so the start was kept.")
    return Section("glance", "At a glance", lines, tiles=tiles)


def _score_tiles(scores: dict[str, Any]) -> list[tuple[str, str, str]]:
    loss = Estimate.of_loss(scores)
    tiles = [("weighted log loss, fine-tuned", format_number(loss.value), _format_bounds(loss))]
    for name, kind in (("AUC any by slice, fine-tuned", "auc"), ("AUC any by study, fine-tuned", "study_auc")):
        auc = Estimate.from_json(scores[kind]["any"])
        tiles.append((name, format_number(auc.value, 3), _format_bounds(auc) or "no positive or no negative"))
    return tiles


def _compare_models(metrics: dict[str, Any]) -> list[str]:
    losses = [(name, format_number(scores["weighted_log_loss"])) for name, scores in rungs_of(metrics)]
    lowest = min((loss for _, loss in losses), key=float)
    names = " and ".join(name for name, loss in losses if loss == lowest)
    lines = [f"Lowest weighted log loss of {len(losses)} models: {names}, {lowest}."]
    for other in (SLICE_CNN, *map(sequence_name, metrics["sequence"])):
        gains = metrics.get("paired", {}).get(pair_name(FINETUNED, other))
        if gains is None:  # another arm than finetune.arm
            continue
        gain = Estimate.from_json(gains["weighted_log_loss"])
        if gain.low is not None and gain.high is not None:
            verdict = "0 lies outside: a difference" if gain.low > 0 or gain.high < 0 else "0 lies inside: noise"
            text = f"{gain.text()} ({verdict})"
            lines.append(f"Gain of fine-tuned over {model_title(other)} in weighted log loss: {text}.")
    return lines


def _format_bounds(estimate: Estimate) -> str:
    return " to ".join(f"{limit:.3f}" for limit in estimate.interval or ())


def data(facts: Facts) -> Section:
    """Patients, studies, slices and prevalence by split; what was rejected and why."""
    summary = facts.summary
    if summary is None:
        return Section("data", "Data", ["There is no index of slices; run: ichpipe prepare."])
    splits = summary.get("splits", {})
    columns = {words: splits[name] for name, words in SPLITS.items() if name in splits} | {"all": summary}
    sizes = [[words, *(f"{part[name]:,}" for name in SIZES)] for words, part in columns.items()]
    positive = []
    for label in CLASSES:
        counts = [part["prevalence"][label] for part in columns.values()]
        shares = [format_share(c["positive"], c["known"]) if c["known"] else "no label known" for c in counts]
        positive.append([label, *shares])
    tables = [
        Table("Size, by split; a patient stands in one split only", ["split", *SIZES], sizes),
        Table("Positive slices", ["class", *columns], positive),
    ]
    if summary["rejected_by_reason"]:
        reasons = [[reason, f"{count:,}"] for reason, count in summary["rejected_by_reason"].items()]
        tables.append(Table("Files that were not used, and why", ["reason", "files"], reasons))
    files, slices, rejected = (summary[key] for key in ("files", "slices", "rejected"))
    lines = [f"{files:,} files gave {slices:,} slices; {rejected:,} files were rejected."]
    if rejected:
        lines.append("index/rejected.csv names each rejected file.")
    if summary.get("ties") or summary.get("gaps"):
        ties, gaps, series = (summary[key] for key in ("ties", "gaps", "series_with_gaps"))
        lines.append(f"{ties:,} slices share a place with the one before; {gaps:,} gaps in {series:,} series.")
    if summary.get("lossy"):
        lines.append(f"{summary['lossy']:,} slices were compressed with loss.")
    return Section("data", "Data", lines, tables)


def learning(facts: Facts) -> Section:
    """Training and validation loss by epoch, one plot a model; the epoch that was kept is named."""
    plots, rows, unplotted = [], [], []
    for name, history in facts.histories.items():
        title = model_title(name)
        trained = [(float(r["epoch"]), r["train_loss"]) for r in history if r["train_loss"] is not None]
        validated = [(float(r["epoch"]), r["val_loss"]) for r in history]
        if not trained:
            unplotted.append(f"{title}: nothing to learn, so no curve.")
            continue
        lines = [Line("training", trained, 0, dots=True), Line("validation", validated, 1, dots=True)]
        epochs = Axis("epoch", min(e for e, _ in validated) - 0.3, max(e for e, _ in validated) + 0.3, whole=True)
        losses = axis_over("weighted log loss", [loss for _, loss in trained + validated])
        plots.append((title, line_plot(f"Learning curve, {title}", lines, epochs, losses)))
        kept = _kept_rows(history, facts.records.get(name, {}).get("params", {}))
        for row in history:
            numbers = ["" if row[key] is None else f"{row[key]:.4f}" for key in ("train_loss", "val_loss")]
            rows.append([title, str(row["epoch"]), *numbers, "kept" if row in kept else ""])
    if not plots:
        return Section("learning", "Learning curves", ["Nothing has been trained yet; run: ichpipe fit-slices."])
    explanation = (
        "Weighted log loss by epoch; the epoch with the lowest validation loss is kept, or the last as the parameters "
        "say. Epoch 0 is the start. Training loss is taken while weights change, under dropout and augmentation."
    )
    table = Table("Learning curves", ["model", "epoch", "training", "validation", "kept"], rows)
    legend = [("training", 0), ("validation", 1)]
    return Section("learning", "Learning curves", [explanation, *unplotted], legend=legend, plots=plots, hidden=[table])


def _kept_rows(history: list[dict[str, Any]], params: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the epochs whose weights were kept: the last so many, or the one that is best on validation."""
    averaged = params.get("average", {}).get("epochs", 1)
    if averaged > 1 or params.get("keep") == "last":
        return history[-averaged:]
    return [min(history, key=lambda row: float(row["val_loss"]))]


def provenance(facts: Facts) -> Section:
    """Commit, seeds, versions, device, wall time and parameters of the run."""
    records = facts.records
    if not records:
        return Section("run", "How it was made", ["No record of training is there; run: ichpipe fit-slices."])
    times, total = [], 0.0
    for name, record in records.items():
        wall = record.get("wall_seconds")
        total += wall or 0.0
        duration = "unknown" if wall is None else format_duration(wall)
        device, loss = str(record.get("device", "unknown")), format_number(record.get("val_loss"))
        times.append([model_title(name), duration, device, loss])
    times.append(["all of these", format_duration(total), "", ""])
    seeds = [f"{name} {facts.params[name]['seed']}" for name in SEEDS if name in facts.params]
    for arm, section in facts.params.get("sequence", {}).items():
        first, count = section.get("seed", 0), section.get("seeds", 1)
        seeds.append(f"{arm} {first}" if count == 1 else f"{arm} {first} to {first + count - 1}")
    commits = dict.fromkeys(record.get("commit") or "unknown" for record in records.values())
    energy = "unknown: it was not measured"
    run = [["commit", ", ".join(commits)], ["seeds", ", ".join(seeds)], ["energy", energy]]
    versions = sorted({item for record in records.values() for item in record.get("versions", {}).items()})
    return Section(
        "run",
        "How it was made",
        ["Wall time is that of training, as each stage recorded it; prepare, extract and evaluate record none."],
        [
            Table("The run", ["what", "value"], run, words=True),
            Table("Training", ["model", "wall time", "device", "validation loss"], times),
            Table("Versions", ["package", "version"], versions, words=True),
        ],
        preformatted=yaml.safe_dump(facts.params, sort_keys=False, width=88, allow_unicode=True),
    )
