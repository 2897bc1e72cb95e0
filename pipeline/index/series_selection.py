"""Which series stands for a study: a table of every series, the one that is chosen, and why.

Each series has faults, from grave to light. The series whose gravest fault is lightest is chosen, then the one whose
next fault is lighter, and so on; among equals one that says it is plain, then the one whose thickness is nearest to
the one wanted, then the one with more slices, then the first by SeriesInstanceUID. Each series is judged for itself:
neither the order of files nor a further, worse series changes the choice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from ichpipe.common.constants import TIE_MM
from ichpipe.common.user_tables import read_table
from ichpipe.dicom.series_description import kernel_kind
from ichpipe.index.slice_order import DIRECTIONS, order_series

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ichpipe.params.schema import SelectionParams

SERIES_COLUMNS: Final = [
    "patient_id", "study_uid", "series_uid", "n_slices", "n_refused", "spacing_mm", "thickness_mm", "span_mm",
    "kernel", "kernel_kind", "contrast", "marks", "body_part", "n_same_place", "lossy", "refused_because",
]  # fmt: skip
FAULTS: Final = (  # from grave to light; what each means is said in faults_of
    "unusable", "not a head", "other examination", "too little", "contrast", "reformatted", "bone kernel",
    "same places", "several sizes", "turned", "perhaps contrast", "lossy", "too long",
)  # fmt: skip
_KEYS: Final = ["study_uid", "series_uid"]
_HEAD: Final = re.compile("HEAD|BRAIN|SKULL|CRANI|CEREB|NEURO|UNKNOWN|^$")  # BodyPartExamined (0018,0015); often wrong
_OTHER_PARTS: Final = ("spine", "neck", "chest", "abdomen", "face")
_OTHER_EXAMINATIONS: Final = ("perfusion", "monitoring", "report")
_REFORMATTED: Final = ("MPR", "MIP", "VRT", "VOLREN", "REFORMATTED", "PROJECTION IMAGE", "MINIP", "SSD")
_PERFUSION: Final = ("CBF", "CBV", "MTT", "TTP", "TMAX", "PERFUSION")
_AXIAL_COSINE: Final = 0.7  # the normal within 45 degrees of the body's axis
MIN_SPAN_MM: Final = 80.0  # of a head's 130 to 180; a lone slab of a scan in two slabs covers less
MAX_SAME_PLACE: Final = 0.05  # share of slices at the place of another; RSNA has single pairs


def describe_series(slices: pd.DataFrame, rejected: pd.DataFrame) -> pd.DataFrame:
    """Return SERIES_COLUMNS of every series, also of those whose files were all refused, sorted by study and series.

    ``slices`` and ``rejected`` are those of ``scan``. ``contrast`` is yes, no or unknown: from ContrastBolusAgent
    (0018,0010), else from the marks; an agent in a series that calls itself plain is unknown. Thickness is
    SliceThickness (0018,0050), the spacing where that is absent or 0. A series is one row, also where some of its
    refused files name another study, or none.
    """
    refused = _with_series(slices, rejected)
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


def _with_series(slices: pd.DataFrame, rejected: pd.DataFrame) -> pd.DataFrame:
    """Return the refused files that name a series, under its study: that of its slices, else the first one named."""
    refused = rejected[rejected["series_uid"] != ""].assign(refused_because=rejected["reason"])
    named = refused.loc[refused["study_uid"] != "", _KEYS].sort_values("study_uid")
    studies = pd.concat([slices[_KEYS], named]).drop_duplicates("series_uid").set_index("series_uid")["study_uid"]
    return refused.assign(study_uid=refused["series_uid"].map(studies).fillna("").astype(object))


def _facts(slices: pd.DataFrame) -> pd.DataFrame:
    """Return what the slices of each series have in common, indexed by study and series."""
    step = slices["spacing_mm"].where(slices["slice_index"] > 0)
    thickness = slices["thickness_mm"].where(slices["thickness_mm"] > 0)
    rows = slices.assign(_step=step.where(step >= TIE_MM), _same=step < TIE_MM, thickness_mm=thickness)
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
    words = rows["marks"] + " " + rows["image_type"].map(_marks_of_type)
    words = words.where(axial(rows), words + " reformatted")
    words = words.where(upright(rows), words + " turned")
    sizes = rows.groupby(_KEYS)[["rows", "columns"]].nunique().max(axis=1)
    words = words.where(sizes.reindex(pd.MultiIndex.from_frame(rows[_KEYS])).to_numpy() == 1, words + " sizes")
    unique = rows[_KEYS].assign(marks=words).drop_duplicates()
    return facts.join(unique.groupby(_KEYS)["marks"].agg(_union))


def _commonest(rows: pd.DataFrame, column: str) -> pd.Series:
    """Return each series' commonest text of a column; of equals the first in the alphabet."""
    counts = rows.groupby([*_KEYS, column]).size().rename("_n").reset_index()
    ranked = counts.sort_values([*_KEYS, "_n", column], ascending=[True, True, False, True])
    return ranked.drop_duplicates(_KEYS).set_index(_KEYS)[column]


