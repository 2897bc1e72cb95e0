"""Any folder of DICOM to probabilities per slice and per study, from the fine-tuned model alone."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ichpipe.classes import CLASSES, SUBTYPES
from ichpipe.ct import find_files
from ichpipe.device import choose_device
from ichpipe.embedding import classify_series, to_probabilities
from ichpipe.errors import DataError
from ichpipe.files import atomic_path
from ichpipe.models.weights import load_end_to_end
from ichpipe.progress import track
from ichpipe.studies import scan

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from ichpipe.models.end_to_end import EndToEnd

log = logging.getLogger("ichpipe")

IDENTIFIERS = ["patient_id", "study_uid", "series_uid"]
SLICE_COLUMNS = [*IDENTIFIERS, "sop_uid", "slice_index", "position_mm", *CLASSES]
STUDY_COLUMNS = [*IDENTIFIERS, "n_slices", *CLASSES]


def run(
    paths: Sequence[Path],
    out: Path,
    model_dir: Path,
    *,
    kaggle: Path | None = None,
    gpu: str = "auto",
    workers: int = 1,
) -> str:
    """Write ``slices.csv``, ``studies.csv`` and ``rejected.csv``; return the table of studies as text.

    A series is one sequence; a study with several series has a line for each. Files that can't be used are
    listed with the reason, and the rest goes on; nothing usable at all is an error.
    """
    device = choose_device(gpu)
    model = load_end_to_end(model_dir).to(device)
    index, rejected = scan(find_files(list(paths)), workers)
    slices, undecodable = _predict_all(model, index, device)
    rejected = pd.concat([rejected, undecodable], ignore_index=True)
    _write_csv(rejected, out / "rejected.csv")
    if slices.empty:
        raise DataError(f"none of {len(rejected)} files is a usable CT slice; {out / 'rejected.csv'} says why for each")
    studies = _per_series(slices)
    _write_csv(slices[SLICE_COLUMNS], out / "slices.csv")
    _write_csv(studies[STUDY_COLUMNS], out / "studies.csv")
    if kaggle is not None:
        _write_csv(kaggle_table(slices), kaggle)
    return _as_text(studies, len(rejected))


def kaggle_table(slices: pd.DataFrame) -> pd.DataFrame:
    """Return the RSNA 2019 submission table: ``ID,Label``, six rows a slice, the competition's class order."""
    order = [*SUBTYPES, "any"]
    long = slices.melt(id_vars="sop_uid", value_vars=order, var_name="class", value_name="Label")
    long["ID"] = long["sop_uid"] + "_" + long["class"]
    long["rank"] = long["class"].map({name: rank for rank, name in enumerate(order)})
    return long.sort_values(["sop_uid", "rank"])[["ID", "Label"]]


def _predict_all(model: EndToEnd, index: pd.DataFrame, device: torch.device) -> tuple[pd.DataFrame, pd.DataFrame]:
    parts, rejected = [index.iloc[:0].assign(**dict.fromkeys(CLASSES, np.nan))], []
    groups = index.groupby("series_uid", sort=False)
    for _, group in track(groups, "predict", len(groups), "series"):
        logits, bad = classify_series(model, group["path"].tolist(), device)
        rejected += bad
        readable = group[~group["path"].isin([path for path, _ in bad])].reset_index(drop=True)
        table = pd.DataFrame(to_probabilities(logits), columns=list(CLASSES))
        parts.append(pd.concat([readable.drop(columns=list(CLASSES), errors="ignore"), table], axis=1))
    whole = [part for part in parts if len(part)]
    return pd.concat(whole, ignore_index=True) if whole else parts[0], pd.DataFrame(
        rejected, columns=["path", "reason"]
    )


def _per_series(slices: pd.DataFrame) -> pd.DataFrame:
    grouped = slices.groupby(IDENTIFIERS, sort=False)
    return grouped[list(CLASSES)].max().assign(n_slices=grouped.size()).reset_index()


def _write_csv(table: pd.DataFrame, target: Path) -> None:
    with atomic_path(target) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6f", lineterminator="\n")


def _as_text(studies: pd.DataFrame, n_rejected: int) -> str:
    lines = [f"{'series':<28}{'slices':>7}" + "".join(f"{name[:8]:>10}" for name in CLASSES)]
    for row in studies.to_dict("records"):
        uid = str(row["series_uid"])
        name = uid if len(uid) <= 26 else f"…{uid[-25:]}"
        lines.append(f"{name:<28}{row['n_slices']:>7}" + "".join(f"{row[label]:>10.3f}" for label in CLASSES))
    if n_rejected:
        lines.append(f"{n_rejected} files were left out; rejected.csv says why for each")
    return "\n".join(lines)
