"""The slices of a series put in order along the slice normal, with a stated rule for every odd case."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from numpy.typing import NDArray

POSITION: Final = ("position_x", "position_y", "position_z")
DIRECTIONS: Final = ("row_x", "row_y", "row_z", "column_x", "column_y", "column_z")
TIE_MM: Final = 1e-3
"""Slices closer than this along the normal stand at one place."""

GAP_FACTOR: Final = 1.5
"""A step longer than this many times the longer one of its two neighbouring steps is a gap."""

MAX_TILT_DEG: Final = 45.0
"""Slices tilted more than this against their series' majority are another plane, and are rejected.

RSNA 2019 has series of tilted slices with a few untilted ones (21 degrees apart), all labelled: they stay.
"""


def order_series(slices: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Order the slices of each series; one or many series at once, in any row order.

    ``slices`` has ``series_uid, sop_uid, path, instance_number`` (NaN where absent) and the columns
    POSITION (ImagePositionPatient (0020,0032), mm) and DIRECTIONS (ImageOrientationPatient (0020,0037)).
    Returns the same rows sorted by ``series_uid, slice_index`` with ``slice_index`` (int32, from 0),
    ``position_mm`` and ``spacing_mm`` (float64) added, and the rejected ones as ``path, reason``.

    The normal is row x column direction (PS3.3 C.7.6.2.1.1), turned so that its largest component is
    positive: axial slices ascend from feet to head. Slices at one place keep the order of InstanceNumber
    (0020,0013), absent ones last, then of SOPInstanceUID.
    """
    slices = slices.sort_values(["series_uid", "sop_uid"], kind="stable").reset_index(drop=True)
    normals = _normals(slices)
    leading = normals[_majority_row(slices["series_uid"], normals)]
    cosine = np.einsum("ij,ij->i", normals, leading)
    tilted = cosine < np.cos(np.radians(MAX_TILT_DEG))
    positions = np.einsum("ij,ij->i", slices[list(POSITION)].to_numpy(np.float64), leading)
    ordered = _sort(slices.assign(position_mm=positions)[~tilted])
    reason = "orientation differs from that of most slices of its series"
    return ordered, pd.DataFrame({"path": slices.loc[tilted, "path"], "reason": reason})


def _normals(slices: pd.DataFrame) -> NDArray[np.float64]:
    """Unit normals (n, 3) whose largest component is positive."""
    directions = slices[list(DIRECTIONS)].to_numpy(np.float64)
    normals = np.cross(directions[:, :3], directions[:, 3:])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    # Rounded, so that of two equal components (a 45 degree tilt) noise does not choose.
    largest = np.abs(normals).round(3)[:, ::-1].argmax(axis=1)
    signs = np.sign(normals[np.arange(len(normals)), 2 - largest])
    oriented: NDArray[np.float64] = normals * signs[:, None]
    return oriented


def _majority_row(series: pd.Series, normals: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each row, a row that has the commonest normal of its series; on a tie the one nearest to axial."""
    keys = ["x", "y", "z"]
    table = pd.DataFrame(normals.round(2) + 0.0, columns=keys).assign(series=series.to_numpy(), row=range(len(series)))
    groups = table.groupby(["series", *keys], as_index=False).agg(row=("row", "min"), size=("row", "size"))
    best = groups.sort_values(["series", "size", "z", "y", "x"], kind="stable").drop_duplicates("series", keep="last")
    rows: NDArray[np.int64] = table["series"].map(best.set_index("series")["row"]).to_numpy(np.int64)
    return rows


def _sort(slices: pd.DataFrame) -> pd.DataFrame:
    place = (slices["position_mm"] / TIE_MM).round()
    keys = ["series_uid", "_place", "instance_number", "sop_uid"]
    ordered = slices.assign(_place=place).sort_values(keys, kind="stable", na_position="last")
    ordered = ordered.drop(columns="_place").reset_index(drop=True)
    by_series = ordered.groupby("series_uid", sort=False)
    steps = by_series["position_mm"].diff().clip(lower=0.0)
    spacing = steps.where(by_series.cumcount() > 0, steps.shift(-1).where(_continues(ordered["series_uid"])))
    return ordered.assign(slice_index=by_series.cumcount().astype(np.int32), spacing_mm=spacing.astype(np.float64))


def _continues(series: pd.Series) -> pd.Series:
    """Whether the next row belongs to the same series."""
    return series.eq(series.shift(-1))


def find_ties_and_gaps(index: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Mark rows that stand where the slice before stands, and rows after a gap (boolean).

    A gap is a step of more than GAP_FACTOR times the longer one of the steps before and after it; ties
    don't count as steps. A change from thin to thick slices is therefore none. Nothing is inserted or cut
    at a gap: the series stays one sequence.
    """
    step = index["spacing_mm"].where(index["slice_index"] > 0)
    tie = step < TIE_MM
    by_series = step.where(~tie).groupby(index["series_uid"])
    neighbours = pd.concat([by_series.shift(1), by_series.shift(-1)], axis=1).max(axis=1)
    reference = neighbours.fillna(by_series.transform("median"))
    return tie, step > GAP_FACTOR * reference
