"""Stage two: train one arm on the cached embeddings with each of its seeds, and predict the held-out slices."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ichpipe.common.errors import ParamsError, TrainingError, did_you_mean
from ichpipe.common.files import digest_of, digest_of_file
from ichpipe.stages.options import complete_arm, gpu_option

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    import torch

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.features.generations import Features
    from ichpipe.features.sequence_dataset import LabelledSeries
    from ichpipe.models.sequence import AnySequence
    from ichpipe.params.schema import Params, SequenceParams
    from ichpipe.stages.options import Settings
    from ichpipe.training.trainer import Epoch, Weights

log = logging.getLogger("ichpipe")


@click.command("fit-sequence")
@gpu_option
@click.option("--arm", shell_complete=complete_arm, help="One arm of params: sequence; all of them if not given.")
@click.pass_obj
def command(settings: Settings, gpu: str, arm: str | None) -> None:
    """Stage two: train a sequence model on the cached embeddings.

    \b
    Example:
      ichpipe --set sequence.paper.hidden=256 fit-sequence --arm paper
    """
    params = settings.params()
    for name in [arm] if arm else list(params.sequence):
        choose_arm(params, name)
        with settings.lock_stage(f"fit-sequence.{name}", f"sequence/{name}"):
            run(params, settings.artifacts(), name, gpu)


def run(params: Params, artifacts: Artifacts, arm: str, gpu: str = "auto") -> None:
    """Train the arm's seeds on the train split and write the arm's model and every seed's predictions.

    Checkpoints stay until all is written: an interrupted arm trains no finished seed again.
    """
    import pandas as pd

    from ichpipe.common.device import choose_device
    from ichpipe.features.generations import open_features
    from ichpipe.index.slice_index import read_index
    from ichpipe.models.header import require_made_from
    from ichpipe.models.weights import save_model
    from ichpipe.scoring.heldout_predictions import model_mark, write_predictions
    from ichpipe.training.run_record import start_watch, write_history, write_record

    watch = start_watch()
    device, section = choose_device(gpu), choose_arm(params, arm)
    index = read_index(artifacts.index)
    split = {"index": digest_of_file(artifacts.index)}
    require_made_from(artifacts.slice_cnn, split, "ichpipe fit-slices")
    features = open_features(params, artifacts, index, section)
    data = collect_data(features, index, section, device)
    made_from = {**split, "embeddings": digest_of(features.made_by)}
    params_read = section.model_dump(mode="json")
    identity = {name: value for name, value in params_read.items() if name not in ("seed", "seeds")}  # decides weights
    key = digest_of({"params": identity, "made_from": made_from, "device": device.type})
    seeds = range(section.seed, section.seed + section.seeds)
    checkpoints = [artifacts.resume(f"fit-sequence.{arm}.seed-{seed}.pt") for seed in seeds]
    fitted = [
        train_seed(section, features, data, device, seed, checkpoint, key)
        for seed, checkpoint in zip(seeds, checkpoints, strict=True)
    ]
    members = [weights for kept, *_ in (fitted if section.average.seeds else fitted[:1]) for weights in kept]
    folder = artifacts.sequence(arm)
    save_model(folder, _assemble(section, features, members), made_from)
    write_predictions(pd.concat([table for _, _, table, _ in fitted], ignore_index=True), folder, model_mark(folder))
    write_history(folder, fitted[0][1])
    facts_of_seeds = [facts for *_, facts in fitted]
    facts = {
        "arm": arm,
        "store": features.store,
        "n_train_series": len(data.train),
        "n_val_series": len(data.val),
        "n_parameters": sum(parameter.numel() for parameter in build_model(section, features).parameters()),
        "best_epoch": facts_of_seeds[0]["best_epoch"],
        "val_loss": facts_of_seeds[0]["val_loss"],
        "seeds": facts_of_seeds,
    }
    write_record(folder, stage="fit-sequence", params=params_read, device=device, seconds=watch(), facts=facts)
    for checkpoint in checkpoints:
        checkpoint.unlink(missing_ok=True)


def is_done(params: Params, artifacts: Artifacts, arm: str) -> bool:
    """Say whether the arm that `run` would train exists, with its predictions."""
    from ichpipe.features.generations import describe_inputs
    from ichpipe.index.slice_index import read_index
    from ichpipe.models.header import is_fitted

    section, index = choose_arm(params, arm), read_index(artifacts.index)
    made_from = {
        "index": digest_of_file(artifacts.index),
        "embeddings": digest_of(describe_inputs(params, artifacts, index, section)),
    }
    return is_fitted(artifacts.sequence(arm), section.model_dump(mode="json"), made_from)


def choose_arm(params: Params, arm: str) -> SequenceParams:
    """Return the section of an arm; an unknown one is an error that lists the arms."""
    section = params.sequence.get(arm)
    if section is None:
        close = did_you_mean(arm, params.sequence)
        raise ParamsError(f"--arm {arm}: params have no sequence.{arm}; arms are {', '.join(params.sequence)}{close}")
    return section


class Data(NamedTuple):
    """What all seeds of an arm share."""

    train: list[LabelledSeries]
    val: list[LabelledSeries]
    held_out: pd.DataFrame  # index rows of validation and test
    predicted: list[LabelledSeries]  # the series of these rows


def collect_data(features: Features, index: pd.DataFrame, section: SequenceParams, device: torch.device) -> Data:
    """Join the embeddings with the index; train on series with a known label; on a GPU hold as much as fits."""
    from ichpipe.features.sequence_dataset import collect_series, load_to_device
    from ichpipe.models.sequence import stored_inputs
    from ichpipe.scoring.heldout_predictions import held_out

    parts = []
    for split in ("train", "val"):
        every = collect_series(features, index[(index["split"] == split) & ~index["slices_only"]])
        whole = [series for series in every if len(series) >= section.min_slices]
        labelled = [series for series in whole if not series.labels.isnan().all()]
        if not labelled:
            raise TrainingError(
                f"the {split} split holds no series of {section.min_slices} slices with labels; check prepare.labels, "
                "the split's fraction and sequence.min_slices"
            )
        if len(whole) < len(every):
            few = f"{len(every) - len(whole)} of {len(every)} series have fewer than {section.min_slices} slices"
            log.info("%s split: %s and are left out", split, few)
        parts.append(load_to_device(device, labelled, stored_inputs(section.all_inputs)))
    (train, val), rows = parts, held_out(index)
    return Data(train, val, rows, collect_series(features, rows))


def train_seed(
    section: SequenceParams, features: Features, data: Data, device: torch.device, seed: int, checkpoint: Path, key: str
) -> tuple[list[Weights], list[Epoch], pd.DataFrame, dict[str, Any]]:
    """Train one network with one seed, or go on from its checkpoint, and predict the held-out rows.

    Returns the weights of the best epoch or of the last ones, the history, the predictions, and facts for the record.
    """
    import torch

    from ichpipe.common.device import derive_seed
    from ichpipe.features.sequence_dataset import predict_rows
    from ichpipe.scoring.heldout_predictions import make_table
    from ichpipe.training.run_record import start_watch
    from ichpipe.training.sequence_trainer import SequenceFitting

    watch = start_watch()
    torch.manual_seed(derive_seed(seed, "weights"))
    model = build_model(section, features).to(device)
    fitting = SequenceFitting(model, section, device, data.train, data.val, seed)
    trainer = fitting.trainer(checkpoint, key)
    history = trainer.run(fitting.train_epoch, fitting.validate)
    seconds = watch()
    trained = _assemble(section, features, trainer.kept).to(device)
    probabilities = predict_rows(trained, data.predicted, len(data.held_out), device)
    log.info("seed %d: %.1f s", seed, seconds)
    best = min(history, key=lambda line: line.val_loss)
    facts = {"seed": seed, "best_epoch": best.epoch, "val_loss": best.val_loss, "seconds": seconds}
    return trainer.kept, history, make_table(data.held_out, probabilities).assign(seed=seed), facts


def build_model(section: SequenceParams, features: Features) -> AnySequence:
    """Build one network of an arm, to be trained."""
    import torch

    from ichpipe.models.header import SequenceSpec
    from ichpipe.models.sequence import SequenceModel, build_sequence

    shared = set(SequenceSpec.model_fields) & set(type(section).model_fields)
    fields = {name: getattr(section, name) for name in shared}
    plain = features.plain
    components = plain.principal_components if "pca" in section.all_inputs else None
    pca = len(components.components) if components else 0
    spec = SequenceSpec(embedding_dim=plain.embedding_dim, pca=pca, mirrored=section.average.mirrored, **fields)
    model = build_sequence(spec)
    if isinstance(model, SequenceModel) and components:
        model.set_principal_components(torch.from_numpy(components.mean), torch.from_numpy(components.components))
    return model


def _assemble(section: SequenceParams, features: Features, weights: list[Weights]) -> AnySequence:
    """Build the predicting model: one network, or the mean of several."""
    from ichpipe.models.sequence import SequenceEnsemble

    members = [build_model(section, features) for _ in weights]
    for member, state in zip(members, weights, strict=True):
        member.load_state_dict(state)
    average = section.average
    if len(members) == 1 and not average.reversed and not average.smoothed:
        return members[0]
    spec = members[0].spec.model_copy(update={"reversed": average.reversed, "smoothed": average.smoothed})
    return SequenceEnsemble(spec, members)  # type: ignore[arg-type]