def _union(texts: pd.Series) -> str:
    return " ".join(sorted(set(" ".join(texts).split())))


def _marks_of_type(image_type: str) -> str:
    """Return the marks that ImageType (0008,0008) adds."""
    words = set(image_type.split("\\"))
    found = {"reformatted": words & set(_REFORMATTED), "perfusion": words & set(_PERFUSION)}
    return " ".join(mark for mark, there in found.items() if there)


def axial(slices: pd.DataFrame) -> NDArray[np.bool_]:
    """Mark slices (n,; as ``scan`` returns them) whose normal is within 45 degrees of the body's axis."""
    normals = np.cross(slices[list(DIRECTIONS[:3])], slices[list(DIRECTIONS[3:])])
    near: NDArray[np.bool_] = np.abs(normals[:, 2]) > _AXIAL_COSINE
    return near


def upright(slices: pd.DataFrame) -> NDArray[np.bool_]:
    """Mark slices (n,) whose pixels lie as a model knows them: rows run to the patient's left, columns to the back.

    Within 45 degrees, by ImageOrientationPatient (0020,0037). Axial images of a patient who lies prone, or that were
    mirrored or turned, do not; nothing here turns them back. Slices of another plane are not judged.
    """
    straight = (slices["row_x"] > _AXIAL_COSINE) & (slices["column_y"] > _AXIAL_COSINE)
    found: NDArray[np.bool_] = straight.to_numpy() | ~axial(slices)
    return found


def _contrast(marks: str, *, agent: bool) -> str:
    words = set(marks.split())
    if "plain" in words:
        return "unknown" if agent else "no"
    return "yes" if agent or words & {"contrast", "angio"} else "unknown"


def choose_series(series: pd.DataFrame, params: SelectionParams, choices: dict[str, str] | None = None) -> pd.DataFrame:
    """Add ``chosen`` and ``reason`` to the table of ``describe_series``: one chosen series per study with any slice.

    ``choices`` (study UID to series UID) overrules; both come from ``read_choices``.
    """
    table = series.sort_values(_KEYS, ignore_index=True)
    rows: list[dict[str, Any]] = [dict(row) for row in table.to_dict("records")]  # type: ignore[arg-type]
    studies = groupby(rows, key=itemgetter("study_uid"))
    decided = [one for _, study in studies for one in _choose_one(list(study), params, choices or {})]
    chosen = np.array([is_chosen for is_chosen, _ in decided], dtype=np.bool_)
    return table.assign(chosen=chosen, reason=pd.Series([reason for _, reason in decided], dtype=object))


