"""The ladder of models, and the pieces of the best recipe one at a time, with several seeds, by cross-validation.

python benchmarks/ladder.py --set prepare.dicom_dir=DIR/dicom --set prepare.labels=DIR/stage_2_train.csv --work WORK
python benchmarks/ladder.py --params params/ladder-phantom.yaml --folds 0 --work WORK
python benchmarks/ladder.py --params params/ladder-small.yaml --work WORK   # with loose public slices

Each seed of each piece is one ``cross-validate`` in a folder of its own below ``--work``; what is there is kept, so
that the command goes on where it was stopped, and several may share the work (``--only PIECE --seeds 0``). The tables
are made of whatever is complete: rungs of the ladder against the slice CNN, pieces against what they are added to.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from ichpipe.common.artifacts import RECORD_FILE, Artifacts
from ichpipe.common.files import digest_of_file, read_json
from ichpipe.features.embedder import predict_held_out
from ichpipe.index.slice_index import read_index
from ichpipe.models.end_to_end import EndToEnd, Ensemble
from ichpipe.models.header import fold_models
from ichpipe.models.weights import load_sequence, load_slice_cnn
from ichpipe.params.schema import Params, load_params
from ichpipe.scoring.arm_comparison import Arm, compare_arms, comparison_text
from ichpipe.scoring.bootstrap import Estimate, Ranking, estimate, resample, resampled_mean
from ichpipe.scoring.calibration import fit_calibration
from ichpipe.scoring.heldout_predictions import (
    CLASSES,
    ENSEMBLE,
    FINETUNED,
    LABELS,
    SLICE_COLUMNS,
    known_slices,
    make_table,
    own_predictions,
    write_table,
)
from ichpipe.scoring.metrics import WEIGHTS, calibration_error, cross_entropies, score
from ichpipe.stages import cross_validate

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from numpy.typing import NDArray

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

ALONE = "stage one alone"
"""The piece that changes nothing: the slice CNN without the networks of the folds and without the last step."""

SMALL_PIECES: dict[str, tuple[str, Any]] = {
    ALONE: ("fit-slices", {}),
    "adjacent slices": ("fit-slices", {"neighbours": 1}),
    "the whole image": ("prepare", {"crop": "none", "mm_per_px": None}),
    "192 px": ("prepare", {"size_px": 192, "mm_per_px": 1.04167}),
    "the paper's windows": (
        "windows",
        [{"level_hu": level, "width_hu": width} for level, width in ((40.0, 80.0), (75.0, 215.0), (600.0, 2800.0))],
    ),
    "no average of weights": ("fit-slices", {"ema_decay": 0.0}),
    "no loss on the slice CNN": ("finetune", {"slice_loss": 0.0}),
    "on patients it has seen": ("finetune", {"out_of_fold": False}),
    "one epoch": ("finetune", {"epochs": 1}),
}
"""The same for params/small.yaml, whose stage one begins with loose slices."""

BLEND = "ensemble with blend"
OF_FOLDS = "mean of the folds' networks, before fine-tuning"
"""What finetune.out_of_fold begins with."""


def pieces_of(base: Params) -> dict[str, tuple[str, Any]]:
    """Return the pieces that a parameter file asks for."""
    return SMALL_PIECES if base.prepare.sources else PIECES


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
        section, changes = pieces_of(base).get(self.piece, ("", {}))
        if section not in {"", "finetune"}:
            raw["sequence"] = {SLICE_CNN: raw["sequence"][SLICE_CNN]}  # networks out of fold would cost five times more
            raw["finetune"] |= {"arm": SLICE_CNN, "out_of_fold": False}
            raw["fit-slices"]["folds"], raw["predict"]["ensemble"] = 0, False
        if section:
            raw[section] = raw[section] | changes if isinstance(changes, dict) else changes
        for part in (raw["fit-slices"], raw["finetune"], *raw["sequence"].values()):
            part["seed"] = self.seed
        return Params.model_validate(raw)

    def train(self, base: Params, folds: list[int] | None = None) -> None:
        """Run every fold, or some. A piece of the last step starts from the networks of the ladder itself."""
        section = pieces_of(base).get(self.piece, ("", {}))[0]
        if section == "finetune" and not self.folder.exists():
            origin = Run(BASE, self.seed, self.work).folder
            former = shutil.ignore_patterns(FINETUNED, f"{FINETUNED}.parquet")  # its scores are not those of the piece
            shutil.copytree(origin, self.folder, copy_function=_link, ignore=former)
        params, artifacts = self.params(base), Artifacts(self.folder)
        arms_only = section not in {"", "finetune"}
        cross_validate.run(params, artifacts, "cpu", arms_only=arms_only, only_folds=folds)
        if params.finetune.out_of_fold:
            numbers = range(params.prepare.folds) if folds is None else folds
            parts = [self._score_start(params, number) for number in numbers]
            write_table(pd.concat(parts, ignore_index=True), self.pooled.predictions / f"{OF_FOLDS}.parquet")

    def _score_start(self, params: Params, fold: int) -> pd.DataFrame:
        """Return the test predictions of the networks that the last step of one fold of patients begins with."""
        fitted = params.model_copy(update={"prepare": params.prepare.model_copy(update={"test_fold": fold})})
        artifacts = Artifacts(self.pooled.root / f"fold-{fold}")
        index = read_index(artifacts.index)
        cnns = fold_models(artifacts, fitted, digest_of_file(artifacts.index)).values()
        arm = artifacts.sequence(params.finetune.arm)
        model = Ensemble([EndToEnd(load_slice_cnn(folder), load_sequence(arm)) for folder in cnns])
        rows = known_slices(index, "test")
        return make_table(rows, *predict_held_out(model, rows, torch.device("cpu")))

    def arm(self, name: str, *, average_seeds: bool = False) -> pd.DataFrame | None:
        """Return the pooled test predictions of an arm, or of a final model; None where it is not complete.

        An arm of several seeds counts as its model does: the mean of all (``average.seeds``), or the first.
        """
        path = self.pooled.sequence(name) / "predictions.parquet"
        if name in {OF_FOLDS, FINETUNED, ENSEMBLE, BLEND}:
            path = self.pooled.predictions / f"{ENSEMBLE if name == BLEND else name}.parquet"
        if not path.exists():
            return None
        table = pd.read_parquet(path)
        own = (
            own_predictions(table, average_seeds=average_seeds) if "seed" in table else table[table["split"] == "test"]
        )
        table = own.assign(seed=self.seed)
        if name == BLEND:
            fold = read_index(self.pooled.index).set_index("sop_uid")["fold"]
            return blend(table, table["sop_uid"].map(fold).to_numpy())
        return table


def _link(source: str, target: str) -> None:
    os.link(source, target)  # every stage replaces its files and changes none in place


def blend(table: pd.DataFrame, fold: NDArray[np.int32]) -> pd.DataFrame:
    """Blend the test predictions of a model with its slice CNN's, by class: each fold by the weights of the others."""
    classes, result = list(CLASSES), table.copy()
    labels, own, of_cnn = (table[names].to_numpy(np.float64) for names in (LABELS, classes, SLICE_COLUMNS))
    patients = table["patient_id"].to_numpy(object)
    for number in np.unique(fold):
        inside, rest = fold == number, fold != number
        fitted = fit_calibration(labels[rest], own[rest], patients[rest], "none", "", of_cnn[rest])
        result.loc[inside, classes] = fitted.apply(own[inside], of_cnn[inside])
    return result


