"""``ichpipe predict``: DICOM or NIfTI to probabilities per slice and per study, with one model file alone."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError, IchpipeError
from ichpipe.common.files import write_json, write_text
from ichpipe.stages.options import FILE, FOLDER, PROBABILITY, gpu_option, lock_folder, model_folder, workers_option

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

    import pandas as pd

    from ichpipe.inference.findings import Predicted, Provenance
    from ichpipe.inference.inputs import Inputs
    from ichpipe.params.schema import SelectionParams
    from ichpipe.scoring.pooling import StudyScore
    from ichpipe.stages.options import Settings

log = logging.getLogger("ichpipe")

FORCED = "forced"  # column that the tables have with ``--force``: whether the series would have been refused without


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    selection: SelectionParams
    study_score: StudyScore = "max"
    all_series: bool = False  # every series of a study, not the one that stands for it
    force: bool = False  # predict what is no head CT all the same, and mark it
    uncalibrated: bool = False  # leave the calibration beside the model out
    threshold: float = 0.5  # a probability of at least this is called positive
    sr: Path | None = None  # folder of DICOM Structured Reports
    as_json: bool = False  # return JSON instead of a table
    kaggle: Path | None = None  # also write the RSNA 2019 submission, of all series
    sample: Path | None = None  # whose rows and order the submission takes
    missing: float | None = None  # probability of slices without a prediction; None: an error
    hash_patient_ids: str | None = None  # where the key is (`pseudonyms`); None: PatientIDs stay as they are


@click.command("predict")
@gpu_option
@workers_option
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--list", "listed", type=click.File("rb"), help="Paths from this file, one a line; - is stdin.")
@click.option("--out", type=FOLDER, help="Folder of tables and predictions.json; without it, none.")
@click.option("--model", type=FOLDER, help="Folder of a fine-tuned model or an ensemble [ARTIFACTS/finetuned].")
@click.option("--json", "as_json", is_flag=True, help="Print predictions.json instead of the table.")
@click.option(
    "--sr",
    type=FOLDER,
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
@click.option("--kaggle", type=FILE, help="Also write the RSNA 2019 submission, of all series.")
@click.option("--sample", type=FILE, help="Sample submission whose rows and order --kaggle takes.")
@click.option(
    "--missing",
    type=PROBABILITY,
    help="Write this in the submission for slices without a prediction; else they are an error.",
)
@click.pass_obj
def command(
    settings: Settings,
    /,
    paths: tuple[Path, ...],
    listed: BinaryIO | None,
    out: Path | None,
    model: Path | None,
    gpu: str,
    workers: int,
    **options: Any,
) -> str:
    """Give each study and each of its slices six probabilities.

    PATH is a folder, a zip archive, a DICOMDIR, a file, or @FILE: a list of them, one a line. Files are DICOM
    or NIfTI (.nii, .nii.gz). One series is taken per study; the table says which, and why. What is no plain
    head CT is refused, with the reason: another modality or part of the body, localizers only, contrast by its
    header, too few slices.

    \b
    With --out DIR, as CSV and as JSON:
      slices.csv studies.csv         probabilities, by slice and by study
      predictions.json               the same, with places, reasons and model
      series.csv                     which series were taken, and why
      refused.csv rejected.csv       studies and files left out, and why
    --json prints what predictions.json holds, for a pipe:
      ichpipe predict scan.zip --json | jq .studies[0].findings.any

    Exit code 1 if nothing is left to predict. Of the patient, tables and JSON hold the PatientID alone, of
    NIfTI the name of the file.

    \b
    Example:
      ichpipe predict data/phantom/dicom --out predictions
    """
    if options["kaggle"] is None and (options["sample"] is not None or options["missing"] is not None):
        raise click.UsageError("--sample and --missing are for the submission: give --kaggle FILE")
    if not paths and listed is None:
        raise click.UsageError("name what to predict: a folder, a zip archive, files, @FILE or --list FILE")
    from ichpipe.inference.inputs import expand, read_list

    source = getattr(listed, "name", "standard input")
    inputs = expand(paths) + ([] if listed is None else read_list(listed.read(), source))
    params = settings.params()
    given = Options(
        selection=params.prepare.selection,
        study_score=params.evaluate.study_score,
        hash_patient_ids=params.prepare.hash_patient_ids,
        **options,
    )
    with lock_folder(out, "predict"):
        return run(inputs, out, model or model_folder(params, settings.artifacts()), given, gpu=gpu, workers=workers)


def run(
    paths: Sequence[Path], out: Path | None, model_dir: Path, options: Options, *, gpu: str = "auto", workers: int = 0
) -> str:
    """Write the tables, JSON and reports that have a folder; return the table of studies, or JSON.

    One series stands for a study unless ``options`` ask for all. Series that are no head CT are refused and unusable
    files are listed, each with the reason; the rest is predicted. If nothing is left, the lists are written and a
    DataError follows. A submission that lacks slices is refused after the other tables are written.
    """
    from ichpipe.common.device import choose_device
    from ichpipe.common.pseudonyms import read_pseudonyms
    from ichpipe.inference.findings import build_document, make_provenance
    from ichpipe.inference.inputs import collect_inputs
    from ichpipe.inference.kaggle_submission import build_submission, read_sample
    from ichpipe.inference.predictor import SLICE_COLUMNS, STUDY_COLUMNS, predict_slices
    from ichpipe.models.end_to_end import Ensemble
    from ichpipe.models.header import spacing_of
    from ichpipe.models.weights import load_predictor
    from ichpipe.scoring.calibration import read_calibration

    # Errors in options and small files come first: prediction may take hours.
    if options.sr is not None and find_spec("highdicom") is None:
        raise IchpipeError("--sr needs the package highdicom; run: pip install 'ichpipe[sr]'")
    sample = None if options.sample is None else read_sample(options.sample)
    device = choose_device(gpu)
    model = load_predictor(model_dir).to(device)
    if isinstance(model, Ensemble):
        log.info("ensemble of %s", model.cost)
    calibration = None if options.uncalibrated else read_calibration(model_dir)
    spacing = spacing_of(model_dir)
    whole_archive = options.kaggle is not None  # a submission wants every slice
    inputs = collect_inputs(
        paths,
        options.selection,
        workers,
        one_per_study=not (options.all_series or whole_archive),
        judged=not whole_archive,
        force=options.force,
        pseudonyms=read_pseudonyms(options.hash_patient_ids),
    )
    if options.sr is not None:
        _require_dicom(inputs.slices)
    slices, undecodable = predict_slices(model, inputs.slices, device, spacing, calibration)
    provenance = make_provenance(
        model_dir,
        calibration,
        uncalibrated=options.uncalibrated,
        threshold=options.threshold,
        study_score=options.study_score,
    )
    result = _collect(inputs, slices, undecodable, options, provenance)
    if out is not None:
        _write_csv(result.rejected[["path", "reason"]], out / "rejected.csv")
        _write_csv(result.refused, out / "refused.csv")
        _write_csv(inputs.series, out / "series.csv")
    if result.slices.empty:
        raise DataError(_explain_nothing_left(result, out))
    document = build_document(result)
    if out is not None:
        more = [FORCED] if options.force else []
        _write_csv(result.slices[SLICE_COLUMNS + more], out / "slices.csv")
        _write_csv(result.studies[STUDY_COLUMNS + more], out / "studies.csv")
        write_json(out / "predictions.json", document)
    remarks = [] if options.sr is None else _write_reports(result, options.sr)
    if options.kaggle is not None:
        submission, warnings = build_submission(result.slices, result.rejected, sample, options.missing)
        for warning in warnings:
            log.warning(warning)
        _write_csv(submission, options.kaggle)
    if options.as_json:
        return json.dumps(document, indent=2, allow_nan=False)
    return _as_text(result, out, remarks)


def _require_dicom(slices: pd.DataFrame) -> None:
    """Raise DataError for NIfTI: a report repeats the identity of patient and study, which only DICOM holds."""
    from ichpipe.nifti.volume_file import SYNTAX, split_slice

    for path in slices.loc[slices["transfer_syntax"] == SYNTAX, "path"].iloc[:1]:
        file, _ = split_slice(path) or (path, 0)
        raise DataError(
            f"--sr: {file} is NIfTI, which names no patient and no study to report on; leave --sr out, or name the "
            "DICOM files"
        )


def _collect(
    inputs: Inputs, slices: pd.DataFrame, undecodable: pd.DataFrame, options: Options, provenance: Provenance
) -> Predicted:
    import pandas as pd

    from ichpipe.inference.findings import Predicted, extents
    from ichpipe.inference.inputs import REFUSED_COLUMNS
    from ichpipe.inference.predictor import IDENTIFIERS, score_series

    lost = inputs.slices[~inputs.slices["series_uid"].isin(slices["series_uid"])]
    reasons = undecodable.set_index("path")["reason"]
    lost = lost.groupby(IDENTIFIERS, sort=False).agg(n_slices=("path", "size"), reason=("path", "first")).reset_index()
    lost["reason"] = "no slice could be read; the first: " + lost["reason"].map(reasons).astype(str)
    refused = [table for table in (inputs.refused, lost[REFUSED_COLUMNS]) if len(table)]
    studies = score_series(slices, options.study_score)
    if options.force:
        slices, studies = (
            table.assign(**{FORCED: table["series_uid"].isin(inputs.forced)}) for table in (slices, studies)
        )
    return Predicted(
        slices,
        studies,
        inputs.series,
        pd.concat(refused, ignore_index=True) if refused else inputs.refused,
        pd.concat([inputs.rejected, undecodable], ignore_index=True)[["path", "reason", "code"]],
        inputs.forced,
        extents(slices, options.threshold),
        provenance,
    )


def _write_reports(result: Predicted, folder: Path) -> list[str]:
    """Write a DICOM SR per predicted series; warn of series without one, and return a line about the written ones."""
    from ichpipe.inference.findings import counted
    from ichpipe.inference.structured_report import make_report, read_source, write_report

    failed: dict[str, list[str]] = {}
    paths = {str(uid): part["path"].tolist() for uid, part in result.slices.groupby("series_uid")}
    for row in result.studies.to_dict("records"):
        uid = str(row["series_uid"])
        probability, forced = {name: row[name] for name in CLASSES}, result.forced.get(uid, "")
        try:
            report = make_report(read_source(paths[uid]), probability, result.where[uid], result.provenance, forced)
            write_report(folder / f"{uid}.dcm", report)
        except DataError as error:
            failed.setdefault(str(error), []).append(uid)
    for reason, uids in failed.items():
        log.warning("no DICOM report for %d series, %s the first: %s", len(uids), uids[0], reason)
    written = len(result.studies) - sum(map(len, failed.values()))
    return [f"{counted(written, 'DICOM report')} in {folder}, with the patient's identity"] if written else []


def _write_csv(table: pd.DataFrame, target: Path) -> None:
    """Write nine significant digits: six decimals would turn 1e-8 into 0, which costs 16 nats more if it is wrong."""
    write_text(target, table.to_csv(index=False, float_format="%.9g", lineterminator="\n"))


def _explain_nothing_left(result: Predicted, out: Path | None) -> str:
    from ichpipe.inference.findings import format_nothing_left

    why = "name a folder with --out to see why for each" if out is None else f"{out / 'rejected.csv'} says why for each"
    return format_nothing_left(result.refused, result.rejected, len(result.rejected), why)


def _as_text(result: Predicted, out: Path | None, remarks: list[str]) -> str:
    from ichpipe.inference.findings import counted, format_refused, format_studies, wrapped

    mark = partial(click.style, fg="red", bold=True)
    table = format_studies(result, mark)
    lines = wrapped(f"positive from {result.provenance.threshold:g}; {result.provenance.describe_calibration()}")
    usable = result.series[result.series["n_slices"] > 0]
    if passed_over := int((~usable["chosen"]).sum()):
        lines.append(f"{passed_over} series passed over for another one of their study{_see(out, 'series.csv')}")
    if len(result.refused):
        lines.append(f"refused: {counted(len(result.refused), 'study', 'studies')}{_see(out, 'refused.csv')}")
        lines += format_refused(result.refused)
    if len(result.rejected):
        lines.append(f"{counted(len(result.rejected), 'file')} left out{_see(out, 'rejected.csv')}")
    for remark in remarks:
        lines += wrapped(remark)
    return "\n".join([table, "", *lines])


def _see(out: Path | None, name: str) -> str:
    return "" if out is None else f"; {out / name} says why"
