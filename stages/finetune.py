"""Step three: join slice CNN and sequence model, unfreeze both, train end to end on whole series."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ichpipe import augment
from ichpipe.artifacts import MODEL_FILE
from ichpipe.caches import made_by
from ichpipe.classes import CLASSES
from ichpipe.device import autocast, choose_device, derive_seed, generator, needs_scaling
from ichpipe.embedding import classify_series, to_probabilities
from ichpipe.errors import TrainingError, UnreadableDicomError
from ichpipe.feeding import load_slices
from ichpipe.files import digest_of, digest_of_file
from ichpipe.lineage import is_fitted, require_made_from
from ichpipe.losses import weighted_bce, weighted_bce_sum
from ichpipe.models.end_to_end import EndToEnd, backward_in_chunks
from ichpipe.models.header import SPACING
from ichpipe.models.weights import load_sequence, load_slice_cnn, save_model
from ichpipe.predictions import held_out, make_table, model_mark, write_predictions
from ichpipe.progress import track
from ichpipe.record import Stopwatch, write_history, write_record
from ichpipe.studies import read_index
from ichpipe.training import Trainer, make_optimizer, make_schedule, step

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray
    from torch import Tensor

    from ichpipe.artifacts import Artifacts
    from ichpipe.params import FinetuneParams, Params


@dataclass(frozen=True)
class ImageSeries:
    """One series as files and labels (T, 6), in slice order."""

    paths: list[str]
    labels: Tensor
    position_mm: Tensor  # (T,)


def run(params: Params, artifacts: Artifacts, gpu: str = "auto") -> None:
    """Start from stage one's and stage two's weights; never end worse on validation than they are."""
    watch = Stopwatch()
    device = choose_device(gpu)
    section = params.finetune
    index = read_index(artifacts.index)
    cnn, sequence = load_slice_cnn(artifacts.slice_cnn), load_sequence(artifacts.sequence(section.arm))
    embeddings = digest_of(made_by(params, artifacts, index, params.sequence[section.arm]))
    command = f"ichpipe extract, then: ichpipe fit-sequence --arm {section.arm}"
    split = {"index": digest_of_file(artifacts.index)}
    require_made_from(artifacts.slice_cnn, split, "ichpipe fit-slices")
    require_made_from(artifacts.sequence(section.arm), {**split, "embeddings": embeddings}, command)
    model = EndToEnd(cnn, sequence).to(device)
    fitting = EndToEndFitting(model, section, device, image_series(index, "train"), image_series(index, "val"))
    made_from = _made_from(artifacts, section.arm)
    identity = section.model_dump(mode="json")
    key = digest_of({"params": identity, "made_from": made_from, "device": device.type})
    trainer = fitting.trainer(artifacts.resume("finetune.pt"), key)
    history = trainer.run(fitting.train_epoch, fitting.validate, compare_with_start=True)
    save_model(artifacts.finetuned, model, made_from | _spacing(index))
    rows = held_out(index)
    table = make_table(rows, predict_held_out(model, rows, device))
    write_predictions(table, artifacts.finetuned, model_mark(artifacts.finetuned))
    write_history(artifacts.finetuned, history)
    best = min(history, key=lambda line: line.val_loss)
    facts = {"best_epoch": best.epoch, "val_loss_before": history[0].val_loss, "val_loss": best.val_loss}
    write_record(
        artifacts.finetuned, stage="finetune", params=identity, device=device, seconds=watch.seconds(), facts=facts
    )
    trainer.finish()


def is_done(params: Params, artifacts: Artifacts) -> bool:
    """Say whether the model that `run` would train is there already, with its predictions."""
    section = params.finetune
    return is_fitted(artifacts.finetuned, section.model_dump(mode="json"), _made_from(artifacts, section.arm))


def _made_from(artifacts: Artifacts, arm: str) -> dict[str, str]:
    return {
        "index": digest_of_file(artifacts.index),
        "slice_cnn": digest_of_file(artifacts.slice_cnn / MODEL_FILE),
        "sequence": digest_of_file(artifacts.sequence(arm) / MODEL_FILE),
    }


def _spacing(index: pd.DataFrame) -> dict[str, str]:
    """Return the median distance of neighbouring train slices, mm, for those who predict on thinner series."""
    train = index[(index["split"] == "train") & (index["slice_index"] > 0)]
    spacing = train["spacing_mm"].median()
    return {} if np.isnan(spacing) else {SPACING: f"{spacing:.4g}"}


def image_series(index: pd.DataFrame, split: str) -> list[ImageSeries]:
    """Return the series of one split that have a known label, as files in slice order."""
    chosen = index[index["split"] == split]
    found = [_image_series(group) for _, group in chosen.groupby("series_uid", sort=False)]
    known = [series for series in found if not series.labels.isnan().any(dim=1).all()]
    if not known:
        raise TrainingError(
            f"the {split} split holds no series with labels; check prepare.labels and the split's fraction"
        )
    return known


def _image_series(rows: pd.DataFrame) -> ImageSeries:
    labels, places = (rows[names].to_numpy(np.float32, copy=True) for names in (list(CLASSES), "position_mm"))
    return ImageSeries(rows["path"].tolist(), torch.from_numpy(labels), torch.from_numpy(places))


def predict_held_out(model: EndToEnd, rows: pd.DataFrame, device: torch.device) -> NDArray[np.float64]:
    """Return probabilities (rows, 6) from the images; rows of one series stand in slice order."""
    result = np.full((len(rows), len(CLASSES)), np.nan)
    groups = rows.groupby("series_uid", sort=False).indices
    for chosen in track(groups.values(), "predict", len(groups), "series"):
        series = _image_series(rows.iloc[chosen])
        logits, bad = classify_series(model, series.paths, series.position_mm.tolist(), device)
        if bad:
            raise UnreadableDicomError(bad[0][1])
        result[chosen] = to_probabilities(logits)
    return result


class EndToEndFitting:
    """One epoch of training and one pass of validation over whole series of images."""

    def __init__(
        self,
        model: EndToEnd,
        section: FinetuneParams,
        device: torch.device,
        train: list[ImageSeries],
        val: list[ImageSeries],
    ) -> None:
        self.model, self.section, self.device, self.train, self.val = model, section, device, train, val
        self.context = functools.partial(autocast, device, section.precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=needs_scaling(device, section.precision))
        rates = [(model.cnn, section.learning_rate_cnn), (model.sequence, section.learning_rate_sequence)]
        self.optimizer = make_optimizer(rates, section.weight_decay)
        per_epoch = -(-len(train) // section.batch_series)
        self.schedule = make_schedule(self.optimizer, per_epoch, section.epochs, section.warmup_epochs)

    def trainer(self, checkpoint: Path, key: str) -> Trainer:
        """Return what runs the epochs."""
        section = self.section
        return Trainer(
            self.model, self.optimizer, self.schedule, section.seed, section.epochs, checkpoint, key, self.scaler
        )

    def train_epoch(self, epoch: int) -> float:
        """Pass once over the training series; return the mean loss per series."""
        self.model.train()
        order = torch.randperm(len(self.train), generator=generator(self.section.seed, "order", epoch)).tolist()
        size, losses = self.section.batch_series, []
        starts = range(0, len(order), size)
        for start in track(starts, f"epoch {epoch}", len(starts)):
            members = order[start : start + size]
            losses += [self._backward(number, epoch, len(members)) for number in members]
            step(self.model, self.optimizer, self.schedule, self.scaler, self.section.max_grad_norm)
        return sum(losses) / len(losses)

    @torch.inference_mode()
    def validate(self) -> float:
        """Return the weighted log loss on the validation slices, in the precision of `evaluate` and `predict`."""
        self.model.eval()
        total, count = 0.0, 0
        for series in self.val:
            places, chunk = series.position_mm.tolist(), self.section.chunk_slices
            logits, bad = classify_series(self.model, series.paths, places, self.device, chunk)
            if bad:
                raise UnreadableDicomError(bad[0][1])
            total += float(weighted_bce_sum(logits, series.labels.to(self.device)))
            count += int((~series.labels.isnan().any(dim=1)).sum())
        return total / count

    def _backward(self, number: int, epoch: int, members: int) -> float:
        series, size = self.train[number], self.section.chunk_slices
        seed = derive_seed(self.section.seed, "series", epoch, number)
        drawn = augment.draw(self.section.augment, len(series.paths), generator(seed), together=True)
        rows = [slice(start, start + size) for start in range(0, len(series.paths), size)]
        chunks = [functools.partial(self._chunk, series, row, drawn) for row in rows]
        labels = series.labels.to(self.device)
        return backward_in_chunks(
            self.model,
            chunks,
            series.position_mm.to(self.device),
            lambda logits: weighted_bce(logits.float(), labels),
            context=self.context,
            seed=seed,
            scale=float(self.scaler.get_scale()) / members,
        )

    def _chunk(self, series: ImageSeries, rows: slice, drawn: augment.AugmentDraw) -> Tensor:
        hu = load_slices(series.paths[rows], self.model.cnn.spec.size_px).to(self.device)
        return augment.apply(hu, drawn.part(rows))
