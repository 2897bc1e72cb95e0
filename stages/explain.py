"""A contact sheet per study: where the fine-tuned model looked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.common.files import atomic_path
from ichpipe.common.progress import track
from ichpipe.stages.options import alone_in, gpu_option, workers_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from ichpipe.inference.heat_maps import EmbeddedSeries
    from ichpipe.params.schema import SelectionParams
    from ichpipe.stages.options import Settings


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    selection: SelectionParams
    class_name: str = "any"
    threshold: float = 0.5
    panels: int = 18
    all_series: bool = False


@click.command("explain")
@gpu_option
@workers_option
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
@click.pass_obj
def command(
    settings: Settings,
    /,
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
    chosen = Options(selection=settings.params().prepare.selection, **options)
    with alone_in(out, "explain"):
        return run(paths, out, model or settings.artifacts().finetuned, chosen, gpu=gpu, workers=workers)


def run(
    paths: Sequence[Path], out: Path, model_dir: Path, options: Options, *, gpu: str = "auto", workers: int = 1
) -> str:
    """Write ``study-NNN.png`` for each study, and ``explained.csv`` of what each shows; return the table as text.

    Series are chosen as by ``predict``. The pictures hold no identifier; the table names study and series by UID.
    """
    import pandas as pd

    from ichpipe.common.device import choose_device
    from ichpipe.index.scan import scan
    from ichpipe.index.series_selection import select_series
    from ichpipe.inference.heat_maps import Explainer

    explainer = Explainer(model_dir, choose_device(gpu))
    scanned, rejected = scan(list(paths), workers)
    chosen = select_series(scanned, rejected, options.selection, one_per_study=not options.all_series)
    groups = chosen.slices.groupby("series_uid", sort=False)
    lines: list[dict[str, object]] = []
    bad = [*zip(rejected["path"], rejected["reason"], strict=True)]
    for uid, group in track(groups, "explain", len(groups), "series"):
        series = explainer.embed(group["path"].tolist(), group["position_mm"].tolist())
        bad += series.bad
        if series.paths:
            name = f"study-{len(lines) + 1:03d}"
            picture, probabilities = explainer.sheet(
                series,
                f"Study {len(lines) + 1}",
                class_name=options.class_name,
                threshold=options.threshold,
                panels=options.panels,
            )
            _write(out / f"{name}.png", picture)
            lines.append({"picture": f"{name}.png", "study_uid": group["study_uid"].iloc[0], "series_uid": uid})
            lines[-1] |= _facts(series, probabilities, options)
    if not lines:
        raise DataError(f"none of {len(bad)} files is a usable CT slice; `ichpipe predict` lists why for each")
    table = pd.DataFrame(lines)
    _write(out / "explained.csv", table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode())
    said = _as_text(table, options)
    return f"{said}\n{len(bad)} files were left out; `ichpipe predict` lists why for each" if bad else said


def _facts(series: EmbeddedSeries, probabilities: NDArray[np.float64], options: Options) -> dict[str, object]:
    """Say where a series is positive; mm are positions along the slice normal, empty where it is not."""
    import numpy as np

    own = probabilities[:, CLASSES.index(options.class_name)]
    at = series.position_mm.numpy()
    positive = np.flatnonzero(own >= options.threshold)
    highest = int(np.argmax(own))
    return {
        "class": options.class_name,
        "n_slices": len(own),
        "n_positive": len(positive),
        "probability": float(own[highest]),
        "highest_slice": highest,
        "highest_mm": float(at[highest]),
        "first_positive_mm": float(at[positive[0]]) if positive.size else None,
        "last_positive_mm": float(at[positive[-1]]) if positive.size else None,
    }


def _as_text(table: pd.DataFrame, options: Options) -> str:
    lines = [f"{'picture':<16}{'slices':>7}{f'P({options.class_name})':>20}{'at, mm':>9}{'positive':>10}"]
    lines += [
        f"{row['picture']:<16}{row['n_slices']:>7}{row['probability']:>20.3f}{row['highest_mm']:>9.0f}"
        f"{row['n_positive']:>10}"
        for row in table.to_dict("records")
    ]
    return "\n".join(lines)


def _write(target: Path, content: bytes) -> None:
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)
