"""Trains the slice CNN: batches of slices, augmentation, one epoch, and validation."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ichpipe.common.device import autocast, derive_seed, generator, needs_scaling, training_precision
from ichpipe.common.progress import Counter
from ichpipe.images import augmentation
from ichpipe.images.slice_batch import Batch, draw_cut, sample
from ichpipe.images.slice_dataset import batch_loader, batches_of
from ichpipe.training.distributed import all_sum, average_statistics, share
from ichpipe.training.trainer import Trainer, known_slices, make_optimizer, make_schedule, step, weighted_bce_sum

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from ichpipe.images.slice_dataset import SliceDataset
    from ichpipe.models.slice_cnn import SliceCnn
    from ichpipe.params.schema import SliceParams
    from ichpipe.training.trainer import Position


@dataclass(frozen=True)
class Slices:
    """The labelled slices of both splits; decoded once for all networks where they fit into memory."""

    train: SliceDataset
    val: SliceDataset
    series: list[str]  # the series of each train slice; the slices of one stand together, in slice order
    weights: Sequence[float] = ()  # how often an epoch shows each train slice; empty: once


class SliceFitting:
    """One epoch of training and one pass of validation over single slices."""

    def __init__(
        self,
        cnn: SliceCnn,
        section: SliceParams,
        device: torch.device,
        workers: int,
        slices: Slices,
        rows: Sequence[int],
        seed: int,
    ) -> None:
        self.cnn, self.section, self.device, self.workers = cnn, section, device, workers
        self.slices, self.rows, self.seed = slices, rows, seed
        self.precision = training_precision(device, section.precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=needs_scaling(device, self.precision))
        self.optimizer = make_optimizer([(cnn, section.learning_rate)], section.weight_decay, section.adam_eps)
        self.schedule = make_schedule(self.optimizer, len(self.steps(0)), section.epochs, section.warmup_epochs)

    def trainer(self, checkpoint: Path, key: str) -> Trainer:
        """Return what runs the epochs."""
        section = self.section
        return Trainer(
            self.cnn, self.optimizer, self.schedule, self.seed, section.epochs, checkpoint, key, self.scaler,
            last=1 if section.keep == "last" else 0, ema_decay=section.ema_decay,
        )  # fmt: skip

    def steps(self, epoch: int) -> list[list[Batch]]:
        """Return the batches of each optimiser step of an epoch."""
        section, order, size = self.section, generator(self.seed, "order", epoch), self.section.batch_size
        units: list[Sequence[int]] = [[row] for row in self.rows]  # what is shuffled
        if section.sample_slices is not None:
            series = itertools.groupby(self.rows, lambda row: self.slices.series[row])
            units = [sample(list(rows), section.sample_slices, order) for _, rows in series]
            size = max(1, size // section.sample_slices)
        if self.slices.weights:
            # A weight of 1.3 shows a unit once, and in three of ten epochs a second time.
            chances = torch.rand(len(units), generator=order).tolist()
            often = [int(self.slices.weights[unit[0]] + chance) for unit, chance in zip(units, chances, strict=True)]
            units = [unit for unit, times in zip(units, often, strict=True) for _ in range(times)]
        shuffled = batches_of(torch.randperm(len(units), generator=order).tolist(), size)
        batches = [
            self._batch([row for unit in numbers for row in units[unit]], epoch, number)
            for number, numbers in enumerate(shuffled)
        ]
        return [batches[start : start + section.accumulate] for start in range(0, len(batches), section.accumulate)]

    def train_epoch(self, epoch: int, position: Position) -> None:
        """Pass over the training slices in a new order, from the position within the epoch."""
        self.cnn.train()
        steps = self.steps(epoch)[position.step :]
        loads = [batch.needed_rows for batches in steps for batch in batches if batch.mine]
        pixels = batch_loader(self.slices.train, loads, self.workers)
        position.begin()
        slices = sum(len(batch.rows) for batches in steps for batch in batches)
        counter = Counter(f"epoch {epoch}", slices, "slice", lambda: position.note(self.optimizer))
        for batches in steps:
            of_all = sum(len(batch.rows) for batch in batches)
            losses = [self._backward(batch, next(pixels)[0], of_all) for batch in batches if batch.mine]
            step(self.cnn, self.optimizer, self.schedule, self.scaler, self.section.max_grad_norm)
            mine = sum(len(batch.mine) for batch in batches)
            position.advance(torch.stack(losses).sum() * of_all / mine if losses else 0.0, mine)
            counter.add(of_all)
        counter.close()
        average_statistics(self.cnn)

    def validate(self) -> float:
        """Return the weighted log loss on the validation slices."""
        return self.loss_on(self.slices.val, range(len(self.slices.val)))

    @torch.inference_mode()
    def loss_on(self, dataset: SliceDataset, rows: Sequence[int]) -> float:
        """Return the weighted log loss on rows of a data set, in the precision of `extract` and `predict`."""
        self.cnn.eval()
        total, known = 0.0, 0.0
        for hu, labels, _ in batch_loader(dataset, batches_of(share(rows), 64), self.workers):
            with autocast(self.device, "auto"):
                _, logits = self.cnn(hu.to(self.device))
            total += float(weighted_bce_sum(logits.float(), labels.to(self.device)))
            known += float(known_slices(labels))
        total, known = all_sum(total, known)
        return total / known

    def _batch(self, rows: list[int], epoch: int, number: int) -> Batch:
        n, section = len(rows), self.section
        cut = draw_cut(section.cutmix, n, self.cnn.spec.size_px, derive_seed(self.seed, "cut", epoch, number))

        def draw() -> augmentation.AugmentDraw:
            return augmentation.draw(section.augment, n, generator(self.seed, "augment", epoch, number))

        return Batch(rows, list(share(range(n))), cut, draw)

    def _backward(self, batch: Batch, hu: Tensor, of_all: int) -> Tensor:
        """Add the gradient of this process's part of a batch; return its part of the step's mean loss."""
        labels = batch.labels(self.slices.train.labels)[batch.mine].to(self.device)
        images = batch.images(hu, batch.mine, self.device)  # not under autocast: bfloat16 rounds HU
        with autocast(self.device, self.precision):
            _, logits = self.cnn(images)
        loss = weighted_bce_sum(logits.float(), labels) / of_all
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()
