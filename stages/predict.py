"""Any folder of DICOM to probabilities per slice and per study, from the fine-tuned model alone."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ichpipe.chosen import choose
from ichpipe.classes import CLASSES
from ichpipe.device import choose_device
from ichpipe.embedding import classify_series, to_probabilities
from ichpipe.errors import DataError
from ichpipe.files import atomic_path
from ichpipe.ladder import smooth_series
from ichpipe.models.header import spacing_of
from ichpipe.models.weights import load_end_to_end
from ichpipe.pooling import pool
from ichpipe.progress import track
from ichpipe.scan import scan
from ichpipe.submission import build_submission, read_sample
from ichpipe.thin import stride_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from ichpipe.models.end_to_end import EndToEnd
    from ichpipe.params import SelectionParams
    from ichpipe.pooling import StudyScore

log = logging.getLogger("ichpipe")

IDENTIFIERS = ["patient_id", "study_uid", "series_uid"]
SLICE_COLUMNS = [*IDENTIFIERS, "sop_uid", "slice_index", "position_mm", *CLASSES]
STUDY_COLUMNS = [*IDENTIFIERS, "n_slices", *CLASSES]


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    selection: SelectionParams
    study_score: StudyScore = "max"
    all_series: bool = False  # every series of a study, not the one that stands for it
    kaggle: Path | None = None  # also write the RSNA 2019 submission, of all series
    sample: Path | None = None  # whose rows and order the submission takes
    missing: float | None = None  # probability of slices without a prediction; None: an error


def run(
    paths: Sequence[Path], out: Path, model_dir: Path, options: Options, *, gpu: str = "auto", workers: int = 1
) -> str:
    """Write ``slices.csv``, ``studies.csv``, ``series.csv`` and ``rejected.csv``; return the table of studies as text.

    A series is one sequence, and one series stands for a study unless ``options`` ask for all. Files that can't be
    used are listed with the reason, and the rest goes on; nothing usable at all is an error. A submission that lacks
    slices is refused after the other tables are written.
    """
    # First: a wrong sample is found in seconds, prediction may take hours.
    sample = None if options.sample is None else read_sample(options.sample)
    device = choose_device(gpu)
    model = load_end_to_end(model_dir).to(device)
    spacing = spacing_of(model_dir)
    scanned, rejected = scan(list(paths), workers)
    chosen = choose(scanned, rejected, options.selection, one_per_study=not (options.all_series or options.kaggle))
    slices, undecodable = _predict_all(model, chosen.slices, device, spacing)
    rejected = pd.concat([rejected, chosen.left_out, undecodable], ignore_index=True)
    _write_csv(rejected[["path", "reason"]], out / "rejected.csv")
    _write_csv(chosen.series, out / "series.csv")
    if slices.empty:
        raise DataError(f"none of {len(rejected)} files is a usable CT slice; {out / 'rejected.csv'} says why for each")
    studies = _per_series(slices, options.study_score)
    _write_csv(slices[SLICE_COLUMNS], out / "slices.csv")
    _write_csv(studies[STUDY_COLUMNS], out / "studies.csv")
    if options.kaggle is not None:
        submission = build_submission(slices, rejected, sample, options.missing)
        for remark in submission.remarks:
            log.warning(remark)
        _write_csv(submission.table, options.kaggle)
    return _as_text(studies, chosen.series, len(rejected))


def _predict_all(
    model: EndToEnd, index: pd.DataFrame, device: torch.device, spacing_mm: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    parts, rejected = [index.iloc[:0].assign(**dict.fromkeys(CLASSES, np.nan))], []
    groups = index.groupby("series_uid", sort=False)
    for _, group in track(groups, "predict", len(groups), "series"):
        places = group["position_mm"].to_numpy(np.float64)
        stride = stride_of(places, spacing_mm)
        logits, bad = classify_series(model, group["path"].tolist(), places.tolist(), device, stride=stride)
        rejected += bad
        readable = group[~group["path"].isin([path for path, _ in bad])].reset_index(drop=True)
        table = pd.DataFrame(to_probabilities(logits), columns=list(CLASSES))
        odd = ~np.isfinite(table.to_numpy()).all(axis=1)  # fp16 can overflow
        rejected += [(path, "its prediction is not a number") for path in readable.loc[odd, "path"]]
        readable, table = readable[~odd].reset_index(drop=True), table[~odd].reset_index(drop=True)
        parts.append(pd.concat([readable.drop(columns=list(CLASSES), errors="ignore"), table], axis=1))
    whole = [part for part in parts if len(part)]
    return pd.concat(whole, ignore_index=True) if whole else parts[0], pd.DataFrame(
        rejected, columns=["path", "reason"]
    )


def _per_series(slices: pd.DataFrame, study_score: StudyScore) -> pd.DataFrame:
    groups = slices.groupby(IDENTIFIERS, sort=False)
    table = groups.size().rename("n_slices").reset_index()
    values = pool(smooth_series(slices), np.asarray(groups.ngroup(), dtype=np.intp), len(table), study_score)
    return table.assign(**dict(zip(CLASSES, values.T, strict=True)))


def _write_csv(table: pd.DataFrame, target: Path) -> None:
    """Nine significant digits: with six decimals 1e-8 would be 0, which costs 16 nats more where it is wrong."""
    with atomic_path(target) as temporary:
        table.to_csv(temporary, index=False, float_format="%.9g", lineterminator="\n")


def _as_text(studies: pd.DataFrame, series: pd.DataFrame, n_rejected: int) -> str:
    lines = [f"{'series':<28}{'slices':>7}" + "".join(f"{name[:8]:>10}" for name in CLASSES)]
    for row in studies.to_dict("records"):
        uid = str(row["series_uid"])
        name = uid if len(uid) <= 26 else f"…{uid[-25:]}"
        lines.append(f"{name:<28}{row['n_slices']:>7}" + "".join(f"{row[label]:>10.3f}" for label in CLASSES))
    usable = series[series["n_slices"] > 0]
    if passed_over := int((~usable["chosen"]).sum()):
        lines.append(f"{passed_over} series were passed over for another one of their study; series.csv says why")
    if flawed := int((usable["chosen"] & usable["reason"].str.contains("though: ")).sum()):
        lines.append(f"{flawed} studies have no series without a fault; series.csv says which faults")
    if n_rejected:
        lines.append(f"{n_rejected} files were left out; rejected.csv says why for each")
    return "\n".join(lines)
