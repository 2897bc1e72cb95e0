"""Put arms of stage two beside each other: seeds, paired differences, and what of it is noise."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ichpipe.common.artifacts import PREDICTIONS_FILE, RECORD_FILE, Artifacts
from ichpipe.common.errors import DataError
from ichpipe.common.files import atomic_path, read_json, write_json, write_text
from ichpipe.report.figures import arms_figure
from ichpipe.scoring.arm_comparison import Arm, compare_arms, comparison_text
from ichpipe.scoring.heldout_predictions import read_predictions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ichpipe.params.schema import Params

log = logging.getLogger("ichpipe")


def run(params: Params, artifacts: Artifacts, runs: Sequence[Path] = (), baseline: str | None = None) -> str:
    """Write ``compare/arms.json``, ``arms.md`` and ``arms.png``; return the markdown.

    ``runs`` are artifacts folders; none: this run's own. Of several, arms are named ``RUN/ARM``, as they were given.
    """
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
    table = read_predictions(folder, f"ichpipe fit-sequence --arm {folder.name}")
    test = table[table["split"] == "test"]
    if test.empty:
        raise DataError(f"{folder / PREDICTIONS_FILE} holds no test slice with labels; check prepare.test_fraction")
    return Arm(name, test, read_json(folder / RECORD_FILE))


def _default_baseline(params: Params, arms: list[Arm]) -> str:
    wanted = params.evaluate.baseline or params.finetune.arm
    return next((arm.name for arm in arms if arm.name.rpartition("/")[2] == wanted), wanted)
