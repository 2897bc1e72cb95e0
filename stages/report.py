"""``ichpipe report``: write one HTML page of the run, from its files alone: no date, no clock."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichpipe.common.artifacts import MODEL_FILE
from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError, IchpipeError
from ichpipe.common.files import write_text
from ichpipe.stages.options import FILE, gpu_option

if TYPE_CHECKING:
    import pandas as pd

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.inference.heat_maps import Explainer
    from ichpipe.params.schema import Params
    from ichpipe.report.page import Picture, Section
    from ichpipe.report.runs import Facts
    from ichpipe.report.scores import Case
    from ichpipe.stages.options import Settings

log = logging.getLogger("ichpipe")

PANELS = 8  # slices shown of each case


@click.command("report")
@gpu_option
@click.option("--out", type=FILE, help="Page [ARTIFACTS/report/index.html].")
@click.option(
    "--cases",
    type=click.IntRange(0, 10),
    default=2,
    show_default=True,
    help="Studies shown of each kind: worst misses, worst false alarms, best finds.",
)
@click.pass_obj
def command(settings: Settings, out: Path | None, cases: int, gpu: str) -> str:
    """Write one self-contained HTML page of the run: data, learning, scores, cases. What is missing, it says.

    \b
    Example:
      ichpipe report
    """
    artifacts = settings.artifacts()
    page = out or artifacts.root / "report" / "index.html"
    return run(settings.params(), artifacts, page, cases=cases, gpu=gpu)


def run(params: Params, artifacts: Artifacts, out: Path, *, cases: int = 2, gpu: str = "auto") -> str:
    """Write the page to ``out``, whole or not at all, and return its path and size as text.

    A missing part of the run is named on the page. ``cases`` held-out studies of each kind are shown with heat maps of
    the fine-tuned model; 0: no pictures. Raises DataError for a run without any file.
    """
    from ichpipe.report import runs, scores
    from ichpipe.report.page import render_page

    shown_params = _shorten_paths(params.model_dump(mode="json", by_alias=True))
    facts = runs.read_facts(artifacts, list(params.sequence), shown_params)
    if not (facts.summary or facts.records or facts.metrics):
        raise DataError(f"{artifacts.root} holds no run to report on; run: ichpipe prepare (see dvc.yaml)")
    study_score = params.evaluate.study_score
    sections = [
        runs.glance(facts),
        runs.data(facts),
        runs.learning(facts),
        scores.ladder(facts),
        *scores.curve_sections(facts, params.finetune.arm),
        scores.operating(facts, study_score),
        _cases(params, artifacts, facts, cases, gpu),
        scores.ablation(facts),
        runs.provenance(facts),
    ]
    write_text(out, render_page(sections, "ichpipe: report of a run"))
    return f"{out}: {out.stat().st_size / 1e6:.1f} MB, opens in any browser, without network"


def _shorten_paths(value: Any) -> Any:
    """Keep only the last part of a path outside the project."""
    if isinstance(value, dict):
        return {key: _shorten_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shorten_paths(item) for item in value]
    outside = isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute())
    return f"…/{Path(value).name}" if outside else value


def _cases(params: Params, artifacts: Artifacts, facts: Facts, count: int, gpu: str) -> Section:
    from ichpipe.report import scores
    from ichpipe.report.page import Section

    section = partial(Section, "cases", "Best and worst cases")
    if facts.test is None or not (artifacts.finetuned / MODEL_FILE).exists():
        return section(["There is no fine-tuned model to look at; run: ichpipe finetune."])
    if not count:
        return section(["Pictures were not asked for (--cases 0)."])
    truth, score = scores.of_studies(facts.test, params.evaluate.study_score, facts.calibration)
    cases = scores.choose_cases(facts.test["series_uid"].drop_duplicates(), truth[:, 0] == 1, score[:, 0], count)

    from ichpipe.common.device import choose_device
    from ichpipe.index.slice_index import read_index
    from ichpipe.inference.heat_maps import Explainer

    try:
        explainer = Explainer(artifacts.finetuned, choose_device(gpu))
        paths = read_index(artifacts.index).set_index("sop_uid")["path"]
        by_series = scores.calibrate(facts.test, facts.calibration).groupby("series_uid")
        pictures = [_picture(explainer, paths, by_series.get_group(case.series_uid), case) for case in cases]
    except (IchpipeError, OSError) as error:
        log.warning("no pictures in the report: %s", error)
        return section(["The slices of these studies can't be read here, so there are no pictures."])
    lines = [
        "Held-out studies by the fine-tuned model's score for any haemorrhage, as predict reports it. Orange: slices "
        "labelled positive. Under each slice the same slice with its heat map, stronger where P is higher. It is no "
        "outline of a bleed."
    ]
    return section(lines, pictures=pictures)


def _picture(explainer: Explainer, paths: pd.Series, rows: pd.DataFrame, case: Case) -> Picture:
    from ichpipe.report.page import as_picture
    from ichpipe.scoring.heldout_predictions import labels_and_probabilities

    series = explainer.embed(paths.loc[rows["sop_uid"]].tolist(), rows["position_mm"].tolist())
    if series.bad:
        raise DataError(series.bad[0][1])
    labels, probabilities = labels_and_probabilities(rows)
    png = explainer.draw(
        series,
        probabilities=probabilities,
        title="",
        note="",
        framed=labels[:, 0] == 1,
        framed_means="labelled positive",
        panels=PANELS,
        columns=4,
        width_in=6.5,
    )
    findings = [name for name, column in zip(CLASSES[1:], labels.T[1:], strict=True) if column.any()]
    labelled = ", ".join(findings) or "none"
    alt = f"Contact sheet of {PANELS} of {len(rows)} slices with heat maps, and P along the head."
    return as_picture(png, alt, f"{case.kind} ({case.score:.3f}). Labelled: {labelled}. Series {case.series_uid}.")
