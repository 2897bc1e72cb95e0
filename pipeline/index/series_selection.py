"""Selects the series that stands for a study, by rule, and says why.

Each series has faults, from grave to light. The series whose gravest fault is lightest is chosen, then the one whose
next fault is lighter, and so on. Among equals, these decide in turn: a series that says it is plain, the thickness
nearest to the parameter, more slices, the first SeriesInstanceUID. Each series is judged for itself: neither the order
of files nor a further, worse series changes the choice.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from ichpipe.common.constants import TIE_MM
from ichpipe.common.errors import UnreadableDicomError
from ichpipe.common.user_tables import read_table
from ichpipe.dicom.hounsfield import read_hu
from ichpipe.dicom.series_description import kernel_kind
from ichpipe.index.scan import NOT_CHOSEN, REJECTED
from ichpipe.index.slice_order import DIRECTIONS, order_series

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ichpipe.params.schema import SelectionParams

SERIES_COLUMNS: Final = [
    "patient_id", "study_uid", "series_uid", "n_slices", "n_refused", "spacing_mm", "thickness_mm", "span_mm",
    "kernel", "kernel_kind", "contrast", "marks", "body_part", "n_same_place", "lossy", "refused_because",
    "n_single_slice", "n_short_series",
]  # fmt: skip
FAULTS: Final = (  # from grave to light; what each means is said in faults_of
    "unusable", "absurd values", "not a head", "other examination", "too little", "contrast", "reformatted",
    "bone kernel", "same places", "several passes", "several sizes", "turned", "perhaps contrast", "lossy", "too long",
)  # fmt: skip
MIN_BODY_HU: Final = -1000
MAX_BODY_HU: Final = 4000  # 3071 is the most of 12 bits; metal may be above
MAX_ABOVE_BODY: Final = 0.2  # share of pixels
MIN_BODY: Final = 0.01
MIN_OF_PASS: Final = 3  # slices
MAX_OF_SHORT: Final = 3  # slices of a series that may be a part of a scan
_JOIN: Final = "such as with dcmodify -m SeriesInstanceUID=UID *.dcm"
_KEYS: Final = ["study_uid", "series_uid"]
_HEAD: Final = re.compile("HEAD|BRAIN|SKULL|CRANI|CEREB|NEURO|UNKNOWN|^$")  # BodyPartExamined (0018,0015); often wrong
_OTHER_PARTS: Final = ("spine", "neck", "chest", "abdomen", "face")
_OTHER_EXAMINATIONS: Final = ("perfusion", "monitoring", "report")
_REFORMATTED: Final = frozenset({"MPR", "MIP", "VRT", "VOLREN", "REFORMATTED", "PROJECTION IMAGE", "MINIP", "SSD"})
_PERFUSION: Final = frozenset({"CBF", "CBV", "MTT", "TTP", "TMAX", "PERFUSION"})
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
    refused = rejected[rejected["series_uid"] != ""].assign(refused_because=rejected["reason"])
    # The study of a refused file is that of the slices of its series, else the first one named.
    named = refused.loc[refused["study_uid"] != "", _KEYS].sort_values("study_uid")
    studies = pd.concat([slices[_KEYS], named]).drop_duplicates("series_uid").set_index("series_uid")["study_uid"]
    refused["study_uid"] = refused["series_uid"].map(studies).fillna("").astype(object)
    facts = _collect_facts(slices).join(refused.groupby(_KEYS).size().rename("n_refused"), how="outer")
    table = facts.join(_find_commonest(refused, "refused_because")).reset_index().reindex(columns=SERIES_COLUMNS)
    for name in ("n_slices", "n_refused", "n_same_place"):
        table[name] = table[name].fillna(0).astype(int)
    for name in ("patient_id", "kernel", "marks", "body_part", "refused_because"):
        table[name] = table[name].astype(object).where(table[name].notna(), "")
    for name, most in (("n_single_slice", 1), ("n_short_series", MAX_OF_SHORT)):
        table[name] = table["n_slices"].between(1, most).groupby(table["study_uid"]).transform("sum")
    table["kernel_kind"] = [kernel_kind(kernel) for kernel in table["kernel"]]
    table["lossy"] = table["lossy"].eq(True)
    agent, marks = table["contrast"].eq(True), table["marks"].str.split().map(set)
    plain, contrast = marks.map({"plain"}.issubset), agent | ~marks.map({"contrast", "angio"}.isdisjoint)
    table["contrast"] = np.select([plain & ~agent, ~plain & contrast], ["no", "yes"], "unknown")
    return table.sort_values(_KEYS, ignore_index=True)


def _collect_facts(slices: pd.DataFrame) -> pd.DataFrame:
    """Return what the slices of each series have in common, indexed by study and series."""
    step = slices["spacing_mm"].where(slices["slice_index"] > 0)
    thickness = slices["thickness_mm"].where(slices["thickness_mm"] > 0)
    rows = slices.assign(_step=step.where(step >= TIE_MM), _same=step < TIE_MM, thickness_mm=thickness)
    groups = rows.groupby(_KEYS, sort=True)
    types = rows["image_type"].str.split("\\", regex=False)
    marked = {
        "reformatted": ~axial(rows) | ~types.map(_REFORMATTED.isdisjoint),
        "perfusion": ~types.map(_PERFUSION.isdisjoint),
        "turned": ~upright(rows),
        "sizes": groups[["rows", "columns"]].transform("nunique").max(axis=1) > 1,
        "passes": rows["series_uid"].isin(_find_passes(rows)),
    }
    words = rows["marks"]
    for mark, present in marked.items():
        words = words.where(~np.asarray(present, dtype=np.bool_), words + f" {mark}")
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
    facts["span_mm"] = facts["top"] - facts["bottom"]
    facts["thickness_mm"] = facts["thickness_mm"].fillna(facts["spacing_mm"])
    marks = rows[_KEYS].assign(marks=words).drop_duplicates().groupby(_KEYS)["marks"]
    union = marks.agg(lambda texts: " ".join(sorted(set(" ".join(texts).split()))))
    return facts.join([_find_commonest(rows, "kernel"), _find_commonest(rows, "body_part"), union])


def _find_passes(slices: pd.DataFrame) -> set[str]:
    """Return the series that show a part of the patient several times: their slices would be interleaved.

    Passes have another AcquisitionNumber (0020,0012). Or each has the same InstanceNumbers (0020,0013). Or, in the
    order of InstanceNumber, positions begin anew or run back.
    """
    ordered = slices.sort_values(["series_uid", "instance_number", "position_mm"])
    by_series, numbered = ordered["series_uid"], ordered["instance_number"].notna()
    steps = np.sign(ordered["position_mm"].groupby(by_series).diff().fillna(0.0))
    back = steps == -np.sign(steps.groupby(by_series).transform("sum"))
    turned = steps * steps.groupby(by_series).shift() < 0
    same_number = ordered.groupby(["series_uid", "instance_number"])["position_mm"]
    found = _find_overlaps(slices, slices["acquisition"])
    found |= _find_overlaps(ordered, same_number.cumcount().where(same_number.transform("size") > 1))
    for begins in (back, turned):
        found |= _find_overlaps(ordered, begins.groupby(by_series).cumsum().where(numbered))
    return found


def _find_overlaps(slices: pd.DataFrame, passes: pd.Series) -> set[str]:
    """Return the series whose passes (a label a slice, NaN for none) overlap, each of MIN_OF_PASS slices or more."""
    ranges = slices.groupby(["series_uid", passes.rename("pass")])["position_mm"].agg(["min", "max", "size"])
    ranges = ranges.reset_index().sort_values(["series_uid", "min"])
    of_series = ranges.groupby("series_uid")
    reached = of_series["max"].cummax().groupby(ranges["series_uid"]).shift()
    overlap = (ranges["min"] < reached - TIE_MM) & (of_series["size"].transform("min") >= MIN_OF_PASS)
    return set(ranges.loc[overlap, "series_uid"])


def has_absurd_values(hu: NDArray[np.int16]) -> bool:
    """Say whether HU (rows, columns) of a slice through a body can't be right: nearly all at one end of the scale."""
    body = (hu > MIN_BODY_HU) & (hu < MAX_BODY_HU)
    return bool((hu > MAX_BODY_HU).mean() > MAX_ABOVE_BODY or body.mean() < MIN_BODY)


