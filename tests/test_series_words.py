"""What descriptions and kernels say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ichpipe.series_words import kernel_kind, marks_of

VOCABULARY = {
    "abdomen", "angio", "bone", "brain", "chest", "contrast", "face", "monitoring", "neck", "perfusion", "plain",
    "reformatted", "report", "spine", "thin",
}  # fmt: skip


@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=3))
def test_nothing_but_the_vocabulary_leaves(texts):
    assert set(marks_of(*texts).split()) <= VOCABULARY


@pytest.mark.parametrize(
    "text",
    [
        "CT 5mm Plain", "HEAD W/O", "Head without contrast", "Brain W/O IV CONTRAST", "NON-CONTRAST HEAD",
        "noncontrast", "NON CONTRAST", "C- axial", "AX -C", "NCCT", "NECT HEAD", "Head_WO_con 5.0 H31s",
        "CT PRE CONTRAST 5MM STD",
        "unenhanced", "1A TRAUMA/PLAIN HEAD DM /Head", "sans contraste",
    ],
)  # fmt: skip
def test_a_denied_contrast_is_plain(text):
    assert "plain" in marks_of(text).split()
    assert "contrast" not in marks_of(text).split()


@pytest.mark.parametrize(
    "text",
    ["CT POST CONTRAST", "CT 4cc sec 150cc D3D on-2", "HEAD +C", "CT HEAD WITH CONTRAST", "C+ axial", "CECT", "e+1",
     "CT 55mm Contrast", "HEAD W CON", "HEAD W", "arterial phase"],
)  # fmt: skip
def test_contrast(text):
    assert "contrast" in marks_of(text).split()
    assert "plain" not in marks_of(text).split()


@pytest.mark.parametrize(
    "text", ["CT HEAD W/O & W CONTRAST", "WO/W CONTRAST", "with and without contrast", "AXIAL", ""]
)
def test_both_or_neither_says_nothing(text):
    assert not {"plain", "contrast"} & set(marks_of(text).split())


def test_protocol_and_study_speak_only_of_contrast_and_only_where_the_series_does_not():
    assert marks_of("AX 5MM", "PLAIN HEAD", "CT NECK W CONTRAST") == "plain"
    assert marks_of("POST CONTRAST", "PLAIN HEAD") == "contrast"
    assert marks_of("BONE", "C SPINE") == "bone"
    assert marks_of("HEAD W/O & W", "POST CONTRAST") == "brain"  # the nearer text says that it holds both


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("STD+", "soft"), ("STANDARD", "soft"), ("BONEPLUS", "bone"), ("UB", "soft"), ("YC", "bone"), ("FC21", "soft"),
        ("FC30", "bone"), ("FC81", "bone"), ("FC51", "bone"), ("H31s", "soft"), ("H60s", "bone"), ("J40s\\3", "soft"),
        ("Hr38f", "soft"), ("Hr68h", "bone"), ("H52h", "unknown"), ("DETAIL", "unknown"), ("", "unknown"),
        (" soft ", "soft"),
    ],
)  # fmt: skip
def test_kernels(kernel, kind):
    assert kernel_kind(kernel) == kind
