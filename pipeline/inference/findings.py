"""Finds where along the head each class is positive; formats predictions.json, and the table on 80 columns."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ichpipe.common.artifacts import MODEL_FILE
from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import NotCtError
from ichpipe.common.files import digest_of_file, installed_versions
from ichpipe.scoring.model_ladder import smooth_series

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import pandas as pd

    from ichpipe.scoring.calibration import Calibration

PACKAGE_VERSION: Final = installed_versions(["ichpipe"]).get("ichpipe", "unknown")
FORMAT: Final = "ichpipe-predictions"
FORMAT_VERSION: Final = 1
DIGITS: Final = 9
WIDTH: Final = 80
MAX_FULL_STUDIES: Final = 10  # of more studies than this, only ``any`` and positive classes are shown
MAX_REFUSED: Final = 10  # studies that a message names
UID_WIDTH: Final = 23


@dataclass(frozen=True)
class Extent:
    """The slices of one series in which one class is positive."""

    sop_uids: tuple[str, ...]  # slices at or above the threshold, in order
    first_mm: float | None  # lowest position of these along the slice normal, from the feet up; None without any
    last_mm: float | None
    highest: str  # SOPInstanceUID of the slice with the largest probability


@dataclass(frozen=True)
class Provenance:
    """The model and the rules that made the predictions."""

    model_sha256: str
    calibration: str  # none, temperature, isotonic, absent (nothing beside the model) or left out (by request)
    calibrated: tuple[str, ...]  # classes that have a map
    threshold: float
    study_score: str
    blended: Mapping[str, float] = field(default_factory=dict)  # classes mixed with the slice CNN: the model's share

    def describe_calibration(self) -> str:
        """Describe how probabilities were blended and calibrated."""
        shares = ", ".join(f"{name} {1 - share:.2f}" for name, share in self.blended.items())
        return self._describe_map() + (f"; share of the slice CNN: {shares}" if shares else "")

    def _describe_map(self) -> str:
        texts = {
            "absent": "not calibrated: no calibration.json beside the model (ichpipe evaluate writes it)",
            "left out": "not calibrated, as asked",
            "none": "not calibrated (evaluate.calibration: none)",
        }
        if self.calibration in texts:
            return texts[self.calibration]
        if not self.calibrated:
            return f"not calibrated: too few validation patients for {self.calibration} (calibration.json)"
        classes = "" if len(self.calibrated) == len(CLASSES) else f" of {', '.join(self.calibrated)}"
        return f"calibrated: {self.calibration}{classes}"


@dataclass(frozen=True)
class Predicted:
    """The results of all inputs."""

    slices: pd.DataFrame  # SLICE_COLUMNS and more
    studies: pd.DataFrame  # STUDY_COLUMNS
    series: pd.DataFrame  # one row a series: facts, ``chosen``, ``reason``
    refused: pd.DataFrame  # REFUSED_COLUMNS
    rejected: pd.DataFrame  # path, reason, code
    forced: Mapping[str, str]  # by series UID: why it would have been refused
    where: Mapping[str, Mapping[str, Extent]]  # by series UID and class
    provenance: Provenance


def make_provenance(
    model_dir: Path, calibration: Calibration | None, *, uncalibrated: bool, threshold: float, study_score: str
) -> Provenance:
    """Describe how the model in a folder predicts; ``uncalibrated`` if its calibration was left out by request."""
    return Provenance(
        model_sha256=digest_of_file(model_dir / MODEL_FILE),
        calibration=calibration.method if calibration else "left out" if uncalibrated else "absent",
        calibrated=calibration.mapped if calibration else (),
        blended=calibration.blended if calibration else {},
        threshold=threshold,
        study_score=study_score,
    )


def extents(slices: pd.DataFrame, threshold: float) -> dict[str, dict[str, Extent]]:
    """Return the extent of each class, by series UID and class.

    ``slices`` holds identifiers, ``position_mm`` and six probabilities, each series in slice order. Slices from
    ``threshold`` on are positive. Thin series are averaged along z first, as for the study's score.
    """
    values = smooth_series(slices)
    position_mm, uids = slices["position_mm"].to_numpy(np.float64), slices["sop_uid"].to_numpy(object)
    by_series: dict[str, dict[str, Extent]] = {}
    for series_uid, indices in slices.groupby("series_uid", sort=False).indices.items():
        rows = np.asarray(indices, dtype=np.intp)
        by_class = by_series[str(series_uid)] = {}
        for name, column in zip(CLASSES, values[rows].T, strict=True):
            positive = rows[column >= threshold]
            mm = position_mm[positive]
            first, last = (float(mm.min()), float(mm.max())) if mm.size else (None, None)
            highest = str(uids[rows[int(np.argmax(column))]])
            by_class[name] = Extent(tuple(map(str, uids[positive])), first, last, highest)
    return by_series


def build_document(result: Predicted) -> dict[str, Any]:
    """Build predictions.json as docs/predict.md lists it. It holds no date: same input, same document."""
    forced, provenance = result.forced, result.provenance
    reasons = result.series.set_index("series_uid")["reason"]
    parts = {str(uid): part for uid, part in result.slices.groupby("series_uid", sort=False)}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "ichpipe": PACKAGE_VERSION,
        "model_sha256": provenance.model_sha256,
        "calibration": {
            "method": provenance.calibration,
            "classes": list(provenance.calibrated),
            "blend": provenance.blended,
        },
        "threshold": provenance.threshold,
        "study_score": provenance.study_score,
        "forced": bool(forced),
        "studies": [
            {
                **{name: row[name] for name in ("patient_id", "study_uid", "series_uid")},
                "series_reason": str(reasons[row["series_uid"]]),
                "n_slices": int(row["n_slices"]),
                "forced": row["series_uid"] in forced,
                "forced_despite": forced.get(row["series_uid"]),
                "findings": {
                    name: {
                        "probability": _round(row[name]),
                        "first_mm": _round(extent.first_mm),
                        "last_mm": _round(extent.last_mm),
                        "n_slices": len(extent.sop_uids),
                    }
                    for name, extent in result.where[row["series_uid"]].items()
                },
                "slices": [
                    {
                        "sop_uid": item["sop_uid"],
                        "slice_index": int(item["slice_index"]),
                        **{name: _round(item[name]) for name in ("position_mm", *CLASSES)},
                    }
                    for item in parts[row["series_uid"]].to_dict("records")
                ],
            }
            for row in result.studies.to_dict("records")
        ],
        "refused": result.refused.to_dict("records"),
    }


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def format_studies(result: Predicted, mark: Callable[[str], str] = str) -> str:
    """Return a table of studies and classes, with the mm of the first and last positive slice along the normal.

    Below each study stands the series and the reason for its choice. ``mark`` is applied to the lines of classes whose
    probability is the threshold or more.
    """
    threshold, forced = result.provenance.threshold, result.forced
    reasons = result.series.set_index("series_uid")["reason"]
    lines = [f"{'study':<25}{'class':<17}{'probability':>11}{'first mm':>10}{'last mm':>9}{'slices':>8}"]
    for row in result.studies.to_dict("records"):
        uid, study = str(row["series_uid"]), short_uid(str(row["study_uid"]))
        for name in CLASSES:
            if len(result.studies) <= MAX_FULL_STUDIES or name == "any" or row[name] >= threshold:
                extent = result.where[uid][name]
                first, last = ("-" if mm is None else f"{mm:.1f}" for mm in (extent.first_mm, extent.last_mm))
                line = f"{study:<25}{name:<17}{row[name]:>11.3f}{first:>10}{last:>9}{len(extent.sop_uids):>8}"
                lines.append(mark(line) if row[name] >= threshold else line)
                study = ""
        choice = f"series {short_uid(uid)}, {counted(row['n_slices'], 'slice')}: {reasons[uid]}"
        lines += wrapped(choice, "  ") + (wrapped(f"FORCED, although: {forced[uid]}", "  ") if uid in forced else [])
    return "\n".join(lines)


def format_refused(refused: pd.DataFrame) -> list[str]:
    """Return a line for each refused study, the first ten."""
    lines = []
    for row in refused.iloc[:MAX_REFUSED].to_dict("records"):
        lines += wrapped(f"{short_uid(str(row['study_uid']))}: {row['reason']}", "  ")
    return [*lines, f"  and {len(refused) - MAX_REFUSED} more"] if len(refused) > MAX_REFUSED else lines


def format_nothing_left(refused: pd.DataFrame, rejected: pd.DataFrame, n_files: int, remark: str) -> str:
    """Return the error of a run that has nothing to predict; ``remark`` says where the reasons are.

    ``--force`` is named where it can help: a refused series has slices, or a rejected file is no CT by its header.
    """
    if refused.empty:
        first = "".join(f"; the first is {row.path}: {row.reason}" for row in rejected.head(1).itertuples())
        return f"none of {n_files} files is a usable CT slice{first}; {remark}"
    head = f"refused: {counted(len(refused), 'study', 'studies')}, and nothing else to predict"
    if (refused["n_slices"] > 0).any() or (rejected["code"] == NotCtError.code).any():
        remark = f"--force predicts what has CT pixels all the same, and marks the result; {remark}"
    return "\n".join([head, *format_refused(refused), *wrapped(remark)])


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return ``1 file``, ``2 files``."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def short_uid(uid: str) -> str:
    """Return the end of a UID, which differs between studies of the same device."""
    return uid if len(uid) <= UID_WIDTH else f"…{uid[-UID_WIDTH + 1 :]}"


def wrapped(text: str, indent: str = "") -> list[str]:
    """Wrap a sentence at 80 columns; paths and UIDs stay whole."""
    more = f"{indent}  "
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=more, break_long_words=False, break_on_hyphens=False
    )
