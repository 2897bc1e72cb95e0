"""Trains slice CNN and sequence model together on whole series of images, or samples of them."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ichpipe.common.classes import CLASSES
from ichpipe.common.device import autocast, derive_seed, generator, needs_scaling, training_precision
from ichpipe.common.errors import TrainingError, UnreadableDicomError
from ichpipe.common.progress import Counter
from ichpipe.features.embedder import classify_series
from ichpipe.images import augmentation
from ichpipe.images.slice_batch import Batch, draw_cut, sample
from ichpipe.images.slice_dataset import SliceDataset, batch_loader
from ichpipe.index.slice_index import neighbour_rows, slice_files
from ichpipe.models.end_to_end import backward_in_chunks
from ichpipe.models.slice_cnn import parts_of
from ichpipe.training.distributed import all_sum, share
from ichpipe.training.norm_statistics import NormStatistics
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
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import pandas as pd
    from torch import Tensor

    from ichpipe.models.end_to_end import EndToEnd
    from ichpipe.params.schema import FinetuneParams
    from ichpipe.training.trainer import Position


@dataclass(frozen=True)
class ImageSeries:
    """One series as files and labels (T, 6), in slice order."""

    paths: list[str]
    labels: Tensor  # NaN where unknown
    position_mm: Tensor  # (T,)


@dataclass(frozen=True)
class SeriesBatch(Batch):
    """The slices of some series, or of samples of them, as one batch of images."""

    members: list[tuple[list[int], Tensor, int]]  # series of this process: numbers within the batch, mm, seed
    n_series: int  # of all processes


def image_series(index: pd.DataFrame, split: str, min_slices: int = 1) -> list[ImageSeries]:
    """Return the series of one split that are sequences and have a known label, as files in slice order."""
    rows = index[(index["split"] == split) & ~index["slices_only"]]
    series = [one_series(part) for _, part in rows.groupby("series_uid", sort=False) if len(part) >= min_slices]
    labelled = [each for each in series if not each.labels.isnan().all()]
    if not labelled:
        raise TrainingError(
            f"the {split} split holds no series of {min_slices} slices with labels; check prepare.labels, the split's "
            "fraction and sequence.min_slices"
        )
    return labelled


def one_series(rows: pd.DataFrame) -> ImageSeries:
    """Return the index rows of one series as files and labels."""
    labels, position_mm = (
        torch.from_numpy(rows[names].to_numpy(np.float32, copy=True)) for names in (list(CLASSES), "position_mm")
    )
    return ImageSeries(rows["path"].tolist(), labels, position_mm)


class EndToEndFitting:
    """One epoch of training and one pass of validation over series of images."""

    def __init__(
        self,
        model: EndToEnd,
        section: FinetuneParams,
        device: torch.device,
        train: list[ImageSeries],
        val: list[ImageSeries],
        workers: int = 0,
        read: Callable[..., Tensor] | None = None,
    ) -> None:
        self.model, self.section, self.device, self.train, self.val = model, section, device, train, val
        self.workers = workers
        neighbours = model.cnn.spec.neighbours
        rows = [neighbour_rows(series.position_mm.numpy(), neighbours) for series in train]
        paths = [files for series, near in zip(train, rows, strict=True) for files in slice_files(series.paths, near)]
        labels = torch.cat([series.labels for series in train])
        self.slices = SliceDataset(paths, labels.numpy(), model.cnn.spec.framing, read)
        self.starts = np.cumsum([0, *(len(series.paths) for series in train)]).tolist()
        precision = training_precision(device, section.precision)
        self.context = functools.partial(autocast, device, precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=needs_scaling(device, precision))
        rates = [*self._cnn_rates(), (model.sequence, section.learning_rate_sequence)]
        self.optimizer = make_optimizer(rates, section.weight_decay, section.adam_eps)
        self.schedule = make_schedule(self.optimizer, len(self.steps(0)), section.epochs, section.warmup_epochs)
        self.statistics = NormStatistics(model.cnn, section.norm_momentum)

    def trainer(self, checkpoint: Path, key: str) -> Trainer:
        """Return what runs the epochs."""
        section = self.section
        return Trainer(
            self.model, self.optimizer, self.schedule, section.seed, section.epochs, checkpoint, key, self.scaler,
            last=1 if section.keep == "last" else 0, ema_decay=section.ema_decay,
        )  # fmt: skip

    def unfreeze(self, epoch: int) -> None:
        """Let as many of the CNN's last parts learn as ``unfreeze_epochs`` allows in this epoch."""
        parts, every = parts_of(self.model.cnn), self.section.unfreeze_epochs
        learning = len(parts) if every == 0 else 1 + (epoch - 1) // every
        if self.section.learning_rate_cnn == 0:
            learning = 0
        for number, parameters in enumerate(reversed(parts)):
            for parameter in parameters:
                parameter.requires_grad_(number < learning)

    def steps(self, epoch: int) -> list[list[SeriesBatch]]:
        """Return the batches of each optimiser step of an epoch."""
        section = self.section
        order = torch.randperm(len(self.train), generator=generator(section.seed, "order", epoch)).tolist()
        spans = itertools.pairwise([*self._batch_starts(order), len(order)])
        batches = [self._batch(order[start:end], epoch, start) for start, end in spans]
        return [batches[start : start + section.accumulate] for start in range(0, len(batches), section.accumulate)]

    def train_epoch(self, epoch: int, position: Position) -> None:
        """Pass over the training series in a new order, from the position within the epoch."""
        self.model.train()
        self.unfreeze(epoch)
        steps = self.steps(epoch)[position.step :]
        loads = [batch.needed_rows for batches in steps for batch in batches if batch.members]
        pixels = batch_loader(self.slices, loads, self.workers)
        position.begin()
        slices = sum(len(batch.rows) for batches in steps for batch in batches)
        counter = Counter(f"epoch {epoch}", slices, "slice", lambda: position.note(self.optimizer))
        for batches in steps:
            of_all = sum(self.weight(batch) for batch in batches)
            losses = []
            with self.statistics.collected():
                for batch in batches:
                    losses += self.backward(batch, next(pixels)[0], of_all) if batch.members else []
            self.statistics.update()
            step(self.model, self.optimizer, self.schedule, self.scaler, self.section.max_grad_norm)
            weight = sum(weight for _, weight in losses)
            position.advance(sum(loss * weight for loss, weight in losses) / weight if losses else 0.0, weight)
            counter.add(sum(len(batch.rows) for batch in batches))
        counter.close()

    def weight(self, batch: SeriesBatch) -> float:
        """Return what a batch weighs in its step: its series or, with ``batch_slices``, its slices by known labels."""
        if self.section.batch_slices is None:
            return batch.n_series
        return float(known_slices(batch.labels(self.slices.labels)))

    def backward(self, batch: SeriesBatch, hu: Tensor, of_all: float) -> list[tuple[float, float]]:
        """Add the gradient of each series of this process; return their losses and weights.

        ``of_all`` is the `weight` of all batches of the step.
        """
        batch_labels, size, losses = batch.labels(self.slices.labels), self.section.chunk_slices, []
        loss_scale = float(self.scaler.scale(torch.ones((), device=self.device)))  # `get_scale` starts no scaler
        for rows, position_mm, seed in batch.members:
            labels = batch_labels[rows].to(self.device)
            if labels.isnan().all():  # a sample may hold no known label
                continue
            weight = 1.0 if self.section.batch_slices is None else float(known_slices(labels))
            parts = [rows[start : start + size] for start in range(0, len(rows), size)]
            loss = backward_in_chunks(
                self.model,
                [functools.partial(batch.images, hu, part, self.device) for part in parts],
                position_mm.to(self.device),
                functools.partial(weighted_bce, labels=labels),
                context=self.context,
                seed=seed,
                scale=loss_scale * weight / of_all,
                slice_weight=self.section.slice_loss,
            )
            losses.append((loss, weight))
        return losses

    @torch.inference_mode()
    def validate(self) -> float:
        """Return the weighted log loss on the validation slices, in the precision of `evaluate` and `predict`."""
        self.model.eval()
        total, labelled = 0.0, 0.0
        for series in share(self.val):
            position_mm, chunk = series.position_mm.tolist(), self.section.chunk_slices
            logits, bad = classify_series(self.model, series.paths, position_mm, self.device, chunk)
            if bad:
                raise UnreadableDicomError(bad[0][1])
            total += float(weighted_bce_sum(logits, series.labels.to(self.device)))
            labelled += float(known_slices(series.labels))
        total, count = all_sum(total, labelled)
        return total / count

    def _cnn_rates(self) -> list[tuple[torch.nn.Module, float]]:
        """Return the CNN, or with ``layer_decay`` its parts from the last to the first, with their learning rates."""
        cnn, section = self.model.cnn, self.section
        if section.layer_decay == 1:  # the groups of earlier checkpoints
            return [(cnn, section.learning_rate_cnn)]
        return [
            (torch.nn.ParameterList(part), section.learning_rate_cnn * section.layer_decay**distance)
            for distance, part in enumerate(reversed(parts_of(cnn)))
        ]

    def _batch_starts(self, order: Sequence[int]) -> Sequence[int]:
        """Return where each batch begins in the order of the series.

        With ``batch_slices`` the epoch's slices are cut into equal parts. A series goes where its middle slice lies.
        """
        section = self.section
        if section.batch_slices is None:
            return range(0, len(order), section.batch_series)
        lengths = np.array([len(self.train[number].paths) for number in order])
        sizes = np.minimum(lengths, section.sample_slices or lengths)
        ends, total = np.cumsum(sizes), int(sizes.sum())
        batches = max(1, round(total / section.batch_slices))
        part = (2 * ends - sizes) * batches // (2 * total)
        return np.flatnonzero(np.diff(part, prepend=-1)).tolist()

    def _batch(self, numbers: Sequence[int], epoch: int, start: int) -> SeriesBatch:
        section, train = self.section, [self.train[number] for number in numbers]
        seeds = [derive_seed(section.seed, "series", epoch, number) for number in numbers]
        samples = [
            sample(range(len(series.paths)), section.sample_slices, generator(seed, "sample"))
            for series, seed in zip(train, seeds, strict=True)
        ]
        ends = np.cumsum([0, *(len(rows) for rows in samples)]).tolist()
        spans = [list(range(start, end)) for start, end in itertools.pairwise(ends)]
        members = [(spans[n], train[n].position_mm[list(samples[n])], seeds[n]) for n in share(range(len(samples)))]
        cut = draw_cut(
            section.cutmix, ends[-1], self.slices.framing.size_px, derive_seed(section.seed, "cut", epoch, start)
        )

        def draw() -> augmentation.AugmentDraw:
            draws = [
                augmentation.draw(section.augment, len(rows), generator(seed), together=section.augment_together)
                for rows, seed in zip(samples, seeds, strict=True)
            ]
            return augmentation.AugmentDraw.joined(draws)

        all_rows = [self.starts[number] + row for number, rows in zip(numbers, samples, strict=True) for row in rows]
        own_rows = [row for rows, _, _ in members for row in rows]
        return SeriesBatch(all_rows, own_rows, cut, draw, members, len(samples))
