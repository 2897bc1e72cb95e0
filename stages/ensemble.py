"""``ichpipe ensemble``: the networks that a run has trained, as one model: the mean of their probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ichpipe.common.artifacts import RECORD_FILE
from ichpipe.common.errors import IchpipeError, ParamsError
from ichpipe.common.files import digest_of_file, read_json
from ichpipe.stages.options import gpu_option

if TYPE_CHECKING:
    from ichpipe.common.artifacts import Artifacts
    from ichpipe.models.end_to_end import EndToEnd
    from ichpipe.models.header import Member
    from ichpipe.params.schema import Params
    from ichpipe.stages.options import Settings


@click.command("ensemble")
@gpu_option
@click.pass_obj
def command(settings: Settings, gpu: str) -> str:
    """Join the trained networks into one model: the mean of their probabilities.

    Its networks are the fine-tuned model, and the slice CNN of each fold with the same sequence model; with
    finetune.out_of_fold the fine-tuned networks of the folds. Nothing is trained. With predict.ensemble, finetune does
    this at its end, and predict, explain and export take the result.

    \b
    Example:
      ichpipe --set predict.mirror=true ensemble
    """
    params = settings.params()
    with settings.lock_stage("ensemble", "ensemble"):
        return run(params, settings.artifacts(), gpu)


def run(params: Params, artifacts: Artifacts, gpu: str = "auto") -> str:
    """Write the ensemble and its predictions of the held-out slices; return what it is and costs.

    Raises MissingFileError or WeightsError for a network that is absent, or may have seen a held-out patient.
    """
    from ichpipe.common.device import choose_device
    from ichpipe.features.embedder import predict_held_out
    from ichpipe.index.slice_index import read_index
    from ichpipe.models.end_to_end import Ensemble
    from ichpipe.models.header import ensemble_members, train_spacing
    from ichpipe.models.weights import save_model
    from ichpipe.scoring import heldout_predictions as predictions
    from ichpipe.scoring.metrics import weighted_log_loss
    from ichpipe.training.run_record import start_watch, write_record

    watch, device, folder = start_watch(), choose_device(gpu), artifacts.ensemble
    index, digest = read_index(artifacts.index), digest_of_file(artifacts.index)
    members = ensemble_members(artifacts, params, digest)
    networks = [_load_member(member, artifacts, params) for member in members]
    if params.predict.mirror:
        for network in networks:
            network.sequence.spec = network.sequence.spec.model_copy(update={"mirrored": True})
    if len(networks) == 1 and not params.predict.mirror:
        raise ParamsError(
            "an ensemble needs more than one network: set fit-slices.folds to prepare.folds and run: ichpipe "
            "fit-slices, extract, fit-sequence, finetune; or set predict.mirror to true"
        )
    model, digests = Ensemble(networks).to(device), [member.made_from for member in members]
    save_model(folder, model, {"index": digest} | train_spacing(index), digests)
    rows = predictions.held_out(index)
    table = predictions.make_table(rows, *predict_held_out(model, rows, device))
    predictions.write_predictions(table, folder, predictions.model_mark(folder))
    val = table[table["split"] == "val"]
    loss = weighted_log_loss(*predictions.labels_and_probabilities(val)) if len(val) else None
    identity = params.predict.model_dump(mode="json")
    facts = {"networks": digests, "val_loss": loss}
    write_record(folder, stage="ensemble", params=identity, device=device, seconds=watch(), facts=facts)
    return f"{folder}: {model.cost}; run: ichpipe evaluate, which calibrates it"


def is_done(params: Params, artifacts: Artifacts) -> bool:
    """Say whether the ensemble that `run` would write exists, with its predictions."""
    from ichpipe.models.header import ensemble_members, require_members

    index = digest_of_file(artifacts.index)
    try:
        require_members(artifacts.ensemble, ensemble_members(artifacts, params, index), index)
        return bool(read_json(artifacts.ensemble / RECORD_FILE)["params"]["mirror"] == params.predict.mirror)
    except (IchpipeError, KeyError, TypeError):
        return False


def _load_member(member: Member, artifacts: Artifacts, params: Params) -> EndToEnd:
    from ichpipe.models.end_to_end import EndToEnd
    from ichpipe.models.weights import load_predictor, load_sequence, load_slice_cnn

    if "finetuned" in member.made_from:
        return load_predictor(member.folder).networks[member.number]
    return EndToEnd(load_slice_cnn(member.folder), load_sequence(artifacts.sequence(params.finetune.arm)))
