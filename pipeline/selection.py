"""Which series stands for a study: a table of every series, the one that is chosen, and why.

Each series has faults, from grave to light. The series whose gravest fault is lightest is chosen, then the one whose
next fault is lighter, and so on; among equals the one whose thickness is nearest to the one wanted, then the one
with more slices, then the first by SeriesInstanceUID. Nothing else counts, so the order of files changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from ichpipe.ordering import DIRECTIONS, TIE_MM
from ichpipe.series_words import kernel_kind
from ichpipe.tables import read_table

if TYPE_CHECKING:
    from pathlib import Path

    from ichpipe.params import SelectionParams

SERIES_COLUMNS: Final = [
    "patient_id", "study_uid", "series_uid", "n_slices", "n_refused", "spacing_mm", "thickness_mm", "span_mm",
    "kernel", "kernel_kind", "contrast", "marks", "body_part", "n_same_place", "lossy", "refused_because",
]  # fmt: skip
FAULTS: Final = (  # from grave to light; what each means is said in _faults
    "unusable", "not a head", "other examination", "too little", "contrast", "reformatted", "bone kernel",
    "same places", "perhaps contrast", "lossy",
)  # fmt: skip
HEADS: Final = frozenset({"", "HEAD", "BRAIN", "SKULL", "CRANIUM", "HEADNECK", "HEAD NECK", "NEURO", "UNKNOWN"})
"""BodyPartExamined (0018,0015) that may be a head; it is often wrong, so other marks count as well."""

_KEYS: Final = ["study_uid", "series_uid"]
_OTHER_PARTS: Final = ("spine", "neck", "chest", "abdomen", "face")
_OTHER_EXAMINATIONS: Final = ("perfusion", "monitoring", "report")
_REFORMATTED: Final = ("MPR", "MIP", "VRT", "VOLREN", "REFORMATTED", "PROJECTION IMAGE", "MINIP", "SSD")
_AXIAL_COSINE: Final = 0.7  # the normal within 45 degrees of the body's axis
MIN_SPAN_MM: Final = 80.0  # of a head's 130 to 180; a lone slab of a scan in two slabs covers less
MAX_SAME_PLACE: Final = 0.05  # share of slices at the place of another; RSNA has single pairs


def describe_series(slices: pd.DataFrame, rejected: pd.DataFrame) -> pd.DataFrame:
    """Return SERIES_COLUMNS of every series, also of those whose files were all refused, sorted by study and series.

    ``slices`` and ``rejected`` are those of ``scan``. ``contrast`` is yes, no or unknown: from ContrastBolusAgent
    (0018,0010), else from the marks. Thickness is SliceThickness (0018,0050), the spacing where that is absent.
    """
    refused = rejected[rejected["series_uid"] != ""].assign(refused_because=rejected["reason"])
    facts = _facts(slices).join(refused.groupby(_KEYS).size().rename("n_refused"), how="outer")
    table = facts.join(_commonest(refused, "refused_because")).reset_index().reindex(columns=SERIES_COLUMNS)
    for name in ("n_slices", "n_refused", "n_same_place"):
        table[name] = table[name].fillna(0).astype(int)
    for name in ("patient_id", "kernel", "marks", "body_part", "refused_because"):
        table[name] = table[name].astype(object).where(table[name].notna(), "")
    table["kernel_kind"] = [kernel_kind(kernel) for kernel in table["kernel"]]
    table["lossy"] = table["lossy"].eq(True)
    said = zip(table["marks"], table["contrast"].eq(True), strict=True)
    table["contrast"] = [_contrast(marks, agent=agent) for marks, agent in said]
    return table.sort_values(_KEYS, ignore_index=True)


def _facts(slices: pd.DataFrame) -> pd.DataFrame:
    """Return what the slices of each series have in common, indexed by study and series."""
    step = slices["spacing_mm"].where(slices["slice_index"] > 0)
    rows = slices.assign(_step=step.where(step >= TIE_MM), _same=step < TIE_MM)
    groups = rows.groupby(_KEYS, sort=True)
    facts = groups.agg(
        patient_id=("patient_id", "first"),
        n_slices=("sop_uid", "size"),
        spacing_mm=("_step", "median"),
        thickness_mm=("thickness_mm", "median"),
        top=("position_mm", "max"),
        bottom=("position_mm", "min"),
        contrast=("contrast_agent", "any"),
        n_same_place=("_same", "sum"),
        lossy=("lossy", "any"),
    )
    facts = facts.assign(span_mm=facts["top"] - facts["bottom"])
    facts["thickness_mm"] = facts["thickness_mm"].fillna(facts["spacing_mm"])
    facts = facts.join(_commonest(rows, "kernel")).join(_commonest(rows, "body_part"))
    words = rows["marks"] + " " + rows["image_type"].map(_reformatted)
    unique = rows[_KEYS].assign(marks=words).drop_duplicates()
    return facts.join(unique.groupby(_KEYS)["marks"].agg(_union))


def _commonest(rows: pd.DataFrame, column: str) -> pd.Series:
    """Return each series' commonest text of a column; of equals the first in the alphabet."""
    counts = rows.groupby([*_KEYS, column]).size().rename("_n").reset_index()
    ranked = counts.sort_values([*_KEYS, "_n", column], ascending=[True, True, False, True])
    return ranked.drop_duplicates(_KEYS).set_index(_KEYS)[column]


