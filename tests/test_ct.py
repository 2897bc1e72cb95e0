"""DICOM file to header and Hounsfield units."""

import contextlib
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from conftest import compress
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydicom import config
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from ichpipe.common.errors import UnreadableDicomError
from ichpipe.dicom import decode, hounsfield
from ichpipe.dicom.dataset import PixelFacts
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.dicom.slice_header import read_header

SIGNED = np.array([[-2000, -1, 0], [1, 1024, 3000]], dtype=np.int16)


def reason_of(read, path):
    with pytest.raises(UnreadableDicomError) as caught:
        read(path)
    return str(caught.value)


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_hounsfield_units_are_slope_times_stored_plus_intercept(write_ct, syntax):
    extra = {} if syntax is None else {"transfer_syntax": syntax}
    pixels = SIGNED.byteswap() if syntax == ExplicitVRBigEndian else SIGNED
    hu = hounsfield.read_hu(write_ct(pixels=pixels, RescaleSlope="2", RescaleIntercept="-1024", **extra))
    assert hu.dtype == np.int16
    assert hu.tolist() == [[-1024, -1024, -1024], [-1022, 1024, 4976]]


def test_fractions_are_rounded_and_ends_are_clipped(write_ct):
    pixels = np.array([[3, 5, 32767, -32768]], np.int16)
    hu = hounsfield.read_hu(write_ct(pixels=pixels, RescaleSlope="1.5", RescaleIntercept="0"))
    assert hu.tolist() == [[4, 8, 32767, -1024]]  # 4.5 and 7.5 go to the even neighbour


def test_integer_rescale_equals_the_one_through_floats(write_ct):
    pixels = np.random.default_rng(0).integers(-3024, 4096, (16, 16)).astype(np.int16)
    whole = hounsfield.read_hu(write_ct("a", pixels, RescaleIntercept="-7"))
    through_floats = hounsfield.read_hu(write_ct("b", pixels, RescaleIntercept="-7.0001"))
    assert np.array_equal(whole, through_floats)
    assert np.array_equal(whole, np.clip(pixels.astype(int) - 7, -1024, 32767))


def test_padding_becomes_air_even_where_its_tag_is_unsigned_beside_signed_pixels(write_ct):
    pixels = np.array([[-2000, 50, 100]], np.int16)
    with quiet_pydicom():
        path = write_ct(pixels=pixels, RescaleIntercept="4000")
        dataset = pydicom.dcmread(path)
        dataset.add_new(0x00280120, "US", 63536)  # what -2000 looks like without its sign
        dataset.save_as(path)
    assert hounsfield.read_hu(path).tolist() == [[-1024, 4050, 4100]]


def test_padding_range_covers_both_ends_in_either_order(write_ct):
    pixels = np.array([[9, 10, 11, 12, 13]], np.uint16)
    path = write_ct(pixels=pixels, RescaleIntercept="0", PixelPaddingValue=12, PixelPaddingRangeLimit=10)
    assert hounsfield.read_hu(path).tolist() == [[9, -1024, -1024, -1024, 13]]


def test_12_bit_values_that_wrapped_come_back(write_ct):
    true_hu = np.array([[-1000, -1, 0, 80, 3000]])
    stored = (true_hu % 4096).astype(np.uint16)
    path = write_ct(pixels=stored, BitsStored=12, HighBit=11, RescaleIntercept="0")
    assert np.array_equal(hounsfield.read_hu(path), true_hu)


@pytest.mark.parametrize(("bits", "intercept"), [(12, "-1024"), (12, "-100"), (16, "0")])
def test_other_unsigned_files_do_not_wrap(write_ct, bits, intercept):
    pixels = np.array([[0, 3500]], np.uint16)
    path = write_ct(pixels=pixels, BitsStored=bits, HighBit=bits - 1, RescaleIntercept=intercept)
    assert hounsfield.read_hu(path).tolist() == [[int(intercept), 3500 + int(intercept)]]


def test_bits_above_bits_stored_are_no_part_of_the_pixel(write_ct):
    unsigned = write_ct("u", np.array([[0x8005]], np.uint16), BitsStored=12, HighBit=11)
    assert hounsfield.read_hu(unsigned).tolist() == [[5 - 1024]]
    pixels = np.array([[0x0FFF, -3024, 7]], np.int16)
    twos_complement = write_ct("s", pixels, BitsStored=12, HighBit=11, RescaleIntercept="0")
    assert hounsfield.read_hu(twos_complement).tolist() == [[-1, -1024, 7]]


