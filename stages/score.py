"""``ichpipe score``: score tables of predictions against tables of labels; no images needed."""

from __future__ import annotations

import json
import logging
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

_COUNTED: Final = {  # by the reports of tables, as the log says it
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

    return run(form, predictions, labels, out, settings.params().evaluate, **options)


def run(
    form: str,
    predictions: Path,
    labels: Path,
    out: Path | None,
    section: EvaluateParams,
    *,
    missing: float | None = None,
    against: Path | None = None,
    pool: str | None = None,
    operating_point: float = 0.9,
) -> str:
    """Score two tables and return JSON; ``out`` is written whole or not at all, what did not match goes to the log."""
    inputs = [predictions, labels, *([against] if against else [])]
    if out is not None and out.resolve() in [path.resolve() for path in inputs]:
        raise DataError(f"--out {out} is one of the tables to read; name another file")
    settings = {"missing": missing, **section.bootstrap()}
    result: dict[str, Any] = {"format": form}
    if form == "rsna":
        from ichpipe.scoring.score_slices import read_labels, read_predictions, score_slices

        slices, slice_labels = read_predictions(predictions), read_labels(labels)
        other_slices = read_predictions(against) if against else None
        result |= score_slices(slices, slice_labels, against=other_slices, **settings)
    elif form == "cq500":
        from ichpipe.index.cq500_reads import read_majority
        from ichpipe.scoring.score_cq500 import read_scans, score_scans

        scans, truth = read_scans(predictions, pool), read_majority(labels)
        other_scans = read_scans(against, pool) if against else None
        result |= score_scans(scans, truth, against=other_scans, operating_point=operating_point, **settings)
    elif against is not None:
        raise DataError("--against is for --format rsna and cq500")
    else:
        from ichpipe.index.label_tables import read_labels as read_label_table
        from ichpipe.scoring.score_studies import score_studies

        table = read_label_table("folder", labels)
        result |= score_studies(predictions, table, pool=pool, operating_point=operating_point, **settings)
    _log_remarks(result)
    if out is not None:
        write_json(out, result)
    return json.dumps(result, indent=2, allow_nan=False)


def _log_remarks(result: dict[str, Any]) -> None:
    """Log one line for each thing that was counted and changes what the figures are about."""
    tables = {name: result[name] for name in ("predictions", "labels")}
    tables["against"] = result.get("against", {}).get("predictions", {})
    for name, report in tables.items():
        for key, text in _COUNTED.items():
            if count := report.get(f"n_{key}"):
                first = report.get(f"first_of_{key}")
                names = ([first] if first else report.get(key, []))[:3]
                more = ", …" if count > len(names) else ""
                log.warning("%s: %d %s%s", name, count, text, f" ({', '.join(names)}{more})" if names else "")
    if cause := result["predictions"].get("likely_cause"):
        log.warning("%s", cause)
    for name, report in tables.items():
        if (value := report.get("filled_with")) is not None:
            log.warning("%s: scored as %s where there is no prediction", name, value)
    if reasons := result.get("no_exact_intervals"):
        name, reason = next(iter(reasons.items()))
        log.warning("no DeLong and no exact intervals of %d classes (%s: %s)", len(reasons), name, reason)
    if excluded := result.get("n_excluded"):
        log.warning("labels: %d slices left out: not all six labels are known", excluded)
    _log_nulls(result)


def _log_nulls(result: dict[str, Any]) -> None:
    """Log why a figure is null."""
    from ichpipe.scoring.metrics import describe_undefined_aucs

    one_kind = {name: auc["n_positive"] for name, auc in result.get("auc", {}).items() if auc["value"] is None}
    if undefined := describe_undefined_aucs(one_kind):
        log.warning("%s", undefined)
    if result.get("weighted_log_loss", 0.0) is None:
        unknown = [name for name, value in result.get("log_loss", {}).items() if value is None]
        cause = f"no label is known of {', '.join(unknown)}" if unknown else "nothing has all six labels"
        log.warning("weighted_log_loss is null: %s; check the headings of the label table", cause)
