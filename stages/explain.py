"""``ichpipe explain``: draw a contact sheet per study with heat maps of the fine-tuned model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.common.files import write_bytes, write_text
from ichpipe.common.progress import track
from ichpipe.common.text_table import format_table
from ichpipe.stages.options import FOLDER, PROBABILITY, gpu_option, lock_folder, model_folder, workers_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ichpipe.params.schema import SelectionParams
    from ichpipe.scoring.pooling import StudyScore
    from ichpipe.stages.options import Settings


log = logging.getLogger("ichpipe")


@click.command("explain")
@gpu_option
@workers_option
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--out", type=FOLDER, required=True, help="Folder of the pictures.")
@click.option("--model", type=FOLDER, help="Folder of a fine-tuned model or an ensemble [ARTIFACTS/finetuned].")
@click.option(
    "--class", "class_name", type=click.Choice(CLASSES), default="any", show_default=True, help="Finding to explain."
)
@click.option(
    "--threshold",
    type=PROBABILITY,
    default=0.5,
    show_default=True,
    help="Slices with at least this probability are framed.",
)
@click.option("--panels", type=click.IntRange(1, 60), default=18, show_default=True, help="Most slices on one sheet.")
@click.option("--all-series", is_flag=True, help="A sheet for every series of a study, not the one that stands for it.")
@click.option("--force", is_flag=True, help="Explain also what is no head CT, and mark it `forced`.")
@click.option("--uncalibrated", is_flag=True, help="The network's own probabilities: leave calibration.json out.")
@click.pass_obj
def command(settings: Settings, /, paths: tuple[Path, ...], out: Path, model: Path | None, **options: Any) -> str:
    """Show where the fine-tuned model looked: one contact sheet per study, with heat maps and P along the head.

    Probabilities are those of predict. What is no plain head CT is refused as predict refuses it.

    \b
    Example:
      ichpipe explain data/phantom/dicom --out explained
    """
    params = settings.params()
    selection, study_score = params.prepare.selection, params.evaluate.study_score
    with lock_folder(out, "explain"):
        folder = model or model_folder(params, settings.artifacts())
        return run(paths, out, folder, selection, study_score=study_score, **options)


def run(
    paths: Sequence[Path],
    out: Path,
    model_dir: Path,
    selection: SelectionParams,
    *,
    study_score: StudyScore,
    class_name: str,
    threshold: float,
    panels: int,
    all_series: bool,
    force: bool,
    uncalibrated: bool,
    gpu: str,
    workers: int,
) -> str:
    """Write ``study-NNN.png`` for each study, and ``explained.csv`` of what each shows; return the table as text.

    Series are chosen, refused and calibrated as by ``predict``, and ``probability`` is the study's of ``studies.csv``.
    The pictures hold no identifier; the table names study and series by UID.
    """
    import numpy as np
    import pandas as pd

    from ichpipe.common.device import choose_device
    from ichpipe.inference.findings import counted, format_nothing_left, format_refused, make_provenance, wrapped
    from ichpipe.inference.heat_maps import Explainer
    from ichpipe.inference.inputs import collect_inputs
    from ichpipe.scoring.calibration import read_calibration

    calibration = None if uncalibrated else read_calibration(model_dir)
    explainer, column = Explainer(model_dir, choose_device(gpu), calibration), CLASSES.index(class_name)
    inputs = collect_inputs(paths, selection, workers, one_per_study=not all_series, force=force)
    groups = inputs.slices.groupby("series_uid", sort=False)
    lines: list[dict[str, Any]] = []
    n_bad = len(inputs.rejected)
    for uid, group in track(groups, "explain", len(groups), "series"):
        series = explainer.embed(group["path"].tolist(), group["position_mm"].tolist())
        n_bad += len(series.bad)
        if not series.paths:
            continue
        probabilities, of_study = explainer.predict(series, study_score)
        if not np.isfinite(probabilities).all():  # fp16 can overflow
            log.warning("no picture of series %s: a prediction is not a number; try --gpu cpu", uid)
            n_bad += len(series.paths)
            continue
        number, forced = len(lines) + 1, str(uid) in inputs.forced
        own, position_mm = probabilities[:, column], series.position_mm.numpy()  # along the slice normal
        positive, highest = np.flatnonzero(own >= threshold), int(np.argmax(own))
        title = f"Study {number}{' (FORCED: no head CT)' if forced else ''}: P({class_name}) {of_study[column]:.2f}, "
        title += f"highest at {position_mm[highest]:.0f} mm"
        picture = explainer.sheet(
            series, probabilities, title, class_name=class_name, threshold=threshold, panels=panels
        )
        name = f"study-{number:03d}.png"
        write_bytes(out / name, picture)
        lines.append(
            {
                "picture": name,
                "study_uid": group["study_uid"].iloc[0],
                "series_uid": uid,
                "class": class_name,
                "n_slices": len(own),
                "n_positive": len(positive),
                "probability": float(of_study[column]),
                "highest_slice": highest,
                "highest_mm": float(position_mm[highest]),
                "first_positive_mm": float(position_mm[positive].min()) if positive.size else None,
                "last_positive_mm": float(position_mm[positive].max()) if positive.size else None,
                **({"forced": forced} if force else {}),
            }
        )
    if not lines:
        remark = "`ichpipe predict --out FOLDER` lists why for each"
        raise DataError(format_nothing_left(inputs.refused, inputs.rejected, n_bad, remark))
    table = pd.DataFrame(lines)
    write_text(out / "explained.csv", table.to_csv(index=False, float_format="%.9g", lineterminator="\n"))
    row = "{picture} {n_slices} {probability:.3f} {highest_mm:.0f} {n_positive}"
    head = ["picture", "slices", f"P({class_name})", "at, mm", "positive"]
    facts = make_provenance(
        model_dir, calibration, uncalibrated=uncalibrated, threshold=threshold, study_score=study_score
    )
    text = [format_table(head, [row.format_map(line).split() for line in lines])]
    text += wrapped(f"P is that of predict, {study_score} over slices; {facts.describe_calibration()}")
    if (count := len(explainer.model.networks)) > 1:
        text += wrapped(f"P is the mean of {count} networks; the heat maps are of the first alone")
    for line in lines:
        if line.get("forced"):
            text += wrapped(f"{line['picture']}: FORCED, although: {inputs.forced[line['series_uid']]}")
    if len(inputs.refused):
        text += [f"refused: {counted(len(inputs.refused), 'study', 'studies')}", *format_refused(inputs.refused)]
    if n_bad:
        text.append(f"{counted(n_bad, 'file')} left out; `ichpipe predict` lists why for each")
    return "\n".join(text)
