"""What descriptions and kernels say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ichpipe.dicom.series_description import kernel_kind, marks_of

VOCABULARY = {
    "abdomen", "angio", "bone", "brain", "chest", "contrast", "face", "monitoring", "neck", "perfusion", "plain",
    "reformatted", "report", "spine", "thin",
}  # fmt: skip


@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=3))
@pytest.mark.slow
def test_nothing_but_the_vocabulary_leaves(texts):
    assert set(marks_of(*texts).split()) <= VOCABULARY


@pytest.mark.parametrize(
    "text",
    [
        "CT 5mm Plain", "HEAD W/O", "Head without contrast", "Brain W/O IV CONTRAST", "NON-CONTRAST HEAD",
        "noncontrast", "NON CONTRAST", "C- axial", "AX -C", "NCCT", "NECT HEAD", "Head_WO_con 5.0 H31s",
        "CT PRE CONTRAST 5MM STD",
        "unenhanced", "1A TRAUMA/PLAIN HEAD DM /Head", "sans contraste", "Cerebro sin contraste", "ohne KM", "Nativ",
        "5 MM PRE CONTRAST-2", "NON CE", "W/O CE", "w/o iv contrast", "no contrast", "non contrasted", "(C-)", "(-C)",
        "HEAD WO", "NON_CONTRAST", "5/5mm Plain", "CRANEO SIN CONTRASTE IV", "CRANIO SENZA MDC",
        "Hersenen zonder contrast", "HERSENEN BLANCO", "bez kontrastu", "ohne Kontrastmittel", "s/ contraste",
        "sans produit de contraste", "W/OUT CONTRAST", "crâne sans IV",
    ],
)  # fmt: skip
def test_a_denied_contrast_is_plain(text):
    assert "plain" in marks_of(text).split()
    assert "contrast" not in marks_of(text).split()


@pytest.mark.parametrize(
    "text",
    ["CT POST CONTRAST", "CT 4cc sec 150cc D3D on-2", "HEAD +C", "CT HEAD WITH CONTRAST", "C+ axial", "CECT", "e+1",
     "CT 55mm Contrast", "HEAD W CON", "HEAD W", "arterial phase", "CT ORAL IV", "CE HEAD", "w/ contrast", "mit KM",
     "POST CONTRAST-2", "postcontrast", "W/IV", "AX (C+)", "HEAD+C",
     "CRANIO CON MDC", "con CIV", "CRANE AVEC PDC",
     "après injection", "Kopf KM"],
)  # fmt: skip
def test_contrast(text):
    assert "contrast" in marks_of(text).split()
    assert "plain" not in marks_of(text).split()


@pytest.mark.parametrize(
    "text",
    ["CT HEAD W/O & W CONTRAST", "WO/W CONTRAST", "with and without contrast", "AXIAL", "", "Head W+WO", "W/WO",
     "HEAD W AND W/O", "C-/C+", "with bone algorithm", "HEAD W/GANTRY TILT", "HEAD W/O TILT", "HEAD W/C-SPINE",
     "HEAD + C-SPINE", "C SPINE", "CT C", "withdrawn"],
)  # fmt: skip
def test_both_or_neither_says_nothing(text):
    assert not {"plain", "contrast"} & set(marks_of(text).split())


def test_protocol_and_study_speak_only_of_contrast_and_only_where_the_series_does_not():
    assert marks_of("AX 5MM", "PLAIN HEAD", "CT NECK W CONTRAST") == "plain"
    assert marks_of("POST CONTRAST", "PLAIN HEAD") == "contrast"
    assert marks_of("BONE", "C SPINE") == "bone"
    assert marks_of("HEAD W/O & W", "POST CONTRAST") == "brain"  # the nearer text says that it holds both


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("CTA COW", "angio"), ("CT VENOGRAM", "angio"), ("CTP 4D", "perfusion"), ("TTP", "perfusion"),
        ("c-spine", "spine"), ("CSPINE 2.0", "spine"), ("Neck", "neck"), ("THORAX", "chest"), ("Abdomen", "abdomen"),
        ("SINUSES", "face"), ("IAC_0.6", "face"), ("TEMPORAL BONE", "bone face"), ("Coronal MPR", "reformatted"),
        ("SAG", "reformatted"), ("VRT", "reformatted"), ("3D", "reformatted"), ("MIP", "reformatted"),
        ("Dose Report", "report"), ("LOW DOSE HEAD", "brain"), ("Smart Prep", "monitoring"),
        ("TestBolus", "monitoring"),
        ("PreMonitoring", "monitoring"), ("bolus_track", "monitoring"), ("AX_HEAD/BONE", "bone brain"),
        ("Schädel", "brain"), ("BONE PLUS", "bone"), ("Topogram", "report"), ("EXPLAINED CORE SAGE PERFORMED", ""),
    ],
)  # fmt: skip
def test_words(text, marks):
    assert marks_of(text) == marks
    assert marks_of(text.lower()) == marks_of(text.upper()) == marks


# Folder names as the public lists of CQ500 have them: "/", "+" and ":" of the description are lost in them.
CQ500_PLAIN = ["CT PLAIN THIN", "CT Plain 3mm", "CT 55mm Plain-2", "CT PRE CONTRAST 5MM STD", "CT PRE CONTRAST THIN",
               "CT BRAIN PLAIN", "CT 3.753.75mm Plain", "CT 5 MM PRE CONTRAST-2", "CT Thin Plain-3"]  # fmt: skip
CQ500_CONTRAST = ["CT POST CONTRAST-4", "CT 4cc sec 150cc D3D on-3", "CT 5mm POST CONTRAST", "CT ORAL IV-2",
                  "CT Thin Contrast", "CT CONTRAST-2", "CT CECT THIN", "CT 55mm Contrast"]  # fmt: skip
CQ500_NEITHER = ["CT 5mm-4", "CT 0.625mm", "CT 2.55mm", "CT I To S", "CT HELICAL-2", "CT C THIN", "CT C-2", "CT DE",
                 "CT Thin Stnd", "CT 1.25 MMC", "CT SOFT THIN", "CT HRCT", "CT Axial 0.625 HiResVS40"]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "said"), [(CQ500_PLAIN, {"plain"}), (CQ500_CONTRAST, {"contrast"}), (CQ500_NEITHER, set())]
)
def test_names_of_cq500(names, said):
    for name in names:
        assert {"plain", "contrast"} & set(marks_of(name).split()) == said, name
        assert not set(marks_of(name).split()) - {"plain", "contrast", "thin", "brain"}, name


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("STD+", "soft"), ("STANDARD", "soft"), ("BONEPLUS", "bone"), ("UB", "soft"), ("YC", "bone"), ("FC21", "soft"),
        ("FC30", "bone"), ("FC81", "bone"), ("FC51", "bone"), ("H31s", "soft"), ("H60s", "bone"), ("J40s\\3", "soft"),
        ("Hr38f", "soft"), ("Hr68h", "bone"), ("H52h", "unknown"), ("DETAIL", "unknown"), ("", "unknown"),
        (" soft ", "soft"), ("H50s", "unknown"), ("B30f", "soft"), ("B70f", "bone"), ("U70u", "bone"),
        ("I31f\\3", "soft"), ("HD BONEPLUS", "bone"), ("HD STND", "soft"), ("D", "bone"), ("YA", "unknown"),
        ("FC64", "soft"), ("FC68-H", "soft"), ("FC43", "unknown"), ("FC70", "unknown"), ("FL03", "unknown"),
        ("BONE\\STANDARD", "bone"), ("X40", "unknown"), ("FC3", "unknown"), ("bone", "bone"),
    ],
)  # fmt: skip
def test_kernels(kernel, kind):
    assert kernel_kind(kernel) == kind
