"""Stage one: train the slice CNN on single slices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ichpipe import augment
from ichpipe.classes import CLASSES
from ichpipe.device import autocast, choose_device, derive_seed, generator, needs_scaling
from ichpipe.errors import TrainingError
from ichpipe.feeding import SliceDataset, batches_of, slice_loader
from ichpipe.files import digest_of, digest_of_file
from ichpipe.losses import weighted_bce, weighted_bce_sum
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.models.weights import load_pretrained, save_model
from ichpipe.progress import track
from ichpipe.record import Stopwatch, write_history, write_record
from ichpipe.studies import read_index
from ichpipe.training import Trainer, make_optimizer, make_schedule, step

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from ichpipe.artifacts import Artifacts
    from ichpipe.params import Params, SliceParams


def run(params: Params, artifacts: Artifacts, gpu: str = "auto", workers: int = 0) -> None:
    """Train on the index's train split, keep what is best on its validation split, write the model."""
    watch = Stopwatch()
    device = choose_device(gpu)
    section = params.fit_slices
    index = read_index(artifacts.index)
    train, val = labelled(index, "train"), labelled(index, "val")
    torch.manual_seed(derive_seed(section.seed, "weights"))
    cnn = build(params).to(device)
    fitting = SliceFitting(cnn, section, device, workers, train, val)
    made_from = {"index": digest_of_file(artifacts.index)}
    key = digest_of({"params": _identity(params), "made_from": made_from, "device": device.type})
    trainer = fitting.trainer(artifacts.resume("fit-slices.pt"), key)
    history = trainer.run(fitting.train_epoch, fitting.validate)
    save_model(artifacts.slice_cnn, cnn, made_from)
    write_history(artifacts.slice_cnn, history)
    best = min(history, key=lambda line: line.val_loss)
    facts = {
        "n_train_slices": len(train),
        "n_val_slices": len(val),
        "best_epoch": best.epoch,
        "val_loss": best.val_loss,
    }
    write_record(
        artifacts.slice_cnn,
        stage="fit-slices",
        params=_identity(params),
        device=device,
        seconds=watch.seconds(),
        facts=facts,
    )
    trainer.finish()


def build(params: Params) -> SliceCnn:
    """Build the network that the parameters describe, with its pretrained weights where they name some."""
    section = params.fit_slices
    cnn = SliceCnn(spec_for(section.backbone, params.windows, params.prepare.size_px, section.dropout))
    if section.pretrained is not None:
        load_pretrained(cnn.backbone, section.backbone, section.pretrained)
    return cnn


def labelled(index: pd.DataFrame, split: str) -> pd.DataFrame:
    """Return the slices of one split whose labels are known; none at all is an error."""
    chosen = index[(index["split"] == split) & index[list(CLASSES)].notna().all(axis=1)]
    if chosen.empty:
        raise TrainingError(
            f"the {split} split holds no slice with labels; check prepare.labels and the split's fraction "
            "(index/summary.json counts both), then run: ichpipe prepare"
        )
    return chosen.reset_index(drop=True)


class SliceFitting:
    """One epoch of training and one pass of validation over single slices."""

    def __init__(
        self,
        cnn: SliceCnn,
        section: SliceParams,
        device: torch.device,
        workers: int,
        train: pd.DataFrame,
        val: pd.DataFrame,
    ) -> None:
        self.cnn, self.section, self.device, self.workers = cnn, section, device, workers
        self.train, self.val = _dataset(train, cnn.spec.size_px), _dataset(val, cnn.spec.size_px)
        self.scaler = torch.amp.GradScaler(device.type, enabled=needs_scaling(device, section.precision))
        self.optimizer = make_optimizer([(cnn, section.learning_rate)], section.weight_decay)
        per_epoch = len(batches_of(range(len(self.train)), section.batch_size))
        self.schedule = make_schedule(self.optimizer, per_epoch, section.epochs, section.warmup_epochs)

    def trainer(self, checkpoint: Path, key: str) -> Trainer:
        """Return what runs the epochs."""
        section = self.section
        return Trainer(self.cnn, self.optimizer, self.schedule, section.seed, section.epochs, checkpoint, key)

    def train_epoch(self, epoch: int) -> float:
        """Pass once over the training slices in a new order; return the mean loss."""
        self.cnn.train()
        order = torch.randperm(len(self.train), generator=generator(self.section.seed, "order", epoch)).tolist()
        loader = slice_loader(self.train, self.section.batch_size, order, self.workers)
        total = 0.0
        for number, (hu, labels, _) in enumerate(track(loader, f"epoch {epoch}")):
            drawn = augment.draw(self.section.augment, len(hu), generator(self.section.seed, "augment", epoch, number))
            total += self._step(augment.apply(hu.to(self.device), drawn), labels) * len(hu)
        return total / len(self.train)

    @torch.inference_mode()
    def validate(self) -> float:
        """Return the weighted log loss on the validation slices, in the precision of `extract` and `predict`."""
        self.cnn.eval()
        total = 0.0
        for hu, labels, _ in slice_loader(self.val, 64, range(len(self.val)), self.workers):
            with autocast(self.device, "auto"):
                _, logits = self.cnn(hu.to(self.device))
            total += float(weighted_bce_sum(logits.float(), labels.to(self.device)))
        return total / len(self.val)

    def _step(self, hu: torch.Tensor, labels: torch.Tensor) -> float:
        with autocast(self.device, self.section.precision):
            _, logits = self.cnn(hu)
        loss = weighted_bce(logits.float(), labels.to(self.device))
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        step(self.cnn, self.optimizer, self.schedule, self.scaler, self.section.max_grad_norm)
        return float(loss.detach())


def _dataset(index: pd.DataFrame, size_px: int) -> SliceDataset:
    return SliceDataset(index["path"].tolist(), index[list(CLASSES)].to_numpy(np.float32), size_px)


def _identity(params: Params) -> dict[str, object]:
    """Return the parameters that decide the result."""
    return {
        "size_px": params.prepare.size_px,
        "windows": [window.model_dump() for window in params.windows],
        "fit-slices": params.fit_slices.model_dump(mode="json"),
    }
