"""Step three: join slice CNN and sequence model, unfreeze both, train end to end on whole series."""

from __future__ import annotations

import logging
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from ichpipe.common.files import digest_of, digest_of_file
from ichpipe.stages.options import gpu_option, pixels_option, training_workers_option

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pandas as pd
    import torch

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.models.end_to_end import EndToEnd
    from ichpipe.params.schema import Params
    from ichpipe.stages.options import Settings
    from ichpipe.training.trainer import Epoch, Trainer

log = logging.getLogger("ichpipe")


@click.command("finetune")
@gpu_option
@training_workers_option
@pixels_option
@click.pass_obj
def command(settings: Settings, gpu: str, workers: int, pixel_cache: Path | None) -> None:
    """Unfreeze slice CNN and sequence model and train end to end.

    With finetune.keep: best (the default) the model never ends worse on validation than it began. With
    finetune.out_of_fold each network of fit-slices.folds learns from the patients that it left out.

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

    With ``out_of_fold`` each network of `fit-slices.folds` learns from the patients that it left out, beginning with
    the same sequence model, and the model is the mean of their probabilities. Under `torchrun` the processes share the
    series of every batch, and the first writes. ``pixel_cache`` is a folder for decoded slices; the result is the same
    without it.
    """
    from ichpipe.common.device import choose_device
    from ichpipe.features.embedder import predict_held_out
    from ichpipe.features.generations import describe_inputs
    from ichpipe.images.pixel_cache import fill_pixel_cache
    from ichpipe.index.slice_index import read_index
    from ichpipe.models.end_to_end import Ensemble
    from ichpipe.models.header import fold_models, read_header, require_made_from, train_spacing
    from ichpipe.models.weights import save_model
    from ichpipe.scoring.heldout_predictions import held_out, make_table, model_mark, write_predictions
    from ichpipe.training import distributed
    from ichpipe.training.run_record import start_watch, write_history, write_record

    watch = start_watch()
    device = choose_device(distributed.local_gpu(gpu))
    section = params.finetune
    index = read_index(artifacts.index)
    made_from = _made_from(artifacts, params)
    embeddings = digest_of(describe_inputs(params, artifacts, index, params.sequence[section.arm]))
    remedy = f"ichpipe extract, then: ichpipe fit-sequence --arm {section.arm}"
    require_made_from(artifacts.sequence(section.arm), {"embeddings": embeddings}, remedy)
    starts: list[tuple[int | None, Path]] = [(None, artifacts.slice_cnn)]
    if section.out_of_fold:
        starts = [*fold_models(artifacts, params, made_from["index"]).items()]
    with distributed.processes():
        with distributed.first_goes_first():
            spec = read_header(artifacts.slice_cnn).slice_cnn
            read = None
            if pixel_cache and spec:
                read = fill_pixel_cache(pixel_cache, index, spec.framing, workers, spec.neighbours).read
        fitted = [
            train_network(params, artifacts, index, folder, fold, device, workers, read) for fold, folder in starts
        ]
        if distributed.rank():
            return
    model = Ensemble([network for network, _, _ in fitted]) if section.out_of_fold else fitted[0][0]
    networks = [{"learned_fold": str(fold)} for fold, _ in starts] if section.out_of_fold else []
    save_model(artifacts.finetuned, model, made_from | train_spacing(index), networks)
    rows = held_out(index)
    table = make_table(rows, *predict_held_out(model, rows, device))
    write_predictions(table, artifacts.finetuned, model_mark(artifacts.finetuned))
    history = _mean_history([each for _, each, _ in fitted])
    write_history(artifacts.finetuned, history)
    kept = [each[-1] if section.keep == "last" else _best(each) for _, each, _ in fitted]
    facts = {
        "best_epoch": _best(history).epoch,
        "val_loss_before": history[0].val_loss,
        "val_loss": fmean(line.val_loss for line in kept),
    }
    identity = section.model_dump(mode="json")
    write_record(artifacts.finetuned, stage="finetune", params=identity, device=device, seconds=watch(), facts=facts)
    for _, _, trainer in fitted:
        trainer.finish()
    if params.predict.ensemble:
        from ichpipe.stages import ensemble

        log.info(ensemble.run(params, artifacts, gpu))


def train_network(
    params: Params,
    artifacts: Artifacts,
    index: pd.DataFrame,
    slice_cnn: Path,
    fold: int | None,
    device: torch.device,
    workers: int,
    read: Callable[..., torch.Tensor] | None,
) -> tuple[EndToEnd, list[Epoch], Trainer]:
    """Train one network from a slice CNN and the arm, or go on from its checkpoint; return it and its learning curve.

    With a ``fold`` its series are the train series of this fold, which the slice CNN has not seen.
    """
    from ichpipe.common.device import derive_seed
    from ichpipe.models.end_to_end import EndToEnd
    from ichpipe.models.weights import load_sequence, load_slice_cnn
    from ichpipe.training.end_to_end_trainer import EndToEndFitting, image_series

    section, name = params.finetune, "finetune.pt"
    fewest, rows = params.sequence[section.arm].min_slices, index
    identity: dict[str, Any] = {"params": section.model_dump(mode="json"), "made_from": _made_from(artifacts, params)}
    if fold is not None:
        log.info("end to end on the patients of fold %d", fold)
        rows, name = index[(index["split"] != "train") | (index["fold"] == fold)], f"finetune.fold-{fold}.pt"
        section = section.model_copy(update={"seed": derive_seed(section.seed, "fold", fold)})
        identity["fold"] = fold
    model = EndToEnd(load_slice_cnn(slice_cnn), load_sequence(artifacts.sequence(section.arm))).to(device)
    if section.compile:
        model.cnn.compile()
    train, val = image_series(rows, "train", fewest), image_series(rows, "val", fewest)
    fitting = EndToEndFitting(model, section, device, train, val, workers, read)
    trainer = fitting.trainer(artifacts.resume(name), digest_of(identity | {"device": device.type}))
    return model, trainer.run(fitting.train_epoch, fitting.validate, compare_with_start=True), trainer


def is_done(params: Params, artifacts: Artifacts) -> bool:
    """Say whether the model that `run` would train exists, with its predictions."""
    from ichpipe.models.header import is_fitted

    made_from = _made_from(artifacts, params)
    return is_fitted(artifacts.finetuned, params.finetune.model_dump(mode="json"), made_from)


def _made_from(artifacts: Artifacts, params: Params) -> dict[str, str]:
    from ichpipe.models.header import finetuned_from

    return finetuned_from(artifacts, params, digest_of_file(artifacts.index))


def _best(history: list[Epoch]) -> Epoch:
    return min(history, key=lambda line: line.val_loss)


def _mean_history(histories: list[list[Epoch]]) -> list[Epoch]:
    """Return the learning curve of several networks: the mean of their losses, epoch by epoch."""
    return [
        replace(
            lines[0],
            train_loss=None if lines[0].train_loss is None else fmean(line.train_loss for line in lines),
            val_loss=fmean(line.val_loss for line in lines),
        )
        for lines in zip(*histories, strict=True)
    ]