def _choose_one(rows: list[dict[str, Any]], params: SelectionParams, choices: dict[str, str]) -> list[tuple[bool, str]]:
    """Return whether each series of one study is chosen, and why or why not."""
    faults = [find_faults(row, params) for row in rows]
    ranked = sorted(range(len(rows)), key=lambda number: _rank(rows[number], faults[number], params))
    best = ranked[0]
    named = choices.get(str(rows[best]["study_uid"]))
    if named is not None:
        best = next(number for number in ranked if rows[number]["series_uid"] == named)
    reasons = [_why_not(row, found, rows[best]) for row, found in zip(rows, faults, strict=True)]
    usable = rows[best]["n_slices"] > 0
    if usable:
        reasons[best] = f"named in {params.choices}" if named else _why(best, rows, faults, params)
    return [(usable and number == best, reason) for number, reason in enumerate(reasons)]


def find_faults(row: dict[str, Any], params: SelectionParams) -> dict[str, str]:
    """Return the faults of a series, a row of ``describe_series``, as keys of FAULTS with the words for each."""
    if not row["n_slices"]:
        return {"unusable": row["refused_because"] or "no usable slice"}
    return _faults_of_kind(row) | _faults_of_extent(row, params)


def _faults_of_kind(row: dict[str, Any]) -> dict[str, str]:
    marks, found = set(row["marks"].split()), {}
    parts = [mark for mark in _OTHER_PARTS if mark in marks]
    if "brain" not in marks and (parts or not _HEAD.search(row["body_part"])):
        found["not a head"] = f"not a head: {', '.join(parts) or row['body_part'][:16]}"
    if other := [mark for mark in _OTHER_EXAMINATIONS if mark in marks]:
        found["other examination"] = f"another examination: {', '.join(other)}"
    if row["contrast"] == "yes":
        found["contrast"] = "contrast"
    elif row["contrast"] == "unknown" and "plain" in marks:
        found["perhaps contrast"] = "perhaps contrast: called plain, but its header names an agent"
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
    marks = row["marks"].split()
    if "sizes" in marks:
        found["several sizes"] = "slices of several sizes, as of two series under one SeriesInstanceUID"
    if "turned" in marks:
        found["turned"] = "mirrored or turned images (ImageOrientationPatient); the models know upright ones"
    if row["lossy"]:
        found["lossy"] = "compressed with loss"
    if params.head_mm is not None and row["span_mm"] > params.head_mm:
        found["too long"] = f"covers {row['span_mm']:.0f} mm, more than a head"
    return found


def _rank(row: dict[str, Any], faults: dict[str, str], params: SelectionParams) -> tuple[Any, ...]:
    weights = sorted((len(FAULTS) - FAULTS.index(name) for name in faults), reverse=True)
    gravest_first = (*weights, *[0] * (len(FAULTS) - len(weights)))
    distance = round(_distance(row, params), 2)
    return gravest_first, row["contrast"] != "no", distance, -row["n_slices"], row["series_uid"]


def _distance(row: dict[str, Any], params: SelectionParams) -> float:
    distance = abs(float(row["thickness_mm"]) - params.thickness_mm)
    return np.inf if np.isnan(distance) else distance


def _why(best: int, rows: list[dict[str, Any]], faults: list[dict[str, str]], params: SelectionParams) -> str:
    row, usable = rows[best], sum(other["n_slices"] > 0 for other in rows)
    if faults[best]:
        start = "the only usable series" if usable == 1 else f"the best of {usable} usable series"
        return f"{start}, though: {'; '.join(faults[best].values())}"
    facts = [f"{row['thickness_mm']:.4g} mm"] if row["thickness_mm"] == row["thickness_mm"] else []
    facts += [text for text in (_plain(row), _kernel(row)) if text]
    about = f" ({', '.join(facts)})" if facts else ""
    return f"{_which(row, [one for one, found in zip(rows, faults, strict=True) if not found], usable, params)}{about}"


def _which(row: dict[str, Any], fit: list[dict[str, Any]], usable: int, params: SelectionParams) -> str:
    if usable == 1:
        return "the only usable series"
    if len(fit) == 1:
        return "the only one without a fault"
    alike = [one for one in fit if one["contrast"] == row["contrast"]]
    if len(alike) == 1:
        return f"the only one of {len(fit)} without a fault that says it is plain"
    said = "" if len(alike) == len(fit) else " that says it is plain"
    return f"nearest to {params.thickness_mm:g} mm of {len(alike)} without a fault{said}"


