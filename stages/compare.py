"""``ichpipe compare``: compare arms of stage two: seeds, paired differences, and which of them are noise."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ichpipe.common.artifacts import PREDICTIONS_FILE, RECORD_FILE, Artifacts
from ichpipe.common.errors import DataError
from ichpipe.common.files import read_json, write_bytes, write_json, write_text
from ichpipe.stages.options import complete_arm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ichpipe.params.schema import Params
    from ichpipe.scoring.arm_comparison import Arm
    from ichpipe.stages.options import Settings

log = logging.getLogger("ichpipe")


@click.command("compare")
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option(
    "--baseline", metavar="ARM", shell_complete=complete_arm, help="Arm to compare with [params: evaluate.baseline]."
)
@click.pass_obj
def command(settings: Settings, runs: tuple[Path, ...], baseline: str | None) -> str:
    """Put the arms of stage two beside each other: seeds, paired differences, and what of it is noise.

    RUNS are artifacts folders; without any, this run's own.

    \b
    Example:
      ichpipe compare --baseline paper
    """
    return run(settings.params(), settings.artifacts(), runs, baseline)


def run(params: Params, artifacts: Artifacts, runs: Sequence[Path] = (), baseline: str | None = None) -> str:
    """Write ``compare/arms.json``, ``arms.md`` and ``arms.png``; return the markdown.

    ``runs`` are artifacts folders; none: this run's own. Of several, arms are named ``RUN/ARM``, as they were given.
    Where the held-out slices come from several sources, each source is compared by itself, too (``sources``).
    """
    from ichpipe.report.figures import arms_figure
    from ichpipe.scoring.arm_comparison import compare_arms, comparison_text

    roots = list(runs) or [artifacts.root]
    names = list(params.sequence) if roots == [artifacts.root] else None
    arms = [arm for root in roots for arm in read_arms(root, names, prefixed=len(roots) > 1)]
    if baseline is None:
        name = params.evaluate.baseline or params.finetune.arm
        baseline = next((arm.name for arm in arms if arm.name.rpartition("/")[2] == name), name)
    comparison = compare_arms(arms, baseline, **params.evaluate.bootstrap())
    for warning in comparison["warnings"]:
        log.warning("%s", warning)
    text = comparison_text(comparison)
    comparison["sources"] = {}
    for source, parts in by_source(arms, roots).items():
        if baseline not in [arm.name for arm in parts]:
            log.warning("source %s: the baseline %s was not scored on it, so it is not compared", source, baseline)
            continue
        of_source = compare_arms(parts, baseline, **params.evaluate.bootstrap())
        comparison["sources"][source] = of_source
        text += f"\n\n## Source {source}\n\n{comparison_text(of_source)}"
    write_json(artifacts.comparison / "arms.json", comparison)
    write_text(artifacts.comparison / "arms.md", text + "\n")
    write_bytes(artifacts.comparison / "arms.png", arms_figure(comparison))
    return text


def by_source(arms: list[Arm], roots: Sequence[Path]) -> dict[str, list[Arm]]:
    """Return the arms with the held-out slices of one source; nothing where all slices come from one source."""
    from dataclasses import replace

    import pandas as pd

    from ichpipe.index.slice_index import read_index

    indexes = [read_index(Artifacts(root).index) for root in roots if Artifacts(root).index.exists()]
    if not indexes:
        return {}
    of_slice = pd.concat(indexes).drop_duplicates("sop_uid").set_index("sop_uid")["source"]
    sources = [arm.table["sop_uid"].map(of_slice).to_numpy() for arm in arms]
    names = sorted({name for values in sources for name in pd.unique(values) if isinstance(name, str)})
    if len(names) < 2:
        return {}
    return {
        name: [
            replace(arm, table=arm.table[values == name].reset_index(drop=True))
            for arm, values in zip(arms, sources, strict=True)
            if (values == name).any()
        ]
        for name in names
    }


def read_arms(root: Path, names: list[str] | None = None, *, prefixed: bool = False) -> list[Arm]:
    """Read the arms ``names`` below an artifacts folder (None: all trained arms, by name); none is an error."""
    below = Artifacts(root)
    trained = sorted(path.parent.name for path in below.arms.glob(f"*/{PREDICTIONS_FILE}"))
    if not trained:
        raise DataError(f"{below.arms} holds no trained arm; run: ichpipe fit-sequence")
    names = trained if names is None else names
    return [_read_arm(below.sequence(name), f"{root}/{name}" if prefixed else name) for name in names]


def _read_arm(folder: Path, name: str) -> Arm:
    from ichpipe.scoring.arm_comparison import Arm
    from ichpipe.scoring.heldout_predictions import read_predictions

    table = read_predictions(folder, f"ichpipe fit-sequence --arm {folder.name}")
    test = table[table["split"] == "test"]
    if test.empty:
        raise DataError(f"{folder / PREDICTIONS_FILE} holds no test slice with labels; check prepare.test_fraction")
    return Arm(name, test, read_json(folder / RECORD_FILE))
