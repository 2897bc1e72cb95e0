"""Compressed streams looked at before their codec: what they claim, and whether their codes are complete."""

import struct

import numpy as np
import pydicom
import pytest
from conftest import compress, ct_dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from ichpipe.common.errors import DataError, UnreadableDicomError
from ichpipe.dicom import decode, decode_sandbox, hounsfield
from ichpipe.dicom.dataset import PixelFacts
from ichpipe.dicom.decode_sandbox import TrialDecoder
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.dicom.slice_header import read_header
from ichpipe.dicom.stream_checks import Claim, frame_bytes, require_complete, require_sound
from ichpipe.index.scan import scan

ROWS, COLUMNS = 40, 56
CLAIM = Claim(ROWS, COLUMNS, 16)
LOSSLESS_JPEG = str(JPEGLosslessSV1)


def image():
    rows, columns = np.mgrid[:ROWS, :COLUMNS]
    noise = np.random.default_rng(0).integers(0, 90, (ROWS, COLUMNS))
    return (1000 + 30 * rows + 7 * columns + noise).astype(np.uint16)


PREDICTORS = ("left", "above", "corner", "left + above - corner", "left + (above - corner) // 2",
              "above + (left - corner) // 2", "(left + above) // 2")  # fmt: skip


def jpeg_lossless(pixels, precision=16, restart=0, predictor=1):
    """A lossless JPEG by T.81, annex H, with a table that gives each category a code of five bits."""
    bits, interval, parts = "", 0, []
    for number, value in enumerate(pixels.ravel().tolist()):
        row, column = divmod(number, pixels.shape[1])
        if restart and number and number % restart == 0:
            parts.append(bits)
            bits, interval = "", number
        if number == interval:
            guess = 1 << (precision - 1)
        elif number < interval + pixels.shape[1]:
            guess = int(pixels[row, column - 1])
        elif not column:
            guess = int(pixels[row - 1, 0])
        else:
            (corner, above), left = pixels[row - 1, column - 1 : column + 1].tolist(), int(pixels[row, column - 1])
            names = {"left": left, "above": above, "corner": corner}
            guess = eval(PREDICTORS[predictor - 1], names)  # noqa: S307
        difference = (value - guess + 32768) % 65536 - 32768
        category = abs(difference).bit_length()
        extra = difference if difference > 0 else difference + (1 << category) - 1
        bits += f"{category:05b}" + (f"{extra:0{category}b}" if category else "")
    parts.append(bits)
    coded = [int(part.ljust(-(-len(part) // 8) * 8, "1"), 2).to_bytes(-(-len(part) // 8), "big") for part in parts]
    coded = [part.replace(b"\xff", b"\xff\x00") for part in coded]
    scan_bytes = b"".join(part + bytes([0xFF, 0xD0 + number % 8]) for number, part in enumerate(coded[:-1])) + coded[-1]
    size = struct.pack(">BHHB", precision, *pixels.shape, 1) + b"\x01\x11\x00"
    table = b"\0" + bytes([0, 0, 0, 0, 16, *[0] * 11]) + bytes(range(16))
    segments = [(0xC3, size), (0xC4, table), *([(0xDD, struct.pack(">H", restart))] if restart else [])]
    segments.append((0xDA, bytes([1, 1, 0, predictor, 0, 0])))
    head = b"".join(bytes([0xFF, marker]) + struct.pack(">H", len(one) + 2) + one for marker, one in segments)
    return b"\xff\xd8" + head + scan_bytes + b"\xff\xd9"


def coded_file(write_ct, syntax, **options):
    path = write_ct(pixels=image(), **options)
    if syntax != JPEGLosslessSV1:
        return compress(path, syntax)
    with quiet_pydicom():
        dataset = pydicom.dcmread(path)
        dataset.PixelData = encapsulate([jpeg_lossless(dataset.pixel_array)])
        dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(path)
    return path


def frame_of(path):
    with quiet_pydicom():
        return frame_bytes(pydicom.dcmread(path).PixelData)


def with_frame(path, frame, **tags):
    with quiet_pydicom():
        dataset = pydicom.dcmread(path)
        dataset.PixelData = encapsulate([frame + b"\0" * (len(frame) % 2)])
        for keyword, value in tags.items():
            setattr(dataset, keyword, value)
        dataset.save_as(path)
    return path


def require_both(frame, syntax, bits=16):
    """Check a stream as ``read_hu`` does: its structure, then its codes against the decoded pixels."""
    require_sound(frame, syntax, CLAIM)
    facts = PixelFacts(ROWS, COLUMNS, 16, bits, False, 1.0, 0.0, None, syntax)
    pixel_data = encapsulate([frame])
    stored = decode.decode(pixel_data, facts)
    if stored is None:
        dataset = ct_dataset(image())
        dataset.PixelData = pixel_data
        dataset["PixelData"].VR = "OB"
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        with quiet_pydicom():
            stored = decode.decode_by_pydicom(dataset, facts)
    require_complete(frame, syntax, CLAIM, stored)


def reason_of(call, *arguments):
    with pytest.raises(UnreadableDicomError) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless])
def test_a_sound_stream_passes_and_gives_its_pixels(write_ct, syntax):
    path = coded_file(write_ct, syntax)
    require_both(frame_of(path), str(syntax))
    assert read_header(path).compressed
    if syntax == JPEGLosslessSV1:
        pytest.importorskip("gdcm")
    assert np.array_equal(hounsfield.read_hu(path), image().astype(int) - 1024)


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize("rows", [60_000, ROWS + 1])
def test_a_stream_that_claims_another_size_is_refused_before_any_decoder(write_ct, monkeypatch, syntax, rows):
    path = coded_file(write_ct, syntax)
    frame = bytearray(frame_of(path))
    if syntax == JPEG2000Lossless:
        struct.pack_into(">L", frame, 12, rows)
    else:
        start = frame.index(b"\xff\xc3" if syntax == JPEGLosslessSV1 else b"\xff\xf7")
        struct.pack_into(">H", frame, start + 5, rows)
    with_frame(path, bytes(frame))
    for decoder in ("decode", "decode_by_pydicom"):
        monkeypatch.setattr(decode, decoder, lambda *_: pytest.fail("a decoder was called"))
    expected = f"the stream claims {rows} x {COLUMNS} pixels, the header says {ROWS} x {COLUMNS}"
    for read in (read_header, hounsfield.read_hu):
        reason = reason_of(read, path)
        assert expected in reason
        assert str(syntax) in reason


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda f: f[:-2], "end marker"),
        (lambda f: f[: len(f) // 2] + b"\xff\xd9", "codes do not end"),
        (lambda f: f[:200] + f[230:], "codes do not end|no code|bits"),
        (lambda f: f[:-2] + b"\x55\x55\xff\xd9", "codes do not end"),
        (lambda f: f + bytes(100), "after its end marker"),
        (lambda f: f[:200] + b"\xff\xda" + f[202:], "marker DA amid"),
        (lambda f: f.replace(b"\xff\xc4", b"\xff\xfe", 1), "Huffman table is missing"),
        (lambda f: f.replace(b"\xff\xc3", b"\xff\xc0", 1), "does not belong"),
        (lambda f: f[:40], "cut short|out of place"),
        (lambda f: b"GIF89a" + f, "does not begin as JPEG"),
        (lambda f: f.replace(b"\xff\xda\x00\x08\x01", b"\xff\xda\x00\x08\x02", 1), "one component"),
    ],
)
def test_damaged_lossless_jpeg(change, expected):
    frame = change(jpeg_lossless(image()))
    with pytest.raises(UnreadableDicomError, match=expected):
        require_both(frame, LOSSLESS_JPEG)


def test_samples_that_leave_their_bits_are_damage():
    pixels = image() % 4096
    require_both(jpeg_lossless(pixels, 12), LOSSLESS_JPEG, 12)
    pixels[3, 5] = 4096
    assert "more than 12 bits" in reason_of(require_both, jpeg_lossless(pixels, 12), LOSSLESS_JPEG, 12)


@pytest.mark.parametrize("predictor", range(1, 8))
@pytest.mark.parametrize("restart", [0, COLUMNS * 3])
def test_codes_are_those_of_the_pixels_for_every_predictor(predictor, restart):
    frame = jpeg_lossless(image(), restart=restart, predictor=predictor)
    require_complete(frame, LOSSLESS_JPEG, CLAIM, image())
    other = image()
    other[7, 11] ^= 0x4000
    assert "codes do not end" in reason_of(require_complete, frame, LOSSLESS_JPEG, CLAIM, other)


def test_codes_of_as_many_bits_as_the_pixels_need_but_of_others_are_damage():
    frame, other = jpeg_lossless(image()), image()
    other[-1, -1] ^= 1
    assert reason_of(require_complete, frame, LOSSLESS_JPEG, CLAIM, other) == "its codes are not those of its pixels"


def test_restart_markers_are_counted():
    frame = jpeg_lossless(image(), restart=COLUMNS * 3)
    require_both(frame, LOSSLESS_JPEG)
    place = frame.index(b"\xff\xd0")
    short = frame[:place] + frame[place + 2 :]
    assert "intervals" in reason_of(require_complete, short, LOSSLESS_JPEG, CLAIM, image())


@pytest.mark.parametrize(
    ("bits_stored", "signed", "is_refused"), [(12, True, False), (15, True, True), (15, False, False)]
)
def test_signed_pixels_of_fewer_bits_than_the_header_says_are_refused(bits_stored, signed, is_refused):
    frame = jpeg_lossless(image() % 4096, precision=12)
    claim = CLAIM._replace(signed=signed, bits_stored=bits_stored)
    if not is_refused:
        require_sound(frame, LOSSLESS_JPEG, claim)
        return
    assert "which is the sign is unclear" in reason_of(require_sound, frame, LOSSLESS_JPEG, claim)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda f: struct.pack("<L", 3) + f[4:], "segments"),
        (lambda f: f[:8] + struct.pack("<L", 2**31) + f[12:], "not in order"),
        (lambda f: f[:30], "no header"),
        (lambda f: f[:-40], "its runs give"),
        (lambda f: f[:64] + b"\x7f" + f[65:], "its runs give"),
        (lambda f: f + bytes(50), "its runs give"),
    ],
)
def test_damaged_run_length(write_ct, change, expected):
    frame = change(frame_of(coded_file(write_ct, RLELossless)))
    with pytest.raises(UnreadableDicomError, match=expected):
        require_complete(frame, str(RLELossless), CLAIM, image())


