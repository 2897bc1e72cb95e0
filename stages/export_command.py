"""What the command line of ``ichpipe export`` takes. Imported with the front door: nothing heavy here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ichpipe.stages.options import alone_in

if TYPE_CHECKING:
    from ichpipe.stages.options import Settings


@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=None, help="Folder [ARTIFACTS/export]."
)
@click.option("--onnx", is_flag=True, help="Also model.onnx, compared with the network under onnxruntime.")
def export(settings: Settings, out: Path | None, *, onnx: bool) -> str:
    """Write the fine-tuned model as a folder to hand on: weights and model card.

    \b
    Example:
      ichpipe export --out model --onnx
    """
    from ichpipe.stages.export import run

    params, artifacts = settings.params(), settings.artifacts()
    folder = out or artifacts.root / "export"
    with alone_in(folder, "export"):
        return run(params, artifacts, folder, onnx=onnx)
