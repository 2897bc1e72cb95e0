"""``ichpipe evaluate``: score slice CNN, sequence arms and fine-tuned model on the same held-out patients.

Each model predicted them at the end of its training. Nothing here runs a network or imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ichpipe.common.artifacts import HISTORY_FILE, MODEL_FILE, PREDICTIONS_FILE
from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.common.files import digest_of, digest_of_file, read_json, write_bytes, write_json, write_text

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.params.schema import Params
    from ichpipe.stages.options import Settings


@click.command("evaluate")
@click.option("--gpu", default="auto", envvar="ICHPIPE_GPU", hidden=True, expose_value=False)
@click.pass_obj
def command(settings: Settings) -> str:
    """Score slice CNN, sequence models and the fine-tuned model on the same held-out patients.

    Before finetune has run, the other models are scored alone, without calibration.

    \b
    Example:
      ichpipe evaluate
    """
    params = settings.params()
    with settings.lock_stage("evaluate", "metrics", "plots", "predictions"):
        return run(params, settings.artifacts())


def run(params: Params, artifacts: Artifacts) -> str:
    """Write metrics, plots, predictions, the calibration of the fine-tuned model and the comparison of arms.

    Scores are of the networks' own probabilities; the effect of calibration is written beside them. Without a
    fine-tuned model its scores and the calibration are None, and a former model's are removed. Returns ladder,
    calibration and comparison as text.
    """
    import numpy as np
    from scipy.special import expit

    from ichpipe.features.generations import open_features
    from ichpipe.index.slice_index import read_index
    from ichpipe.report import calibration_report, figures
    from ichpipe.scoring import heldout_predictions as predictions
    from ichpipe.scoring.model_ladder import ladder_text, score_all
    from ichpipe.stages import compare

    index = read_index(artifacts.index)
    held_out = predictions.known_slices(index, "test")
    if held_out.empty:
        raise DataError("the test split holds no series with labels; check prepare.labels and prepare.test_fraction")
    features = open_features(params, artifacts, index)
    is_finetuned = any((artifacts.finetuned / name).exists() for name in (MODEL_FILE, PREDICTIONS_FILE))
    _require_one_run(params, artifacts, index, is_finetuned=is_finetuned)
    slice_probabilities = np.full((len(held_out), len(CLASSES)), np.nan)  # `open_features` has checked the order
    for uid, positions in held_out.groupby("series_uid", sort=False).indices.items():
        slice_probabilities[positions] = expit(features.plain.read(str(uid), "logit").astype(np.float64))
    tables = {predictions.SLICE_CNN: predictions.make_table(held_out, slice_probabilities)}
    for arm, section in params.sequence.items():
        seeds = predictions.read_predictions(artifacts.sequence(arm), f"ichpipe fit-sequence --arm {arm}")
        tables[predictions.sequence_name(arm)] = predictions.own_predictions(seeds, average_seeds=section.average.seeds)
    val = None
    if is_finetuned:
        finetuned = predictions.read_predictions(artifacts.finetuned, "ichpipe finetune")
        tables[predictions.FINETUNED] = finetuned[finetuned["split"] == "test"].reset_index(drop=True)
        val = finetuned[finetuned["split"] == "val"]  # these patients are never scored
    overlap = frozenset(index.loc[index["split"].isna(), "patient_id"])
    metrics = score_all(tables, params.evaluate, params.finetune.arm, overlap)
    metrics["sources"] = score_sources(params, index, tables, overlap)
    metrics["calibration"] = None
    if val is None:
        stale = [artifacts.plots / name for name in ("reliability.json", "reliability.png")]
        for path in [*stale, artifacts.predictions / f"{predictions.FINETUNED}.parquet"]:
            path.unlink(missing_ok=True)  # of a model that is gone
    else:
        metrics["calibration"] = _calibrate(params, artifacts, val, tables[predictions.FINETUNED])
    write_scores(artifacts, metrics, tables)
    folders = {"slice CNN": artifacts.slice_cnn}
    folders |= {f"sequence, {arm}": artifacts.sequence(arm) for arm in params.sequence}
    folders |= {"fine-tuned": artifacts.finetuned} if is_finetuned else {}
    histories = {name: read_json(folder / HISTORY_FILE) for name, folder in folders.items()}
    lines = [{"model": name, **line} for name, history in histories.items() for line in history]
    write_json(artifacts.plots / "learning_curves.json", lines)
    write_bytes(artifacts.plots / "learning_curves.png", figures.learning_curves(histories))
    _write_study_sheet(artifacts.plots / "study.png", held_out, tables)
    text = ladder_text(metrics)
    if metrics["calibration"] is not None:
        text += f"\n\n{calibration_report.calibration_text(metrics['calibration'])}"
    write_text(artifacts.metrics.with_name("ladder.txt"), text + "\n")
    return f"{text}\n\n{compare.run(params, artifacts)}"


def score_sources(
    params: Params, index: pd.DataFrame, tables: dict[str, pd.DataFrame], overlap: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Score each source of the held-out slices by itself; an empty result where all come from one."""
    from ichpipe.scoring.model_ladder import score_all

    first, of_slice = next(iter(tables.values())), index.set_index("sop_uid")["source"]
    sources = first["sop_uid"].map(of_slice).to_numpy()
    scores = {}
    for source in sorted(set(sources)):
        parts = {name: table[sources == source].reset_index(drop=True) for name, table in tables.items()}
        scores[source] = score_all(parts, params.evaluate, params.finetune.arm, overlap)
    return scores if len(scores) > 1 else {}


