"""Raw values read as pydicom converts them."""

import math
from io import BytesIO

import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ichpipe.common.errors import UnreadableDicomError
from ichpipe.dicom.elements import Elements
from ichpipe.dicom.pydicom_quiet import quiet_pydicom

SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="\\"), max_size=12)


def stored(syntax=ExplicitVRLittleEndian, **values):
    """A dataset written and parsed again, its values still raw."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    file = BytesIO()
    with quiet_pydicom():
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
        pydicom.dcmwrite(file, dataset, enforce_file_format=False)
        return pydicom.dcmread(BytesIO(file.getvalue()), force=True)


@settings(deadline=None, max_examples=60)
@given(
    patient=ASCII, words=st.lists(ASCII, max_size=3), rows=st.integers(0, 65535), number=st.integers(-9999, 99999),
    floats=st.lists(st.floats(-1e4, 1e4).map(lambda value: round(value, 4)), min_size=3, max_size=3),
    syntax=st.sampled_from(SYNTAXES),
)  # fmt: skip
def test_values_are_those_of_pydicom(patient, words, rows, number, floats, syntax):
    values = {"PatientID": patient, "ImageType": words, "Rows": rows, "InstanceNumber": number}
    found = stored(syntax, ImagePositionPatient=floats, **values)
    elements = Elements(found)
    assert elements.text("PatientID") == str(found.PatientID or "").strip()
    types = found.get("ImageType") or []
    parts = [types] if isinstance(types, str) else types
    assert elements.text("ImageType") == "\\".join(str(part).strip() for part in parts)
    assert elements.whole("Rows") == found.Rows == rows
    assert elements.whole("InstanceNumber") == int(found.InstanceNumber) == number
    assert elements.floats("ImagePositionPatient", 3) == [float(value) for value in found.ImagePositionPatient]


@pytest.mark.parametrize(
    ("charset", "name"), [("ISO_IR 100", "Müller"), ("ISO_IR 192", "Łódź 東京"), (["", "ISO 2022 IR 87"], "山田")]
)
def test_other_character_sets_are_decoded_as_the_file_says(charset, name):
    assert Elements(stored(SpecificCharacterSet=charset, PatientID=name)).text("PatientID") == name


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("value", [-2000, 63536, 0])
def test_padding_keeps_its_16_bits(syntax, value):
    dataset = stored(syntax, PixelRepresentation=int(value < 0), PixelPaddingValue=value)
    assert Elements(dataset).required_whole("PixelPaddingValue") & 0xFFFF == value & 0xFFFF


def test_absent_and_empty_values():
    elements = Elements(stored(PatientID="", SliceThickness=None))
    assert (elements.text("PatientID"), elements.text("StudyInstanceUID")) == ("", "")
    assert (elements.whole("Rows"), elements.value_bytes("PixelData")) == (None, b"")
    assert math.isnan(elements.optional_float("SliceThickness"))
    for keyword in ("PatientID", "Rows"):
        with pytest.raises(UnreadableDicomError, match=f"{keyword} is missing"):
            elements.required_text(keyword)
    with pytest.raises(UnreadableDicomError, match="Rows is missing"):
        elements.required_whole("Rows")
    with pytest.raises(UnreadableDicomError, match="SliceThickness is missing"):
        elements.floats("SliceThickness", 1)


@pytest.mark.parametrize(
    ("raw", "call", "complaint"),
    [
        (("InstanceNumber", "IS", b"1\\2 "), lambda e: e.whole("InstanceNumber"), "InstanceNumber is not a whole"),
        (("InstanceNumber", "IS", b"1.5 "), lambda e: e.whole("InstanceNumber"), "not a whole number"),
        (("InstanceNumber", "IS", b"1_0 "), lambda e: e.whole("InstanceNumber"), "not a whole number"),
        (("InstanceNumber", "IS", b"inf "), lambda e: e.whole("InstanceNumber"), "not a whole number"),
        (("Rows", "US", b"\x01\x00\x02\x00"), lambda e: e.whole("Rows"), "Rows is not a whole number"),
        (("SliceThickness", "DS", b"x "), lambda e: e.floats("SliceThickness", 1), "SliceThickness is not a number"),
        (("RescaleSlope", "DS", b"nan "), lambda e: e.floats("RescaleSlope", 1), "1 finite number"),
        (("ImagePositionPatient", "DS", b"1\\2 "), lambda e: e.floats("ImagePositionPatient", 3), "found 2 value"),
        (("PatientID", "SQ", b""), lambda e: e.required_text("PatientID"), "PatientID is"),
    ],
)
def test_a_wrong_value_names_the_keyword_and_not_the_content(raw, call, complaint):
    keyword, representation, value = raw
    dataset = Dataset()
    tag = pydicom.tag.Tag(keyword)
    dataset[tag] = pydicom.dataelem.RawDataElement(tag, representation, len(value), value, 0, False, True, True)
    with pytest.raises(UnreadableDicomError, match=complaint):
        call(Elements(dataset))
