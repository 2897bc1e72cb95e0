"""Trains a sequence model on cached embeddings: one epoch of batches, and validation."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from ichpipe.common.device import autocast, needs_scaling, training_precision
from ichpipe.features.sequence_dataset import Shuffle, predict_batches, train_batches
from ichpipe.models.sequence import stored_inputs
from ichpipe.training.trainer import (
    Trainer,
    known_slices,
    make_optimizer,
    make_schedule,
    step,
    weighted_bce,
    weighted_bce_sum,
)

if TYPE_CHECKING:
    from pathlib import Path

    from ichpipe.features.sequence_dataset import LabelledSeries
    from ichpipe.models.sequence import AnySequence
    from ichpipe.params.schema import SequenceParams
    from ichpipe.training.trainer import Position

SAVE_EVERY_S = 20.0  # least time between checkpoints: writing one may take longer than an epoch


class SequenceFitting:
    """One epoch of training and one pass of validation over cached sequences."""

    def __init__(
        self,
        model: AnySequence,
        section: SequenceParams,
        device: torch.device,
        train: list[LabelledSeries],
        val: list[LabelledSeries],
        seed: int,
    ) -> None:
        self.model, self.section, self.device, self.train, self.val = model, section, device, train, val
        self.seed, self.names = seed, stored_inputs(section.all_inputs)
        self.precision = training_precision(device, section.precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=needs_scaling(device, self.precision))
        # The moving average learns nothing, but an optimiser needs parameters.
        learns = any(True for _ in model.parameters())
        self.epochs = section.epochs if learns else 0
        learning = model if learns else torch.nn.Linear(1, 1)
        self.optimizer = make_optimizer([(learning, section.learning_rate)], section.weight_decay, section.adam_eps)
        per_epoch = -(-len(train) // section.batch_series)
        self.schedule = make_schedule(self.optimizer, per_epoch, section.epochs, section.warmup_epochs)

    def trainer(self, checkpoint: Path, key: str) -> Trainer:
        """Return the trainer that runs the epochs."""
        averaged = self.section.average.epochs
        return Trainer(
            self.model, self.optimizer, self.schedule, self.seed, self.epochs, checkpoint, key, self.scaler,
            last=min(averaged, max(1, self.epochs)) if averaged > 1 else 0, save_every_s=SAVE_EVERY_S,
        )  # fmt: skip

    def train_epoch(self, epoch: int, position: Position) -> None:
        """Pass over the training series from the position within the epoch."""
        self.model.train()
        section = self.section
        shuffle = Shuffle(self.seed, epoch, section.regularize, section.shuffle_series)
        batches = train_batches(self.train, self.names, section.batch_series, shuffle)
        for batch in itertools.islice(batches, position.step, None):
            if batch.labels.isnan().all():  # a crop may hold no known label
                position.advance(0.0, 0.0)
                continue
            moved = batch.to(self.device)
            with autocast(self.device, self.precision):
                logits = self.model(moved.sources, moved.lengths)
            loss = weighted_bce(logits.float().flatten(0, 1), moved.labels.flatten(0, 1))
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            step(self.model, self.optimizer, self.schedule, self.scaler, section.max_grad_norm)
            position.advance(loss)

    def validate(self) -> float:
        """Return the weighted log loss on the validation slices."""
        total, count = 0.0, 0.0
        for logits, batch in predict_batches(self.model, self.val, self.device):
            flat = batch.labels.flatten(0, 1)
            total += float(weighted_bce_sum(logits.flatten(0, 1), flat))
            count += float(known_slices(flat))
        return total / count