def _calibrate(params: Params, artifacts: Artifacts, val: pd.DataFrame, test: pd.DataFrame) -> dict[str, Any]:
    """Fit the calibration of the fine-tuned model, write it and its reliability plots, and return its scores."""
    from ichpipe.report import calibration_report
    from ichpipe.scoring.calibration import fit_calibration, write_calibration
    from ichpipe.scoring.heldout_predictions import labels_and_probabilities, model_mark

    patients, mark = val["patient_id"].to_numpy(object), model_mark(artifacts.finetuned)
    calibration = fit_calibration(*labels_and_probabilities(val), patients, params.evaluate.calibration, mark)
    write_calibration(artifacts.finetuned, calibration)
    scores, points = calibration_report.calibration_scores(*labels_and_probabilities(test), calibration)
    write_json(artifacts.plots / "reliability.json", points)
    write_bytes(artifacts.plots / "reliability.png", calibration_report.reliability_figure(points))
    return scores


def write_scores(artifacts: Artifacts, metrics: dict[str, Any], tables: dict[str, pd.DataFrame]) -> None:
    """Write metrics and predictions; ROC, precision-recall and calibration points as JSON for DVC; their pictures."""
    from ichpipe.report.figures import ladder, roc
    from ichpipe.scoring.heldout_predictions import labels_and_probabilities, write_table
    from ichpipe.scoring.metrics import curves

    write_json(artifacts.metrics, metrics)
    for name, table in tables.items():
        write_table(table, artifacts.predictions / f"{name}.parquet")
    points = {name: curves(*labels_and_probabilities(table)) for name, table in tables.items()}
    for kind in ("roc", "precision_recall", "calibration"):
        rows = [{"model": name, **row} for name, curve in points.items() for row in curve[kind]]
        write_json(artifacts.plots / f"{kind}.json", rows)
    write_bytes(artifacts.plots / "ladder.png", ladder(metrics))
    write_bytes(artifacts.plots / "roc.png", roc({name: curve["roc"] for name, curve in points.items()}))


def _require_one_run(params: Params, artifacts: Artifacts, slices: pd.DataFrame, *, is_finetuned: bool) -> None:
    """Refuse models of another split or of another network's embeddings; their scores would look valid."""
    from ichpipe.features.generations import describe_inputs
    from ichpipe.models.header import require_made_from

    index = digest_of_file(artifacts.index)
    require_made_from(artifacts.slice_cnn, {"index": index}, "ichpipe fit-slices")
    for arm, section in params.sequence.items():
        made_from = {"index": index, "embeddings": digest_of(describe_inputs(params, artifacts, slices, section))}
        require_made_from(artifacts.sequence(arm), made_from, f"ichpipe fit-sequence --arm {arm}")
    if not is_finetuned:
        return
    parts = {"slice_cnn": artifacts.slice_cnn, "sequence": artifacts.sequence(params.finetune.arm)}
    digests = {name: digest_of_file(folder / MODEL_FILE) for name, folder in parts.items()}
    require_made_from(artifacts.finetuned, {"index": index, **digests}, "ichpipe finetune")


def _write_study_sheet(target: Path, held_out: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> None:
    """Show the held-out series with the median number of positive slices among those that have any."""
    from ichpipe.dicom.hounsfield import read_square_hu
    from ichpipe.report.figures import study_sheet

    counts = held_out.groupby("series_uid")["any"].sum().sort_values(kind="stable")
    positive = counts[counts > 0] if (counts > 0).any() else counts
    uid = positive.index[len(positive) // 2]
    rows = held_out["series_uid"] == uid
    hu = [read_square_hu(path, scanned=True) for path in held_out["path"][rows]]
    probabilities = {name: table[list(CLASSES)].to_numpy()[rows] for name, table in tables.items()}
    labels = held_out[list(CLASSES)].to_numpy()[rows]
    write_bytes(target, study_sheet(hu, probabilities, labels, f"held-out series {uid}"))
