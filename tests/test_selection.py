"""One series a study, chosen by rule."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ichpipe.chosen import choose
from ichpipe.errors import DataError
from ichpipe.ordering import DIRECTIONS, POSITION, order_series
from ichpipe.params import SelectionParams
from ichpipe.scan import REJECTED
from ichpipe.selection import FAULTS, choose_series, describe_series

PARAMS = SelectionParams()
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
    "lossy": {"lossy": True},
    "spine": {"marks": "spine"},
    "chest": {"body_part": "CHEST"},
    "perfusion": {"marks": "perfusion"},
    "mpr": {"image_type": "DERIVED\\SECONDARY\\REFORMATTED"},
}


def series(uid, study="T1", *, count=30, step=5.0, twice=False, **facts):
    """The slices of one series, ``step`` mm apart."""
    places = np.arange(count) * step
    places = np.concatenate([places, places]) if twice else places
    known = {
        "kernel": "STANDARD", "marks": "", "contrast_agent": False, "lossy": False, "thickness_mm": 5.0,
        "body_part": "HEAD",
        "image_type": "ORIGINAL\\PRIMARY\\AXIAL", "rows": 512, "columns": 512,
    }  # fmt: skip
    frame = pd.DataFrame({"sop_uid": [f"{uid}.{number:03d}" for number in range(len(places))]})
    frame = frame.assign(study_uid=study, series_uid=uid, patient_id=f"P-{study}", instance_number=np.nan)
    frame = frame.assign(path=frame["sop_uid"], **(known | facts))
    frame[list(POSITION)] = np.column_stack([np.zeros_like(places), np.zeros_like(places), places])
    frame[list(DIRECTIONS)] = [1.0, 0, 0, 0, 1.0, 0]
    return order_series(frame)[0]


def no_rejected(*rows):
    return pd.DataFrame(rows, columns=REJECTED, dtype=object)


def chosen_of(*parts, params=PARAMS, rejected=None, choices=None):
    table = describe_series(pd.concat(parts), no_rejected() if rejected is None else rejected)
    return choose_series(table, params, choices).set_index("series_uid")


@settings(deadline=None, max_examples=40)
@given(
    studies=st.lists(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=4), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
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
def test_a_series_that_is_not_chosen_can_be_taken_away(kinds):
    parts = [series(f"S{number}", **KINDS[kind]) for number, kind in enumerate(kinds)]
    table = chosen_of(*parts)
    best = table.index[table["chosen"]][0]
    kept = [part for part in parts if part["series_uid"].iloc[0] == best]
    others = [part for part in parts if part["series_uid"].iloc[0] != best]
    for left_out in range(len(others)):
        rest = others[:left_out] + others[left_out + 1 :]
        if table.loc[others[left_out]["series_uid"].iloc[0], "contrast"] != "yes":  # its contrast makes others suspect
            assert chosen_of(*kept, *rest)["chosen"][best]


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
    ],
)
def test_what_is_better_than_what(better, worse, reason):
    for names in ("AB", "BA"):
        table = chosen_of(series(names[0], **KINDS[better]), series(names[1], **KINDS[worse]))
        assert table.loc[names[0], "chosen"]
        assert reason in table.loc[names[1], "reason"]


def test_faults_of_the_code_are_those_of_the_list():
    table = describe_series(pd.concat([series(kind, kind, **facts) for kind, facts in KINDS.items()]), no_rejected())
    assert choose_series(table, PARAMS)["chosen"].all()
    assert len(FAULTS) == len(set(FAULTS))


def test_a_lone_series_is_taken_and_its_faults_are_said():
    table = chosen_of(series("A", count=1, kernel="BONE"))
    assert table["chosen"].all()
    assert table.loc["A", "reason"] == ("the only usable series, though: bone kernel BONE; fewer than 10 slices (1)")


def test_beside_contrast_a_series_that_does_not_say_is_suspect():
    table = chosen_of(series("A"), series("B", marks="contrast"), series("C", **KINDS["thin"], marks="plain"))
    assert table.index[table["chosen"]].tolist() == ["C"]
    assert "perhaps contrast" in table.loc["A", "reason"]
    assert chosen_of(series("A"), series("C", **KINDS["thin"], marks="plain"))["chosen"]["A"]


def test_refused_series_stand_in_the_table_with_the_commonest_reason():
    rejected = no_rejected(
        ("x", "a localizer", "T1", "L"), ("y", "a localizer", "T1", "L"), ("z", "damaged", "T1", "L"),
        ("v", "damaged", "T1", "A"), ("w", "not DICOM", "", ""), ("u", "secondary capture", "T9", "Q"),
    )  # fmt: skip
    table = chosen_of(series("A"), rejected=rejected)
    assert table.loc["L", ["n_slices", "n_refused", "chosen", "reason"]].tolist() == [0, 3, False, "a localizer"]
    assert table.loc["Q", ["n_slices", "chosen", "reason"]].tolist() == [0, False, "secondary capture"]
    assert table.loc["A", ["n_refused", "chosen"]].tolist() == [1, True]


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
    path.write_text("series_uid\nB\n")
    parts = pd.concat([series("A"), series("B", **KINDS["bone"]), series("C", "T2"), series("D", "T2", **KINDS["few"])])
    found = choose(parts, no_rejected(), SelectionParams(choices=str(path)), one_per_study=True)
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
    ],
)
def test_wrong_choices_are_named(tmp_path, text, complaint):
    path = tmp_path / "choices.csv"
    path.write_text(text)
    rejected = no_rejected(("x", "a localizer", "T1", "L"))
    with pytest.raises(DataError, match=complaint):
        choose(pd.concat([series("A"), series("B")]), rejected, SelectionParams(choices=str(path)), one_per_study=True)


def test_what_lies_below_the_head_is_left_out_and_the_rest_is_numbered_anew():
    long = series("A", count=100)
    found = choose(long, no_rejected(), PARAMS, one_per_study=True)
    assert found.slices["position_mm"].tolist() == list(np.arange(49, 100) * 5.0)
    assert found.slices["slice_index"].tolist() == list(range(51))
    assert found.left_out["reason"].unique().tolist() == ["more than 250.0 mm below the topmost slice: no head"]
    whole = choose(long, no_rejected(), SelectionParams(head_mm=None), one_per_study=True)
    assert len(whole.slices) == 100


def test_all_series_are_taken_where_that_is_asked_for():
    parts = pd.concat([series("A"), series("B", **KINDS["bone"])])
    found = choose(parts, no_rejected(("x", "a localizer", "T1", "L")), PARAMS, one_per_study=False)
    assert found.slices is parts
    assert found.series["chosen"].tolist() == [True, True, False]
    assert found.left_out.empty