def test_monochrome1_changes_the_display_and_not_the_hu(write_ct):
    plain = hounsfield.read_hu(write_ct("a", SIGNED))
    assert np.array_equal(plain, hounsfield.read_hu(write_ct("b", SIGNED, PhotometricInterpretation="MONOCHROME1")))


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_lossless_compression_gives_the_same_hu(write_ct, syntax):
    pixels = np.random.default_rng(1).integers(-1000, 3000, (32, 32)).astype(np.int16)
    path = write_ct(pixels=pixels)
    plain = hounsfield.read_hu(path)
    compress(path, syntax)
    assert read_header(path).compressed
    assert np.array_equal(hounsfield.read_hu(path), plain)


def test_a_broken_stream_names_file_and_transfer_syntax(write_ct):
    path = compress(write_ct(pixels=np.zeros((32, 32), np.int16)), RLELossless)
    with quiet_pydicom():
        dataset = pydicom.dcmread(path)
        dataset.PixelData = dataset.PixelData[:24] + bytes(8)
        dataset.save_as(path)
    reason = reason_of(hounsfield.read_hu, path)
    assert str(path) in reason
    assert str(RLELossless) in reason


def test_header_has_the_facts_and_no_more(write_ct):
    path = write_ct("deep/er/x", number=7, z=12.5, PatientName="Secret^Person", PatientBirthDate="19010203")
    header = read_header(path)
    assert (header.patient_id, header.series_uid, header.sop_uid) == ("P1", "1.2.3.1", "1.2.3.1.7")
    assert (header.rows, header.columns, header.instance_number) == (4, 6, 7)
    assert header.position == (-100.0, -100.0, 12.5)
    assert header.row_direction + header.column_direction == (1, 0, 0, 0, 1, 0)
    assert header.path == path.as_posix()
    assert "Secret" not in repr(header)
    assert "19010203" not in repr(header)


def test_digest_follows_the_bytes(write_ct):
    first, second = write_ct("a", z=1.0), write_ct("b", z=2.0)
    copy = first.with_name("c")
    copy.write_bytes(first.read_bytes())
    digests = [read_header(path).file_digest for path in (first, second, copy)]
    assert digests[0] == digests[2] != digests[1]
    assert all(len(digest) == 64 for digest in digests)


@pytest.mark.parametrize("patient", ["", None])
def test_without_patient_id_the_study_stands_for_the_patient(write_ct, patient):
    header = read_header(write_ct(PatientID=patient))
    assert header.patient_id == header.study_uid


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"Modality": "MR"}, "Modality"),
        ({"Modality": None}, "Modality"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "LOCALIZER"),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, "SCREEN SAVE"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "secondary capture"),
        ({"NumberOfFrames": 2}, "multi-frame"),
        ({"SamplesPerPixel": 3}, "colour"),
        ({"PixelData": None}, "PixelData"),
        ({"Rows": 20}, "truncated"),
        ({"Rows": 5000}, "5000"),
        ({"Columns": 0}, "x 0"),
        ({"BitsStored": 17}, "BitsStored"),
        ({"RescaleSlope": None}, "RescaleSlope"),
        ({"RescaleSlope": "0"}, "RescaleSlope"),
        ({"RescaleSlope": "-1"}, "RescaleSlope"),
        ({"RescaleSlope": "1e9"}, "RescaleSlope"),
        ({"RescaleIntercept": "1e300"}, "RescaleIntercept"),
        ({"RescaleType": "Z_EFF"}, "RescaleType"),
        ({"StudyInstanceUID": None}, "StudyInstanceUID"),
        ({"SeriesInstanceUID": ""}, "SeriesInstanceUID"),
        ({"SOPInstanceUID": ""}, "SOPInstanceUID"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient"),
        ({"ImagePositionPatient": [1.0, 2.0]}, "ImagePositionPatient"),
        ({"ImageOrientationPatient": None}, "ImageOrientationPatient"),
        ({"ImageOrientationPatient": [1.0, 0, 0, 1.0, 0, 0]}, "perpendicular"),
    ],
)
def test_what_is_no_usable_slice_is_rejected_with_the_reason(write_ct, tags, expected):
    assert expected in reason_of(read_header, write_ct(**tags))