def _plain(row: dict[str, Any]) -> str:
    return "plain" if row["contrast"] == "no" else ""


def _kernel(row: dict[str, Any]) -> str:
    return f"kernel {row['kernel']}" if row["kernel"] else ""


def _why_not(row: dict[str, Any], faults: dict[str, str], best: dict[str, Any]) -> str:
    if faults:
        return "; ".join(faults.values())
    if row["contrast"] != best["contrast"] == "no":
        return "does not say whether it is plain; the chosen one does"
    mine, other = (float(one["thickness_mm"]) for one in (row, best))
    if mine != other and not (np.isnan(mine) and np.isnan(other)):
        return f"{mine:.4g} mm thick; the chosen one has {other:.4g} mm"
    if row["n_slices"] != best["n_slices"]:
        return f"like the chosen one, with {row['n_slices']} slices instead of {best['n_slices']}"
    return "like the chosen one; its SeriesInstanceUID comes later"


def read_choices(path: Path, series: pd.DataFrame) -> dict[str, str]:
    """Read a table with the column ``series_uid``, and ``study_uid`` if it has one: study UID to the series to take.

    Raises DataError that names file and line: a series that is not there, has no usable slice or is of another study
    than the row says; two series of one study.
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
    if "study_uid" in table.names:
        said = pd.Series(table.text("study_uid").to_pandas())
        remedy = "the series is of another study; correct study_uid, or leave that column out"
        table.refuse(said.to_numpy() != studies.to_numpy(), remedy, said)
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
    near: pd.Series = (top - slices["position_mm"] <= head_mm) | ~axial(slices)
    return near


@dataclass(frozen=True)
class Selection:
    """The result of ``choose``; every input slice is in ``slices`` or in ``left_out``."""

    slices: pd.DataFrame  # as ``scan`` returns them
    series: pd.DataFrame  # one row a series: its facts, ``chosen``, ``reason``
    left_out: pd.DataFrame  # path, reason, study_uid, series_uid


def select_series(
    slices: pd.DataFrame, rejected: pd.DataFrame, params: SelectionParams, *, one_per_study: bool
) -> Selection:
    """Choose series by the rules of ``selection``; ``slices`` and ``rejected`` are those of ``scan``.

    Without ``one_per_study`` every series with a usable slice is chosen whole.
    """
    series = describe_series(slices, rejected)
    if not one_per_study:
        usable = series["n_slices"] > 0
        every = series.assign(
            chosen=usable, reason=usable.map({True: "every series is used", False: "no usable slice"})
        )
        return Selection(slices, every, rejected.iloc[:0])
    choices = read_choices(Path(params.choices), series) if params.choices else None
    series = choose_series(series, params, choices)
    reason = slices["series_uid"].map(series.set_index("series_uid")["reason"])
    not_chosen = ~slices["series_uid"].isin(series.loc[series["chosen"], "series_uid"])
    below = ~not_chosen & ~head_slices(slices, params.head_mm)
    kept = slices[~not_chosen & ~below]
    if below.any():  # numbers and distances of what is left
        kept, _ = order_series(kept.drop(columns=["slice_index", "position_mm", "spacing_mm"]))
    parts = [
        _left_out(slices[not_chosen], "series not chosen: " + reason[not_chosen]),
        _left_out(slices[below], f"more than {params.head_mm} mm below the topmost slice: no head"),
    ]
    return Selection(kept.reset_index(drop=True), series, pd.concat(parts, ignore_index=True))


def _left_out(slices: pd.DataFrame, reason: pd.Series | str) -> pd.DataFrame:
    return slices[["path", "study_uid", "series_uid"]].assign(reason=reason)[
        ["path", "reason", "study_uid", "series_uid"]
    ]