def tables(base: Params, work: Path, seeds: Iterable[int]) -> dict[str, dict[str, Any]]:
    """Compare whatever is complete: four comparisons, each with its baseline."""
    pieces_here = pieces_of(base)
    runs = {piece: [Run(piece, seed, work) for seed in seeds] for piece in (BASE, *pieces_here)}
    first = (OF_FOLDS,) if base.finetune.out_of_fold else ()
    last = (*first, FINETUNED, *((ENSEMBLE, BLEND) if base.predict.ensemble else ()))
    averaged = {name for name, section in base.sequence.items() if section.average.seeds}
    own = {name: _arm(runs[BASE], name, name, averaged) for name in (*base.sequence, *last)}
    by_section: dict[str, list[Arm | None]] = {"fit-slices": [], "finetune": []}
    for piece, (section, _) in pieces_here.items():
        of_piece = FINETUNED if section == "finetune" else SLICE_CNN
        listed = by_section["finetune" if section == "finetune" else "fit-slices"]
        listed.append(_arm(runs[piece], of_piece, f"{of_piece}, {piece}"))
    rungs = ("moving-average", f"{base.finetune.arm}-in-sample", base.finetune.arm, *last)
    pieces = [name for name in base.sequence if name not in {SLICE_CNN, *rungs}]
    wanted = {
        "ladder": [own[SLICE_CNN], *(own[name] for name in rungs if name in own)],
        "stage one": by_section["fit-slices"] if ALONE in pieces_here else [own[SLICE_CNN], *by_section["fit-slices"]],
        "stage two": [own[base.finetune.arm], *(own[name] for name in pieces)],
        "end to end": [own[FINETUNED], *by_section["finetune"]],
    }
    settings = base.evaluate.bootstrap()
    found = {}
    for name, (baseline, *others) in wanted.items():
        if baseline is not None:
            arms = [baseline, *(arm for arm in others if arm is not None)]
            found[name] = compare_arms(arms, baseline.name, **settings) | {
                "own": [own_scores(arm, settings) for arm in arms]
            }
            if name == "ladder":  # each rung against the one before
                pairs = itertools.pairwise(arms)
                found[name]["steps"] = [compare_arms(pair, pair[0].name, **settings)["arms"][1] for pair in pairs]
    return found