def test_files_that_are_not_dicom_say_so(tmp_path):
    for name, data in {"t.csv": b"ID,Label\n" * 99, "p.png": b"\x89PNG\r\n\x1a\n" + bytes(300), "short": b"x"}.items():
        path = tmp_path / name
        path.write_bytes(data)
        assert "not a DICOM file" in reason_of(read_header, path)
    (tmp_path / "nothing").touch()
    assert "empty" in reason_of(read_header, tmp_path / "nothing")


def test_a_dicomdir_says_so(write_ct):
    path = write_ct()
    data = path.read_bytes()
    path.write_bytes(data.replace(b"1.2.840.10008.5.1.4.1.1.2\0", b"1.2.840.10008.1.3.10\0\0\0\0\0\0", 1))
    assert "DICOMDIR" in reason_of(read_header, path)


def test_no_cut_of_a_file_passes_or_raises_anything_else(write_ct):
    path = write_ct(pixels=SIGNED)
    data = path.read_bytes()
    for length in range(len(data) - 1):
        path.write_bytes(data[:length])
        reason_of(read_header, path)


def test_no_flipped_byte_raises_anything_else(write_ct):
    path = write_ct(pixels=SIGNED)
    data, generator = path.read_bytes(), np.random.default_rng(0)
    for place in range(128, len(data)):
        path.write_bytes(data[:place] + bytes([int(generator.integers(256))]) + data[place + 1 :])
        for read in (read_header, hounsfield.read_hu):
            with contextlib.suppress(UnreadableDicomError):
                read(path)


def test_a_file_without_preamble_is_read(write_ct):
    path = write_ct(pixels=SIGNED, transfer_syntax=ImplicitVRLittleEndian)
    before = hounsfield.read_hu(path)
    data = path.read_bytes()
    path.write_bytes(data[data.index(b"\x08\x00\x08\x00") :])  # from ImageType (0008,0008) on
    assert read_header(path).transfer_syntax == ImplicitVRLittleEndian
    assert np.array_equal(hounsfield.read_hu(path), before)


def test_rsna_identifiers_pass_without_a_warning(write_ct):
    uids = {"SOPInstanceUID": "ID_07c9bea25", "StudyInstanceUID": "ID_1", "SeriesInstanceUID": "ID_2"}
    header = read_header(write_ct(InstanceNumber=None, **uids))  # pytest turns any warning into an error
    assert (header.sop_uid, header.instance_number) == ("ID_07c9bea25", None)


