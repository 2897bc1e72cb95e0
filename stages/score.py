"""``ichpipe score``: score tables of predictions against tables of labels; no images needed."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from ichpipe.common.errors import DataError
from ichpipe.common.files import write_json
from ichpipe.stages.options import FILE, PROBABILITY

if TYPE_CHECKING:
    from ichpipe.params.schema import EvaluateParams
    from ichpipe.stages.options import Settings

log = logging.getLogger("ichpipe")

_COUNTED: Final = {
    "duplicate_rows": "rows repeat another one",
    "inconsistent_any_slices": "slices whose any is not the maximum of the five",
    "slices_without_label": "slices have no label and are not scored",
    "slices_without_prediction": "labelled slices have no prediction",
    "rows_of_no_scan": "names are no scan of CQ500",
    "studies_without_label": "studies have no label and are not scored",
    "studies_without_prediction": "labelled studies have no prediction",
    "scans_without_label": "scans have no label and are not scored",
    "scans_without_prediction": "labelled scans have no prediction",
}
"""What the reports of tables count, as the log says it."""


@dataclass(frozen=True)
class Options:
    """The options of the command that change the figures."""

    missing: float | None = None  # probability of what has no prediction; None: an error (rsna), left out (cq500)
    against: Path | None = None  # another model's predictions
    pool: str | None = None  # cq500, several rows of one scan: max, mean; None: an error
    operating_point: float = 0.9  # cq500: wanted sensitivity, and wanted specificity


@click.command("score")
@click.argument("predictions", type=click.Path(path_type=Path))
@click.argument("labels", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["rsna", "cq500", "studies"]),
    required=True,
    help="Slices, CQ500 scans, or any studies.",
)
@click.option("--out", type=FILE, help="Also write the JSON here.")
@click.option("--against", type=click.Path(path_type=Path), help="Another model's table, to compare.")
@click.option(
    "--missing",
    type=PROBABILITY,
    help="Score what has no prediction as this; else rsna stops with an error, the others leave it out.",
)
@click.option(
    "--pool",
    type=click.Choice(["max", "mean"]),
    help="cq500, studies: pool several rows of one, as of two series; else they are an error.",
)
@click.option(
    "--operating-point",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.9,
    show_default=True,
    help="cq500, studies: wanted sensitivity of one point, specificity of the other.",
)
@click.pass_obj
def command(settings: Settings, /, predictions: Path, labels: Path, form: str, out: Path | None, **options: Any) -> str:
    """Score a table of PREDICTIONS against a table of LABELS by the official metric; prints JSON.

    \b
    Example:
      ichpipe score submission.csv stage_2_train.csv --format rsna
      ichpipe score prediction_probabilities.csv reads.csv --format cq500
      ichpipe score predictions/studies.csv labels.csv --format studies
    """
    if form == "rsna" and options["pool"]:
        raise click.UsageError("--pool is for scans and studies: --format cq500, studies")

    return run(form, predictions, labels, out, settings.params().evaluate, Options(**options))


def run(form: str, predictions: Path, labels: Path, out: Path | None, section: EvaluateParams, options: Options) -> str:
    """Score two tables and return JSON; ``out`` is written whole or not at all, what did not match goes to the log."""
    inputs = [predictions, labels, *([options.against] if options.against else [])]
    if out is not None and out.resolve() in [path.resolve() for path in inputs]:
        raise DataError(f"--out {out} is one of the tables to read; name another file")
    result = _FORMS[form](predictions, labels, section, options)
    for line in _remarks(result):
        log.warning(line)
    if out is not None:
        write_json(out, result)
    return json.dumps(result, indent=2, allow_nan=False)


def _rsna(predictions: Path, labels: Path, section: EvaluateParams, options: Options) -> dict[str, Any]:
    from ichpipe.scoring.score_slices import read_labels, read_predictions, score_slices

    found = score_slices(
        read_predictions(predictions),
        read_labels(labels),
        missing=options.missing,
        against=read_predictions(options.against) if options.against else None,
        **section.bootstrap(),
    )
    return {"format": "rsna", **found}


def _cq500(predictions: Path, labels: Path, section: EvaluateParams, options: Options) -> dict[str, Any]:
    from ichpipe.index.cq500_reads import read_majority
    from ichpipe.scoring.score_cq500 import read_scans, score_scans

    found = score_scans(
        read_scans(predictions, options.pool),
        read_majority(labels),
        missing=options.missing,
        against=read_scans(options.against, options.pool) if options.against else None,
        operating_point=options.operating_point,
        **section.bootstrap(),
    )
    return {"format": "cq500", **found}


def _studies(predictions: Path, labels: Path, section: EvaluateParams, options: Options) -> dict[str, Any]:
    from ichpipe.index.label_tables import read_labels as read_label_table
    from ichpipe.scoring.score_studies import score_studies

    if options.against is not None:
        raise DataError("--against is for --format rsna and cq500")
    found = score_studies(
        predictions,
        read_label_table("folder", labels),
        pool=options.pool,
        missing=options.missing,
        operating_point=options.operating_point,
        **section.bootstrap(),
    )
    return {"format": "studies", **found}


_FORMS: Final = {"rsna": _rsna, "cq500": _cq500, "studies": _studies}


def _remarks(result: dict[str, Any]) -> list[str]:
    """Return one line for each thing that was counted and changes what the figures are about."""
    against = result.get("against", {})
    tables = {
        "predictions": result["predictions"],
        "labels": result["labels"],
        "against": against.get("predictions", {}),
    }
    lines = [
        f"{name}: {report[f'n_{what}']} {text}{_examples(report, what)}"
        for name, report in tables.items()
        for what, text in _COUNTED.items()
        if report.get(f"n_{what}")
    ]
    if result.get("weighted_log_loss", 0.0) is None:
        unknown = [name for name, value in result.get("log_loss", {}).items() if value is None]
        cause = f"no label is known of {', '.join(unknown)}" if unknown else "nothing has all six labels"
        lines.append(f"weighted_log_loss is null: {cause}; check the headings of the label table")
    filled = [(name, report["filled_with"]) for name, report in tables.items() if report.get("filled_with") is not None]
    lines += [f"{name}: scored as {value} where there is no prediction" for name, value in filled]
    excluded = result.get("n_excluded")
    return [*lines, f"labels: {excluded} slices left out: not all six labels are known"] if excluded else lines


def _examples(report: dict[str, Any], what: str) -> str:
    first = report.get(f"first_of_{what}")
    names = [first] if first else report.get(what, [])
    return f" ({', '.join(names[:3])}{', …' if report[f'n_{what}'] > len(names[:3]) else ''})" if names else ""
