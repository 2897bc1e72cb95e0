"""``ichpipe run``: every step from files to scores, and predictions of new scans, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ichpipe.stages.options import FOLDER, gpu_option, workers_option

if TYPE_CHECKING:
    from ichpipe.stages.options import Settings


@click.command("run")
@gpu_option
@workers_option
@click.option("--predict", "scans", type=click.Path(path_type=Path), help="Scans to predict with the model at the end.")
@click.option("--out", type=FOLDER, help="Folder of these predictions.")
@click.pass_context
def command(context: click.Context, gpu: str, workers: int, scans: Path | None, out: Path | None) -> str:
    """Run prepare, fit-slices, extract, fit-sequence, finetune and evaluate, one after the other.

    Files are scanned every time. A model that was trained on the same inputs with the same parameters is kept, and an
    interrupted step goes on where it stopped. `dvc repro` does the same for params.yaml, and tracks what it writes.

    \b
    Example:
      ichpipe --params own.yaml --artifacts own run --predict /data/new --out predictions
    """
    from ichpipe.stages import ensemble, evaluate, extract, finetune, fit_sequence, fit_slices, predict, prepare

    if (scans is None) != (out is None):
        raise click.UsageError("--predict and --out belong together: the scans, and the folder of their predictions")
    if scans is not None and not scans.exists():
        raise click.UsageError(f"--predict: {scans} does not exist")
    settings: Settings = context.obj
    params, artifacts = settings.params(), settings.artifacts()
    context.invoke(prepare.command, workers=workers)
    if not fit_slices.is_done(params, artifacts):
        context.invoke(fit_slices.command, gpu=gpu, workers=workers)
    context.invoke(extract.command, gpu=gpu, workers=workers)
    for arm in params.sequence:
        if not fit_sequence.is_done(params, artifacts, arm):
            context.invoke(fit_sequence.command, gpu=gpu, arm=arm)
    if not finetune.is_done(params, artifacts):
        context.invoke(finetune.command, gpu=gpu, workers=workers)
    if params.predict.ensemble and not ensemble.is_done(params, artifacts):
        context.invoke(ensemble.command, gpu=gpu)
    scores: str = context.invoke(evaluate.command)
    if scans is None:
        return scores
    table: str = context.invoke(predict.command, paths=(scans,), out=out, gpu=gpu, workers=workers)
    return f"{scores}\n\n{table}"
