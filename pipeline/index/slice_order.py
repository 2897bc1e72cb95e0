"""Order of the slices of a series along the slice normal."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd

from ichpipe.common.constants import TIE_MM

POSITION: Final = ("position_x", "position_y", "position_z")
DIRECTIONS: Final = ("row_x", "row_y", "row_z", "column_x", "column_y", "column_z")

GAP_FACTOR: Final = 1.5  # a gap is a step longer than this many times the longer of its two neighbours
# Slices tilted more than this against most of their series are rejected as another plane. RSNA 2019 has labelled series
# with slices 21 degrees apart.
MAX_TILT_DEG: Final = 45.0


def order_series(slices: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Order the slices of one or many series, given in any row order.

    ``slices`` has ``series_uid, sop_uid, path, instance_number`` (NaN where absent) and the columns
    POSITION (ImagePositionPatient (0020,0032), mm) and DIRECTIONS (ImageOrientationPatient (0020,0037)).
    Returns the same rows sorted by ``series_uid, slice_index`` with ``slice_index`` (int32, from 0),
    ``position_mm`` and ``spacing_mm`` (float64) added, and the rejected ones as ``path, reason``.

    The normal is row x column direction (PS3.3 C.7.6.2.1.1), turned so that its largest component is
    positive: axial slices ascend from feet to head. Slices at one position are ordered by InstanceNumber
    (0020,0013), absent ones last, then by SOPInstanceUID.
    """
    slices = slices.sort_values(["series_uid", "sop_uid"], kind="stable").reset_index(drop=True)
    directions = slices[list(DIRECTIONS)].to_numpy(np.float64)
    normals = np.cross(directions[:, :3], directions[:, 3:])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    # Rounded, so that noise does not choose between two equal components (a 45 degree tilt).
    largest = 2 - np.abs(normals).round(3)[:, ::-1].argmax(axis=1)
    normals *= np.sign(normals[np.arange(len(normals)), largest])[:, None]

    # Each series is ordered along its commonest normal; of equals the one nearest to axial.
    axes = ["x", "y", "z"]
    table = pd.DataFrame(normals.round(2) + 0.0, columns=axes).assign(series=slices["series_uid"], row=slices.index)
    counts = table.groupby(["series", *axes], as_index=False).agg(row=("row", "min"), size=("row", "size"))
    best = counts.sort_values(["series", "size", "z", "y", "x"], kind="stable").drop_duplicates("series", keep="last")
    leading = normals[table["series"].map(best.set_index("series")["row"]).to_numpy(np.int64)]
    tilted = np.einsum("ij,ij->i", normals, leading) < np.cos(np.radians(MAX_TILT_DEG))
    reason = "orientation differs from that of most slices of its series"
    rejected = pd.DataFrame({"path": slices.loc[tilted, "path"], "reason": reason})

    position = np.einsum("ij,ij->i", slices[list(POSITION)].to_numpy(np.float64), leading)
    kept = slices.assign(position_mm=position, _position=(position / TIE_MM).round())[~tilted]
    keys = ["series_uid", "_position", "instance_number", "sop_uid"]
    ordered = kept.sort_values(keys, kind="stable", na_position="last", ignore_index=True).drop(columns="_position")
    by_series = ordered.groupby("series_uid", sort=False)
    number = by_series.cumcount()
    steps = by_series["position_mm"].diff().clip(lower=0.0)
    followed = ordered["series_uid"].eq(ordered["series_uid"].shift(-1))  # by a slice of the same series
    spacing = steps.where(number > 0, steps.shift(-1).where(followed))
    return ordered.assign(slice_index=number.astype(np.int32), spacing_mm=spacing.astype(np.float64)), rejected


def find_ties_and_gaps(index: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Mark rows at the position of the slice before, and rows after a gap (boolean).

    A gap is a step of more than GAP_FACTOR times the longer of the steps before and after it, ties not counted. So a
    change from thin to thick slices is no gap. The series stays one sequence.
    """
    step = index["spacing_mm"].where(index["slice_index"] > 0)
    tie = step < TIE_MM
    by_series = step.where(~tie).groupby(index["series_uid"])
    neighbours = pd.concat([by_series.shift(1), by_series.shift(-1)], axis=1).max(axis=1)
    reference = neighbours.fillna(by_series.transform("median"))
    return tie, step > GAP_FACTOR * reference
