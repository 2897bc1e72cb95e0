"""Compressed pixels: the fast decoder gives what pydicom's give, and never sees a stream that it can't trust."""

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders import RLELosslessEncoder

from ichpipe.dicom import decode
from ichpipe.dicom.dataset import PixelFacts, read_pixel_file
from ichpipe.dicom.pydicom_quiet import quiet_pydicom

JPEG_LOSSLESS, JPEG_2000, RUN_LENGTH = (
    "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.5",
)  # fmt: skip
IMAGES = st.tuples(st.integers(2, 20), st.integers(2, 20), st.integers(9, 16), st.integers(0, 2**32 - 1))
"""Rows, columns, bits, seed."""


@pytest.fixture
def library():
    return pytest.importorskip("imagecodecs")


def facts_of(pixels, syntax, bits=16):
    rows, columns = pixels.shape
    return PixelFacts(rows, columns, 16, bits, pixels.dtype.kind == "i", 1.0, 0.0, None, syntax)


def stream_of(pixels, syntax, library, bits=16):
    if syntax == JPEG_LOSSLESS:
        return library.ljpeg_encode(pixels, bitspersample=bits)
    if syntax == JPEG_2000:
        return library.jpeg2k_encode(pixels, level=0, codecformat="j2k", bitspersample=bits)
    rows, columns = pixels.shape
    return RLELosslessEncoder.encode(
        pixels.tobytes(), rows=rows, columns=columns, samples_per_pixel=1, bits_allocated=16, bits_stored=16,
        pixel_representation=0, photometric_interpretation="MONOCHROME2", number_of_frames=1,
    )  # fmt: skip


def by_pydicom(dataset, stream, facts):
    dataset.PixelData = encapsulate([stream])
    dataset["PixelData"].VR = "OB"
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = facts.transfer_syntax
    with quiet_pydicom():
        return decode.decode_by_pydicom(dataset, facts)


@pytest.mark.parametrize("syntax", [JPEG_LOSSLESS, JPEG_2000, RUN_LENGTH])
@settings(deadline=None, max_examples=40)
@given(image=IMAGES, smooth=st.booleans())
def test_both_decoders_give_the_pixels_that_were_encoded(syntax, image, smooth):
    from conftest import ct_dataset

    library = pytest.importorskip("imagecodecs")
    rows, columns, bits, seed = image
    pixels = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns)).astype(np.uint16)
    if smooth:
        pixels = np.sort(pixels, axis=1)
    bits = 16 if syntax == RUN_LENGTH else bits
    if syntax == JPEG_2000:
        rows = columns = 20  # openjpeg's encoder wants room for its levels
        pixels = np.resize(pixels, (rows, columns))
    stream, facts = stream_of(pixels, syntax, library, bits), facts_of(pixels, syntax, bits)
    found = decode.decode(encapsulate([stream]), facts)
    assert found is not None, "the quick way was not taken"
    assert found.dtype == np.uint16
    assert np.array_equal(found, pixels)
    with quiet_pydicom():
        assert np.array_equal(by_pydicom(ct_dataset(pixels), stream, facts), pixels)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_signed_pixels_keep_their_bits(seed):
    library = pytest.importorskip("imagecodecs")
    pixels = np.random.default_rng(seed).integers(-3024, 4096, (5, 7)).astype(np.int16)
    stream = library.ljpeg_encode(pixels.view(np.uint16), bitspersample=16)
    found = decode.decode(encapsulate([stream]), facts_of(pixels, JPEG_LOSSLESS))
    assert np.array_equal(found, pixels)


@pytest.mark.parametrize("syntax", [JPEG_LOSSLESS, JPEG_2000, RUN_LENGTH])
def test_a_stream_of_another_size_is_left_to_pydicom(library, syntax):
    pixels = np.arange(24 * 16, dtype=np.uint16).reshape(24, 16)
    stream = encapsulate([stream_of(pixels, syntax, library)])
    assert decode.decode(stream, facts_of(pixels, syntax)) is not None
    for wrong in ({"rows": 25}, {"columns": 8}, {"bits_allocated": 32, "bits_stored": 32}):
        assert decode.decode(stream, facts_of(pixels, syntax)._replace(**wrong)) is None


@pytest.mark.parametrize("syntax", [JPEG_LOSSLESS, JPEG_2000, RUN_LENGTH])
def test_no_damage_to_a_stream_ends_the_process_or_raises(library, syntax):
    """imagecodecs 2026.3.6 ends with a segmentation fault on many of these if it is given them unchecked."""
    pixels = np.random.default_rng(0).integers(0, 4000, (24, 16)).astype(np.uint16)
    stream, generator = stream_of(pixels, syntax, library), np.random.default_rng(1)
    taken = 0
    for number in range(1500):
        damaged = bytearray(stream)
        for _ in range(1 + number % 3):
            reach = min(100, len(stream)) if number % 2 else len(stream)
            damaged[int(generator.integers(reach))] = int(generator.integers(256))
        found = decode.decode(encapsulate([bytes(damaged)]), facts_of(pixels, syntax))
        taken += found is not None
        assert found is None or found.shape == pixels.shape
    assert 0 < taken < 1500


@pytest.mark.parametrize("syntax", [JPEG_LOSSLESS, RUN_LENGTH])
def test_a_stream_that_is_cut_short_is_not_filled_up(library, syntax):
    pixels = np.random.default_rng(0).integers(0, 4000, (24, 16)).astype(np.uint16)
    stream = stream_of(pixels, syntax, library).rstrip(b"\0")
    for length in range(2, len(stream) - 4, 7):
        assert decode.decode(encapsulate([stream[:length]]), facts_of(pixels, syntax)) is None


def test_without_imagecodecs_pydicom_decodes(library, monkeypatch):
    pixels = np.arange(24 * 16, dtype=np.uint16).reshape(24, 16)
    monkeypatch.setattr(decode, "imagecodecs", lambda: None)
    stream = encapsulate([stream_of(pixels, JPEG_LOSSLESS, library)])
    assert decode.decode(stream, facts_of(pixels, JPEG_LOSSLESS)) is None


@pytest.mark.real_data
@pytest.mark.parametrize("image", ["CT1", "CT2"])
def test_real_streams_are_decoded_alike(real_data, library, image):
    quick = set()
    for path in sorted((real_data / "nema_wg04_ct_codecs").glob(f"{image}_*.dcm")):
        with quiet_pydicom():
            file = read_pixel_file(path)
            if not file.facts.compressed:
                continue
            found = decode.decode(file.pixel_data, file.facts)
            if found is None:
                continue
            assert np.array_equal(found, decode.decode_by_pydicom(file.dataset, file.facts))
        quick.add(path.stem.removeprefix(f"{image}_"))
    assert quick == {"JPLL", "J2KR", "RLE"}
