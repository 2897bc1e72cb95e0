"""Stage one: train the slice CNN on single slices, and one more CNN per fold without this fold's patients."""

from __future__ import annotations

import functools
import logging
import operator
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import click

from ichpipe.common.artifacts import FOLDS_FILE
from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import IchpipeError, TrainingError
from ichpipe.common.files import digest_of, digest_of_file, write_json
from ichpipe.stages.options import gpu_option, pixels_option, workers_option

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
    from ichpipe.training.trainer import Epoch

log = logging.getLogger("ichpipe")


@dataclass(frozen=True)
class Task:
    """One network to train and its files. Rows are positions in ``Slices.train``."""

    rows: Sequence[int]  # to train on
    left_out: Sequence[int]  # of the fold's patients
    seed: int  # of order, augmentation and dropout; all networks start from the same weights
    made_from: dict[str, str]
    folder: Path
    checkpoint: Path


@dataclass(frozen=True)
class Fitted:
    """A trained network, before it is written."""

    task: Task
    cnn: SliceCnn
    history: list[Epoch]
    facts: dict[str, Any]  # counts, epoch and losses, for the record
    seconds: float

    def save(self) -> None:
        """Write model and learning curve."""
        from ichpipe.models.weights import save_model
        from ichpipe.training.run_record import write_history

        save_model(self.task.folder, self.cnn, self.task.made_from)
        write_history(self.task.folder, self.history)


@click.command("fit-slices")
@gpu_option
@workers_option
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
    params: Params, artifacts: Artifacts, gpu: str = "auto", workers: int = 0, pixel_cache: Path | None = None
) -> None:
    """Train on the train split, keep the epoch that is best on the validation split, write the model.

    ``fit-slices.folds`` adds one network per fold, trained without that fold's patients. Checkpoints stay until all is
    written: an interrupted stage trains no finished network again, even if DVC removed its files. Under `torchrun` the
    processes share every batch, and the first writes. ``pixel_cache`` is a folder for decoded slices; the result is
    the same without it.
    """
    import numpy as np

    from ichpipe.common.device import choose_device
    from ichpipe.images.pixel_cache import fill_pixel_cache
    from ichpipe.images.slice_dataset import SliceDataset
    from ichpipe.index.slice_index import read_index
    from ichpipe.training import distributed
    from ichpipe.training.slice_trainer import Slices

    device = choose_device(distributed.local_gpu(gpu))
    index = read_index(artifacts.index)
    train, val = labelled(index, "train"), labelled(index, "val")
    plain, *folds = _tasks(params, artifacts, train)
    size = params.prepare.size_px
    with distributed.processes():
        first = distributed.rank() == 0
        with distributed.first_goes_first():
            read = fill_pixel_cache(pixel_cache, index, size, workers).read if pixel_cache else None
        train_set, val_set = (
            SliceDataset(part["path"].tolist(), part[list(CLASSES)].to_numpy(np.float32), size, read)
            for part in (train, val)
        )
        slices = Slices(train_set, val_set, train["series_uid"].tolist())
        fit = functools.partial(train_network, params, slices, device, workers)
        whole = fit(plain)
        if first:
            shutil.rmtree(artifacts.fold_cnns, ignore_errors=True)  # never mix the networks of two runs
            whole.save()
        parts = []
        for task in folds:
            log.info("slice CNN without fold %s", task.made_from["excluded_fold"])
            parts.append(fit(task))
            if first:
                parts[-1].save()
    if first:
        write_json(artifacts.fold_cnns / FOLDS_FILE, [fitted.facts for fitted in parts])
        _write_record(params, device, whole, parts)
        for checkpoint in artifacts.resume("").glob("fit-slices.*pt"):  # also of folds that a former run had
            checkpoint.unlink()


def is_done(params: Params, artifacts: Artifacts) -> bool:
    """Say whether the networks that `run` would train exist."""
    from ichpipe.models.fold_models import fold_models
    from ichpipe.models.header import is_fitted

    index = digest_of_file(artifacts.index)
    try:
        fold_models(artifacts, params, index)
    except IchpipeError:
        return False
    return is_fitted(artifacts.slice_cnn, _identity(params), {"index": index})


def build(params: Params) -> SliceCnn:
    """Build the network that the parameters describe, with its pretrained weights where they name some.

    All networks of one run start from the same weights, so that their embeddings stay comparable.
    """
    import torch

    from ichpipe.common.device import derive_seed
    from ichpipe.models.slice_cnn import SliceCnn, spec_for
    from ichpipe.models.weights import load_pretrained

    section = params.fit_slices
    torch.manual_seed(derive_seed(section.seed, "weights"))
    cnn = SliceCnn(spec_for(section.backbone, params.windows, params.prepare.size_px, section.dropout, section.pooling))
    if section.pretrained is not None:
        load_pretrained(cnn.backbone, section.backbone, section.pretrained)
    return cnn


