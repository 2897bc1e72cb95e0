"""End every stage at random moments, run it again, and compare all that it wrote with an undisturbed run's, by byte.

python benchmarks/stage_kills.py --kills 100 --out stage-kills.json

Each stage is a real process on a tiny phantom. It is ended once or more, by SIGKILL, SIGTERM or SIGINT (to the process
or, as a terminal does, to its whole group), after a drawn time or at a drawn change of its files; then it runs to its
end. Stages that can use processes do so half of the time. Not compared are the wall times in records, and the pictures
of heat maps, whose gradients depend in their last bits on where memory lies: they must be whole.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import killing

PARAMS = """
phantom: {studies: 8, size_px: 32, seed: 3}
prepare: {dicom_dir: data/dicom, labels: data/stage_2_train.csv, size_px: 32, val_fraction: 0.2, test_fraction: 0.3,
  folds: 2}
fit-slices: {backbone: resnet10t, epochs: 2, batch_size: 32, precision: fp32}
extract: {chunk_rows: 24, batch_size: 24}
sequence:
  paper: {cell: lstm, hidden: 8, layers: 2, epochs: 2, dropout: 0.1}
  floor: {cell: average, inputs: [logits]}
finetune: {arm: paper, epochs: 2, chunk_slices: 9}
evaluate: {bootstrap_samples: 20}
"""

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TIMES = ("wall_seconds", "folds_wall_seconds", "seconds", "seconds_per_seed")
LEFT = ("tmp", ".partial")


@dataclass(frozen=True)
class Stage:
    """A command, in as many ways as give the same files, and the files and folders that it writes."""

    name: str
    commands: tuple[str, ...]
    outputs: tuple[str, ...]

    def watched(self, folder: Path) -> list[Path]:
        """Return the folders that change while it runs."""
        return [folder / output for output in (*self.outputs, "artifacts/.resume")]


_EVALUATED = tuple(f"artifacts/{name}" for name in ("metrics", "plots", "predictions", "compare", "finetuned"))
STAGES = (
    Stage("phantom", ("phantom --out data",), ("data",)),
    Stage("prepare", ("prepare",), ("artifacts/index",)),
    Stage("fit-slices", ("fit-slices", "fit-slices --workers 1"), ("artifacts/slice-cnn",)),
    Stage("extract", ("extract", "extract --workers 2"), ("artifacts/embeddings.zarr",)),
    Stage("fit-sequence", ("fit-sequence",), ("artifacts/sequence",)),
    Stage("finetune", ("finetune", "finetune --workers 1"), ("artifacts/finetuned",)),
    Stage("evaluate", ("evaluate",), _EVALUATED),
    Stage("report", ("report --cases 1",), ("artifacts/report",)),
    Stage("export", ("export --out model",), ("model",)),
    Stage("predict", ("predict data/dicom --out predicted --kaggle predicted/kaggle.csv",), ("predicted",)),
    Stage("explain", ("explain data/dicom --out explained --panels 2",), ("explained",)),
    Stage("cross-validate", ("cross-validate --arms-only",), ("artifacts/cv",)),
)


@dataclass
class Tally:
    """What was counted."""

    stages: Counter[str] = field(default_factory=Counter)
    signals: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    resumed: int = 0  # kills after which the stage ended with the bytes of the undisturbed run
    wrong: list[str] = field(default_factory=list)

    def note(self, wrong: str) -> None:
        """Keep what is wrong, and say it at once."""
        self.wrong.append(wrong)
        print(wrong, file=sys.stderr)

    @property
    def kills(self) -> int:
        """Return how many commands were ended."""
        return sum(self.stages.values())


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="*", default=[stage.name for stage in STAGES], help="only these are ended")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(Path(folder), options.kills, options.seed, options.stages)
    text = json.dumps(result, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


def run(folder: Path, kills: int, seed: int, names: list[str]) -> dict[str, Any]:
    """Return counts. Rounds through all stages follow each other until there were ``kills``."""
    started, draw, tally = time.monotonic(), random.Random(seed), Tally()  # noqa: S311
    chosen = [stage for stage in STAGES if stage.name in names]
    last = STAGES.index(chosen[-1])
    whole = folder / "whole"
    facts = {stage.name: _undisturbed(whole, stage) for stage in STAGES[: last + 1]}
    rounds = 0
    while tally.kills < kills:
        here = folder / f"round-{rounds}"
        _begin(here)
        for stage in STAGES[: last + 1]:
            if stage in chosen and tally.kills < kills:
                _disturbed(here, whole, stage, facts[stage.name], draw, tally)
            _take(whole, here, stage)
        shutil.rmtree(here)
        rounds += 1
        print(f"{tally.kills} kills, {len(tally.wrong)} wrong, {time.monotonic() - started:.0f} s", file=sys.stderr)
    return {
        "kills": tally.kills,
        "resumed_to_the_same_bytes": tally.resumed,
        "rounds": rounds,
        "by_stage": dict(tally.stages),
        "by_signal": dict(tally.signals),
        "ends": dict(tally.ends),
        "wrong": tally.wrong,
        "seconds": round(time.monotonic() - started),
    }


def _begin(folder: Path) -> None:
    folder.mkdir()
    (folder / "params.yaml").write_text(PARAMS)


def _line(command: str) -> list[str]:
    return [sys.executable, "-m", "ichpipe.stages.cli", *command.split()]


def _undisturbed(folder: Path, stage: Stage) -> tuple[float, int]:
    """Run a stage; return its seconds and how many changes of its files were seen."""
    if not folder.exists():
        _begin(folder)
    begun, seen = time.monotonic(), 0
    with killing.start(_line(stage.commands[0]), folder) as process:
        for count in killing.changes(stage.watched(folder), process):
            seen = count
        _, stderr = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"{stage.name}, undisturbed, failed: {stderr}")
    seconds = time.monotonic() - begun
    print(f"{stage.name}: {seconds:.1f} s, {seen} changes", file=sys.stderr)
    return seconds, seen


def _disturbed(
    here: Path, whole: Path, stage: Stage, facts: tuple[float, int], draw: random.Random, tally: Tally
) -> None:
    """End a stage two or three times, let it run to its end, and compare."""
    before = tally.kills
    for _ in range(draw.choice((2, 2, 3))):
        number, command = draw.choice(SIGNALS), draw.choice(stage.commands)
        group = number == signal.SIGINT or (number == signal.SIGTERM and draw.random() < 0.5)
        wait = (
            killing.wait_for_changes(stage.watched(here), draw.randint(1, max(1, facts[1])), draw)
            if draw.random() < 0.5
            else killing.wait_seconds(draw.uniform(0.1, 1.05) * facts[0])
        )
        found = killing.strike(_line(command), here, number, wait, group=group)
        tally.ends[_kind(found, number)] += 1
        if found.strays:
            tally.note(f"{stage.name}: {found.strays} processes left by {number.name}")
        if "Traceback" in found.stderr and found.code != -number:
            tally.note(f"{stage.name}: {number.name}: {found.stderr[-3000:]}")
        if found.alive and found.code != 0:
            tally.stages[stage.name] += 1
            tally.signals[number.name] += 1
    with killing.start(_line(draw.choice(stage.commands)), here) as process:
        _, stderr = process.communicate()
    differences = [f"{stage.name}: {stderr[-800:]}"] if process.returncode else compare(here, whole, stage)
    for one in differences:
        tally.note(one)
    tally.resumed += 0 if differences else tally.kills - before


def _kind(found: killing.Struck, number: signal.Signals) -> str:
    if not found.alive or found.code == 0:
        return "had ended before"
    if number == signal.SIGKILL:
        return "killed"
    if found.code == 128 + number and found.stderr.rstrip().endswith("; the same command goes on"):
        return f"one line, exit code {found.code}"
    if found.code == -number:
        return f"{number.name} before the command had begun"
    return f"{number.name}: exit code {found.code}: {found.stderr[-300:]}"


def compare(here: Path, whole: Path, stage: Stage) -> list[str]:
    """Name the files that differ, are too many or too few."""
    found, wanted = (_files(root, stage) for root in (here, whole))
    wrong = [f"{stage.name}: only here: {name}" for name in sorted(found.keys() - wanted.keys())]
    wrong += [f"{stage.name}: not here: {name}" for name in sorted(wanted.keys() - found.keys())]
    both = sorted(found.keys() & wanted.keys())
    wrong += [f"{stage.name}: differs: {name}" for name in both if _content(found[name]) != _content(wanted[name])]
    left = [path for output in stage.outputs for path in (here / output).rglob("*") if path.name.endswith(LEFT)]
    return wrong + [f"{stage.name}: left behind: {path.name}" for path in left]


def _files(root: Path, stage: Stage) -> dict[str, Path]:
    paths = [path for output in stage.outputs for path in (root / output).rglob("*") if path.is_file()]
    files = {str(path.relative_to(root)): path for path in paths if not _is_said_with_times(path)}
    if stage.name == "finetune":  # `evaluate` puts it there
        files.pop("artifacts/finetuned/calibration.json", None)
    return files


def _is_said_with_times(path: Path) -> bool:
    """The comparison of arms as text and picture says how long each trained; the same numbers stand in its JSON."""
    in_cross_validation = "cv" in path.parts and path.name in ("arms.md", "arms.png")
    return in_cross_validation or path.name.endswith((".lock", ".pid", *LEFT))


def _content(path: Path) -> Any:
    content = path.read_bytes()
    if path.name in ("record.json", "arms.json"):
        return _without_times(json.loads(content))
    if path.suffix == ".html":
        return re.sub(rb'src="data:[^"]*"', b"", content)
    if path.parent.name == "explained" and path.suffix == ".png":
        return Image.open(path).convert("RGB").size  # decodes all of it
    return content


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(one) for key, one in value.items() if key not in TIMES}
    return [_without_times(one) for one in value] if isinstance(value, list) else value


def _take(whole: Path, here: Path, stage: Stage) -> None:
    """Go on from the undisturbed run's files: wall times in records would show in all that follows."""
    for output in stage.outputs:
        shutil.rmtree(here / output, ignore_errors=True)
        shutil.copytree(whole / output, here / output)


if __name__ == "__main__":
    main()