def put(form, place, *values):
    def change(frame):
        changed = bytearray(frame)
        struct.pack_into(form, changed, place(frame) if callable(place) else place, *values)
        return bytes(changed)

    return change


def coding_style(offset):
    return lambda frame: frame.index(b"\xff\x52") + 4 + offset


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (put(">LL", 24, 1, 1), "tiles"),
        (put(">LL", 24, 0, 56), "first tile"),
        (put(">LL", 16, 2**31, 0), "contradicts"),
        (put(">H", 40, 3), "contradicts"),
        (put("B", 42, 37), "38 bits a sample"),
        (put("BB", 43, 2, 2), "subsampled"),
        (put(">H", coding_style(2), 65535), "coding style"),
        (put("B", coding_style(5), 33), "coding style"),
        (put("B", coding_style(6), 9), "coding style"),
        (lambda f: f[:-60], "cut short"),
        (lambda f: f[:80], "cut short"),
        (lambda f: b"\x00\x00\x00\x0cjP  \r\n\x87\n" + f, "does not begin"),
    ],
)
def test_damaged_jpeg_2000(write_ct, change, expected):
    frame = change(frame_of(coded_file(write_ct, JPEG2000Lossless)))
    assert expected in reason_of(require_sound, frame, str(JPEG2000Lossless), CLAIM)