def labelled(index: pd.DataFrame, split: str) -> pd.DataFrame:
    """Return the slices of one split whose labels are known; none at all is an error."""
    slices = index[(index["split"] == split) & index[list(CLASSES)].notna().all(axis=1)]
    if slices.empty:
        raise TrainingError(
            f"the {split} split holds no slice with labels; check prepare.labels and the split's fraction "
            "(index/summary.json counts both), then run: ichpipe prepare"
        )
    return slices.reset_index(drop=True)


def _tasks(params: Params, artifacts: Artifacts, train: pd.DataFrame) -> list[Task]:
    """Return the network of all labelled train slices, then one per fold.

    Raises TrainingError where a fold can't be left out, before anything is trained.
    """
    from ichpipe.common.device import derive_seed
    from ichpipe.models.fold_models import fold_numbers, made_from_without, part_rows

    seed, index = params.fit_slices.seed, digest_of_file(artifacts.index)
    every = range(len(train))
    tasks = [Task(every, (), seed, {"index": index}, artifacts.slice_cnn, artifacts.resume("fit-slices.pt"))]
    for fold in fold_numbers(params):
        made_from = made_from_without(index, fold, params.fit_slices.folds)
        checkpoint = artifacts.resume(f"fit-slices.fold-{fold}.pt")
        own_seed = derive_seed(seed, "fold", fold)
        tasks.append(Task(*part_rows(train, fold), own_seed, made_from, artifacts.fold_cnn(fold), checkpoint))
    return tasks


def train_network(params: Params, slices: Slices, device: torch.device, workers: int, task: Task) -> Fitted:
    """Train one network, or go on from its checkpoint (a finished one is loaded and not trained further)."""
    from ichpipe.training import distributed
    from ichpipe.training.run_record import start_watch
    from ichpipe.training.slice_trainer import SliceFitting

    watch = start_watch()
    cnn = build(params).to(device)
    if distributed.count() > 1 and device.type == "cuda":  # on a CPU PyTorch has no such layer
        from timm.layers.norm_act import convert_sync_batchnorm

        cnn = cast("SliceCnn", convert_sync_batchnorm(cnn))  # type: ignore[no-untyped-call] # timm has no types
    if params.fit_slices.compile:
        cnn.compile()
    fitting = SliceFitting(cnn, params.fit_slices, device, workers, slices, task.rows, task.seed)
    key = digest_of({"params": _identity(params), "made_from": task.made_from, "device": device.type})
    history = fitting.trainer(task.checkpoint, key).run(fitting.train_epoch, fitting.validate)
    best = min(history, key=lambda line: line.val_loss)
    facts: dict[str, Any] = {"n_train_slices": len(task.rows), "n_val_slices": len(slices.val)}
    facts |= {"best_epoch": best.epoch, "val_loss": best.val_loss}
    if task.left_out:
        facts["excluded_fold"] = int(task.made_from["excluded_fold"])
        facts["n_out_of_fold_slices"] = len(task.left_out)
        facts["out_of_fold_loss"] = fitting.loss_on(slices.train, task.left_out)
    return Fitted(task, cnn.cpu(), history, facts, watch())


def _write_record(params: Params, device: torch.device, whole: Fitted, parts: list[Fitted]) -> None:
    """Write the record. Its wall time is that of the plain network; out-of-fold losses are pooled by slice."""
    from ichpipe.training.run_record import write_record

    facts = dict(whole.facts)
    if parts:
        counts = [fitted.facts["n_out_of_fold_slices"] for fitted in parts]
        losses = [fitted.facts["out_of_fold_loss"] for fitted in parts]
        facts["n_folds"], facts["n_out_of_fold_slices"] = len(parts), sum(counts)
        facts["out_of_fold_loss"] = sum(map(operator.mul, counts, losses)) / sum(counts)
        facts["folds_wall_seconds"] = [fitted.seconds for fitted in parts]
    folder, identity = whole.task.folder, _identity(params)
    write_record(folder, stage="fit-slices", params=identity, device=device, seconds=whole.seconds, facts=facts)


def _identity(params: Params) -> dict[str, object]:
    """Return the parameters that decide one network's weights; the number of folds does not."""
    return {
        "size_px": params.prepare.size_px,
        "windows": [window.model_dump() for window in params.windows],
        "fit-slices": params.fit_slices.model_dump(mode="json", exclude={"folds"}),
    }
