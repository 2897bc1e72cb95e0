"""What the command line of ``ichpipe score`` takes. Imported with the front door, so nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ichpipe.stages.options import Settings


@click.argument("predictions", type=click.Path(path_type=Path))
@click.argument("labels", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["rsna", "cq500", "studies"]),
    required=True,
    help="Slices, CQ500 scans, or any studies.",
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=None, help="Also write the JSON here.")
@click.option("--against", type=click.Path(path_type=Path), default=None, help="Another model's table, to compare.")
@click.option(
    "--missing",
    type=click.FloatRange(0, 1),
    default=None,
    help="Score what has no prediction as this; else rsna stops with an error, the others leave it out.",
)
@click.option(
    "--pool",
    type=click.Choice(["max", "mean"]),
    default=None,
    help="cq500, studies: pool several rows of one, as of two series; else they are an error.",
)
@click.option(
    "--operating-point",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.9,
    show_default=True,
    help="cq500, studies: wanted sensitivity of one point, specificity of the other.",
)
def score(settings: Settings, predictions: Path, labels: Path, form: str, out: Path | None, **options: Any) -> str:
    """Score a table of PREDICTIONS against a table of LABELS by the official metric; prints JSON.

    \b
    Example:
      ichpipe score submission.csv stage_2_train.csv --format rsna
      ichpipe score prediction_probabilities.csv reads.csv --format cq500
      ichpipe score predictions/studies.csv labels.csv --format studies
    """
    if form == "rsna" and options["pool"]:
        raise click.UsageError("--pool is for scans and studies: --format cq500, studies")
    from ichpipe.stages.score import Options, run

    return run(form, predictions, labels, out, settings.params().evaluate, Options(**options))