def _mark_absurd(series: pd.DataFrame, slices: pd.DataFrame) -> pd.DataFrame:
    """Add the mark ``absurd`` to series whose middle slice has absurd values; only this slice is decoded."""
    absurd = set()
    for uid, paths in slices.groupby("series_uid")["path"]:
        with contextlib.suppress(UnreadableDicomError):  # decoding reports it
            if has_absurd_values(read_hu(paths.iloc[len(paths) // 2], scanned=True)):
                absurd.add(uid)
    marks = series["marks"].where(~series["series_uid"].isin(absurd), ("absurd " + series["marks"]).str.strip())
    return series.assign(marks=marks)


def _find_commonest(rows: pd.DataFrame, column: str) -> pd.Series:
    """Return each series' commonest text of a column; of equals the first in the alphabet."""
    counts = rows.groupby([*_KEYS, column]).size().rename("_n").reset_index()
    ranked = counts.sort_values([*_KEYS, "_n", column], ascending=[True, True, False, True])
    return ranked.drop_duplicates(_KEYS).set_index(_KEYS)[column]


def axial(slices: pd.DataFrame) -> NDArray[np.bool_]:
    """Mark slices (n,; as ``scan`` returns them) whose normal is within 45 degrees of the body's axis."""
    normals = np.cross(slices[list(DIRECTIONS[:3])], slices[list(DIRECTIONS[3:])])
    return np.asarray(np.abs(normals[:, 2]) > _AXIAL_COSINE)


def upright(slices: pd.DataFrame) -> NDArray[np.bool_]:
    """Mark slices (n,) whose pixels lie as a model knows them: rows run to the patient's left, columns to the back.

    Within 45 degrees, by ImageOrientationPatient (0020,0037). Axial images of a patient who lies prone, or that were
    mirrored or turned, do not; nothing here turns them back. Slices of another plane are not judged.
    """
    straight = (slices["row_x"] > _AXIAL_COSINE) & (slices["column_y"] > _AXIAL_COSINE)
    return straight.to_numpy(np.bool_) | ~axial(slices)


def choose_series(series: pd.DataFrame, params: SelectionParams, choices: dict[str, str] | None = None) -> pd.DataFrame:
    """Add ``chosen``, ``reason`` and ``faults`` to the table of ``describe_series``: one chosen series a study.

    ``choices`` (study UID to series UID) overrules; both come from ``read_choices``.
    """
    table = series.sort_values(_KEYS, ignore_index=True)
    records: list[dict[str, Any]] = table.to_dict("records")  # type: ignore[assignment]
    chosen: list[bool] = []
    reasons: list[str] = []
    texts: list[str] = []
    for study, group in groupby(records, key=itemgetter("study_uid")):
        rows = list(group)
        faults = [find_faults(row, params) for row in rows]
        best = min(range(len(rows)), key=lambda number: _rank(rows[number], faults[number], params))
        named = (choices or {}).get(str(study))
        if named is not None:
            best = [row["series_uid"] for row in rows].index(named)
        explained = [_why_not(row, found, rows[best]) for row, found in zip(rows, faults, strict=True)]
        if usable := rows[best]["n_slices"] > 0:
            explained[best] = f"named in {params.choices}" if named else _why(best, rows, faults, params)
        reasons += explained
        texts += ["; ".join(words.values()) for words in faults]
        chosen += [usable and number == best for number in range(len(rows))]
    columns = {name: pd.Series(values, dtype=object) for name, values in (("reason", reasons), ("faults", texts))}
    return table.assign(chosen=np.array(chosen, dtype=np.bool_), **columns)


def find_faults(row: dict[str, Any], params: SelectionParams) -> dict[str, str]:
    """Return the faults of a series, a row of ``describe_series``, as keys of FAULTS with the words for each."""
    count, span, same, kernel = row["n_slices"], row["span_mm"], row["n_same_place"], row["kernel_kind"]
    if not count:
        return {"unusable": row["refused_because"] or "no usable slice"}
    marks = set(row["marks"].split())
    parts = [mark for mark in _OTHER_PARTS if mark in marks]
    other = [mark for mark in _OTHER_EXAMINATIONS if mark in marks]
    not_head = "brain" not in marks and (parts or not _HEAD.search(row["body_part"]))
    perhaps = row["contrast"] == "unknown" and "plain" in marks
    bone = kernel == "bone" or ("bone" in marks and kernel != "soft")
    few, long = count < params.min_slices, params.head_mm is not None and span > params.head_mm
    turned = "mirrored or turned images (ImageOrientationPatient); the models know upright ones"
    short, single = row.get("n_short_series", 0), row.get("n_single_slice", 0)
    size = "one slice" if short == single else f"{MAX_OF_SHORT} slices or fewer"
    join = f"; its study has {short} series of {size} each: give them one SeriesInstanceUID (0020,000E), {_JOIN}"
    checks = (
        (
            "absurd values",
            "absurd" in marks,
            "absurd values: its middle slice has hardly a pixel in the range of a body",
        ),
        ("not a head", not_head, f"not a head: {', '.join(parts) or row['body_part'][:16]}"),
        ("other examination", other, f"another examination: {', '.join(other)}"),
        ("contrast", row["contrast"] == "yes", "contrast"),
        ("perhaps contrast", perhaps, "perhaps contrast: called plain, but its header names an agent"),
        ("reformatted", "reformatted" in marks, "reformatted"),
        ("bone kernel", bone, f"bone kernel {row['kernel']}".strip()),
        ("too little", few, f"fewer than {params.min_slices} slices ({count}){join if short > 2 else ''}"),
        ("too little", not few and span < MIN_SPAN_MM, f"covers only {span:.0f} mm"),
        ("same places", same > MAX_SAME_PLACE * count, f"{same} of {count} slices at the place of another"),
        ("several passes", "passes" in marks, "several passes over one part in one series; split them"),
        ("several sizes", "sizes" in marks, "slices of several sizes, as of two series under one SeriesInstanceUID"),
        ("turned", "turned" in marks, turned),
        ("lossy", row["lossy"], "compressed with loss"),
        ("too long", long, f"covers {span:.0f} mm, more than a head"),
    )
    return {name: words for name, present, words in checks if present}


def _rank(row: dict[str, Any], faults: dict[str, str], params: SelectionParams) -> tuple[Any, ...]:
    weights = sorted((len(FAULTS) - FAULTS.index(name) for name in faults), reverse=True)
    gravest_first = (*weights, *[0] * (len(FAULTS) - len(weights)))
    distance = round(abs(float(row["thickness_mm"]) - params.thickness_mm), 2)
    distance = np.inf if np.isnan(distance) else distance
    return gravest_first, row["contrast"] != "no", distance, -row["n_slices"], row["series_uid"]


def _why(best: int, rows: list[dict[str, Any]], faults: list[dict[str, str]], params: SelectionParams) -> str:
    row, usable = rows[best], sum(other["n_slices"] > 0 for other in rows)
    fit = [other for other, other_faults in zip(rows, faults, strict=True) if not other_faults]
    alike = [other for other in fit if other["contrast"] == row["contrast"]]
    if usable == 1:
        text = "the only usable series"
    elif faults[best]:
        text = f"the best of {usable} usable series"
    elif len(fit) == 1:
        text = "the only one without a fault"
    elif len(alike) == 1:
        text = f"the only one of {len(fit)} without a fault that says it is plain"
    else:
        text = f"nearest to {params.thickness_mm:g} mm of {len(alike)} without a fault"
        text += "" if len(alike) == len(fit) else " that says it is plain"
    if faults[best]:
        return f"{text}, though: {'; '.join(faults[best].values())}"
    facts = [] if np.isnan(row["thickness_mm"]) else [f"{row['thickness_mm']:.4g} mm"]
    facts += ["plain"] if row["contrast"] == "no" else []
    facts += [f"kernel {row['kernel']}"] if row["kernel"] else []
    return f"{text} ({', '.join(facts)})" if facts else text


def _why_not(row: dict[str, Any], faults: dict[str, str], best: dict[str, Any]) -> str:
    if faults:
        return "; ".join(faults.values())
    if row["contrast"] != best["contrast"] == "no":
        return "does not say whether it is plain; the chosen one does"
    mine, other = float(row["thickness_mm"]), float(best["thickness_mm"])
    if mine != other and not (np.isnan(mine) and np.isnan(other)):
        return f"{mine:.4g} mm thick; the chosen one has {other:.4g} mm"
    if row["n_slices"] != best["n_slices"]:
        return f"like the chosen one, with {row['n_slices']} slices instead of {best['n_slices']}"
    return "like the chosen one; its SeriesInstanceUID comes later"


def read_choices(path: Path, series: pd.DataFrame) -> dict[str, str]:
    """Read a table with the column ``series_uid``, and ``study_uid`` if it has one: study UID to the series to take.

    Raises DataError that names file and line: an unknown series, one without a usable slice or of another study than
    the row says; two series of one study.
    """
    table = read_table(path, "choices of series", ("series_uid", "study_uid"))
    if "series_uid" not in table.names:
        raise table.error("must have a column series_uid")
    named = pd.Series(table.text("series_uid").to_pandas())
    facts = series.set_index("series_uid")
    table.refuse(~named.isin(facts.index).to_numpy(), "no such series; series.csv lists those there are", named)
    empty = (facts["n_slices"].reindex(named) == 0).to_numpy()
    table.refuse(empty, "the series has no usable slice; rejected.csv says why", named)
    studies = facts["study_uid"].reindex(named)
    if "study_uid" in table.names:
        stated = pd.Series(table.text("study_uid").to_pandas())
        remedy = "the series is of another study; correct study_uid, or leave that column out"
        table.refuse(stated.to_numpy() != studies.to_numpy(), remedy, stated)
    table.refuse(studies.duplicated().to_numpy(), "a second series of the same study; name one", named)
    return dict(zip(studies, named, strict=True))


@dataclass(frozen=True)
class Selection:
    """The result of ``select_series``; every input slice is in ``slices`` or in ``left_out``."""

    slices: pd.DataFrame  # as ``scan`` returns them
    series: pd.DataFrame  # one row a series: its facts, ``chosen``, ``reason``
    left_out: pd.DataFrame  # scan.REJECTED


def select_series(
    slices: pd.DataFrame, rejected: pd.DataFrame, params: SelectionParams, *, one_per_study: bool
) -> Selection:
    """Choose series by rule and the slices within ``head_mm`` of the topmost; both tables are those of ``scan``.

    Without ``one_per_study`` every series with a usable slice is chosen whole.
    """
    series = _mark_absurd(describe_series(slices, rejected), slices)
    if not one_per_study:
        usable = series["n_slices"] > 0
        reason = np.where(usable, "every series is used", "no usable slice").astype(object)
        return Selection(slices, series.assign(chosen=usable, reason=reason, faults=""), rejected.iloc[:0])
    choices = read_choices(Path(params.choices), series) if params.choices else None
    series = choose_series(series, params, choices)
    reasons = slices["series_uid"].map(series.set_index("series_uid")["reason"])
    chosen = slices["series_uid"].isin(series.loc[series["chosen"], "series_uid"])
    depth = slices.groupby("series_uid")["position_mm"].transform("max") - slices["position_mm"]
    # The normal of axial slices ascends to the head: what lies low in a long series is neck or chest (CQ500-CT-345).
    below = chosen & axial(slices) & (depth > (np.inf if params.head_mm is None else params.head_mm))
    kept = slices[chosen & ~below]
    if below.any():  # numbers and distances of what is left
        kept, _ = order_series(kept.drop(columns=["slice_index", "position_mm", "spacing_mm"]))
    too_low = f"more than {params.head_mm} mm below the topmost slice: no head"
    left_out = pd.concat(
        [
            slices[~chosen].assign(reason="series not chosen: " + reasons[~chosen], code=NOT_CHOSEN),
            slices[below].assign(reason=too_low, code=""),
        ],
        ignore_index=True,
    )
    return Selection(kept.reset_index(drop=True), series, left_out[REJECTED])