def _union(texts: pd.Series) -> str:
    return " ".join(sorted(set(" ".join(texts).split())))


def _reformatted(image_type: str) -> str:
    return "reformatted" if any(word in _REFORMATTED for word in image_type.split("\\")) else ""


def _contrast(marks: str, *, agent: bool) -> str:
    words = marks.split()
    if agent or {"contrast", "angio"} & set(words):
        return "yes"
    return "no" if "plain" in words else "unknown"


def choose_series(series: pd.DataFrame, params: SelectionParams, choices: dict[str, str] | None = None) -> pd.DataFrame:
    """Add ``chosen`` and ``reason`` to the table of ``describe_series``: one chosen series per study with any slice.

    ``choices`` (study UID to series UID) overrules; both come from ``read_choices``.
    """
    parts = [_choose_one(group, params, choices or {}) for _, group in series.groupby("study_uid", sort=True)]
    empty = series.assign(chosen=False, reason="")
    return pd.concat(parts, ignore_index=True) if parts else empty


def _choose_one(group: pd.DataFrame, params: SelectionParams, choices: dict[str, str]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = [dict(row) for row in group.to_dict("records")]  # type: ignore[arg-type]
    with_contrast = any(row["contrast"] == "yes" for row in rows)
    faults = [_faults(row, params, with_contrast=with_contrast) for row in rows]
    ranked = sorted(range(len(rows)), key=lambda number: _rank(rows[number], faults[number], params))
    best = ranked[0]
    named = choices.get(str(rows[best]["study_uid"]))
    if named is not None:
        best = next(number for number in ranked if rows[number]["series_uid"] == named)
    reasons = [_why_not(rows[number], faults[number], rows[best]) for number in range(len(rows))]
    usable = rows[best]["n_slices"] > 0
    if usable:
        fit = sum(not found for found in faults)
        reasons[best] = f"named in {params.choices}" if named else _why(rows[best], faults[best], fit, rows, params)
    chosen = [usable and number == best for number in range(len(rows))]
    return group.assign(chosen=chosen, reason=reasons)


def _faults(row: dict[str, Any], params: SelectionParams, *, with_contrast: bool) -> dict[str, str]:
    """Return the faults of a series as keys of FAULTS, with the words for each."""
    if not row["n_slices"]:
        return {"unusable": row["refused_because"] or "no usable slice"}
    return _faults_of_kind(row, with_contrast=with_contrast) | _faults_of_extent(row, params)


def _faults_of_kind(row: dict[str, Any], *, with_contrast: bool) -> dict[str, str]:
    marks, found = set(row["marks"].split()), {}
    parts = [mark for mark in _OTHER_PARTS if mark in marks and "brain" not in marks]
    if parts or row["body_part"] not in HEADS:
        found["not a head"] = f"not a head: {', '.join(parts) or row['body_part'][:16]}"
    if other := [mark for mark in _OTHER_EXAMINATIONS if mark in marks]:
        found["other examination"] = f"another examination: {', '.join(other)}"
    if row["contrast"] == "yes":
        found["contrast"] = "contrast"
    elif row["contrast"] == "unknown" and with_contrast:
        found["perhaps contrast"] = "perhaps contrast: another series of the study has it, and this one does not say"
    if "reformatted" in marks:
        found["reformatted"] = "reformatted"
    if row["kernel_kind"] == "bone" or ("bone" in marks and row["kernel_kind"] != "soft"):
        found["bone kernel"] = f"bone kernel {row['kernel']}".strip()
    return found


def _faults_of_extent(row: dict[str, Any], params: SelectionParams) -> dict[str, str]:
    found = {}
    if row["n_slices"] < params.min_slices:
        found["too little"] = f"fewer than {params.min_slices} slices ({row['n_slices']})"
    elif row["span_mm"] < MIN_SPAN_MM:
        found["too little"] = f"covers only {row['span_mm']:.0f} mm"
    if row["n_same_place"] > MAX_SAME_PLACE * row["n_slices"]:
        found["same places"] = f"{row['n_same_place']} of {row['n_slices']} slices at the place of another"
    if row["lossy"]:
        found["lossy"] = "compressed with loss"
    return found


def _rank(row: dict[str, Any], faults: dict[str, str], params: SelectionParams) -> tuple[Any, ...]:
    weights = sorted((len(FAULTS) - FAULTS.index(name) for name in faults), reverse=True)
    gravest_first = (*weights, *[0] * (len(FAULTS) - len(weights)))
    distance = _distance(row, params)
    return gravest_first, round(distance, 2), -row["n_slices"], row["series_uid"]


def _distance(row: dict[str, Any], params: SelectionParams) -> float:
    distance = abs(float(row["thickness_mm"]) - params.thickness_mm)
    return np.inf if np.isnan(distance) else distance


def _why(
    row: dict[str, Any], faults: dict[str, str], fit: int, rows: list[dict[str, Any]], params: SelectionParams
) -> str:
    usable = sum(other["n_slices"] > 0 for other in rows)
    facts = [f"{row['thickness_mm']:.4g} mm"] if row["thickness_mm"] == row["thickness_mm"] else []
    facts += [text for text in (_plain(row), _kernel(row)) if text]
    if faults:
        start = "the only usable series" if usable == 1 else f"the best of {usable} usable series"
        return f"{start}, though: {'; '.join(faults.values())}"
    if usable == 1:
        return f"the only usable series ({', '.join(facts)})"
    which = (
        "the only one without a fault"
        if fit == 1
        else f"nearest to {params.thickness_mm:g} mm of {fit} without a fault"
    )
    return f"{which} ({', '.join(facts)})"


def _plain(row: dict[str, Any]) -> str:
    return "plain" if row["contrast"] == "no" else ""


def _kernel(row: dict[str, Any]) -> str:
    return f"kernel {row['kernel']}" if row["kernel"] else ""


def _why_not(row: dict[str, Any], faults: dict[str, str], best: dict[str, Any]) -> str:
    if faults:
        return "; ".join(faults.values())
    mine, other = (float(one["thickness_mm"]) for one in (row, best))
    if mine != other and not (np.isnan(mine) and np.isnan(other)):
        return f"{mine:.4g} mm thick; the chosen one has {other:.4g} mm"
    if row["n_slices"] != best["n_slices"]:
        return f"like the chosen one, with {row['n_slices']} slices instead of {best['n_slices']}"
    return "like the chosen one; its SeriesInstanceUID comes later"


def read_choices(path: Path, series: pd.DataFrame) -> dict[str, str]:
    """Read a table with a column ``series_uid`` (others are not looked at): study UID to the series to take.

    Raises DataError that names file and line: a series that is not there or has no usable slice, two of one study.
    """
    table = read_table(path, "choices of series")
    if "series_uid" not in table.names:
        raise table.error("must have a column series_uid")
    named = pd.Series(table.text("series_uid").to_pandas())
    known = series.set_index("series_uid")
    table.refuse(~named.isin(known.index).to_numpy(), "no such series; series.csv lists those there are", named)
    empty = (known["n_slices"].reindex(named) == 0).to_numpy()
    table.refuse(empty, "the series has no usable slice; rejected.csv says why", named)
    studies = known["study_uid"].reindex(named)
    table.refuse(studies.duplicated().to_numpy(), "a second series of the same study; name one", named)
    return dict(zip(studies, named, strict=True))


def head_slices(slices: pd.DataFrame, head_mm: float | None) -> pd.Series:
    """Mark the slices within ``head_mm`` of the topmost of their series (boolean); None marks all.

    Along the slice normal, which ascends to the head for axial slices: what lies lower in a long series is neck or
    chest (CQ500-CT-345). Series of another plane are marked whole.
    """
    if head_mm is None:
        return pd.Series(data=True, index=slices.index)
    top = slices.groupby("series_uid")["position_mm"].transform("max")
    axial = np.abs(np.cross(slices[list(DIRECTIONS[:3])], slices[list(DIRECTIONS[3:])])[:, 2]) > _AXIAL_COSINE
    near: pd.Series = (top - slices["position_mm"] <= head_mm) | ~axial
    return near
