"""What was predicted, to hand on: where each class was found along the head, and all of it as one document."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ichpipe.common.classes import CLASSES
from ichpipe.scoring.model_ladder import smooth_series

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd

FORMAT: Final = "ichpipe-predictions"
FORMAT_VERSION: Final = 1
DIGITS: Final = 9


@dataclass(frozen=True)
class Extent:
    """Where one class was found in one series."""

    sop_uids: tuple[str, ...]  # slices at or above the threshold, in order
    first_mm: float | None  # place along the slice normal of the first of them, from the feet up; None without any
    last_mm: float | None
    highest: str  # SOPInstanceUID of the slice with the largest probability


@dataclass(frozen=True)
class Provenance:
    """What made the predictions, and by which rules."""

    model_sha256: str
    calibration: str  # none, temperature, isotonic, absent (nothing beside the model) or left out (by request)
    calibrated: tuple[str, ...]  # classes that have a map
    threshold: float
    study_score: str

    def calibration_said(self) -> str:
        """Return how probabilities were calibrated, in words."""
        said = {
            "absent": "not calibrated: no calibration.json beside the model (ichpipe evaluate writes it)",
            "left out": "not calibrated, as asked",
            "none": "not calibrated (evaluate.calibration: none)",
        }
        if self.calibration in said:
            return said[self.calibration]
        if not self.calibrated:
            return f"not calibrated: too few validation patients for {self.calibration} (calibration.json)"
        which = "" if len(self.calibrated) == len(CLASSES) else f" of {', '.join(self.calibrated)}"
        return f"calibrated: {self.calibration}{which}"


def extents(slices: pd.DataFrame, threshold: float) -> dict[str, dict[str, Extent]]:
    """Return the extent of each class by series UID, then class.

    ``slices`` are predicted ones: identifiers, ``position_mm`` and the six classes (probabilities), a series in slice
    order. A slice counts from ``threshold`` on. Thin series are averaged along z first, as for the study's score.
    """
    values = smooth_series(slices)
    places, uids = slices["position_mm"].to_numpy(np.float64), slices["sop_uid"].to_numpy(object)
    return {
        str(series): {
            name: _extent(column, places[rows], uids[rows], threshold)
            for name, column in zip(CLASSES, values[rows].T, strict=True)
        }
        for series, rows in slices.groupby("series_uid", sort=False).indices.items()
    }


def _extent(values: Any, places: Any, uids: Any, threshold: float) -> Extent:
    found = np.flatnonzero(values >= threshold)
    first, last = (float(places[found].min()), float(places[found].max())) if len(found) else (None, None)
    return Extent(tuple(map(str, uids[found])), first, last, str(uids[int(np.argmax(values))]))


def as_document(
    studies: pd.DataFrame,
    slices: pd.DataFrame,
    where: Mapping[str, Mapping[str, Extent]],
    series: pd.DataFrame,
    refused: pd.DataFrame,
    forced: Mapping[str, str],
    provenance: Provenance,
) -> dict[str, Any]:
    """Return everything as JSON-like data, as docs/predict.md lists it. No date: same input, same document."""
    reasons = series.set_index("series_uid")["reason"]
    rows = {str(uid): part for uid, part in slices.groupby("series_uid", sort=False)}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "ichpipe": package_version(),
        "model_sha256": provenance.model_sha256,
        "calibration": {"method": provenance.calibration, "classes": list(provenance.calibrated)},
        "threshold": provenance.threshold,
        "study_score": provenance.study_score,
        "forced": bool(forced),
        "studies": [
            _study(row, rows[row["series_uid"]], where[row["series_uid"]], str(reasons[row["series_uid"]]), forced)
            for row in _records(studies)
        ],
        "refused": _records(refused),
    }


def package_version() -> str:
    """Return the version of this package; unknown where it is not installed."""
    try:
        return version("ichpipe")
    except PackageNotFoundError:
        return "unknown"


def _study(
    row: dict[str, Any], slices: pd.DataFrame, where: Mapping[str, Extent], reason: str, forced: Mapping[str, str]
) -> dict[str, Any]:
    uid = row["series_uid"]
    return {
        **{name: row[name] for name in ("patient_id", "study_uid", "series_uid")},
        "series_reason": reason,
        "n_slices": int(row["n_slices"]),
        "forced": uid in forced,
        "forced_despite": forced.get(uid),
        "findings": {name: {"probability": _short(row[name]), **_place(where[name])} for name in CLASSES},
        "slices": [
            {
                "sop_uid": one["sop_uid"],
                "slice_index": int(one["slice_index"]),
                "position_mm": _short(one["position_mm"]),
                **{name: _short(one[name]) for name in CLASSES},
            }
            for one in _records(slices)
        ],
    }


def _place(found: Extent) -> dict[str, Any]:
    first, last = (None if one is None else _short(one) for one in (found.first_mm, found.last_mm))
    return {"first_mm": first, "last_mm": last, "n_slices": len(found.sop_uids)}


def _records(table: pd.DataFrame) -> Sequence[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
