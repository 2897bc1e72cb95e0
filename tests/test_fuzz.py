"""A small run of the fuzzer, and one test for each kind of bomb that it throws."""

import json
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian

from ichpipe.common.errors import UnreadableDicomError
from ichpipe.dicom import bounded_file, dataset
from ichpipe.dicom.bounded_file import inflate
from ichpipe.dicom.hounsfield import read_hu
from ichpipe.dicom.slice_header import read_header

FUZZ = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"
NEEDS = ("gdcm", "jpeg_ls", "openjpeg")


def fuzz(tmp_path, *rest):
    for name in NEEDS:
        pytest.importorskip(name)
    out = tmp_path / "fuzz.json"
    # Time is measured by hand runs alone: the machine of a test may be busy.
    command = [sys.executable, FUZZ, "--limit-s", "60", "--out", out, "--keep", tmp_path / "findings", *rest]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_273_damaged_files_are_refused_or_read_as_the_reference_reads_them(tmp_path):
    result = fuzz(tmp_path, "--files", 273)
    assert result["findings"] == 0
    assert result["files"] == 273 == sum(result["outcomes"].values())
    assert set(result["outcomes"]) == {"refused", "equal"}
    assert min(len(set(counts)) for counts in result["by_encoding"].values()) == 2  # of each encoding some of both
    assert len(result["by_encoding"]) == 13
    assert len(result["by_mutation"]) >= 27
    assert result["peak_mb"] < 1024


@pytest.mark.real_data
def test_damaged_real_files_too(tmp_path, real_data):
    result = fuzz(tmp_path, "--files", 230, "--dicom", real_data / "nema_wg04_ct_codecs")
    assert result["findings"] == 0


def test_the_fuzzer_sees_what_it_looks_for(tmp_path, monkeypatch, write_ct):
    """Without this the fuzzer might find nothing because it sees nothing."""
    monkeypatch.syspath_prepend(FUZZ.parent)
    import fuzz_reading

    from ichpipe.dicom.decode_sandbox import TrialDecoder

    path = write_ct(pixels=None, RescaleIntercept="-1000")
    with TrialDecoder() as trial:
        reading = fuzz_reading.Reading(trial)
        assert reading.read(path)["outcome"] == "equal"
        with monkeypatch.context() as patch:
            patch.setattr(fuzz_reading.hounsfield, "read_hu", lambda one: read_hu(one) + 1)
            assert reading.read(path)["outcome"] == "unequal"
        with monkeypatch.context() as patch:
            patch.setattr(fuzz_reading.hounsfield, "read_square_hu", lambda one: read_hu(one)[1:])
            assert reading.read(path)["outcome"] == "unequal"
        with monkeypatch.context() as patch:
            patch.setattr(fuzz_reading, "read_header", lambda _: 1 / 0)
            assert reading.read(path)["outcome"] == "exception"
        with monkeypatch.context() as patch:
            patch.setattr(fuzz_reading, "read_header", refusing("two\nlines"))
            patch.setattr(fuzz_reading.hounsfield, "read_hu", refusing("again"))
            assert reading.read(path)["outcome"] == "unclear message"


@pytest.mark.parametrize(
    ("pixels", "tags", "expected"),
    [
        ([0, 40, 4095], {"BitsStored": 12, "HighBit": 11, "RescaleIntercept": 0}, [0, 40, -1]),  # wrapped
        ([0, 40, 4095], {"BitsStored": 12, "HighBit": 11, "RescaleIntercept": 24}, [24, 64, 4119]),
        ([0, 64, 1600], {"BitsStored": 12, "HighBit": 15, "RescaleIntercept": 24}, [24, 28, 124]),  # shifted
        ([1, 40, 100], {"BitsStored": 12, "HighBit": 15, "RescaleIntercept": 24}, [25, 64, 124]),  # a wrong HighBit
        (
            [0, 40, 63536],
            {"PixelRepresentation": 1, "BitsStored": 12, "HighBit": 11, "RescaleIntercept": 0},
            [0, 40, -1024],
        ),  # whole
        (
            [0, 40, 0x1028],
            {"PixelRepresentation": 1, "BitsStored": 12, "HighBit": 11, "RescaleIntercept": 0},
            [0, 40, 40],
        ),  # noise
        ([0, 40, 4095], {"PixelPaddingValue": 40, "RescaleIntercept": 0, "RescaleSlope": "0.5"}, [0, -1024, 2048]),
        ([0, 40, 65535], {"RescaleIntercept": 0}, [0, 40, 32767]),
    ],
)
def test_the_reference_is_the_modality_lut_with_the_documented_exceptions(
    tmp_path, monkeypatch, write_ct, pixels, tags, expected
):
    monkeypatch.syspath_prepend(FUZZ.parent)
    import reference_pixels

    path = write_ct(pixels=np.array([pixels], np.uint16), **tags)
    assert reference_pixels.reference_hu(path.read_bytes())[0].tolist() == [expected]
    assert read_hu(path).tolist() == [expected]