def test_a_jp2_file_around_the_codestream_is_unwrapped(write_ct):
    frame = frame_of(coded_file(write_ct, JPEG2000Lossless))
    boxed = b"\x00\x00\x00\x0cjP  \r\n\x87\n" + struct.pack(">L", 0) + b"jp2c" + frame
    require_sound(boxed, str(JPEG2000Lossless), CLAIM)


def test_precincts_of_a_pixel_each_are_refused():
    style = struct.pack(">BBHBBBBBB", 1, 0, 1, 0, 5, 4, 4, 0, 1) + b"\x00" * 6
    size = struct.pack(">H8LH3B", 0, 4096, 4096, 0, 0, 4096, 4096, 0, 0, 1, 15, 1, 1)
    frame = b"\xff\x4f" + b"".join(
        marker + struct.pack(">H", len(one) + 2) + one for marker, one in ((b"\xff\x51", size), (b"\xff\x52", style))
    )
    frame += b"\xff\x90\x00\x0a" + struct.pack(">HLBB", 0, 14, 0, 1) + b"\xff\x93\xff\xd9"
    assert "too many precincts" in reason_of(require_sound, frame, str(JPEG2000Lossless), Claim(4096, 4096, 16))


def test_near_lossless_is_no_lossless_jpeg_ls(write_ct):
    frame = frame_of(coded_file(write_ct, JPEGLSLossless))
    place = frame.index(b"\xff\xda") + 7
    near = frame[:place] + b"\x02" + frame[place + 1 :]
    assert "error of up to 2" in reason_of(require_sound, near, str(JPEGLSLossless), CLAIM)
    require_sound(near, "1.2.840.10008.1.2.4.81", CLAIM)


