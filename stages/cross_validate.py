"""Every step once per fold of patients; the pooled held-out predictions are scored together."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pandas as pd

from ichpipe import studies
from ichpipe.artifacts import Artifacts
from ichpipe.errors import ParamsError
from ichpipe.files import digest_of, digest_of_file, read_json, write_json, write_text
from ichpipe.predictions import FINETUNED, SLICE_CNN, ladder_text, score_all, sequence_name, write_table
from ichpipe.stages import evaluate, extract, finetune, fit_sequence, fit_slices, prepare
from ichpipe.studies import read_index

if TYPE_CHECKING:
    from pathlib import Path

    from ichpipe.params import Params

log = logging.getLogger("ichpipe")


def run(params: Params, artifacts: Artifacts, gpu: str = "auto") -> str:
    """Write ``cv/fold-K/…`` per fold and ``cv/metrics``, ``cv/plots``, ``cv/predictions`` over all patients.

    Each patient is scored once, by models that never saw that patient. The files are scanned every time; folds
    that were fitted on the same index with the same parameters are kept, so that an interrupted run goes on.
    Returns the ladder of models as a table of text.
    """
    root = artifacts.root / "cv"
    if params.prepare.split == "stage1":
        raise ParamsError("cross-validate makes folds of patients; prepare.split must be patient-kfold, not stage1")
    prepare.run(params.prepare, Artifacts(root).index_dir, cache=artifacts.resume("prepare"))
    folds = [_fit_fold(params, root, fold, gpu) for fold in range(params.prepare.folds)]
    for number, fold in enumerate(folds, start=1):
        log.info("fold %d of %d\n%s", number, len(folds), evaluate.run(params, fold))
    names = [SLICE_CNN, *(sequence_name(arm) for arm in params.sequence), FINETUNED]
    tables = {name: _pool([fold.predictions / f"{name}.parquet" for fold in folds]) for name in names}
    whole = Artifacts(root)
    metrics = score_all(tables, params.evaluate, params.finetune.arm)
    metrics["folds"] = [read_json(fold.metrics) for fold in folds]
    write_json(whole.metrics, metrics)
    for name, table in tables.items():
        write_table(table, whole.predictions / f"{name}.parquet")
    evaluate.write_plots(whole.plots, metrics, tables)
    text = ladder_text(metrics)
    write_text(whole.metrics.with_name("ladder.txt"), text + "\n")
    return text


def _fit_fold(params: Params, root: Path, fold: int, gpu: str) -> Artifacts:
    chosen = params.model_copy(update={"prepare": params.prepare.model_copy(update={"test_fold": fold})})
    artifacts = Artifacts(root / f"fold-{fold}")
    _split(Artifacts(root), chosen, artifacts)
    fitted_with = chosen.model_dump(mode="json", exclude={"phantom", "evaluate"})
    mark = artifacts.root / "fitted.json"
    key = {"params": digest_of(fitted_with), "index": digest_of_file(artifacts.index)}
    if mark.exists() and read_json(mark) == key:
        log.info("fold %d is fitted", fold)
        return artifacts
    log.info("fold %d of %d", fold + 1, params.prepare.folds)
    fit_slices.run(chosen, artifacts, gpu)
    extract.run(chosen, artifacts, gpu)
    for arm in chosen.sequence:
        fit_sequence.run(chosen, artifacts, arm, gpu)
    finetune.run(chosen, artifacts, gpu)
    write_json(mark, key)
    return artifacts


def _split(whole: Artifacts, chosen: Params, artifacts: Artifacts) -> None:
    """Write the fold's index: that of all patients, split anew."""
    index = studies.assign_splits(read_index(whole.index).drop(columns=["split", "fold"]), chosen.prepare)
    rejected = pd.read_csv(whole.index_dir / "rejected.csv")
    studies.write_outputs(artifacts.index_dir, index, rejected, studies.summarise(index, rejected))


def _pool(paths: list[Path]) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(path) for path in paths], ignore_index=True)
