"""What the command line of ``ichpipe predict`` takes. Imported with the front door: nothing heavy here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ichpipe.stages.cli import Settings

_file = click.Path(path_type=Path, dir_okay=False)


@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the tables.")
@click.option(
    "--model",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder of a fine-tuned model [ARTIFACTS/finetuned].",
)
@click.option("--all-series", is_flag=True, help="Predict every series of a study, not the one that stands for it.")
@click.option("--kaggle", type=_file, default=None, help="Also write the RSNA 2019 submission, of all series.")
@click.option("--sample", type=_file, default=None, help="Sample submission whose rows and order --kaggle takes.")
@click.option(
    "--missing",
    type=click.FloatRange(0, 1),
    default=None,
    help="Write this in the submission for slices without a prediction; else they are an error.",
)
def predict(
    settings: Settings,
    paths: tuple[Path, ...],
    out: Path,
    model: Path | None,
    gpu: str,
    workers: int,
    **options: Any,
) -> str:
    """Give each slice and each study of any DICOM folder, zip archive or list of files six probabilities.

    \b
    Example:
      ichpipe predict data/phantom/dicom --out predictions
    """
    if options["kaggle"] is None and (options["sample"] is not None or options["missing"] is not None):
        raise click.UsageError("--sample and --missing are for the submission: give --kaggle FILE")
    from ichpipe.stages.predict import Options, run

    params = settings.params()
    chosen = Options(selection=params.prepare.selection, study_score=params.evaluate.study_score, **options)
    return run(paths, out, model or settings.artifacts().finetuned, chosen, gpu=gpu, workers=workers)
