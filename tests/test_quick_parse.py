"""The quick way to a header finds what pydicom finds, or leaves it to pydicom."""

import numpy as np
import pydicom
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
)

from ichpipe.common.errors import UnreadableDicomError
from ichpipe.dicom import slice_header
from ichpipe.dicom.dataset import parse, transfer_syntax
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.dicom.quick_parse import quick_elements
from ichpipe.dicom.slice_header import read_header

CHARACTER_SET = 0x00080005  # pydicom converts it at once


def raw(items):
    found = {int(tag): (one.VR, one.value) for tag, one in items if isinstance(one.value, bytes | None)}
    return {tag: value for tag, value in found.items() if tag != CHARACTER_SET}


def same_as_pydicom(data):
    with quiet_pydicom():
        found = quick_elements(data, slice_header._HEADER_TAGS)
        dataset = parse(data, slice_header._HEADER_TAGS)
    if found is None:
        return False
    elements, syntax = found
    assert syntax == transfer_syntax(dataset)
    assert raw(elements._by_tag.items()) == raw(dataset.items())
    return True


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_ordinary_files_give_the_same_elements(write_ct, syntax):
    data = write_ct(transfer_syntax=syntax, PatientName="A^B", ConvolutionKernel="UB", SliceThickness=5).read_bytes()
    assert same_as_pydicom(data)


def test_compressed_files_too(write_ct):
    path = write_ct(pixels=np.arange(1024, dtype=np.int16).reshape(32, 32))
    with quiet_pydicom():
        dataset = pydicom.dcmread(path)
        dataset.compress(RLELossless, generate_instance_uid=False)
        dataset.save_as(path)
    assert same_as_pydicom(path.read_bytes())


@pytest.mark.parametrize("syntax", [ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_rare_encodings_are_left_to_pydicom(write_ct, syntax):
    path = write_ct(transfer_syntax=syntax)
    assert not same_as_pydicom(path.read_bytes())
    assert read_header(path).transfer_syntax == syntax


def test_an_encoding_that_is_not_the_stated_one_is_left_to_pydicom(write_ct):
    path = write_ct()
    data = path.read_bytes()
    path.write_bytes(data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0"))
    assert not same_as_pydicom(path.read_bytes())
    assert read_header(path).rows == 4


@settings(deadline=None, max_examples=150)
@example(place=215, value=0, cut=False)  # another value representation in the meta header
@given(place=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.booleans())
def test_damaged_files_are_read_alike_or_refused_alike(tmp_path_factory, place, value, cut):
    data = bytearray(_file(tmp_path_factory))
    place %= len(data)
    data[place] = value
    data = bytes(data[:place] if cut else data)
    outcomes = []
    for quick in (quick_elements, lambda *_: None):
        path = tmp_path_factory.getbasetemp() / "damaged"
        path.write_bytes(data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slice_header, "quick_elements", quick)
            try:
                outcomes.append(repr(read_header(path)))
            except UnreadableDicomError as error:
                outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def _file(tmp_path_factory):
    from conftest import ct_dataset, save_dicom

    path = tmp_path_factory.getbasetemp() / "whole"
    if not path.exists():
        with quiet_pydicom():
            save_dicom(ct_dataset(np.full((4, 6), 1000, dtype=np.int16)), path)
    return path.read_bytes()


@pytest.mark.real_data
def test_real_files_are_read_alike(real_data):
    quick = 0
    for path in sorted(real_data.rglob("*.dcm")):
        data = path.read_bytes()
        try:
            with quiet_pydicom():
                parse(data, slice_header._HEADER_TAGS)
        except UnreadableDicomError:
            continue
        quick += same_as_pydicom(data)
    assert quick >= 20
