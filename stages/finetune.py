"""Step three: join slice CNN and sequence model, unfreeze both, train end to end on whole series."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import click

from ichpipe.common.artifacts import MODEL_FILE
from ichpipe.common.files import digest_of, digest_of_file
from ichpipe.stages.options import gpu_option, pixels_option, training_workers_option

if TYPE_CHECKING:
    from pathlib import Path

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.params.schema import Params
    from ichpipe.stages.options import Settings

log = logging.getLogger("ichpipe")


@click.command("finetune")
@gpu_option
@training_workers_option
@pixels_option
@click.pass_obj
def command(settings: Settings, gpu: str, workers: int, pixel_cache: Path | None) -> None:
    """Unfreeze slice CNN and sequence model and train end to end.

    With finetune.keep: best (the default) the model never ends worse on validation than it began.

    \b
    Example:
      ichpipe --set finetune.chunk_slices=8 finetune --gpu 0
    """
    params = settings.params()
    with settings.lock_stage("finetune", "finetuned", "ensemble"):
        run(params, settings.artifacts(), gpu, workers, pixel_cache)


def run(
    params: Params, artifacts: Artifacts, gpu: str = "auto", workers: int = 0, pixel_cache: Path | None = None
) -> None:
    """Start from stage one's and stage two's weights; with ``keep: best`` never end worse on validation than they are.

    Under `torchrun` the processes share the series of every batch, and the first writes. ``pixel_cache`` is a folder
    for decoded slices; the result is the same without it.
    """
    from ichpipe.common.device import choose_device
    from ichpipe.features.embedder import predict_held_out
    from ichpipe.features.generations import describe_inputs
    from ichpipe.images.pixel_cache import fill_pixel_cache
    from ichpipe.index.slice_index import read_index
    from ichpipe.models.end_to_end import EndToEnd
    from ichpipe.models.header import require_made_from, train_spacing
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
    save_model(artifacts.finetuned, model, made_from | train_spacing(index))
    rows = held_out(index)
    table = make_table(rows, *predict_held_out(model, rows, device))
    write_predictions(table, artifacts.finetuned, model_mark(artifacts.finetuned))
    write_history(artifacts.finetuned, history)
    best = min(history, key=lambda line: line.val_loss)
    val_loss = history[-1].val_loss if section.keep == "last" else best.val_loss
    facts = {"best_epoch": best.epoch, "val_loss_before": history[0].val_loss, "val_loss": val_loss}
    write_record(artifacts.finetuned, stage="finetune", params=identity, device=device, seconds=watch(), facts=facts)
    trainer.finish()
    if params.predict.ensemble:
        from ichpipe.stages import ensemble

        log.info(ensemble.run(params, artifacts, gpu))


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
