"""What the command line of ``ichpipe predict`` takes. Imported with the front door: nothing heavy here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichpipe.stages.options import alone_in

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TextIO

    from ichpipe.stages.options import Settings

_file = click.Path(path_type=Path, dir_okay=False)
_folder = click.Path(path_type=Path, file_okay=False)


@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="PATH...")
@click.option(
    "--list", "listed", type=click.File(encoding="utf-8"), help="Paths from this file, one a line; - is stdin."
)
@click.option("--out", type=_folder, default=None, help="Folder of tables and predictions.json; without it, none.")
@click.option("--model", type=_folder, default=None, help="Folder of a fine-tuned model [ARTIFACTS/finetuned].")
@click.option("--json", "as_json", is_flag=True, help="Print predictions.json instead of the table.")
@click.option(
    "--sr",
    type=_folder,
    default=None,
    help="Folder for a DICOM Structured Report per study, as a PACS stores it. It holds the patient's identity.",
)
@click.option("--force", is_flag=True, help="Predict also what is no head CT, and mark it `forced` in every output.")
@click.option("--uncalibrated", is_flag=True, help="The network's own probabilities: leave calibration.json out.")
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="Probability from which a class is called positive; decides no number in the tables.",
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
    listed: TextIO | None,
    out: Path | None,
    model: Path | None,
    gpu: str,
    workers: int,
    **options: Any,
) -> str:
    """Give each study and each of its slices six probabilities.

    PATH is a folder, a zip archive, a DICOMDIR, a file, or @FILE: a list of them, one a line. One series is
    taken per study; the table says which, and why. What is no plain head CT is refused, with the reason:
    another modality or part of the body, localizers only, contrast by its header, too few slices.

    \b
    With --out DIR, as CSV and as JSON:
      slices.csv studies.csv         probabilities, by slice and by study
      predictions.json               the same, with places, reasons and model
      series.csv                     which series were taken, and why
      refused.csv rejected.csv       studies and files left out, and why
    --json prints what predictions.json holds, for a pipe:
      ichpipe predict scan.zip --json | jq .studies[0].findings.any

    Exit code 1 if nothing is left to predict. Of the patient, tables and JSON hold the PatientID alone.

    \b
    Example:
      ichpipe predict data/phantom/dicom --out predictions
    """
    if options["kaggle"] is None and (options["sample"] is not None or options["missing"] is not None):
        raise click.UsageError("--sample and --missing are for the submission: give --kaggle FILE")
    named = _named(paths, listed)
    from ichpipe.stages.predict import Options, run

    params = settings.params()
    chosen = Options(
        selection=params.prepare.selection,
        study_score=params.evaluate.study_score,
        hash_patient_ids=params.prepare.hash_patient_ids,
        **options,
    )
    with alone_in(out, "predict"):
        return run(named, out, model or settings.artifacts().finetuned, chosen, gpu=gpu, workers=workers)


def _named(paths: Sequence[Path], listed: TextIO | None) -> list[Path]:
    if not paths and listed is None:
        raise click.UsageError("name what to predict: a folder, a zip archive, files, @FILE or --list FILE")
    from ichpipe.inference.inputs import expand, read_list

    return expand(paths) + ([] if listed is None else read_list(listed.read(), listed.name))
