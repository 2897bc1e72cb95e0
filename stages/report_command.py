"""What the command line of ``ichpipe report`` takes. Imported with the front door: nothing heavy here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ichpipe.stages.options import Settings


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
def report(settings: Settings, out: Path | None, cases: int, gpu: str) -> str:
    """Write one self-contained HTML page of the run: data, learning, scores, cases. What is missing, it says.

    \b
    Example:
      ichpipe report
    """
    from ichpipe.stages.report import run

    artifacts = settings.artifacts()
    page = out or artifacts.root / "report" / "index.html"
    return run(settings.params(), artifacts, page, cases=cases, gpu=gpu)
