"""What a stored number means: every attribute of the pixels is honoured or refused."""

import numpy as np
import pydicom
import pytest
from conftest import compress, ct_dataset, save_dicom
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut

from ichpipe.common.errors import UnreadableDicomError
from ichpipe.dicom.hounsfield import read_hu, read_square_hu
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.dicom.slice_header import read_header

ENCAPSULATED = "1.2.840.10008.1.2.1.98"


def hu_by_pydicom(path):
    with quiet_pydicom():
        dataset = pydicom.dcmread(path)
        return np.clip(np.rint(apply_modality_lut(dataset.pixel_array, dataset)), -1024, 32767).astype(np.int16)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_attributes_drawn_at_random_give_the_hu_of_pydicom(data, tmp_path_factory):
    allocated, signed = data.draw(st.sampled_from([8, 16])), data.draw(st.booleans())
    bits = data.draw(st.integers(2, allocated))
    slope = data.draw(st.sampled_from([1.0, 0.5, 2.0, 0.1]))
    intercept = data.draw(st.sampled_from([0.0, -1024.0, -50.0, 24.0, -1000.5, 100.0]))
    kind = np.dtype(f"{'i' if signed else 'u'}{allocated // 8}")
    span = 1 << bits
    own = data.draw(arrays(np.int64, (4, 6), elements=st.integers(0, span - 1)))
    if bits == 12 and not signed and slope == 1 and intercept == 0:
        own %= 3096  # the documented wrapped files begin here
    above = data.draw(st.sampled_from(["zero", "sign", "noise"]))
    unused = np.zeros_like(own)
    if above == "sign" and signed:
        unused[own >= span // 2] = -1
    elif above == "noise" and allocated - bits > 1:
        unused = np.random.default_rng(0).integers(0, 1 << (allocated - bits), own.shape)
        unused[0, 0] = 1  # neither all ones nor all zeros: it can't be the sign of a whole number
    stored = (own + (unused << bits)).astype(f"u{allocated // 8}").view(kind)
    path = tmp_path_factory.getbasetemp() / "drawn.dcm"
    dataset = ct_dataset(stored)
    dataset.BitsStored, dataset.HighBit = bits, bits - 1
    dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    dataset.PhotometricInterpretation = data.draw(st.sampled_from(["MONOCHROME1", "MONOCHROME2"]))
    save_dicom(dataset, path)
    assert np.array_equal(read_hu(path), hu_by_pydicom(path))


@pytest.mark.parametrize("slope", [1, 0.5, 2, 0.1])
@pytest.mark.parametrize("intercept", [0, 24, -50, -1024, -99])
def test_twelve_unsigned_bits_keep_slope_and_intercept(write_ct, slope, intercept):
    pixels = np.array([[0, 10, 40, 1000, 3000]], np.uint16)
    path = write_ct(pixels=pixels, BitsStored=12, HighBit=11, RescaleSlope=slope, RescaleIntercept=intercept)
    assert np.array_equal(read_hu(path), hu_by_pydicom(path))


@pytest.mark.parametrize("position", [12, 13, 14, 15])
@pytest.mark.parametrize("value", [0, 36, 2047, -1, -1024])
def test_an_overlay_above_the_pixel_is_no_part_of_it(write_ct, position, value):
    pixels = np.full((4, 4), value & 0x0FFF, np.uint16)
    pixels[1:3] |= 1 << position
    path = write_ct(pixels=pixels.view(np.int16), BitsStored=12, HighBit=11, RescaleIntercept=0)
    with quiet_pydicom():
        dataset = pydicom.dcmread(path)
        dataset.add_new(0x60000102, "US", position)
        dataset.save_as(path)
    assert (read_hu(path) == value).all()
    assert np.array_equal(read_hu(path), hu_by_pydicom(path))


def test_an_overlay_that_fills_all_unused_bits_needs_its_tag(write_ct):
    pixels = np.array([[0x0024, 0x0024 | 0x8000]], np.uint16).view(np.int16)
    path = write_ct(pixels=pixels, BitsStored=15, HighBit=14, RescaleIntercept=0)
    with quiet_pydicom():
        dataset = pydicom.dcmread(path)
        dataset.add_new(0x60020102, "US", 15)
        dataset.save_as(path)
    assert read_hu(path).tolist() == [[36, 36]]


@pytest.mark.parametrize("padding", [-2000, -3024, -32768])
def test_undeclared_padding_beside_twelve_bits_is_air(write_ct, padding):
    path = write_ct(pixels=np.array([[padding, 40]], np.int16), BitsStored=12, HighBit=11, RescaleIntercept=0)
    assert read_hu(path).tolist() == [[-1024, 40]]


def test_pixels_at_the_upper_end_of_their_word_are_shifted(write_ct):
    values = np.array([[0, 40, 4095]], np.uint16)
    path = write_ct(pixels=values << 4, BitsStored=12, HighBit=15, RescaleIntercept=-1024)
    read_header(path)
    assert read_hu(path).tolist() == [[-1024, -984, 3071]]


def test_a_high_bit_that_the_pixels_contradict_is_ignored(write_ct):
    path = write_ct(pixels=np.array([[1, 1064]], np.uint16), BitsStored=12, HighBit=15)
    assert read_hu(path).tolist() == [[-1023, 40]]


def test_bits_that_may_be_the_pixel_or_not_are_refused_at_once(write_ct):
    path = write_ct(pixels=np.array([[0x8001, 0x7FFF]], np.uint16), BitsStored=12, HighBit=15)
    for read in (read_header, read_hu):
        with pytest.raises(UnreadableDicomError, match=r"HighBit \(0028,0102\) is 15 .* export"):
            read(path)


@pytest.mark.parametrize("kind", ["PALETTE COLOR", "RGB", "YBR_FULL", "Smith^John"])
def test_what_is_no_gray_value_is_refused(write_ct, kind):
    path = write_ct(PhotometricInterpretation=kind)
    with pytest.raises(UnreadableDicomError, match=r"PhotometricInterpretation \(0028,0004\)") as caught:
        read_header(path)
    assert "Smith" not in str(caught.value)


def test_a_table_of_values_is_refused(write_ct):
    from pydicom.dataset import Dataset

    table = Dataset()
    table.ModalityLUTType = "HU"
    path = write_ct(ModalityLUTSequence=[table])
    with pytest.raises(UnreadableDicomError, match=r"ModalityLUTSequence \(0028,3000\)"):
        read_header(path)


@pytest.mark.parametrize(
    ("tags", "shape"),
    [
        ({"PixelSpacing": [0.5, 0.5]}, (8, 8)),
        ({"PixelSpacing": [0.5, 0.503]}, (8, 8)),  # rounding of a header
        ({"PixelSpacing": [2, 4]}, (8, 16)),
        ({"PixelSpacing": [1, 0.5]}, (16, 8)),
        ({"PixelAspectRatio": [2, 1]}, (16, 8)),
        ({"PixelSpacing": [1, 1], "PixelAspectRatio": [2, 1]}, (8, 8)),
        ({"PixelSpacing": [0, 1]}, (8, 8)),
        ({"PixelSpacing": [-1, 2]}, (8, 8)),
        ({"ImagerPixelSpacing": [2, 1]}, (16, 8)),
        ({"NominalScannedPixelSpacing": [1, 2]}, (8, 16)),
        ({"PixelSpacing": [1, 1], "ImagerPixelSpacing": [2, 1]}, (8, 8)),
        ({}, (8, 8)),
    ],
)
def test_pixels_become_square(write_ct, tags, shape):
    ramp = np.add.outer(np.arange(8), np.arange(8) * 10).astype(np.int16)
    path = write_ct(pixels=ramp, RescaleIntercept=0, **tags)
    square = read_square_hu(path)
    assert square.shape == shape
    assert (square.min(), square.max()) == (0, 77)
    assert abs(square.mean() - ramp.mean()) < 0.6


@pytest.mark.parametrize("keyword", ["FloatPixelData", "DoubleFloatPixelData"])
def test_floating_point_pixels_are_refused_by_name(write_ct, keyword):
    path = write_ct(PixelData=None, **{keyword: bytes(192)})
    with pytest.raises(UnreadableDicomError, match=r"floating-point numbers \(7FE0,0008.*export"):
        read_header(path)


def relabel(path, syntax):
    """Name another transfer syntax in the file; its bytes stay."""
    with quiet_pydicom():
        dataset = pydicom.dcmread(path)
        old = str(dataset.file_meta.TransferSyntaxUID).encode()
    old, new = (uid + b"\0" * (len(uid) % 2) for uid in (old, syntax.encode()))
    data = path.read_bytes()
    at = data.index(old)
    head = data[: at - 2] + len(new).to_bytes(2, "little") + new
    group = int.from_bytes(head[140:144], "little") + len(new) - len(old)
    path.write_bytes(head[:140] + group.to_bytes(4, "little") + head[144:] + data[at + len(old) :])
    return path


RLE, JPEG_BASELINE, JPEG_70, JPEG_LS, JPEG_2000 = (
    "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.90",
)  # fmt: skip
KINDS = {RLE: "run length", JPEG_70: "lossless JPEG", JPEG_LS: "JPEG-LS", JPEG_2000: "JPEG 2000"}
ITEM, END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0" + bytes(4)
RAMP = np.arange(32 * 40, dtype=np.uint16).reshape(32, 40)


def stream_of(kind):
    """RAMP as a stream of a transfer syntax, of even length."""
    if kind == RLE:
        segments = [b"".join(b"\x00" + bytes([value]) for value in (RAMP >> shift & 255).ravel()) for shift in (8, 0)]
        starts = np.array([2, 64, 64 + len(segments[0]), *[0] * 13], "<u4")
        return starts.tobytes() + b"".join(segments)
    codecs = pytest.importorskip("imagecodecs")
    encode = {
        JPEG_BASELINE: lambda: codecs.jpeg8_encode((RAMP >> 4).astype(np.uint8)),
        JPEG_70: lambda: codecs.ljpeg_encode(RAMP, bitspersample=16),
        JPEG_LS: lambda: codecs.jpegls_encode(RAMP),
        JPEG_2000: lambda: codecs.jpeg2k_encode(RAMP, level=0, codecformat="j2k", bitspersample=16),
    }
    stream = encode[kind]()
    return stream + b"\0" * (len(stream) % 2)


def write_items(write_ct, syntax, *fragments, items=True, meta=True):
    """A file of RAMP that states ``syntax``, with ``fragments`` as the items after an empty table of offsets.

    Without ``items`` the fragments stand alone; without ``meta`` the file begins with its data set.
    """
    path = relabel(write_ct(pixels=RAMP, PixelData=None), syntax)
    parts = [ITEM + len(part).to_bytes(4, "little") + part for part in (b"", *fragments)]
    body, length = (b"".join(parts) + END, b"\xff" * 4) if items else (b"".join(fragments), None)
    length = length or len(body).to_bytes(4, "little")
    data = path.read_bytes() + b"\xe0\x7f\x10\x00OB\0\0" + length + body
    path.write_bytes(data if meta else data[144 + int.from_bytes(data[140:144], "little") :])
    return path


@pytest.mark.parametrize("syntax", [*KINDS, "1.2.840.10008.1.2.4.57", JPEG_BASELINE, ENCAPSULATED])
@pytest.mark.parametrize("kind", [*KINDS, JPEG_BASELINE])
def test_a_stream_of_another_syntax_is_named(write_ct, syntax, kind):
    path = write_items(write_ct, syntax, stream_of(kind))
    if kind == syntax or (kind == JPEG_70 and syntax.endswith(".57")):
        assert read_header(path).transfer_syntax == syntax
        if kind != JPEG_BASELINE:
            assert np.array_equal(read_hu(path), np.maximum(RAMP.astype(int) - 1024, -1024))
        return
    found = KINDS.get(kind, "JPEG baseline")
    for read in (read_header, read_hu):
        with pytest.raises(
            UnreadableDicomError, match=rf"is {syntax} \(.*\), but .* holds {found}.*; export the image"
        ):
            read(path)


@pytest.mark.parametrize("syntax", [*KINDS, JPEG_BASELINE, ENCAPSULATED])
@pytest.mark.parametrize(
    ("fragments", "expected"),
    [
        ((), "no fragment|no PixelData"),
        ((b"",), "without a byte|hold 0 bytes"),
        ((b"", b"", b""), "without a byte|hold 0"),
    ],
)
def test_fragments_without_pixels_are_named(write_ct, syntax, fragments, expected):
    path = write_items(write_ct, syntax, *fragments)
    with pytest.raises(UnreadableDicomError, match=f"({syntax}.*)?({expected}).*; (copy or )?export") as caught:
        read_header(path)
    assert syntax in str(caught.value)


@pytest.mark.parametrize("syntax", [*KINDS, ENCAPSULATED])
def test_empty_fragments_among_others_change_nothing(write_ct, syntax):
    stream = RAMP.tobytes() if syntax == ENCAPSULATED else stream_of(syntax)
    path = write_items(write_ct, syntax, b"", stream, b"")
    assert np.array_equal(read_hu(path), np.maximum(RAMP.astype(int) - 1024, -1024))


@pytest.mark.parametrize("size", [-2, 2, 4000])
def test_items_of_uncompressed_pixels_hold_the_image(write_ct, size):
    pixels = np.random.default_rng(0).bytes(RAMP.nbytes + size)
    with pytest.raises(
        UnreadableDicomError, match=rf"{ENCAPSULATED} .*hold {len(pixels)} bytes.*{RAMP.nbytes}; export"
    ):
        read_header(write_items(write_ct, ENCAPSULATED, pixels))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("meta", [True, False])
def test_a_compressed_stream_without_items_is_named(write_ct, kind, meta):
    noise = np.random.default_rng(0).bytes(2 * RAMP.nbytes)  # longer than the image, so that its length says nothing
    path = write_items(write_ct, "1.2.840.10008.1.2.1", stream_of(kind) + noise, items=False, meta=meta)
    with pytest.raises(UnreadableDicomError, match=rf"1\.2\.1 .*holds {KINDS[kind]}.*; export"):
        read_header(path)


@pytest.mark.parametrize("kind", [*KINDS, JPEG_BASELINE])
def test_items_in_a_file_without_a_transfer_syntax_are_named(write_ct, kind):
    path = write_items(write_ct, "1.2.840.10008.1.2.1", stream_of(kind), meta=False)
    found = KINDS.get(kind, "JPEG baseline")
    for read in (read_header, read_hu):
        with pytest.raises(
            UnreadableDicomError, match=rf"no TransferSyntaxUID .*list of items \({found}.*export the im"
        ):
            read(path)


def test_encapsulated_uncompressed_pixels_are_read(write_ct):
    pixels = np.arange(16, dtype=np.int16).reshape(4, 4)
    path = write_ct(pixels=pixels, PixelData=encapsulate([pixels.tobytes()]))
    relabel(path, ENCAPSULATED)
    assert read_header(path).transfer_syntax == ENCAPSULATED
    assert np.array_equal(read_hu(path), np.maximum(pixels - 1024, -1024))


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"])
def test_items_under_an_uncompressed_syntax_are_named(write_ct, syntax):
    path = relabel(compress(write_ct(), "1.2.840.10008.1.2.5"), "1.2.840.10008.1.2.1")
    with pytest.raises(UnreadableDicomError, match=r"TransferSyntaxUID .*1\.2\.1 .*is a list of items.*export"):
        read_header(path)


@pytest.mark.parametrize(
    "syntax", ["1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.90", ENCAPSULATED]
)
def test_plain_pixels_under_an_encapsulated_syntax_are_named(write_ct, syntax):
    path = relabel(write_ct(), syntax)
    with pytest.raises(UnreadableDicomError, match=f"{syntax} .*is not a list of items.*export"):
        read_header(path)


@pytest.mark.parametrize(
    ("syntax", "name"),
    [
        ("1.2.840.113619.5.2", "private"),
        ("1.2.840.10008.1.2.7", "unknown"),
        ("1.2.840.10008.1.2.4.94", "JPIP Referenced"),
        ("1.2.840.10008.1.2.4.102", "MPEG-4"),
        ("1.3.46.670589.33.14", "private"),
    ],
)
def test_a_syntax_that_is_not_read_is_named(write_ct, syntax, name):
    path = relabel(write_ct(), syntax)
    with pytest.raises(UnreadableDicomError, match=f"{syntax} .*{name}.*can't be read; export"):
        read_header(path)
