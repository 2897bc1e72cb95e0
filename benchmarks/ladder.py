"""The ladder of models, and the pieces of the best recipe one at a time, with several seeds, by cross-validation.

python benchmarks/ladder.py --set prepare.dicom_dir=DIR/dicom --set prepare.labels=DIR/stage_2_train.csv --work WORK
python benchmarks/ladder.py --params params/ladder-phantom.yaml --folds 0 --work WORK

Each seed of each piece is one ``cross-validate`` in a folder of its own below ``--work``; what is there is kept, so
that the command goes on where it was stopped, and several may share the work (``--only PIECE --seeds 0``). The tables
are made of whatever is complete: rungs of the ladder against the slice CNN, pieces against what they are added to.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ichpipe.common.artifacts import RECORD_FILE, Artifacts
from ichpipe.common.files import read_json
from ichpipe.params.schema import Params, load_params
from ichpipe.scoring.arm_comparison import Arm, compare_arms, comparison_text
from ichpipe.scoring.bootstrap import Estimate, Ranking, estimate, resample, resampled_mean
from ichpipe.scoring.heldout_predictions import CLASSES, FINETUNED, LABELS
from ichpipe.scoring.metrics import WEIGHTS, cross_entropies
from ichpipe.stages import cross_validate

if TYPE_CHECKING:
    from collections.abc import Iterable

BASE = "base"
SLICE_CNN = "slice-cnn"
"""Name of the arm that is the slice CNN as it is, and of the baseline of the ladder."""

AUGMENT = {
    "flip_probability": 0.5, "crop_area": 0.8, "crop_aspect": 1.2, "rotation_deg": 25.0, "scale": 0.1, "shift": 0.05,
    "distortion": 0.03, "offset_hu": 3.0, "noise_hu": 3.0, "blur_px": 1.0,
}  # fmt: skip
"""That of params/best.yaml."""

PIECES: dict[str, tuple[str, dict[str, Any]]] = {
    "stronger augmentation": ("fit-slices", {"augment": AUGMENT}),
    "CutMix": ("fit-slices", {"cutmix": {"alpha": 1.0, "probability": 0.5}}),
    "average of weights": ("fit-slices", {"ema_decay": 0.99}),
    "average of weights, end to end": ("finetune", {"ema_decay": 0.99}),
    "each slice augmented for itself": ("finetune", {"augment_together": False}),
    "part by part": ("finetune", {"unfreeze_epochs": 1}),
}
"""Section and changed parameters; pieces of stage two are arms of the parameter file."""


@dataclass(frozen=True)
class Run:
    """One seed of one piece."""

    piece: str
    seed: int
    work: Path

    @property
    def folder(self) -> Path:
        """Its artifacts."""
        return self.work / self.piece.replace(" ", "-").replace(",", "") / f"seed-{self.seed}"

    @property
    def pooled(self) -> Artifacts:
        """Where the predictions of all folds are pooled."""
        return Artifacts(self.folder / "cv")

    def params(self, base: Params) -> Params:
        """Return the parameters: those of the file, the seed everywhere, and the piece."""
        raw = base.model_dump(by_alias=True)
        section, changes = PIECES.get(self.piece, ("", {}))
        if section == "fit-slices":
            raw["sequence"] = {SLICE_CNN: raw["sequence"][SLICE_CNN]}  # networks out of fold would cost five times more
            raw["finetune"]["arm"], raw["fit-slices"]["folds"] = SLICE_CNN, 0
        if section:
            raw[section] |= changes
        for part in (raw["fit-slices"], raw["finetune"], *raw["sequence"].values()):
            part["seed"] = self.seed
        return Params.model_validate(raw)

    def train(self, base: Params, folds: list[int] | None = None) -> None:
        """Run every fold, or some. A piece of the last step starts from the networks of the ladder itself."""
        section = PIECES.get(self.piece, ("", {}))[0]
        if section == "finetune" and not self.folder.exists():
            origin = Run(BASE, self.seed, self.work).folder
            former = shutil.ignore_patterns(FINETUNED, f"{FINETUNED}.parquet")  # its scores are not those of the piece
            shutil.copytree(origin, self.folder, copy_function=_link, ignore=former)
        params, artifacts = self.params(base), Artifacts(self.folder)
        cross_validate.run(params, artifacts, "cpu", arms_only=section == "fit-slices", only_folds=folds)

    def arm(self, name: str) -> pd.DataFrame | None:
        """Return the pooled test predictions of an arm, or of `FINETUNED`; None where it is not complete."""
        path = self.pooled.predictions / f"{FINETUNED}.parquet"
        if name != FINETUNED:
            path = self.pooled.sequence(name) / "predictions.parquet"
        if not path.exists():
            return None
        table = pd.read_parquet(path)
        return table[table["split"] == "test"].assign(seed=self.seed)


def _link(source: str, target: str) -> None:
    os.link(source, target)  # every stage replaces its files and changes none in place


def tables(base: Params, work: Path, seeds: Iterable[int]) -> dict[str, dict[str, Any]]:
    """Compare whatever is complete: four comparisons, each with its baseline."""
    runs = {piece: [Run(piece, seed, work) for seed in seeds] for piece in (BASE, *PIECES)}
    own = {name: _arm(runs[BASE], name, name) for name in (*base.sequence, FINETUNED)}
    by_section: dict[str, list[Arm | None]] = {"fit-slices": [], "finetune": []}
    for piece, (section, _) in PIECES.items():
        of_piece = SLICE_CNN if section == "fit-slices" else FINETUNED
        by_section[section].append(_arm(runs[piece], of_piece, f"{of_piece}, {piece}"))
    rungs = ("moving-average", f"{base.finetune.arm}-in-sample", base.finetune.arm, FINETUNED)
    pieces = [name for name in base.sequence if name not in {SLICE_CNN, *rungs}]
    wanted = {
        "ladder": [own[SLICE_CNN], *(own[name] for name in rungs if name in own)],
        "stage one": [own[SLICE_CNN], *by_section["fit-slices"]],
        "stage two": [own[base.finetune.arm], *(own[name] for name in pieces)],
        "end to end": [own[FINETUNED], *by_section["finetune"]],
    }
    settings = base.evaluate.bootstrap()
    found = {}
    for name, (first, *others) in wanted.items():
        if first is not None:
            arms = [first, *(arm for arm in others if arm is not None)]
            found[name] = compare_arms(arms, first.name, **settings) | {
                "own": [own_scores(arm, settings) for arm in arms]
            }
    return found


def _arm(runs: list[Run], name: str, called: str) -> Arm | None:
    parts = [(run, table) for run in runs if (table := run.arm(name)) is not None]
    if not parts:
        return None
    path = parts[0][0].pooled.sequence(name) / RECORD_FILE
    record = read_json(path) if path.exists() else {}
    kept = {key: record[key] for key in ("n_parameters",) if key in record}
    return Arm(called, pd.concat([table for _, table in parts], ignore_index=True), kept)


def own_scores(arm: Arm, settings: dict[str, Any]) -> dict[str, Any]:
    """Return weighted log loss and AUC of any, mean over seeds, each with its interval over patients."""
    losses, rankings, patient = [], [], np.empty(0, dtype=np.intp)
    for _, part in arm.table.groupby("seed", sort=True):
        rows = part.sort_values("sop_uid")
        true, predicted = rows[LABELS].to_numpy(np.float64), rows[list(CLASSES)].to_numpy(np.float64)
        losses.append(cross_entropies(true, predicted) @ WEIGHTS)
        patient = np.unique(rows["patient_id"].to_numpy(), return_inverse=True)[1]
        rankings.append(Ranking(true[:, 0], predicted[:, 0], patient))
    loss, patients = np.mean(losses, axis=0), int(patient.max()) + 1
    statistics = [resampled_mean(loss, patient, patients), *(ranking.resample for ranking in rankings)]
    drawn, *aucs = resample(statistics, patients, settings["bootstrap_samples"], settings["seed"])
    estimates = {
        "weighted_log_loss": estimate(float(loss.mean()), drawn, settings["confidence"]),
        "auc_any": estimate(
            float(np.mean([ranking.value for ranking in rankings])), np.mean(aucs, axis=0), settings["confidence"]
        ),
    }
    figures = {name: [found.value, found.low, found.high] for name, found in estimates.items()}
    return {"arm": arm.name, "seeds": len(losses), **figures}


def as_text(found: dict[str, dict[str, Any]]) -> str:
    """Return the comparisons as markdown."""
    parts = []
    for name, value in found.items():
        own = [
            f"| {row['arm']} | {row['seeds']} | "
            + " | ".join(Estimate(*row[key]).text() for key in ("weighted_log_loss", "auc_any"))
            for row in value["own"]
        ]
        head = ["| model | seeds | weighted log loss | AUC any, by slice |", "|---|---|---|---|"]
        parts += [f"## {name}", "", *head, *(f"{line} |" for line in own), "", comparison_text(value), ""]
    return "\n".join(parts)


def main() -> None:
    """Train what is asked for, then write ``ladder.json`` and ``ladder.md`` of all that is complete."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--params", type=Path, default=Path("params/ladder.yaml"))
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", metavar="PIECE", help="base, or pieces; none: tables alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folds", type=int, nargs="+", metavar="K", help="go through these folds of patients alone")
    parser.add_argument("--table-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=2000, help="resamples of patients for the tables")
    options = parser.parse_args()
    base = load_params(options.params, tuple(options.overrides), must_exist=True)
    for piece in (BASE, *PIECES) if options.only is None else options.only:
        for seed in options.seeds:
            Run(piece, seed, options.work).train(base, options.folds)
    base = base.model_copy(update={"evaluate": base.evaluate.model_copy(update={"bootstrap_samples": options.samples})})
    found = tables(base, options.work, options.table_seeds)
    (options.work / "ladder.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    text = as_text(found)
    (options.work / "ladder.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
