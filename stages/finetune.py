"""Step three: join slice CNN and sequence model, unfreeze both, train end to end on whole series."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ichpipe.common.artifacts import MODEL_FILE
from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import UnreadableDicomError
from ichpipe.common.files import digest_of, digest_of_file
from ichpipe.common.progress import track
from ichpipe.stages.options import gpu_option, pixels_option, training_workers_option

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import pandas as pd
    import torch
    from numpy.typing import NDArray

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.models.end_to_end import EndToEnd
    from ichpipe.params.schema import Params
    from ichpipe.stages.options import Settings


@click.command("finetune")
@gpu_option
@training_workers_option
@pixels_option
@click.pass_obj
def command(settings: Settings, gpu: str, workers: int, pixel_cache: Path | None) -> None:
    """Unfreeze slice CNN and sequence model and train end to end. Never ends worse than it began.

    \b
    Example:
      ichpipe --set finetune.chunk_slices=8 finetune --gpu 0
    """
    params = settings.params()
    with settings.lock_stage("finetune", "finetuned"):
        run(params, settings.artifacts(), gpu, workers, pixel_cache)


def run(
    params: Params, artifacts: Artifacts, gpu: str = "auto", workers: int = 0, pixel_cache: Path | None = None
) -> None:
    """Start from stage one's and stage two's weights; never end worse on validation than they are.

    Under `torchrun` the processes share the series of every batch, and the first writes. ``pixel_cache`` is a folder
    for decoded slices; the result is the same without it.
    """
    import numpy as np

    from ichpipe.common.device import choose_device
    from ichpipe.features.generations import describe_inputs
    from ichpipe.images.pixel_cache import fill_pixel_cache
    from ichpipe.index.slice_index import read_index
    from ichpipe.models.end_to_end import EndToEnd
    from ichpipe.models.header import SPACING, require_made_from
    from ichpipe.models.weights import load_sequence, load_slice_cnn, save_model
    from ichpipe.scoring.heldout_predictions import held_out, make_table, model_mark, write_predictions
    from ichpipe.training import distributed
    from ichpipe.training.end_to_end_trainer import EndToEndFitting, image_series
    from ichpipe.training.run_record import start_watch, write_history, write_record

    watch = start_watch()
    device = choose_device(distributed.local_gpu(gpu))
    section = params.finetune
    index = read_index(artifacts.index)
    model = EndToEnd(load_slice_cnn(artifacts.slice_cnn), load_sequence(artifacts.sequence(section.arm))).to(device)
    made_from = _made_from(artifacts, section.arm)
    embeddings = digest_of(describe_inputs(params, artifacts, index, params.sequence[section.arm]))
    split = {"index": made_from["index"]}
    require_made_from(artifacts.slice_cnn, split, "ichpipe fit-slices")
    remedy = f"ichpipe extract, then: ichpipe fit-sequence --arm {section.arm}"
    require_made_from(artifacts.sequence(section.arm), {**split, "embeddings": embeddings}, remedy)
    if section.compile:
        model.cnn.compile()
    fewest = params.sequence[section.arm].min_slices
    train, val = image_series(index, "train", fewest), image_series(index, "val", fewest)
    identity = section.model_dump(mode="json")
    key = digest_of({"params": identity, "made_from": made_from, "device": device.type})
    with distributed.processes():
        with distributed.first_goes_first():
            read = (
                fill_pixel_cache(pixel_cache, index, model.cnn.spec.framing, workers, model.cnn.spec.neighbours).read
                if pixel_cache
                else None
            )
        fitting = EndToEndFitting(model, section, device, train, val, workers, read)
        trainer = fitting.trainer(artifacts.resume("finetune.pt"), key)
        history = trainer.run(fitting.train_epoch, fitting.validate, compare_with_start=True)
        if distributed.rank():
            return
    # Median distance of neighbouring train slices, mm, for predictions on thinner series.
    sequences = (index["split"] == "train") & ~index["slices_only"]
    spacing = index.loc[sequences & (index["slice_index"] > 0), "spacing_mm"].median()
    save_model(artifacts.finetuned, model, made_from | ({} if np.isnan(spacing) else {SPACING: f"{spacing:.4g}"}))
    rows = held_out(index)
    table = make_table(rows, predict_held_out(model, rows, device))
    write_predictions(table, artifacts.finetuned, model_mark(artifacts.finetuned))
    write_history(artifacts.finetuned, history)
    best = min(history, key=lambda line: line.val_loss)
    facts = {"best_epoch": best.epoch, "val_loss_before": history[0].val_loss, "val_loss": best.val_loss}
    seconds = watch()
    write_record(artifacts.finetuned, stage="finetune", params=identity, device=device, seconds=seconds, facts=facts)
    trainer.finish()


def is_done(params: Params, artifacts: Artifacts) -> bool:
    """Say whether the model that `run` would train exists, with its predictions."""
    from ichpipe.models.header import is_fitted

    section = params.finetune
    return is_fitted(artifacts.finetuned, section.model_dump(mode="json"), _made_from(artifacts, section.arm))


def _made_from(artifacts: Artifacts, arm: str) -> dict[str, str]:
    return {
        "index": digest_of_file(artifacts.index),
        "slice_cnn": digest_of_file(artifacts.slice_cnn / MODEL_FILE),
        "sequence": digest_of_file(artifacts.sequence(arm) / MODEL_FILE),
    }


def predict_held_out(model: EndToEnd, rows: pd.DataFrame, device: torch.device) -> NDArray[np.float64]:
    """Return probabilities (rows, 6) from the images; rows of one series stand in slice order."""
    import numpy as np

    from ichpipe.features.embedder import classify_series, to_probabilities
    from ichpipe.training.end_to_end_trainer import one_series

    result = np.full((len(rows), len(CLASSES)), np.nan)
    groups = rows.groupby("series_uid", sort=False).indices
    for positions in track(groups.values(), "predict", len(groups), "series"):
        series = one_series(rows.iloc[positions])
        logits, bad = classify_series(model, series.paths, series.position_mm.tolist(), device)
        if bad:
            raise UnreadableDicomError(bad[0][1])
        result[positions] = to_probabilities(logits)
    return result
