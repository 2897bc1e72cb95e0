"""Predicts an index of slices with the fine-tuned model or an ensemble, as tables of probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from ichpipe.common.classes import CLASSES
from ichpipe.common.progress import Counter
from ichpipe.features.embedder import classify_twice, to_probabilities
from ichpipe.index.thin_slices import stride_of
from ichpipe.scoring.model_ladder import smooth_series
from ichpipe.scoring.pooling import pool

if TYPE_CHECKING:
    import torch

    from ichpipe.models.end_to_end import EndToEnd, Ensemble
    from ichpipe.scoring.calibration import Calibration
    from ichpipe.scoring.pooling import StudyScore

IDENTIFIERS: Final = ["patient_id", "study_uid", "series_uid"]
SLICE_COLUMNS: Final = [*IDENTIFIERS, "sop_uid", "slice_index", "position_mm", *CLASSES]
STUDY_COLUMNS: Final = [*IDENTIFIERS, "n_slices", *CLASSES]


def predict_slices(
    model: EndToEnd | Ensemble,
    index: pd.DataFrame,
    device: torch.device,
    spacing_mm: float,
    calibration: Calibration | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predict every series of ``index``, slices in order: its readable rows with six probabilities (float64), 0 to 1.

    ``spacing_mm`` is the slice distance of the training data (``models.header.spacing_of``). Without ``calibration``
    probabilities are the network's own. Also returns ``path, reason`` of slices that can't be decoded, or whose
    prediction is not a number.
    """
    parts, rejected = [index.iloc[:0].assign(**dict.fromkeys(CLASSES, np.nan))], []
    counter = Counter("predict", len(index), "slice")
    for _, group in index.groupby("series_uid", sort=False):
        position_mm = group["position_mm"].to_numpy(np.float64)
        stride = stride_of(position_mm, spacing_mm)
        paths = group["path"].tolist()
        logits, cnn_logits, bad = classify_twice(model, paths, position_mm.tolist(), device, stride=stride)
        readable = group[~group["path"].isin([path for path, _ in bad])]
        values, of_cnn = to_probabilities(logits), to_probabilities(cnn_logits)
        finite = np.isfinite(values + of_cnn).all(axis=1)  # fp16 can overflow
        not_finite = readable["path"].iloc[np.flatnonzero(~finite)]
        rejected += bad + [(path, "its prediction is not a number") for path in not_finite]
        values = calibration.apply(values[finite], of_cnn[finite]) if calibration else values[finite]
        parts.append(readable[finite].assign(**dict(zip(CLASSES, values.T, strict=True))))
        counter.add(len(group))
    counter.close()
    filled = [part for part in parts if len(part)]
    slices = pd.concat(filled, ignore_index=True) if filled else parts[0]
    return slices, pd.DataFrame(rejected, columns=["path", "reason"])


def score_series(slices: pd.DataFrame, study_score: StudyScore = "max") -> pd.DataFrame:
    """Pool the slices of each series to a row with STUDY_COLUMNS; thin series are averaged along z before."""
    groups = slices.groupby(IDENTIFIERS, sort=False)
    table = groups.size().rename("n_slices").reset_index()
    values = pool(smooth_series(slices), np.asarray(groups.ngroup(), dtype=np.intp), len(table), study_score)
    return table.assign(**dict(zip(CLASSES, values.T, strict=True)))[STUDY_COLUMNS]
