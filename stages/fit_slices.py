"""Stage one: train the slice CNN on single slices, and one more CNN per fold without this fold's patients."""

from __future__ import annotations

import logging
import operator
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import click

from ichpipe.common.artifacts import FOLDS_FILE
from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import IchpipeError, TrainingError
from ichpipe.common.files import digest_of, digest_of_file, write_json
from ichpipe.stages.options import gpu_option, pixels_option, training_workers_option

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    import torch

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.models.slice_cnn import SliceCnn
    from ichpipe.params.schema import Params
    from ichpipe.stages.options import Settings
    from ichpipe.training.slice_trainer import Slices

log = logging.getLogger("ichpipe")


@click.command("fit-slices")
@gpu_option
@training_workers_option
@pixels_option
@click.pass_obj
def command(settings: Settings, gpu: str, workers: int, pixel_cache: Path | None) -> None:
    """Stage one: train the slice CNN. Goes on where it was stopped.

    \b
    Example:
      ichpipe --set fit-slices.epochs=3 fit-slices --gpu 0
    """
    params = settings.params()
    with settings.lock_stage("fit-slices", "slice-cnn"):
        run(params, settings.artifacts(), gpu, workers, pixel_cache)


def run(
    params: Params,
    artifacts: Artifacts,
    gpu: str = "auto",
    workers: int = 0,
    pixel_cache: Path | None = None,
    pretrained: Path | None = None,
) -> None:
    """Train on the train split, keep the epoch that is best on the validation split (or the last), write the model.

    ``fit-slices.folds`` adds one network per fold, trained without that fold's patients. Checkpoints stay until all is
    written: an interrupted stage trains no finished network again, even if DVC removed its files. Under `torchrun` the
    processes share every batch, and the first writes. ``pixel_cache`` is a folder for decoded slices; the result is
    the same without it. ``pretrained`` is the folder of networks trained for ``fit-slices.pretrain_epochs``: by default
    the run's own; the folds of a cross-validation share one, since patients of those sources are in no fold.
    """
    import numpy as np

    from ichpipe.common.device import choose_device
    from ichpipe.images.pixel_cache import fill_pixel_cache
    from ichpipe.images.slice_dataset import SliceDataset
    from ichpipe.index.slice_index import index_neighbours, read_index, slice_files
    from ichpipe.models.header import Framing, fold_numbers
    from ichpipe.training import distributed
    from ichpipe.training.run_record import write_record
    from ichpipe.training.slice_trainer import Slices

    device = choose_device(distributed.local_gpu(gpu))
    index, digest = read_index(artifacts.index), digest_of_file(artifacts.index)
    index["files"] = slice_files(index["path"].tolist(), index_neighbours(index, params.fit_slices.neighbours))
    train, val = labelled(index, "train"), labelled(index, "val")  # their neighbours may have no label
    inside = {fold: train["fold"].to_numpy() == fold for fold in fold_numbers(params)}
    for fold, rows in inside.items():
        if not rows.any() or rows.all():
            fault = "holds them all, and nothing is left to train on" if rows.any() else "holds none"
            raise TrainingError(
                f"fit-slices.folds: of {len(train)} train slices with labels, fold {fold} {fault}; "
                "set fit-slices.folds to 0, or lower it and prepare.folds (or add patients), then run: ichpipe prepare"
            )
    framing, neighbours = Framing.of(params.prepare), params.fit_slices.neighbours
    with distributed.processes():
        with distributed.first_goes_first():
            read = fill_pixel_cache(pixel_cache, index, framing, workers, neighbours).read if pixel_cache else None
        train_set, val_set = (
            SliceDataset(part["files"].tolist(), part[list(CLASSES)].to_numpy(np.float32), framing, read)
            for part in (train, val)
        )
        weights = train["source"].map(lambda name: params.fit_slices.source_weights.get(name, 1.0)).tolist()
        weights = [] if set(weights) == {1.0} else weights
        slices = Slices(train_set, val_set, train["series_uid"].tolist(), weights)
        start = None
        if params.fit_slices.pretrain_epochs:
            folder = pretrained or artifacts.resume("pretrained")
            start = pretrain(params, folder, slices, train[train["slices_only"]], device, workers)
        facts, seconds = train_network(params, artifacts, slices, device, workers, digest, start=start)
        parts = []
        for fold, rows in inside.items():
            log.info("slice CNN without fold %d", fold)
            left_out = np.flatnonzero(rows).tolist()
            network = train_network(
                params, artifacts, slices, device, workers, digest, start=start, fold=fold, left_out=left_out
            )
            parts.append(network)
        if distributed.rank():
            return
    facts_of_folds = [of_fold for of_fold, _ in parts]
    write_json(artifacts.fold_cnns / FOLDS_FILE, facts_of_folds)
    if parts:  # losses are pooled by slice; the wall time of the record is that of the plain network
        counts = [of_fold["n_out_of_fold_slices"] for of_fold in facts_of_folds]
        losses = [of_fold["out_of_fold_loss"] for of_fold in facts_of_folds]
        facts["n_folds"], facts["n_out_of_fold_slices"] = len(parts), sum(counts)
        facts["out_of_fold_loss"] = sum(map(operator.mul, counts, losses)) / sum(counts)
        facts["folds_wall_seconds"] = [seconds_of_fold for _, seconds_of_fold in parts]
    folder, identity = artifacts.slice_cnn, _identity(params)
    write_record(folder, stage="fit-slices", params=identity, device=device, seconds=seconds, facts=facts)
    for checkpoint in artifacts.resume("").glob("fit-slices.*pt"):  # also of folds that a former run had
        checkpoint.unlink()


