"""Put arms of stage two beside each other: seeds, paired differences, and what of it is noise."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ichpipe.common.artifacts import PREDICTIONS_FILE, RECORD_FILE, Artifacts
from ichpipe.common.errors import DataError
from ichpipe.common.files import atomic_path, read_json, write_json, write_text
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
    "--baseline",
    metavar="ARM",
    default=None,
    shell_complete=complete_arm,
    help="Arm to compare with [params: evaluate.baseline].",
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
    """
    from ichpipe.report.figures import arms_figure
    from ichpipe.scoring.arm_comparison import compare_arms, comparison_text

    roots = list(runs) or [artifacts.root]
    names = list(params.sequence) if roots == [artifacts.root] else None
    arms = [arm for root in roots for arm in read_arms(root, names, prefixed=len(roots) > 1)]
    wanted = baseline or _default_baseline(params, arms)
    found = compare_arms(arms, wanted, **params.evaluate.bootstrap())
    for warning in found["warnings"]:
        log.warning("%s", warning)
    text = comparison_text(found)
    write_json(artifacts.comparison / "arms.json", found)
    write_text(artifacts.comparison / "arms.md", text + "\n")
    with atomic_path(artifacts.comparison / "arms.png") as temporary:
        temporary.write_bytes(arms_figure(found))
    return text


def read_arms(root: Path, names: list[str] | None = None, *, prefixed: bool = False) -> list[Arm]:
    """Read the arms ``names`` below an artifacts folder (None: all that are there, by name); none is an error."""
    below = Artifacts(root)
    there = sorted(path.parent.name for path in below.arms.glob(f"*/{PREDICTIONS_FILE}"))
    if not there:
        raise DataError(f"{below.arms} holds no trained arm; run: ichpipe fit-sequence")
    chosen = there if names is None else names
    return [_read_arm(below.sequence(name), f"{root}/{name}" if prefixed else name) for name in chosen]


def _read_arm(folder: Path, name: str) -> Arm:
    from ichpipe.scoring.arm_comparison import Arm
    from ichpipe.scoring.heldout_predictions import read_predictions

    table = read_predictions(folder, f"ichpipe fit-sequence --arm {folder.name}")
    test = table[table["split"] == "test"]
    if test.empty:
        raise DataError(f"{folder / PREDICTIONS_FILE} holds no test slice with labels; check prepare.test_fraction")
    return Arm(name, test, read_json(folder / RECORD_FILE))


def _default_baseline(params: Params, arms: list[Arm]) -> str:
    wanted = params.evaluate.baseline or params.finetune.arm
    return next((arm.name for arm in arms if arm.name.rpartition("/")[2] == wanted), wanted)