@pytest.mark.parametrize(
    ("marker", "place", "value", "expected"),
    [
        (b"\xff\xf7", 11, 0x01, "sampled otherwise"),
        (b"\xff\xf7", 11, 0x22, "sampled otherwise"),
        (b"\xff\xf7", 12, 0x01, "sampled otherwise"),
        (b"\xff\xda", 6, 0x01, "mapping table"),
        (b"\xff\xda", 8, 0x01, "interleaving"),
        (b"\xff\xda", 9, 0x01, "point transform"),
    ],
)
def test_jpeg_ls_of_one_component_says_what_one_component_may_say(write_ct, marker, place, value, expected):
    frame = frame_of(coded_file(write_ct, JPEGLSLossless))
    place += frame.index(marker)
    changed = frame[:place] + bytes([value]) + frame[place + 1 :]
    assert expected in reason_of(require_sound, changed, str(JPEGLSLossless), CLAIM)
    require_sound(frame, str(JPEGLSLossless), CLAIM)


ITEM, END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0" + bytes(4)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (ITEM + bytes(4), "no fragment"),
        (ITEM + bytes(4) + ITEM + b"\xff\xff\xff\xff" + bytes(9), "no length"),
        (ITEM + bytes(4) + ITEM + struct.pack("<L", 10) + bytes(9), "cut short"),
        (ITEM + bytes(4) + ITEM + struct.pack("<L", 4) + bytes(4) + b"noise", "begin as an item"),
        (ITEM + struct.pack("<3L", 8, 0, 12) + ITEM + struct.pack("<L", 4) + bytes(4), "offsets"),
        (ITEM + struct.pack("<2L", 4, 7) + ITEM + struct.pack("<L", 4) + bytes(4), "offsets"),
    ],
)
def test_fragments_that_are_not_those_of_one_frame(pixels, expected):
    assert expected in reason_of(frame_bytes, pixels)


def test_fragments_are_joined():
    pixels = ITEM + struct.pack("<2L", 4, 0) + ITEM + struct.pack("<L", 2) + b"ab" + ITEM + struct.pack("<L", 2) + b"cd"
    assert frame_bytes(pixels) == frame_bytes(pixels + END + b"whatever") == b"abcd"


