"""``ichpipe evaluate``: score slice CNN, sequence arms and fine-tuned model on the same held-out patients.

Each model predicted them at the end of its training. Nothing here runs a network or imports torch.
"""

from __future__ import annotations

import logging
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

log = logging.getLogger("ichpipe")


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
    """Write metrics, plots, predictions, the calibrations and the comparison of arms.

    Scores are of the networks' own probabilities; the effect of calibration is written beside them. The fine-tuned
    model and the ensemble are calibrated. Where one is absent, its scores and its calibration are None, and a former
    model's are removed. Returns ladder, calibrations and comparison as text.
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
    folders = {predictions.FINETUNED: artifacts.finetuned, predictions.ENSEMBLE: artifacts.ensemble}
    files = (MODEL_FILE, PREDICTIONS_FILE)
    final = {name: folder for name, folder in folders.items() if any((folder / file).exists() for file in files)}
    _require_one_run(params, artifacts, index, final)
    slice_probabilities = np.full((len(held_out), len(CLASSES)), np.nan)  # `open_features` has checked the order
    for uid, positions in held_out.groupby("series_uid", sort=False).indices.items():
        slice_probabilities[positions] = expit(features.plain.read(str(uid), "logit").astype(np.float64))
    tables = {predictions.SLICE_CNN: predictions.make_table(held_out, slice_probabilities)}
    for arm, section in params.sequence.items():
        seeds = predictions.read_predictions(artifacts.sequence(arm), f"ichpipe fit-sequence --arm {arm}")
        tables[predictions.sequence_name(arm)] = predictions.own_predictions(seeds, average_seeds=section.average.seeds)
    val = {}  # these patients are never scored
    for name, folder in final.items():
        both = predictions.read_predictions(folder, predictions.CALIBRATED[name].command)
        tables[name] = both[both["split"] == "test"].reset_index(drop=True)
        val[name] = both[both["split"] == "val"]
    overlap = frozenset(index.loc[index["split"].isna(), "patient_id"])
    metrics = score_all(tables, params.evaluate, params.finetune.arm, overlap)
    metrics["sources"] = score_sources(params, index, tables, overlap)
    metrics |= _calibrate(params, artifacts, final, val, tables)
    write_scores(artifacts, metrics, tables)
    curves = {"slice CNN": artifacts.slice_cnn}
    curves |= {f"sequence, {arm}": artifacts.sequence(arm) for arm in params.sequence}
    curves |= {"fine-tuned": artifacts.finetuned} if predictions.FINETUNED in final else {}
    histories = {name: read_json(folder / HISTORY_FILE) for name, folder in curves.items()}
    lines = [{"model": name, **line} for name, history in histories.items() for line in history]
    write_json(artifacts.plots / "learning_curves.json", lines)
    write_bytes(artifacts.plots / "learning_curves.png", figures.learning_curves(histories))
    _write_study_sheet(artifacts.plots / "study.png", held_out, tables)
    text = ladder_text(metrics)
    if params.predict.ensemble and predictions.ENSEMBLE not in final:
        text += "\nensemble: not scored and not calibrated, because there is none; run: ichpipe ensemble"
    for name in final:
        model = predictions.CALIBRATED[name]
        text += f"\n\n{calibration_report.calibration_text(metrics[model.scores], model.title)}"
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


def _calibrate(
    params: Params,
    artifacts: Artifacts,
    final: dict[str, Path],
    val: dict[str, pd.DataFrame],
    test: dict[str, pd.DataFrame],
) -> dict[str, Any]:
    """Calibrate the models whose folders are in ``final``, from their predictions of the validation slices.

    Writes the calibrations and their reliability diagrams, and returns their scores, by the name in the metrics. What
    is there of a model that is gone is removed.
    """
    from ichpipe.report.calibration_report import calibration_scores, reliability_figure
    from ichpipe.scoring import heldout_predictions as predictions
    from ichpipe.scoring.calibration import NO_SLICE_COLUMNS, fit_calibration, write_calibration

    scores: dict[str, Any] = {}
    for name, model in predictions.CALIBRATED.items():
        diagrams = [artifacts.plots / f"{model.plot}.{kind}" for kind in ("json", "png")]
        if name not in final:
            scores[model.scores] = None
            for path in [*diagrams, artifacts.predictions / f"{name}.parquet"]:
                path.unlink(missing_ok=True)
            continue
        of_cnn = predictions.slice_probabilities_of(val[name]) if params.evaluate.blend else None
        if params.evaluate.blend and of_cnn is None:
            log.warning("evaluate.blend: %s is not blended with the slice CNN, %s", model.title, NO_SLICE_COLUMNS)
        pair = predictions.labels_and_probabilities(val[name])
        patients, mark = val[name]["patient_id"].to_numpy(object), predictions.model_mark(final[name])
        calibration = fit_calibration(*pair, patients, params.evaluate.calibration, mark, of_cnn)
        write_calibration(final[name], calibration)
        pair, of_cnn = predictions.labels_and_probabilities(test[name]), predictions.slice_probabilities_of(test[name])
        scores[model.scores], points = calibration_scores(*pair, calibration, of_cnn)
        write_json(diagrams[0], points)
        write_bytes(diagrams[1], reliability_figure(points))
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


def _require_one_run(params: Params, artifacts: Artifacts, slices: pd.DataFrame, final: dict[str, Path]) -> None:
    """Refuse models of another split or of another network's embeddings; their scores would look valid."""
    from ichpipe.features.generations import describe_inputs
    from ichpipe.models.header import ensemble_members, finetuned_from, require_made_from, require_members
    from ichpipe.scoring.heldout_predictions import ENSEMBLE, FINETUNED

    index = digest_of_file(artifacts.index)
    require_made_from(artifacts.slice_cnn, {"index": index}, "ichpipe fit-slices")
    for arm, section in params.sequence.items():
        made_from = {"index": index, "embeddings": digest_of(describe_inputs(params, artifacts, slices, section))}
        require_made_from(artifacts.sequence(arm), made_from, f"ichpipe fit-sequence --arm {arm}")
    if FINETUNED in final:
        require_made_from(artifacts.finetuned, finetuned_from(artifacts, params, index), "ichpipe finetune")
    if ENSEMBLE in final:
        require_members(artifacts.ensemble, ensemble_members(artifacts, params, index), index)


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
