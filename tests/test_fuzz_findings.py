"""What the fuzzer found when attributes were drawn anew."""

import time
import warnings
import zipfile

import numpy as np
import pydicom
import pytest
from conftest import compress
from pydicom.uid import ImplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless
from test_enhanced_ct import write_enhanced

from ichpipe.common.errors import UnreadableDicomError
from ichpipe.dicom.hounsfield import read_hu
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.dicom.slice_header import read_header
from ichpipe.index.scan import scan

FRAMES = np.arange(2 * 48, dtype=np.int16).reshape(2, 6, 8)


@pytest.mark.parametrize("high_bit", [16, 63, 12344, 65535])
def test_a_high_bit_outside_the_word_is_ignored(write_ct, high_bit):
    path = write_ct(pixels=np.array([[1, 40]], np.uint16), BitsStored=12, HighBit=high_bit, RescaleIntercept=24)
    read_header(path)
    assert read_hu(path).tolist() == [[25, 64]]


@pytest.mark.parametrize("spacing", [[1e-5, 1], [1, 0.0001], [2000, 1]])
def test_pixels_too_long_to_make_square_are_refused_at_once(write_ct, spacing):
    with pytest.raises(UnreadableDicomError, match="times as long as wide"):
        read_header(write_ct(PixelSpacing=spacing))


def test_padding_of_signed_32_bits_has_the_sign_of_the_pixels(write_ct):
    path = write_ct(pixels=np.array([[-2000, 40]], np.int32), transfer_syntax=ImplicitVRLittleEndian,
                    BitsAllocated=32, BitsStored=32, HighBit=31, RescaleIntercept=1000,
                    PixelPaddingValue=-2000)  # fmt: skip
    assert read_hu(path).tolist() == [[-1024, 1040]]


@pytest.mark.parametrize(
    ("keyword", "text"),
    [("AcquisitionNumber", b"7A"), ("AcquisitionNumber", b"9" * 30), ("InstanceNumber", b"nan "),
     ("SliceThickness", b"abc "), ("ContrastBolusAgent", b"NONE"), ("AcquisitionNumber", b"1e400 "),
     ("InstanceNumber", b"4.1 "), ("NumberOfFrames", b"NO"), ("NumberOfFrames", b"1e5 "),
     ("SpecificCharacterSet", b"\\ISO 2022 IR 58 "), ("StudyInstanceUID", b"\xff\xfe")],
)  # fmt: skip
def test_an_odd_text_in_an_enhanced_ct_ends_no_scan_and_is_repeated_nowhere(tmp_path, capfd, keyword, text):
    path = write_enhanced(tmp_path / "a.dcm", FRAMES, intercepts=[0, 0], AcquisitionNumber=7, InstanceNumber=7)
    with quiet_pydicom():
        dataset = pydicom.dcmread(path)
        tag = pydicom.tag.Tag(keyword)
        kind = pydicom.datadict.dictionary_VR(tag)
        text += b" " * (len(text) % 2)
        dataset._dict[tag] = pydicom.dataelem.RawDataElement(tag, kind, len(text), text, 0, False, True)
        dataset.save_as(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slices, rejected = scan([path])
    assert len(slices) + len(rejected) > 0
    assert "Warning" not in capfd.readouterr().err
    if keyword in {"AcquisitionNumber", "InstanceNumber", "SliceThickness", "ContrastBolusAgent"}:
        assert len(slices) == 2  # they only break ties


def test_an_enhanced_ct_that_lacks_one_byte_is_truncated(tmp_path):
    path = write_enhanced(tmp_path / "a.dcm", FRAMES, intercepts=[0, 0])
    path.write_bytes(path.read_bytes()[:-1])
    slices, rejected = scan([path])
    assert (len(slices), len(rejected)) == (1, 1)
    assert "truncated" in rejected["reason"].iloc[0]


@pytest.mark.parametrize("head", [b"", b"an Enhanced CT"])
def test_a_large_member_is_not_parsed_for_ever(tmp_path, head):
    content = write_enhanced(tmp_path / "a.dcm", FRAMES, intercepts=[0, 0]).read_bytes() if head else b""
    (tmp_path / "zip").mkdir()
    with zipfile.ZipFile(tmp_path / "zip" / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x", content + bytes(100 * 2**20))
    begin = time.process_time()
    _, rejected = scan([tmp_path / "zip"])
    assert len(rejected) == 1
    assert time.process_time() - begin < 5.0


@pytest.mark.parametrize("keyword", ["SpecificCharacterSet", "ProtocolName", "SOPInstanceUID", "PatientID"])
@pytest.mark.parametrize("pattern", [b"\x1b$B", b"\x1b\\", b"AXIAL\\", b"A"])
@pytest.mark.parametrize("is_enhanced", [False, True])
def test_a_text_of_64000_characters_costs_little(tmp_path, write_ct, is_enhanced, keyword, pattern):
    path = write_enhanced(tmp_path / "a.dcm", FRAMES, intercepts=[0, 0]) if is_enhanced else write_ct()
    text = (pattern * 64_000)[:63_998]
    scan([path])  # once for imports
    begin = time.process_time()
    scan([path])
    usual_s = time.process_time() - begin
    with quiet_pydicom():
        dataset = pydicom.dcmread(path)
        tag = pydicom.tag.Tag(keyword)
        dataset._dict[tag] = pydicom.dataelem.RawDataElement(tag, "LO", len(text), text, 0, False, True)
        dataset.set_original_encoding(False, True, dataset._character_set)  # written as it is
        dataset.save_as(path)
    begin = time.process_time()
    _, rejected = scan([path])
    assert time.process_time() - begin < 0.1 + 10 * usual_s  # before: 2 s to a hang
    if keyword == "SpecificCharacterSet":
        assert "SpecificCharacterSet (0008,0005) has 63998 bytes" in rejected["reason"].iloc[0]


@pytest.mark.parametrize("syntax", [None, JPEG2000Lossless, JPEGLSLossless])
@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((2096, 13615), [8000, 11720, 8001]),  # no signed number of 12 bits
        ((2096, 2096), [-1024, 11720, 8001]),  # -2000 without its leading ones
        ((63536, 63537), [-1024, 11720, -1024]),
        ((1720, 4917), [8000, -1024, 8001]),
    ],
)
def test_padding_is_compared_with_signed_numbers_in_every_transfer_syntax(write_ct, syntax, ends, expected):
    path = write_ct(pixels=np.array([[2096, 1720, 2097] * 22] * 64, np.uint16), BitsStored=12, HighBit=11,
                    RescaleIntercept=10_000)  # fmt: skip
    if syntax:
        compress(path, syntax)
    with quiet_pydicom():
        dataset = pydicom.dcmread(path)
        dataset.PixelRepresentation = 1
        dataset.add_new("PixelPaddingValue", "US", ends[0])
        dataset.add_new("PixelPaddingRangeLimit", "US", ends[1])
        dataset.save_as(path)
    assert read_hu(path)[0, :3].tolist() == expected


def test_zeros_behind_an_enhanced_ct_are_not_parsed(tmp_path):
    path = write_enhanced(tmp_path / "a.dcm", FRAMES, intercepts=[0, 0])
    sound = path.read_bytes()
    path.write_bytes(sound + bytes(512))
    assert len(scan([path])[0]) == 2
    path.write_bytes(sound + bytes(40 * 2**20))
    begin = time.process_time()
    _, rejected = scan([path])
    assert "bytes follow zeros where an element should begin" in rejected["reason"].iloc[0]
    assert time.process_time() - begin < 0.5