def is_done(params: Params, artifacts: Artifacts) -> bool:
    """Say whether the networks that `run` would train exist."""
    from ichpipe.models.header import fold_models, is_fitted

    index = digest_of_file(artifacts.index)
    try:
        fold_models(artifacts, params, index)
    except IchpipeError:
        return False
    return is_fitted(artifacts.slice_cnn, _identity(params), {"index": index})


def labelled(index: pd.DataFrame, split: str) -> pd.DataFrame:
    """Return the slices of one split with a known label; none at all is an error."""
    slices = index[(index["split"] == split) & index[list(CLASSES)].notna().any(axis=1)]
    if slices.empty:
        raise TrainingError(
            f"the {split} split holds no slice with labels; check prepare.labels and the split's fraction "
            "(index/summary.json counts both), then run: ichpipe prepare"
        )
    return slices.reset_index(drop=True)


def pretrain(
    params: Params, folder: Path, slices: Slices, rows: pd.DataFrame, device: torch.device, workers: int
) -> Path:
    """Train a network on ``rows`` of the train slices, those for stage one alone; return its folder.

    The last epoch's weights are kept, so that no other patient decides anything. A network that was trained so on the
    same files and labels is not trained again.
    """
    from ichpipe.models.header import is_fitted
    from ichpipe.models.weights import save_model
    from ichpipe.training import distributed
    from ichpipe.training.run_record import start_watch, write_history, write_record
    from ichpipe.training.slice_trainer import SliceFitting

    watch, section = start_watch(), params.fit_slices
    if rows.empty:
        raise TrainingError("fit-slices.pretrain_epochs: no source of use: slices has a slice with labels; write 0")
    content = rows[["sop_uid", "file_digest", *CLASSES]].to_csv(index=False)
    # The last epoch is kept, not the one that is best on validation. What comes later may change.
    rate = section.pretrain_learning_rate or section.learning_rate
    changes = {"epochs": section.pretrain_epochs, "learning_rate": rate, "pretrain_learning_rate": None}
    shorter = section.model_copy(update=changes | {"source_weights": {}, "keep": "last", "folds": 0})
    identity = _identity(params.model_copy(update={"fit_slices": shorter}))  # later epochs may change
    made_from = {"slices": digest_of({"content": content})}
    key = digest_of({"params": identity, "made_from": made_from, "device": device.type})
    target = folder / key[:16]
    if is_fitted(target, identity, made_from):
        log.info("the network of the sources for stage one alone is there")
        return target
    log.info("slice CNN of the %d slices for stage one alone", len(rows))
    cnn, alone = _build(params, device), replace(slices, weights=())
    fitting = SliceFitting(cnn, shorter, device, workers, alone, rows.index.tolist(), section.seed)
    trainer = fitting.trainer(folder / f"{key[:16]}.pt", key)
    history = trainer.run(fitting.train_epoch, fitting.validate)
    if distributed.rank() == 0:
        save_model(target, cnn, made_from)
        write_history(target, history)
        facts = {"n_train_slices": len(rows)}
        write_record(target, stage="fit-slices", params=identity, device=device, seconds=watch(), facts=facts)
        trainer.finish()
    return target


