"""What the command line of ``ichpipe explain`` takes. Imported with the front door: nothing heavy here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichpipe.common.classes import CLASSES
from ichpipe.stages.options import alone_in

if TYPE_CHECKING:
    from ichpipe.stages.options import Settings


@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the pictures.")
@click.option(
    "--model",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder of a fine-tuned model [ARTIFACTS/finetuned].",
)
@click.option(
    "--class", "class_name", type=click.Choice(CLASSES), default="any", show_default=True, help="Finding to explain."
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Slices with at least this probability are framed.",
)
@click.option("--panels", type=click.IntRange(1, 60), default=18, show_default=True, help="Most slices on one sheet.")
@click.option("--all-series", is_flag=True, help="A sheet for every series of a study, not the one that stands for it.")
def explain(
    settings: Settings,
    paths: tuple[Path, ...],
    out: Path,
    model: Path | None,
    gpu: str,
    workers: int,
    **options: Any,
) -> str:
    """Show where the fine-tuned model looked: one contact sheet per study, with heat maps and P along the head.

    \b
    Example:
      ichpipe explain data/phantom/dicom --out explained
    """
    from ichpipe.stages.explain import Options, run

    chosen = Options(selection=settings.params().prepare.selection, **options)
    with alone_in(out, "explain"):
        return run(paths, out, model or settings.artifacts().finetuned, chosen, gpu=gpu, workers=workers)
