"""``ichpipe export``: write the fine-tuned model or the ensemble as a folder: weights, model card, ONNX on demand."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import click

from ichpipe.common.artifacts import CALIBRATION_FILE, MODEL_FILE
from ichpipe.common.errors import DataError, ParamsError
from ichpipe.common.files import atomic_path, digest_of_file, require_file, write_json, write_text
from ichpipe.stages.options import FOLDER, lock_folder, model_folder

if TYPE_CHECKING:
    from pathlib import Path

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.params.schema import Params
    from ichpipe.stages.options import Settings

CARD_FILE = "config.json"
PAGE_FILE = "README.md"
ONNX_FILE = "model.onnx"


@click.command("export")
@click.option("--out", type=FOLDER, help="Folder [ARTIFACTS/export].")
@click.option("--onnx", is_flag=True, help="Also model.onnx, compared with the network under onnxruntime.")
@click.pass_obj
def command(settings: Settings, out: Path | None, *, onnx: bool) -> str:
    """Write the fine-tuned model, or the ensemble, as a folder to hand on: weights and model card.

    \b
    Example:
      ichpipe export --out model --onnx
    """
    params, artifacts = settings.params(), settings.artifacts()
    folder = out or artifacts.root / "export"
    with lock_folder(folder, "export"):
        return run(params, artifacts, folder, onnx=onnx)


def run(params: Params, artifacts: Artifacts, out: Path, *, onnx: bool = False) -> str:
    """Write weights, card, page, the calibration where there is one and, if asked, ONNX; return a summary.

    The index must be the one that the model was trained on, since the card counts its patients.
    """
    from ichpipe.index.slice_index import read_index
    from ichpipe.models.header import read_header
    from ichpipe.report.model_card import card_text, make_card
    from ichpipe.scoring.calibration import read_calibration, write_calibration

    folder = model_folder(params, artifacts)
    command = "ichpipe ensemble" if params.predict.ensemble else "ichpipe finetune"
    source = require_file(folder / MODEL_FILE, f"run: {command}")
    header = read_header(folder)
    index = read_index(artifacts.index)
    if header.made_from.get("index") != digest_of_file(artifacts.index):
        raise DataError(f"{source} was trained on another index than {artifacts.index}; run: {command}")
    if onnx and header.kind == "ensemble":
        raise ParamsError("model.onnx holds one network; export it with --set predict.ensemble=false")
    card = make_card(folder, header.description(), index, params.prepare.dataset, params.evaluate)
    with atomic_path(out / MODEL_FILE) as temporary:
        shutil.copyfile(source, temporary)
    lines = [f"{out / MODEL_FILE}: {source.stat().st_size / 1e6:.1f} MB"]
    if calibration := read_calibration(folder):
        write_calibration(out, calibration)
        lines.append(f"{out / CALIBRATION_FILE}: {calibration.method}, applied by predict")
    else:
        (out / CALIBRATION_FILE).unlink(missing_ok=True)  # of a former model
        lines.append("no calibration: ichpipe evaluate has not run; predict will give uncalibrated probabilities")
    if onnx:
        from ichpipe.models.onnx_export import write_onnx
        from ichpipe.models.weights import load_end_to_end

        description = {name: card[name] for name in ("classes", "slice_cnn", "sequence", "model_sha256")}
        worst = write_onnx(load_end_to_end(folder), out / ONNX_FILE, description)
        card["onnx"] = {"sha256": digest_of_file(out / ONNX_FILE), "largest_difference": worst}
        lines.append(f"{out / ONNX_FILE}: differs from the network by at most {worst:.1e} in probability")
    write_json(out / CARD_FILE, card)
    write_text(out / PAGE_FILE, card_text(card))
    return "\n".join([*lines, f"{out / CARD_FILE}, {out / PAGE_FILE}: what it is, was trained on, and is not for"])
