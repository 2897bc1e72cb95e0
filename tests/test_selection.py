"""One series a study, chosen by rule."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichpipe.common.errors import DataError
from ichpipe.index.scan import REJECTED
from ichpipe.index.series_selection import FAULTS, choose_series, describe_series, select_series
from ichpipe.index.slice_order import DIRECTIONS, POSITION, order_series
from ichpipe.params.schema import SelectionParams

PARAMS = SelectionParams()
AXIAL = [1.0, 0, 0, 0, 1.0, 0]
KINDS = {
    "good": {},
    "plain": {"marks": "plain"},
    "thin": {"count": 220, "step": 0.625, "thickness_mm": 0.625},
    "contrast": {"marks": "contrast"},
    "agent": {"contrast_agent": True},
    "bone": {"kernel": "BONEPLUS"},
    "few": {"count": 3},
    "slab": {"count": 11},
    "twice": {"twice": True},
    "sizes": {"rows": [512] * 15 + [256] * 15},
    "turned": {"directions": [-1.0, 0, 0, 0, 1.0, 0]},
    "lossy": {"lossy": True},
    "spine": {"marks": "spine"},
    "absurd": {"marks": "absurd"},
    "passes": {"marks": "passes"},
    "chest": {"body_part": "CHEST"},
    "perfusion": {"marks": "perfusion"},
    "mpr": {"image_type": "DERIVED\\SECONDARY\\REFORMATTED"},
    "coronal": {"directions": [1.0, 0, 0, 0, 0, -1.0]},
    "map": {"image_type": "DERIVED\\SECONDARY\\AXIAL\\CBF"},
    "agent though plain": {"contrast_agent": True, "marks": "plain"},
    "plain angio": {"marks": "angio plain"},
    "long": {"count": 80},
}


def series(uid, study="T1", *, count=30, step=5.0, twice=False, directions=AXIAL, **facts):
    """The slices of one series, ``step`` mm apart."""
    places = np.arange(count) * step
    places = np.concatenate([places, places]) if twice else places
    known = {
        "kernel": "STANDARD", "marks": "", "contrast_agent": False, "lossy": False, "thickness_mm": 5.0,
        "body_part": "HEAD", "acquisition": "",
        "image_type": "ORIGINAL\\PRIMARY\\AXIAL", "rows": 512, "columns": 512,
    }  # fmt: skip
    frame = pd.DataFrame({"sop_uid": [f"{uid}.{number:03d}" for number in range(len(places))]})
    frame = frame.assign(study_uid=study, series_uid=uid, patient_id=f"P-{study}", instance_number=np.nan)
    frame = frame.assign(path=frame["sop_uid"], **(known | facts))
    normal = np.cross(directions[:3], directions[3:])
    frame[list(POSITION)] = places[:, None] * normal
    frame[list(DIRECTIONS)] = directions
    return order_series(frame)[0]


def no_rejected(*rows):
    return pd.DataFrame([(*row, "", "") for row in rows], columns=REJECTED, dtype=object)


def chosen_of(*parts, params=PARAMS, rejected=None, choices=None):
    table = describe_series(pd.concat(parts), no_rejected() if rejected is None else rejected)
    return choose_series(table, params, choices).set_index("series_uid")


@settings(deadline=None, max_examples=40)
@given(
    studies=st.lists(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=4), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
@pytest.mark.slow
def test_one_series_a_study_whatever_the_order_of_rows(studies, seed):
    parts = [
        series(f"S{study}{number}{kind}", f"T{study}", **KINDS[kind])
        for study, kinds in enumerate(studies)
        for number, kind in enumerate(kinds)
    ]
    slices = pd.concat(parts, ignore_index=True)
    table = choose_series(describe_series(slices, no_rejected()), PARAMS)
    assert (table.groupby("study_uid")["chosen"].sum() == 1).all()
    assert table["reason"].str.len().gt(3).all()
    mixed = slices.sample(frac=1, random_state=seed)
    pd.testing.assert_frame_equal(choose_series(describe_series(mixed, no_rejected()), PARAMS), table)


@settings(deadline=None, max_examples=40)
@given(kinds=st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=4))
@pytest.mark.slow
def test_a_series_that_is_not_chosen_can_be_taken_away_or_added(kinds):
    parts = [series(f"S{number}", **KINDS[kind]) for number, kind in enumerate(kinds)]
    table = chosen_of(*parts)
    best = table.index[table["chosen"]][0]
    kept = [part for part in parts if part["series_uid"].iloc[0] == best]
    others = [part for part in parts if part["series_uid"].iloc[0] != best]
    for left_out in range(len(others)):
        rest = others[:left_out] + others[left_out + 1 :]
        assert chosen_of(*kept, *rest)["chosen"][best]


@settings(deadline=None, max_examples=30)
@given(kinds=st.lists(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=3), min_size=2, max_size=3))
@pytest.mark.slow
def test_studies_do_not_touch_each_other(kinds):
    studies = [
        [series(f"S{study}{number}", f"T{study}", **KINDS[kind]) for number, kind in enumerate(names)]
        for study, names in enumerate(kinds)
    ]
    alone = pd.concat([chosen_of(*parts) for parts in studies])
    pd.testing.assert_frame_equal(chosen_of(*[part for parts in reversed(studies) for part in parts]), alone)


@pytest.mark.parametrize(
    ("better", "worse", "reason"),
    [
        ("good", "thin", "0.625 mm thick; the chosen one has 5 mm"),
        ("plain", "contrast", "contrast"),
        ("thin", "contrast", "contrast"),
        ("thin", "bone", "bone kernel BONEPLUS"),
        ("good", "agent", "contrast"),
        ("good", "few", "fewer than 10 slices (3)"),
        ("good", "slab", "covers only 50 mm"),
        ("thin", "twice", "30 of 60 slices at the place of another"),
        ("thin", "lossy", "compressed with loss"),
        ("thin", "spine", "not a head: spine"),
        ("contrast", "chest", "not a head: CHEST"),
        ("contrast", "perfusion", "another examination: perfusion"),
        ("bone", "mpr", "reformatted"),
        ("bone", "contrast", "contrast"),
        ("contrast", "few", "fewer than 10 slices (3)"),
        ("thin", "long", "covers 395 mm, more than a head"),
        ("thin", "coronal", "reformatted"),
        ("bone", "coronal", "reformatted"),
        ("contrast", "map", "another examination: perfusion"),
        ("agent though plain", "contrast", "contrast"),
        ("agent though plain", "bone", "bone kernel BONEPLUS"),
        ("thin", "agent though plain", "called plain, but its header names an agent"),
        ("plain", "thin", "does not say whether it is plain; the chosen one does"),
        ("plain angio", "good", "does not say whether it is plain; the chosen one does"),
    ],
)
def test_what_is_better_than_what(better, worse, reason):
    for names in ("AB", "BA"):
        table = chosen_of(series(names[0], **KINDS[better]), series(names[1], **KINDS[worse]))
        assert table.loc[names[0], "chosen"]
        assert reason in table.loc[names[1], "reason"]


@pytest.mark.slow
def test_a_fault_alone_is_worse_than_none_and_the_list_orders_them():
    order = [
        "absurd", "chest", "perfusion", "few", "contrast", "mpr", "bone", "twice", "passes", "sizes", "turned",
        "agent though plain", "lossy", "long", "good",
    ]  # fmt: skip
    assert len(order) == len(FAULTS)  # "unusable" has no slices; the last one has no fault
    for number, worse in enumerate(order):
        for better in order[number + 1 :]:
            table = chosen_of(series("A", **KINDS[worse]), series("B", **KINDS[better]))
            assert table["chosen"]["B"], (worse, better)


def test_a_lone_series_is_taken_and_its_faults_are_said():
    table = chosen_of(series("A", count=1, kernel="BONE"))
    assert table["chosen"].all()
    assert table.loc["A", "reason"] == ("the only usable series, though: bone kernel BONE; fewer than 10 slices (1)")


def test_what_says_it_is_plain_goes_before_what_does_not_say_and_then_thickness_counts():
    parts = [series("A"), series("B", marks="contrast"), series("C", **KINDS["thin"], marks="plain")]
    table = chosen_of(*parts)
    assert table.index[table["chosen"]].tolist() == ["C"]
    assert table.loc["C", "reason"].startswith("the only one of 2 without a fault that says it is plain (0.625 mm")
    table = chosen_of(*parts, series("D", marks="plain"))
    assert table.loc["D", "reason"].startswith("nearest to 5 mm of 2 without a fault that says it is plain")
    assert table.loc["C", "reason"] == "0.625 mm thick; the chosen one has 5 mm"
    assert chosen_of(series("A"), series("C", **KINDS["thin"]))["chosen"]["A"]


@pytest.mark.parametrize(
    ("facts", "contrast"),
    [
        ({}, "unknown"), ({"marks": "plain"}, "no"), ({"marks": "contrast"}, "yes"), ({"marks": "angio"}, "yes"),
        ({"marks": "angio plain"}, "no"), ({"contrast_agent": True}, "yes"),
        ({"contrast_agent": True, "marks": "plain"}, "unknown"),
    ],
)  # fmt: skip
def test_contrast_is_yes_no_or_unknown(facts, contrast):
    assert chosen_of(series("A", **facts)).loc["A", "contrast"] == contrast


@pytest.mark.parametrize(
    ("body_part", "marks", "fit"),
    [
        ("HEAD", "", True), ("", "", True), ("HEAD_AND_NECK", "", True), ("NEUROHEAD", "", True), ("CHEST", "", False),
        ("CHEST", "brain", True), ("HEAD", "spine", False), ("HEAD", "brain spine", True), ("CSPINE", "", False),
    ],
)  # fmt: skip
def test_its_own_words_outweigh_the_body_part(body_part, marks, fit):
    reason = chosen_of(series("A", body_part=body_part, marks=marks)).loc["A", "reason"]
    assert ("not a head" not in reason) == fit


def test_facts_of_a_series():
    slices = series("A", count=20, kernel="STANDARD", thickness_mm=np.nan, marks="thin")
    slices.loc[:4, "kernel"] = "BONE"
    slices.loc[:2, "marks"] = "brain"
    facts = describe_series(slices, no_rejected()).iloc[0]
    assert facts[["n_slices", "spacing_mm", "thickness_mm", "span_mm"]].tolist() == [20, 5.0, 5.0, 95.0]
    assert facts[["kernel", "kernel_kind", "marks"]].tolist() == ["STANDARD", "soft", "brain thin"]
    assert describe_series(slices.assign(thickness_mm=0.0), no_rejected())["thickness_mm"].tolist() == [5.0]
    assert describe_series(slices.assign(thickness_mm=2.5), no_rejected())["thickness_mm"].tolist() == [2.5]


def test_like_a_study_from_a_philips_scanner():
    rejected = no_rejected(
        ("i1", "ImageType (0008,0008) says LOCALIZER: a localizer or screen, not a slice", "T1", "LOC"),
        ("i2", "secondary capture (SOPClassUID 0008,0016), not an original CT slice", "T1", "SC"),
    )
    table = chosen_of(
        series("AX", count=28, kernel="UB", marks="brain"),
        series("BONE", count=28, kernel="D", marks="bone"),
        rejected=rejected,
    )
    assert table.index[table["chosen"]].tolist() == ["AX"]
    assert table.loc["AX", "reason"] == "the only one without a fault (5 mm, kernel UB)"
    assert table.loc["BONE", "reason"] == "bone kernel D"
    assert "localizer or screen" in table.loc["LOC", "reason"]
    assert "secondary capture" in table.loc["SC", "reason"]


def test_refused_series_stand_in_the_table_with_the_commonest_reason():
    rejected = no_rejected(
        ("x", "a localizer", "T1", "L"), ("y", "a localizer", "T1", "L"), ("z", "damaged", "T1", "L"),
        ("v", "damaged", "T1", "A"), ("w", "not DICOM", "", ""), ("u", "secondary capture", "T9", "Q"),
    )  # fmt: skip
    table = chosen_of(series("A"), rejected=rejected)
    assert table.loc["L", ["n_slices", "n_refused", "chosen", "reason"]].tolist() == [0, 3, False, "a localizer"]
    assert table.loc["Q", ["n_slices", "chosen", "reason"]].tolist() == [0, False, "secondary capture"]
    assert table.loc["A", ["n_refused", "chosen"]].tolist() == [1, True]


def test_a_series_is_one_row_whatever_its_refused_files_say():
    rejected = no_rejected(
        ("v", "damaged", "", "A"), ("w", "damaged", "T9", "A"), ("x", "mixed", "T3", "M"), ("y", "mixed", "T2", "M"),
        ("z", "damaged", "", "N"),
    )  # fmt: skip
    table = describe_series(series("A"), rejected).set_index("series_uid")
    assert table["study_uid"].to_dict() == {"A": "T1", "M": "T2", "N": ""}
    assert table["n_refused"].to_dict() == {"A": 2, "M": 2, "N": 1}
    assert len(select_series(series("A"), rejected, PARAMS, one_per_study=True).slices) == 30


def test_nothing_usable_at_all():
    rejected = no_rejected(("x", "a localizer", "T1", "L"))
    table = choose_series(describe_series(series("A").iloc[:0], rejected), PARAMS)
    assert (len(table), table["chosen"].any()) == (1, False)
    assert choose_series(describe_series(series("A").iloc[:0], no_rejected()), PARAMS).empty


def test_the_tie_goes_to_the_first_uid():
    table = chosen_of(series("B"), series("A"))
    assert table["chosen"]["A"]
    assert table.loc["B", "reason"] == "like the chosen one; its SeriesInstanceUID comes later"


def test_thickness_is_a_parameter():
    parts = [series("A"), series("B", **KINDS["thin"])]
    assert chosen_of(*parts, params=SelectionParams(thickness_mm=1.0))["chosen"]["B"]


def test_choices_overrule(tmp_path):
    path = tmp_path / "choices.csv"
    path.write_text("study_uid,series_uid\nT1,B\n")
    parts = pd.concat([series("A"), series("B", **KINDS["bone"]), series("C", "T2"), series("D", "T2", **KINDS["few"])])
    found = select_series(parts, no_rejected(), SelectionParams(choices=str(path)), one_per_study=True)
    table = found.series.set_index("series_uid")
    assert table.index[table["chosen"]].tolist() == ["B", "C"]
    assert table.loc["B", "reason"] == f"named in {path}"
    assert set(found.slices["series_uid"]) == {"B", "C"}
    assert len(found.slices) + len(found.left_out) == len(parts)
    assert found.left_out["reason"].str.startswith("series not chosen: ").all()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("series_uid\nA\nX\n", "line 3: no such series; series.csv lists"),
        ("series_uid\nA\nB\n", "line 3: a second series of the same study"),
        ("series_uid\nL\n", "line 2: the series has no usable slice"),
        ("uid\nA\n", "must have a column series_uid"),
        ("study_uid,series_uid\nT2,A\n", "line 2: the series is of another study"),
    ],
)
def test_wrong_choices_are_named(tmp_path, text, complaint):
    path = tmp_path / "choices.csv"
    path.write_text(text)
    rejected = no_rejected(("x", "a localizer", "T1", "L"))
    with pytest.raises(DataError, match=complaint):
        select_series(
            pd.concat([series("A"), series("B")]), rejected, SelectionParams(choices=str(path)), one_per_study=True
        )


def test_what_lies_below_the_head_is_left_out_and_the_rest_is_numbered_anew():
    long = series("A", count=100)
    found = select_series(long, no_rejected(), PARAMS, one_per_study=True)
    assert found.slices["position_mm"].tolist() == list(np.arange(49, 100) * 5.0)
    assert found.slices["slice_index"].tolist() == list(range(51))
    assert found.left_out["reason"].unique().tolist() == ["more than 250.0 mm below the topmost slice: no head"]
    whole = select_series(long, no_rejected(), SelectionParams(head_mm=None), one_per_study=True)
    assert len(whole.slices) == 100


def test_all_series_are_taken_where_that_is_asked_for():
    parts = pd.concat([series("A"), series("B", **KINDS["bone"])])
    found = select_series(parts, no_rejected(("x", "a localizer", "T1", "L")), PARAMS, one_per_study=False)
    assert found.slices is parts
    assert found.series["chosen"].tolist() == [True, True, False]
    assert found.left_out.empty
