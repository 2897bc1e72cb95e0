"""``ichpipe explain``: draw a contact sheet per study with heat maps of the fine-tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.common.files import write_bytes, write_text
from ichpipe.common.progress import track
from ichpipe.common.text_table import format_table
from ichpipe.stages.options import FOLDER, PROBABILITY, gpu_option, lock_folder, workers_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ichpipe.params.schema import SelectionParams
    from ichpipe.stages.options import Settings


@click.command("explain")
@gpu_option
@workers_option
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@click.option("--out", type=FOLDER, required=True, help="Folder of the pictures.")
@click.option("--model", type=FOLDER, help="Folder of a fine-tuned model [ARTIFACTS/finetuned].")
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
@click.pass_obj
def command(settings: Settings, /, paths: tuple[Path, ...], out: Path, model: Path | None, **options: Any) -> str:
    """Show where the fine-tuned model looked: one contact sheet per study, with heat maps and P along the head.

    \b
    Example:
      ichpipe explain data/phantom/dicom --out explained
    """
    selection = settings.params().prepare.selection
    with lock_folder(out, "explain"):
        return run(paths, out, model or settings.artifacts().finetuned, selection, **options)


def run(
    paths: Sequence[Path],
    out: Path,
    model_dir: Path,
    selection: SelectionParams,
    *,
    class_name: str,
    threshold: float,
    panels: int,
    all_series: bool,
    gpu: str,
    workers: int,
) -> str:
    """Write ``study-NNN.png`` for each study, and ``explained.csv`` of what each shows; return the table as text.

    Series are chosen as by ``predict``. The pictures hold no identifier; the table names study and series by UID.
    """
    import numpy as np
    import pandas as pd

    from ichpipe.common.device import choose_device
    from ichpipe.index.scan import scan
    from ichpipe.index.series_selection import select_series
    from ichpipe.inference.heat_maps import Explainer

    explainer = Explainer(model_dir, choose_device(gpu))
    scanned, rejected = scan(list(paths), workers)
    chosen = select_series(scanned, rejected, selection, one_per_study=not all_series)
    groups = chosen.slices.groupby("series_uid", sort=False)
    lines: list[dict[str, Any]] = []
    n_bad = len(rejected)
    for uid, group in track(groups, "explain", len(groups), "series"):
        series = explainer.embed(group["path"].tolist(), group["position_mm"].tolist())
        n_bad += len(series.bad)
        if not series.paths:
            continue
        number = len(lines) + 1
        picture, probabilities = explainer.sheet(
            series, f"Study {number}", class_name=class_name, threshold=threshold, panels=panels
        )
        name = f"study-{number:03d}.png"
        write_bytes(out / name, picture)
        own = probabilities[:, CLASSES.index(class_name)]
        position_mm = series.position_mm.numpy()  # along the slice normal
        positive, highest = np.flatnonzero(own >= threshold), int(np.argmax(own))
        lines.append(
            {
                "picture": name,
                "study_uid": group["study_uid"].iloc[0],
                "series_uid": uid,
                "class": class_name,
                "n_slices": len(own),
                "n_positive": len(positive),
                "probability": float(own[highest]),
                "highest_slice": highest,
                "highest_mm": float(position_mm[highest]),
                "first_positive_mm": float(position_mm[positive[0]]) if positive.size else None,
                "last_positive_mm": float(position_mm[positive[-1]]) if positive.size else None,
            }
        )
    if not lines:
        raise DataError(f"none of {n_bad} files is a usable CT slice; `ichpipe predict` lists why for each")
    table = pd.DataFrame(lines)
    write_text(out / "explained.csv", table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    row = "{picture} {n_slices} {probability:.3f} {highest_mm:.0f} {n_positive}"
    head = ["picture", "slices", f"P({class_name})", "at, mm", "positive"]
    text = format_table(head, [row.format_map(line).split() for line in lines])
    return text + (f"\n{n_bad} files were left out; `ichpipe predict` lists why for each" if n_bad else "")