def test_quiet_holds_in_threads_and_ends_after_them(write_ct):
    path, errors = write_ct(SOPInstanceUID="ID_07c9bea25"), []

    def read_often():
        try:
            for _ in range(30):
                read_header(path)
        except Exception as error:
            errors.append(error)

    filters = list(warnings.filters)
    threads = [threading.Thread(target=read_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert warnings.filters == filters


def test_quiet_is_the_thread_that_reads(write_ct):
    """Other threads keep their warnings, their filters and pydicom's validation."""
    path, entered, leave = write_ct(SOPInstanceUID="ID_07c9bea25"), threading.Event(), threading.Event()
    modes, filters = [], list(warnings.filters)
    mode = config.settings.reading_validation_mode

    def read():
        with quiet_pydicom():
            entered.set()
            leave.wait(20)
            warnings.warn("of the reader", stacklevel=1)  # pytest turns any warning into an error
            modes.append(config.settings.reading_validation_mode)

    reader = threading.Thread(target=read)
    reader.start()
    assert entered.wait(20)
    with pytest.warns(UserWarning, match="of another thread"):
        warnings.warn("of another thread", stacklevel=1)
    with pytest.warns(UserWarning, match="Invalid value for VR UI"):
        assert pydicom.dcmread(path).SOPInstanceUID == "ID_07c9bea25"
    with pytest.raises(UserWarning, match="error"):
        warnings.warn("an error", stacklevel=1)
    assert config.settings.reading_validation_mode == mode
    with warnings.catch_warnings(action="error"):  # put before the filter of the reader, then restored
        read_header(path)
        with pytest.raises(UserWarning, match="error"):
            warnings.warn("an error", stacklevel=1)
        leave.set()
        reader.join()
    assert modes == [config.IGNORE]
    assert [each for each in warnings.filters if each in filters] == filters
    config.settings.reading_validation_mode = config.RAISE
    try:
        with quiet_pydicom():
            assert config.settings.reading_validation_mode == config.IGNORE
        assert config.settings.reading_validation_mode == config.RAISE
    finally:
        config.settings.reading_validation_mode = mode


@pytest.mark.real_data
@pytest.mark.parametrize("codec", ["RLE", "JPLL", "JLSL", "J2KR"])
@pytest.mark.parametrize("image", ["CT1", "CT2"])
def test_real_lossless_codecs_equal_the_raw_pixels(real_data, image, codec):
    folder = real_data / "nema_wg04_ct_codecs"
    coded, raw = (hounsfield.read_hu(folder / f"{image}_{name}.dcm") for name in (codec, "UNC"))
    assert np.array_equal(coded, raw)


@pytest.mark.real_data
def test_real_odd_files_are_read_or_refused_as_documented(real_data):
    paths = sorted((real_data / "odd_and_corrupt_dicom").iterdir())
    readable = set()
    for path in paths:
        try:
            read_header(path)
            hu = hounsfield.read_hu(path)
        except UnreadableDicomError:
            continue
        assert -1024 <= hu.min() < hu.max() <= 32767
        readable.add(path.name)
    assert readable == {
        "CT_small.dcm", "bad_sequence.dcm", "explicit_VR-UN.dcm", "ct_head_picker_explicit_le.dcm",
        "ct_no_dicm_prefix.dcm", "ct_rle_fragments.dcm",
    }  # fmt: skip


def test_a_syntax_without_decoder_names_the_extra_that_brings_it(write_ct, monkeypatch):
    path = compress(write_ct(), RLELossless)
    hounsfield.read_hu(path)
    monkeypatch.setattr(decode, "imagecodecs", lambda: None)
    monkeypatch.setattr(decode, "get_decoder", lambda _uid: SimpleNamespace(is_available=False))
    with pytest.raises(UnreadableDicomError, match=r"no decoder.*1\.2\.840\.10008\.1\.2\.5.*dicom-codecs"):
        hounsfield.read_hu(path)


def hu_in_64_bits(stored, facts):
    """The same by the definition, without a shortcut."""
    values = stored.astype(np.int64)
    span = 1 << facts.bits_stored
    if facts.bits_stored < facts.bits_allocated:
        above = values >> facts.bits_stored
        whole = np.isin(above, (0, -1)) | (values == np.iinfo(stored.dtype).min)
        if not facts.signed:
            values &= span - 1
        elif whole.all():
            values[(values >= span // 2) & (values < span)] -= span
        else:  # other data lie above the pixel
            values = (values & (span - 1) ^ span // 2) - span // 2
    numbers = values.copy()
    if facts.bits_stored == 12 and not facts.signed and facts.slope == 1 and abs(facts.intercept) <= 1:
        values[values >= 3096] -= 4096
    hu = np.clip(np.rint(values * facts.slope + facts.intercept), -1024, 32767).astype(np.int16)
    if facts.padding is not None:
        is_of_pixels = facts.signed or facts.padding[0] < span
        compared = numbers if is_of_pixels else stored
        hu[(compared >= facts.padding[0]) & (compared <= facts.padding[1])] = -1024
    return hu


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_no_shortcut_changes_a_value(data):
    allocated, signed = data.draw(st.sampled_from([8, 16, 32])), data.draw(st.booleans())
    kind = np.dtype(f"{'i' if signed else 'u'}{allocated // 8}")
    stored = data.draw(arrays(kind, (3, 5)))
    whole = st.integers(-40_000, 40_000).map(float)
    intercept = data.draw(st.one_of(st.sampled_from([0.0, -1024.0, -1000.0, 32767.0, -32768.0]), whole, st.just(0.5)))
    ends = data.draw(st.none() | st.tuples(*[st.integers(np.iinfo(kind).min, np.iinfo(kind).max)] * 2))
    facts = PixelFacts(
        3, 5, allocated, data.draw(st.integers(1, allocated)), signed, data.draw(st.sampled_from([1.0, -1.0, 0.7])),
        intercept, None if ends is None else (min(ends), max(ends)), "1.2.840.10008.1.2.1",
    )  # fmt: skip
    before = stored.copy()
    found = hounsfield.stored_to_hu(stored, facts)
    assert found.dtype == np.int16
    assert np.array_equal(found, hu_in_64_bits(stored, facts))
    assert np.array_equal(stored, before)