def test_redrawn_headers_are_refused_or_read_as_the_reference_reads_them(tmp_path, monkeypatch, write_ct):
    monkeypatch.syspath_prepend(FUZZ.parent)
    import attribute_mutations
    import fuzz_reading
    import mutations

    from ichpipe.dicom.decode_sandbox import TrialDecoder

    parts = mutations.parts_of(write_ct().read_bytes())
    path, outcomes = tmp_path / "case.dcm", []
    with TrialDecoder() as trial:
        reading = fuzz_reading.Reading(trial)
        for number in range(150):
            chance = random.Random(number)  # noqa: S311
            mutation = chance.choice(attribute_mutations.REDRAWN)
            path.write_bytes(mutation(parts, chance))
            outcomes.append((mutation.__name__, reading.read(path)["outcome"]))
    assert {outcome for _, outcome in outcomes} == {"equal", "refused"}
    assert len({name for name, outcome in outcomes if outcome == "equal"}) >= 6


def refusing(message):
    def read(_):
        raise UnreadableDicomError(message)

    return read


def reason_of(path):
    with pytest.raises(UnreadableDicomError) as caught:
        read_header(path)
    return str(caught.value)


def test_a_deflated_bomb_is_not_inflated(write_ct):
    path = write_ct(transfer_syntax=DeflatedExplicitVRLittleEndian)
    before = read_hu(path)
    data = path.read_bytes()
    start = data.index(b"1.2.840.10008.1.2.1.99") + 22
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    block = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    path.write_bytes(data[:start] + block * 256)  # 4 GiB
    assert "inflates to more than" in reason_of(path)
    path.write_bytes(data[:-8])
    assert "cut short" in reason_of(path)
    path.write_bytes(data)
    assert (read_hu(path) == before).all()
    assert read_header(path).transfer_syntax == DeflatedExplicitVRLittleEndian


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20, 2**20 + 258])
@pytest.mark.parametrize("filling", [b"\0", b"abc"])
def test_any_length_inflates_to_itself(size, filling):
    body = (filling * size)[:size]
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    packed = packer.compress(body) + packer.flush()
    assert inflate(packed, len(body)) == body
    assert inflate(packed + b"\0", len(body)) == body  # a byte to make the length even


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, None])
@pytest.mark.parametrize("kind", ["items", "elements", "elements of an item"])
def test_a_header_of_a_hundred_thousand_parts_is_refused(write_ct, syntax, kind):
    path = write_ct(**({"transfer_syntax": syntax} if syntax else {}))
    data = path.read_bytes()
    sequence = b"\x08\x00\x15\x11" + (b"" if syntax else b"SQ\0\0") + b"\xff\xff\xff\xff"
    tiny = (b"\x09\x00\x10\x00" + (bytes(4) if syntax else b"LO\0\0")) * 100_000
    items = b"\xfe\xff\x00\xe0" + bytes(4)
    content = {
        "items": sequence + items * 100_000 + b"\xfe\xff\xdd\xe0" + bytes(4),
        "elements": tiny,
        "elements of an item": sequence + items[:4] + b"\xff" * 4 + tiny + b"\xfe\xff\x0d\xe0" + bytes(4)
        + b"\xfe\xff\xdd\xe0" + bytes(4),
    }[kind]  # fmt: skip
    place = data.index(b"\x10\x00\x20\x00")  # PatientID (0010,0020)
    path.write_bytes(data[:place] + content + data[place:])
    assert "can't be parsed" in reason_of(path)


def test_a_long_value_of_unknown_length_is_read_in_as_many_pieces_as_it_needs(write_ct, monkeypatch):
    monkeypatch.setattr(bounded_file, "MAX_PARTS", 200)
    path = write_ct()
    data = path.read_bytes()
    place = data.index(b"\x10\x00\x20\x00")
    value = b"\x09\x00\x11\x10OB\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0" + struct.pack("<L", 2**22) + bytes(2**22)
    path.write_bytes(data[:place] + value + b"\xfe\xff\xdd\xe0" + bytes(4) + data[place:])
    assert read_header(path).rows == 4


def test_a_zip_bomb_is_not_unfolded(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("x", bytes(dataset.MAX_FILE_BYTES + 1))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("unfolded"))
    assert "too large for one CT slice" in reason_of(tmp_path / "bomb.zip/x")


@pytest.mark.parametrize("sign", [2, 7, 65535])
def test_a_sign_that_is_neither_0_nor_1_is_no_sign(write_ct, sign):
    assert "PixelRepresentation" in reason_of(write_ct(PixelRepresentation=sign))


@pytest.mark.parametrize("letters", [b"SS", b"FD", b"AT", b"PN", b"ZZ"])
def test_a_number_under_another_representation_is_not_read_as_text(write_ct, letters):
    path = write_ct(RescaleSlope="2")
    data = path.read_bytes()
    assert b"\x28\x00\x53\x10DS" in data
    path.write_bytes(data.replace(b"\x28\x00\x53\x10DS", b"\x28\x00\x53\x10" + letters))
    assert f"RescaleSlope is stored as {letters.decode()}" in reason_of(path)