@pytest.fixture
def change_child(monkeypatch):
    """Let the sandbox's child read by the ``wrong`` that the code defines; ``read`` is the usual ``read_hu``."""
    head = "import os, signal, time\nfrom ichpipe.dicom import decode_sandbox, hounsfield\nread = hounsfield.read_hu\n"
    serve = "\nhounsfield.read_hu = wrong; decode_sandbox.serve()"
    return lambda code: monkeypatch.setattr(decode_sandbox, "CHILD_CODE", head + code + serve)


class TestTrial:
    def test_it_decodes_and_gives_the_reason_of_read_hu(self, write_ct):
        path = coded_file(write_ct, RLELossless)
        with TrialDecoder() as decoder:
            decoder.require(str(path))
            with_frame(path, frame_of(path)[:-50])
            assert f"{path}: {reason_of(decoder.require, str(path))}" == reason_of(hounsfield.read_hu, path)
            assert "No such file" in reason_of(decoder.require, str(path) + "x")

    def test_a_decoder_that_crashes_or_hangs_costs_one_file(self, write_ct, change_child):
        """The child is told to die as a codec does on a bad stream: at once, by SIGSEGV, or never to answer."""
        path = str(coded_file(write_ct, RLELossless))
        change_child(
            "def wrong(path):\n"
            "    if path == 'crash': os.kill(os.getpid(), signal.SIGSEGV)\n"
            "    if path == 'exit': os._exit(3)\n"
            "    if path == 'hang': time.sleep(600)\n"
            "    return read(path)"
        )
        with TrialDecoder(timeout_s=5) as decoder:
            decoder.require(path)
            assert "SIGSEGV" in reason_of(decoder.require, "crash")
            decoder.require(path)
            assert "exit code 3" in reason_of(decoder.require, "exit")
            assert "longer than 5 s" in reason_of(decoder.require, "hang")
            decoder.require(path)

    def test_its_memory_is_bounded(self, write_ct, change_child):
        path = str(coded_file(write_ct, RLELossless))
        change_child(
            "def wrong(path):\n"
            "    try: bytearray(8 * 2**30)\n"
            "    except MemoryError as error: raise hounsfield.UnreadableDicomError('no memory') from error"
        )
        with TrialDecoder() as decoder:
            assert reason_of(decoder.require, path) == "no memory"

    def test_a_child_that_cannot_start_is_an_error_of_its_own(self, monkeypatch):
        monkeypatch.setattr(decode_sandbox, "CHILD_CODE", "raise SystemExit(1)")
        with TrialDecoder() as decoder, pytest.raises(DataError, match="can't be started"):
            decoder.require("x")

    def test_scan_goes_on_after_a_crash(self, tmp_path, write_ct, change_child):
        for name in ("a", "b", "c"):
            coded_file(write_ct, RLELossless, name=f"in/{name}", number=ord(name))
        change_child(
            "crash = lambda: os.kill(os.getpid(), signal.SIGABRT)\n"
            "wrong = lambda path: crash() if path.endswith('b') else read(path)"
        )
        slices, rejected = scan([tmp_path / "in"])
        assert [path[-1] for path in slices["path"]] == ["a", "c"]
        assert rejected["reason"].tolist() == ["its decoder crashed (SIGABRT): the stream is damaged"]


def test_more_pixels_than_coded_bits_are_refused_before_they_are_counted(write_ct):
    frame = bytearray(frame_of(coded_file(write_ct, JPEGLosslessSV1)))
    struct.pack_into(">HH", frame, frame.index(b"\xff\xc3") + 5, 4096, 4096)
    with pytest.raises(UnreadableDicomError, match="fewer coded bits than pixels"):
        require_sound(bytes(frame), str(JPEGLosslessSV1), Claim(4096, 4096, 16))