def _arm(runs: list[Run], name: str, called: str, averaged: Collection[str] = ()) -> Arm | None:
    parts = [(run, table) for run in runs if (table := run.arm(name, average_seeds=name in averaged)) is not None]
    if not parts:
        return None
    path = parts[0][0].pooled.sequence(name) / RECORD_FILE
    record = read_json(path) if path.exists() else {}
    kept = {key: record[key] for key in ("n_parameters",) if key in record}
    return Arm(called, pd.concat([table for _, table in parts], ignore_index=True), kept)


def own_scores(arm: Arm, settings: dict[str, Any]) -> dict[str, Any]:
    """Return weighted log loss and AUC of any, mean over seeds, each with its interval over patients.

    Beside them AUC of any by series (the highest of its slices) and calibration error of any, without an interval.
    """
    losses, rankings, patient = [], [], np.empty(0, dtype=np.intp)
    of_study, errors = [], []
    for _, part in arm.table.groupby("seed", sort=True):
        rows = part.sort_values("sop_uid")
        true, predicted = rows[LABELS].to_numpy(np.float64), rows[list(CLASSES)].to_numpy(np.float64)
        losses.append(cross_entropies(true, predicted) @ WEIGHTS)
        patient = np.unique(rows["patient_id"].to_numpy(), return_inverse=True)[1]
        rankings.append(Ranking(true[:, 0], predicted[:, 0], patient))
        pooled = score(true, predicted, rows["patient_id"], rows["series_uid"], bootstrap_samples=2)["study_auc"]
        of_study.append(pooled["any"]["value"])
        errors.append(calibration_error(true[:, 0], predicted[:, 0]))
    loss, patients = np.mean(losses, axis=0), int(patient.max()) + 1
    statistics = [resampled_mean(loss, patient, patients), *(ranking.resample for ranking in rankings)]
    drawn, *aucs = resample(statistics, patients, settings["bootstrap_samples"], settings["seed"])
    estimates = {
        "weighted_log_loss": estimate(float(loss.mean()), drawn, settings["confidence"]),
        "auc_any": estimate(
            float(np.mean([ranking.value for ranking in rankings])), np.mean(aucs, axis=0), settings["confidence"]
        ),
    }
    figures: dict[str, Any] = {name: [found.value, found.low, found.high] for name, found in estimates.items()}
    figures["study_auc_any"] = None if None in of_study else float(np.mean(of_study))
    figures["calibration_error_any"] = float(np.mean(errors))
    return {"arm": arm.name, "seeds": len(losses), **figures}


def as_text(found: dict[str, dict[str, Any]]) -> str:
    """Return the comparisons as markdown."""
    parts = []
    for name, value in found.items():
        own = [
            f"| {row['arm']} | {row['seeds']} | "
            + " | ".join(Estimate(*row[key]).text() for key in ("weighted_log_loss", "auc_any"))
            + f" | {Estimate(row['study_auc_any']).text()} | {row['calibration_error_any']:.3f}"
            for row in value["own"]
        ]
        head = [
            "model",
            "seeds",
            "weighted log loss",
            "AUC any, by slice",
            "AUC any, by study",
            "calibration error any",
        ]
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"{line} |" for line in own)]
        parts += [f"## {name}", "", *lines, "", comparison_text(value), ""]
        if value.get("steps"):
            parts += ["Each rung against the one before (positive: better), log loss and AUC any:", ""]
            for row in value["steps"]:
                gains = [
                    Estimate.from_json(row["gain"][key]).text(sign="+") for key in ("weighted_log_loss", "auc_any")
                ]
                parts.append(f"* {row['arm']}: {gains[0]}, {gains[1]}")
            parts.append("")
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
    for piece in (BASE, *pieces_of(base)) if options.only is None else options.only:
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
