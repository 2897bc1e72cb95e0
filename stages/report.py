"""One page of the run: data, learning, scores, cases, and how it was made.

The page is a function of the run's files alone: no date, no clock. Wall times are those that the stages recorded.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichpipe.common.artifacts import MODEL_FILE
from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError, IchpipeError
from ichpipe.common.files import write_text
from ichpipe.stages.options import gpu_option

if TYPE_CHECKING:
    import pandas as pd

    from ichpipe.common.artifacts import Artifacts
    from ichpipe.inference.heat_maps import Explainer
    from ichpipe.params.schema import Params
    from ichpipe.report.cases import Case
    from ichpipe.report.facts import Facts
    from ichpipe.report.page import Picture, Section
    from ichpipe.stages.options import Settings

log = logging.getLogger("ichpipe")

PANELS, COLUMNS, WIDTH_IN = 8, 4, 6.5
TITLE = "ichpipe: report of a run"


@click.command("report")
@gpu_option
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=None, help="Page [ARTIFACTS/report/index.html]."
)
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
    """Write the page to ``out``, whole or not at all; what the run lacks is a sentence on it. Returns where it lies.

    ``cases`` held-out studies of each kind are shown with heat maps of the fine-tuned model; 0: no pictures. A run
    without any file is a DataError.
    """
    from ichpipe.report import runs, scores
    from ichpipe.report.facts import read_facts
    from ichpipe.report.page import render_page

    facts = read_facts(artifacts, list(params.sequence), shown_params(params))
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
    write_text(out, render_page(sections, TITLE))
    return f"{out}: {out.stat().st_size / 1e6:.1f} MB, opens in any browser, without network"


def shown_params(params: Params) -> dict[str, Any]:
    """Return the parameters as the page shows them: of a path outside the project only its last part."""
    shown: dict[str, Any] = _without_places(params.model_dump(mode="json", by_alias=True))
    return shown


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_places(one) for one in value]
    outside = isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute())
    return f"…/{Path(value).name}" if outside else value


def _cases(params: Params, artifacts: Artifacts, facts: Facts, count: int, gpu: str) -> Section:
    from ichpipe.report import scores
    from ichpipe.report.cases import choose_cases
    from ichpipe.report.page import Section

    section = Section("cases", "Best and worst cases")
    if facts.test is None or not (artifacts.finetuned / MODEL_FILE).exists():
        return Section(section.key, section.title, ["There is no fine-tuned model to look at; run: ichpipe finetune."])
    if not count:
        return Section(section.key, section.title, ["Pictures were not asked for (--cases 0)."])
    truth, score = scores.of_studies(facts.test, params.evaluate.study_score)
    series = facts.test["series_uid"].drop_duplicates()
    chosen = choose_cases(series, truth[:, 0] == 1, score[:, 0], count)
    try:
        pictures = _pictures(artifacts, facts.test, chosen, gpu)
    except (IchpipeError, OSError) as error:
        log.warning("no pictures in the report: %s", error)
        said = "The slices of these studies can't be read here, so there are no pictures."
        return Section(section.key, section.title, [said])
    lines = [
        "Held-out studies by the fine-tuned model's score for any haemorrhage. Orange: slices labelled positive. "
        "Under each slice the same slice with its heat map, stronger where P is higher. It is no outline of a bleed."
    ]
    return Section(section.key, section.title, lines, pictures=pictures)


def _pictures(artifacts: Artifacts, test: pd.DataFrame, chosen: list[Case], gpu: str) -> list[Picture]:
    from ichpipe.common.device import choose_device
    from ichpipe.index.slice_index import read_index
    from ichpipe.inference.heat_maps import Explainer

    explainer = Explainer(artifacts.finetuned, choose_device(gpu))
    paths = read_index(artifacts.index).set_index("sop_uid")["path"]
    return [_picture(explainer, paths, test[test["series_uid"] == case.series_uid], case) for case in chosen]


def _picture(explainer: Explainer, paths: pd.Series, rows: pd.DataFrame, case: Case) -> Picture:
    import numpy as np

    from ichpipe.report.cases import as_picture
    from ichpipe.scoring.heldout_predictions import LABELS

    series = explainer.embed(paths.loc[rows["sop_uid"]].tolist(), rows["position_mm"].tolist())
    if series.bad:
        raise DataError(series.bad[0][1])
    labels = rows[LABELS].to_numpy()
    png = explainer.draw(
        series,
        probabilities=rows[list(CLASSES)].to_numpy(np.float64),
        title="",
        note="",
        framed=labels[:, 0] == 1,
        framed_means="labelled positive",
        panels=PANELS,
        columns=COLUMNS,
        width_in=WIDTH_IN,
    )
    findings = [name for name, column in zip(CLASSES[1:], labels.T[1:], strict=True) if column.any()]
    said = ", ".join(findings) or "none"
    alt = f"Contact sheet of {PANELS} of {len(rows)} slices with heat maps, and P along the head."
    return as_picture(png, alt, f"{case.kind} ({case.score:.3f}). Labelled: {said}. Series {case.series_uid}.")
