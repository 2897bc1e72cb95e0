"""Every step once per fold of patients; the pooled held-out predictions are scored together."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import click

from ichpipe.common.artifacts import RECORD_FILE, Artifacts
from ichpipe.common.errors import ParamsError
from ichpipe.common.files import digest_of, read_json, write_json, write_text
from ichpipe.stages.options import gpu_option, workers_option

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ichpipe.params.schema import Params
    from ichpipe.stages.options import Settings

log = logging.getLogger("ichpipe")


@click.command("cross-validate")
@gpu_option
@workers_option
@click.option("--arms-only", is_flag=True, help="No fine-tuning: the arms of stage two alone, compared.")
@click.pass_obj
def command(settings: Settings, gpu: str, workers: int, *, arms_only: bool) -> str:
    """Run every step once per fold of patients, and score the pooled held-out predictions.

    A model that was trained on the same inputs with the same parameters is kept.

    \b
    Example:
      ichpipe --params params/ct-ich.yaml cross-validate
    """
    params = settings.params()
    with settings.lock_stage("cross-validate", "cv"):
        return run(params, settings.artifacts(), gpu, workers, arms_only=arms_only)


def run(
    params: Params,
    artifacts: Artifacts,
    gpu: str = "auto",
    workers: int = 0,
    *,
    arms_only: bool = False,
    only_folds: Sequence[int] | None = None,
) -> str:
    """Write ``cv/fold-K/…`` per fold and ``cv/metrics``, ``cv/plots``, ``cv/predictions``, ``cv/compare`` over all.

    Each patient is scored once, by models that never saw this patient. The files are scanned every time. A model that
    was trained on the same inputs with the same parameters is kept: an interrupted run goes on, and a changed arm
    alone is trained again. ``arms_only``: no fine-tuning. ``only_folds``: score the patients of these folds alone.
    Returns the ladder of models and the comparison of arms as text.
    """
    from ichpipe.stages import compare, prepare

    numbers = range(params.prepare.folds) if only_folds is None else only_folds
    if absent := set(numbers) - set(range(params.prepare.folds)):
        raise ParamsError(f"prepare.folds is {params.prepare.folds}: there is no fold {min(absent)}")
    whole = Artifacts(artifacts.root / "cv")
    if params.prepare.split == "stage1":
        raise ParamsError("cross-validate makes folds of patients; prepare.split must be patient-kfold, not stage1")
    prepare.run(params.prepare, whole.index_dir, workers, artifacts.resume("prepare"))
    folds: dict[str, tuple[Params, Artifacts]] = {}
    for number in numbers:
        name = f"fold {number + 1} of {params.prepare.folds}"
        prepare_params = params.prepare.model_copy(update={"test_fold": number})
        fold_params = params.model_copy(update={"prepare": prepare_params})
        folds[name] = fold_params, Artifacts(whole.root / f"fold-{number}")
        _fit_fold(name, *folds[name], whole, gpu, workers, arms_only=arms_only)
    for arm in params.sequence:
        _pool_arm([fold.sequence(arm) for _, fold in folds.values()], whole.sequence(arm))
    ladder = "" if arms_only else _score(params, whole, folds) + "\n\n"
    return ladder + compare.run(params, whole)


def _fit_fold(
    name: str, params: Params, artifacts: Artifacts, whole: Artifacts, gpu: str, workers: int, *, arms_only: bool
) -> None:
    import pandas as pd

    from ichpipe.index import index_writer, splits
    from ichpipe.index.scan import REJECTED
    from ichpipe.index.slice_index import read_index
    from ichpipe.stages import ensemble, extract, finetune, fit_sequence, fit_slices

    log.info(name)
    index = splits.assign_splits(read_index(whole.index).drop(columns=["split", "fold"]), params.prepare)
    rejected = pd.read_csv(whole.index_dir / "rejected.csv")
    of_all = read_json(whole.index_dir / "summary.json")
    summary = index_writer.summarise(index, pd.DataFrame(columns=REJECTED))
    summary |= {name: of_all[name] for name in ("files", "rejected", "rejected_by_reason")}
    index_writer.write_outputs(artifacts.index_dir, index, rejected, summary)
    if not fit_slices.is_done(params, artifacts):
        fit_slices.run(params, artifacts, gpu, workers, pretrained=whole.resume("pretrained"))
    extract.run(params, artifacts, gpu, workers)
    for arm in params.sequence:
        if not fit_sequence.is_done(params, artifacts, arm):
            log.info("%s, arm %s", name, arm)
            fit_sequence.run(params, artifacts, arm, gpu)
    if not arms_only and not finetune.is_done(params, artifacts):
        finetune.run(params, artifacts, gpu, workers)
    if not arms_only and params.predict.ensemble and not ensemble.is_done(params, artifacts):
        log.info(ensemble.run(params, artifacts, gpu))


def _pool_arm(folders: Sequence[Path], target: Path) -> None:
    """Put the test predictions of an arm's folds into one table, seed by seed, with a record of all folds."""
    import pandas as pd

    from ichpipe.scoring.heldout_predictions import POOLED, read_predictions, write_predictions

    tables = [read_predictions(folder, "ichpipe cross-validate") for folder in folders]
    test = pd.concat([table[table["split"] == "test"] for table in tables], ignore_index=True)
    write_predictions(test, target, POOLED)
    records = [read_json(folder / RECORD_FILE) for folder in folders]
    seeds = [
        {"seed": parts[0]["seed"], "seconds": round(sum(part["seconds"] for part in parts), 1)}
        for parts in zip(*(record["seeds"] for record in records), strict=True)
    ]
    first = {name: records[0][name] for name in ("arm", "params", "n_parameters", "device", "versions", "commit")}
    store = digest_of([record["store"] for record in records])
    write_json(target / RECORD_FILE, {**first, "store": store, "folds": len(folders), "seeds": seeds})


def _score(params: Params, whole: Artifacts, by_fold: dict[str, tuple[Params, Artifacts]]) -> str:
    import pandas as pd

    from ichpipe.index.slice_index import read_index
    from ichpipe.scoring.heldout_predictions import ENSEMBLE, FINETUNED, SLICE_CNN, sequence_name
    from ichpipe.scoring.model_ladder import ladder_text, score_all
    from ichpipe.stages import evaluate

    for name, (fold_params, fold) in by_fold.items():
        log.info("%s\n%s", name, evaluate.run(fold_params, fold))
    folds = [fold for _, fold in by_fold.values()]
    names = [SLICE_CNN, *(sequence_name(arm) for arm in params.sequence), FINETUNED]
    names += [ENSEMBLE] if params.predict.ensemble else []
    tables = {
        name: pd.concat([pd.read_parquet(fold.predictions / f"{name}.parquet") for fold in folds], ignore_index=True)
        for name in names
    }
    metrics = score_all(tables, params.evaluate, params.finetune.arm)
    metrics["sources"] = evaluate.score_sources(params, read_index(whole.index), tables)
    metrics["folds"] = [read_json(fold.metrics) for fold in folds]
    evaluate.write_scores(whole, metrics, tables)
    text = ladder_text(metrics)
    write_text(whole.metrics.with_name("ladder.txt"), text + "\n")
    return text
