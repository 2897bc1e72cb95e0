"""Stage two: train one sequence model on the cached embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ichpipe.caches import open_features
from ichpipe.device import choose_device, derive_seed, generator
from ichpipe.errors import ParamsError, TrainingError
from ichpipe.files import digest_of, digest_of_file
from ichpipe.lineage import require_made_from
from ichpipe.losses import weighted_bce, weighted_bce_sum
from ichpipe.models.sequence import SequenceModel, SequenceSpec
from ichpipe.models.weights import save_model
from ichpipe.record import Stopwatch, write_history, write_record
from ichpipe.series import batches, hold_on, read_series
from ichpipe.studies import read_index
from ichpipe.training import Trainer, make_optimizer, make_schedule, step

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from ichpipe.artifacts import Artifacts
    from ichpipe.caches import Features
    from ichpipe.params import Params, SequenceParams
    from ichpipe.series import LabelledSeries


def run(params: Params, artifacts: Artifacts, arm: str, gpu: str = "auto") -> None:
    """Train the arm on the train split, keep what is best on validation, write the model."""
    watch = Stopwatch()
    device = choose_device(gpu)
    section = choose_arm(params, arm)
    index = read_index(artifacts.index)
    split = {"index": digest_of_file(artifacts.index)}
    require_made_from(artifacts.slice_cnn, split, "ichpipe fit-slices")
    features = open_features(params, artifacts, index, section)
    train, val = series_of(features, index, "train"), series_of(features, index, "val")
    torch.manual_seed(derive_seed(section.seed, "weights"))
    model = _build(section, features).to(device)
    held = (hold_on(device, series, section.inputs) for series in (train, val))
    fitting = SequenceFitting(model, section, device, *held)
    made_from = {**split, "embeddings": digest_of(features.made_by)}
    identity = section.model_dump(mode="json")
    key = digest_of({"params": identity, "made_from": made_from, "device": device.type})
    trainer = fitting.trainer(artifacts.resume(f"fit-sequence.{arm}.pt"), key)
    history = trainer.run(fitting.train_epoch, fitting.validate)
    folder = artifacts.sequence(arm)
    save_model(folder, model, made_from)
    write_history(folder, history)
    best = min(history, key=lambda line: line.val_loss)
    facts = {
        "arm": arm,
        "n_train_series": len(train),
        "n_val_series": len(val),
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "best_epoch": best.epoch,
        "val_loss": best.val_loss,
    }
    write_record(folder, stage="fit-sequence", params=identity, device=device, seconds=watch.seconds(), facts=facts)
    trainer.finish()


def _build(section: SequenceParams, features: Features) -> SequenceModel:
    names = set(SequenceSpec.model_fields) & set(type(section).model_fields)
    chosen = {name: getattr(section, name) for name in names}
    plain = features.plain
    components = plain.principal_components if "pca" in section.inputs else None
    pca = len(components.components) if components else 0
    model = SequenceModel(SequenceSpec(embedding_dim=plain.embedding_dim, pca=pca, **chosen))
    if components:
        model.set_principal_components(torch.from_numpy(components.mean), torch.from_numpy(components.components))
    return model


def choose_arm(params: Params, arm: str) -> SequenceParams:
    """Return the section of an arm; an unknown one is an error that lists the arms."""
    section = params.sequence.get(arm)
    if section is None:
        raise ParamsError(f"--arm {arm}: params have no sequence.{arm}; arms are {', '.join(params.sequence)}")
    return section


def series_of(features: Features, index: pd.DataFrame, split: str) -> list[LabelledSeries]:
    """Return the series of one split that have a known label."""
    found = read_series(features, index[index["split"] == split])
    known = [series for series in found if not series.labels.isnan().any(dim=1).all()]
    if not known:
        raise TrainingError(
            f"the {split} split holds no series with labels; check prepare.labels and the split's fraction"
        )
    return known


class SequenceFitting:
    """One epoch of training and one pass of validation over cached sequences."""

    def __init__(
        self,
        model: SequenceModel,
        section: SequenceParams,
        device: torch.device,
        train: list[LabelledSeries],
        val: list[LabelledSeries],
    ) -> None:
        self.model, self.section, self.device, self.train, self.val = model, section, device, train, val
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.optimizer = make_optimizer([(model, section.learning_rate)], section.weight_decay)
        per_epoch = -(-len(train) // section.batch_series)
        self.schedule = make_schedule(self.optimizer, per_epoch, section.epochs, section.warmup_epochs)

    def trainer(self, checkpoint: Path, key: str) -> Trainer:
        """Return what runs the epochs."""
        section = self.section
        return Trainer(self.model, self.optimizer, self.schedule, section.seed, section.epochs, checkpoint, key)

    def train_epoch(self, epoch: int) -> float:
        """Pass once over the training series; return the mean loss per batch."""
        self.model.train()
        losses = []
        order = generator(self.section.seed, "order", epoch)
        section = self.section
        found = batches(self.train, section.inputs, section.batch_series, order, section.shuffle_series)
        for features, labels, lengths in found:
            logits = self.model(features.to(self.device), lengths)
            loss = weighted_bce(logits.flatten(0, 1), labels.to(self.device).flatten(0, 1))
            loss.backward()  # type: ignore[no-untyped-call]
            step(self.model, self.optimizer, self.schedule, self.scaler, self.section.max_grad_norm)
            losses.append(float(loss.detach()))
        return sum(losses) / len(losses)

    @torch.inference_mode()
    def validate(self) -> float:
        """Return the weighted log loss on the validation slices."""
        self.model.eval()
        total, count = 0.0, 0
        for features, labels, lengths in batches(self.val, self.section.inputs, 32, None):
            flat = labels.to(self.device).flatten(0, 1)
            total += float(weighted_bce_sum(self.model(features.to(self.device), lengths).flatten(0, 1), flat))
            count += int((~flat.isnan().any(dim=1)).sum())
        return total / count
