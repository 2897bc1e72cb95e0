"""Trains the slice CNN: batches of slices, augmentation, one epoch, and validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ichpipe.common.device import autocast, derive_seed, generator, needs_scaling
from ichpipe.common.progress import Counter
from ichpipe.images import augmentation
from ichpipe.images.cutmix import draw_cut
from ichpipe.images.slice_batch import Batch, sample
from ichpipe.images.slice_dataset import batch_loader, batches_of, slice_loader
from ichpipe.training.distributed import all_sum, average_statistics, share
from ichpipe.training.losses import weighted_bce_sum
from ichpipe.training.trainer import Trainer, make_optimizer, make_schedule, step

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
        self.scaler = torch.amp.GradScaler(device.type, enabled=needs_scaling(device, section.precision))
        self.optimizer = make_optimizer([(cnn, section.learning_rate)], section.weight_decay, section.adam_eps)
        self.schedule = make_schedule(self.optimizer, len(self._steps(0)), section.epochs, section.warmup_epochs)

    def trainer(self, checkpoint: Path, key: str) -> Trainer:
        """Return what runs the epochs."""
        section = self.section
        return Trainer(
            self.cnn, self.optimizer, self.schedule, self.seed, section.epochs, checkpoint, key, self.scaler,
            ema_decay=section.ema_decay,
        )  # fmt: skip

    def train_epoch(self, epoch: int, position: Position) -> None:
        """Pass over the training slices in a new order, from where the epoch stands."""
        self.cnn.train()
        steps = self._steps(epoch)[position.step :]
        loads = [batch.needed_rows for batches in steps for batch in batches if batch.mine]
        pixels = iter(batch_loader(self.slices.train, loads, self.workers))
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
        total, mine = 0.0, share(rows)
        for hu, labels, _ in slice_loader(dataset, 64, mine, self.workers):
            with autocast(self.device, "auto"):
                _, logits = self.cnn(hu.to(self.device))
            total += float(weighted_bce_sum(logits.float(), labels.to(self.device)))
        return all_sum(total)[0] / len(rows)

    def _backward(self, batch: Batch, hu: Tensor, of_all: int) -> Tensor:
        """Add the gradient of this process's part of a batch; return its part of the step's mean loss."""
        labels = batch.labels(self.slices.train.labels)[batch.mine].to(self.device)
        images = batch.images(hu, batch.mine, self.device)  # not under autocast: bfloat16 has no place for HU
        with autocast(self.device, self.section.precision):
            _, logits = self.cnn(images)
        loss = weighted_bce_sum(logits.float(), labels) / of_all
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _steps(self, epoch: int) -> list[list[Batch]]:
        """Return the batches of each optimiser step of an epoch."""
        batches = [self._batch(rows, epoch, number) for number, rows in enumerate(self._batches(epoch))]
        size = self.section.accumulate
        return [batches[start : start + size] for start in range(0, len(batches), size)]

    def _batch(self, rows: list[int], epoch: int, number: int) -> Batch:
        n, section = len(rows), self.section
        seeds = [derive_seed(self.seed, purpose, epoch, number) for purpose in ("augment", "cut")]
        return Batch(
            rows,
            list(share(range(n))),
            lambda: augmentation.draw(section.augment, n, torch.Generator().manual_seed(seeds[0])),
            lambda: draw_cut(section.cutmix, n, self.cnn.spec.size_px, seeds[1]),
        )

    def _batches(self, epoch: int) -> list[list[int]]:
        section, order = self.section, generator(self.seed, "order", epoch)
        if section.sample_slices is None:
            mixed = torch.randperm(len(self.rows), generator=order).tolist()
            return batches_of([self.rows[number] for number in mixed], section.batch_size)
        samples = [sample(rows, section.sample_slices, order) for rows in self._of_series()]
        mixed = torch.randperm(len(samples), generator=order).tolist()
        size = max(1, section.batch_size // section.sample_slices)
        groups = batches_of(mixed, size)
        return [[row for number in group for row in samples[number]] for group in groups]

    def _of_series(self) -> list[list[int]]:
        groups: dict[str, list[int]] = {}
        for row in self.rows:
            groups.setdefault(self.slices.series[row], []).append(row)
        return list(groups.values())