def _build(params: Params, device: torch.device) -> SliceCnn:
    """Build the slice CNN with its first weights: the same for all networks of a run."""
    import torch

    from ichpipe.common.device import derive_seed
    from ichpipe.models.header import Framing
    from ichpipe.models.slice_cnn import SliceCnn, require_size, spec_for
    from ichpipe.models.weights import load_pretrained
    from ichpipe.training import distributed

    section = params.fit_slices
    torch.manual_seed(derive_seed(section.seed, "weights"))
    framing = Framing.of(params.prepare)
    spec = spec_for(
        section.backbone,
        params.windows,
        framing.size_px,
        section.dropout,
        section.pooling,
        mm_per_px=framing.mm_per_px,
        neighbours=section.neighbours,
    )
    cnn = SliceCnn(spec)
    if section.pretrained is not None:
        load_pretrained(cnn.backbone, section.backbone, section.pretrained, cnn.spec.slices)
    cnn.to(device)
    require_size(cnn)
    if distributed.count() > 1 and device.type not in {"cpu", "mps"}:  # PyTorch has no such layer there
        from timm.layers.norm_act import convert_sync_batchnorm

        cnn = cast("SliceCnn", convert_sync_batchnorm(cnn))  # type: ignore[no-untyped-call] # timm has no types
    if section.compile:
        cnn.compile()
    return cnn


def train_network(
    params: Params,
    artifacts: Artifacts,
    slices: Slices,
    device: torch.device,
    workers: int,
    index_digest: str,
    *,
    start: Path | None = None,
    fold: int | None = None,
    left_out: Sequence[int] = (),
) -> tuple[dict[str, Any], float]:
    """Train one network, or go on from its checkpoint, and write it with its learning curve.

    ``left_out`` are positions in ``slices.train``: the patients of ``fold``. Without a fold it is the network of all
    train slices, and the folds' networks of former runs go. ``start`` is the folder of a network whose weights it
    begins with. Returns facts for the record, and seconds.
    """
    from ichpipe.common.device import derive_seed
    from ichpipe.models.weights import load_slice_cnn, save_model
    from ichpipe.training import distributed
    from ichpipe.training.run_record import start_watch, write_history
    from ichpipe.training.slice_trainer import SliceFitting

    watch, section = start_watch(), params.fit_slices
    rows = sorted(set(range(len(slices.train))).difference(left_out))
    seed, made_from = section.seed, {"index": index_digest}
    folder, checkpoint = artifacts.slice_cnn, artifacts.resume("fit-slices.pt")
    if fold is not None:
        seed = derive_seed(seed, "fold", fold)  # of order, augmentation and dropout
        made_from |= {"excluded_fold": str(fold), "folds": str(section.folds)}
        folder, checkpoint = artifacts.fold_cnn(fold), artifacts.resume(f"fit-slices.fold-{fold}.pt")
    cnn = _build(params, device)
    if start is not None:
        cnn.load_state_dict(load_slice_cnn(start).state_dict())
    fitting = SliceFitting(cnn, section, device, workers, slices, rows, seed)
    key = digest_of({"params": _identity(params), "made_from": made_from, "device": device.type})
    history = fitting.trainer(checkpoint, key).run(fitting.train_epoch, fitting.validate)
    best = history[-1] if section.keep == "last" else min(history, key=lambda line: line.val_loss)
    facts: dict[str, Any] = {"n_train_slices": len(rows), "n_val_slices": len(slices.val)}
    facts |= {"best_epoch": best.epoch, "val_loss": best.val_loss}
    if fold is not None:
        facts |= {"excluded_fold": fold, "n_out_of_fold_slices": len(left_out)}
        facts["out_of_fold_loss"] = fitting.loss_on(slices.train, left_out)
    seconds = watch()
    if distributed.rank() == 0:
        if fold is None:
            shutil.rmtree(artifacts.fold_cnns, ignore_errors=True)  # never mix the networks of two runs
        save_model(folder, cnn, made_from)
        write_history(folder, history)
    return facts, seconds


def _identity(params: Params) -> dict[str, object]:
    """Return the parameters that decide one network's weights; the number of folds does not."""
    from ichpipe.models.header import Framing

    return {
        **Framing.of(params.prepare).identity(),
        "windows": [window.model_dump() for window in params.windows],
        "fit-slices": params.fit_slices.model_dump(mode="json", exclude={"folds"}),
    }
