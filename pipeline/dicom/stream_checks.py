"""Checks compressed pixels: their structure before a codec sees them, their codes against the decoded pixels.

A codec is native code: it trusts a stream that claims 60,000 x 60,000 pixels. Some fill up what is missing and report
nothing (docs/reliability.md). Sources: DICOM PS3.5 A.4 and G (fragments, run length), ITU-T T.81 B and H (JPEG),
T.87 C (JPEG-LS), T.800 A (JPEG 2000).
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from pydicom.encaps import generate_fragments, parse_fragments
from pydicom.uid import UID

from ichpipe.common.errors import UnreadableDicomError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_JPEG: Final = "1.2.840.10008.1.2.4."
RUN_LENGTH: Final = "1.2.840.10008.1.2.5"
ENCAPSULATED_LITTLE: Final = "1.2.840.10008.1.2.1.98"  # items that hold uncompressed pixels
EXPORT_AGAIN: Final = "export the image again as Explicit VR Little Endian (1.2.840.10008.1.2.1)"
FIRST_ITEM: Final = b"\xfe\xff\x00\xe0"  # item tag (FFFE,E000) that opens encapsulated pixel data
JPEG_LOSSLESS: Final = frozenset({f"{_JPEG}57", f"{_JPEG}70"})
_MAX_PADDING: Final = 16  # bytes after the end of a stream: one is usual, to make the length even
# Frame headers (SOFn) that a transfer syntax allows: baseline 0, extended 1, lossless 3, JPEG-LS 55.
_FRAMES: Final = {
    f"{_JPEG}50": {0xC0}, f"{_JPEG}51": {0xC0, 0xC1}, f"{_JPEG}57": {0xC3}, f"{_JPEG}70": {0xC3},
    f"{_JPEG}80": {0xF7}, f"{_JPEG}81": {0xF7},
}  # fmt: skip
_JPEG_LS: Final = frozenset({f"{_JPEG}80", f"{_JPEG}81"})
_ANY_FRAME: Final = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
_TABLES, _RESTART, _SCAN = 0xC4, 0xDD, 0xDA  # DHT, DRI, SOS
_PLAIN_MARKERS: Final = frozenset({0xC3, _TABLES, _SCAN, *range(0xE0, 0xF0), 0xFE})  # and APPn, COM
# Bytes that each code of run length gives, and bytes that it takes (PS3.5, G.3.1); 128 is no operation.
_RUNS: Final = [*((code + 1, code + 2) for code in range(128)), (0, 1), *((257 - code, 2) for code in range(129, 256))]
_LINES_AT_ONCE: Final = 64  # the codes of an image of 4096 x 4096 would take half a gigabyte
_MAX_CATEGORIES: Final = 17  # differences of up to 16 bits have 17 categories, T.81 table H.2
_JPEG_2000: Final = frozenset(f"{_JPEG}{number}" for number in (90, 91, 201, 202, 203))
_JPEG_KINDS: Final = {0xC0: "JPEG baseline", 0xC1: "JPEG extended", 0xC3: "lossless JPEG", 0xF7: "JPEG-LS"}
_RUNS_KIND, _JPEG_2000_KIND = "run length (RLE)", "JPEG 2000"
_KINDS: Final = {  # what name_stream may say of a stream of each transfer syntax
    **{syntax: {_JPEG_KINDS[marker] for marker in markers} for syntax, markers in _FRAMES.items()},
    **{syntax: {_JPEG_2000_KIND} for syntax in _JPEG_2000},
    RUN_LENGTH: {_RUNS_KIND},
}
_MAX_TILES: Final = 4096  # 64 pixels a side in the largest image; each tile costs a decoder memory and time
_MAX_LAYERS: Final = 256
_MAX_BLOCKS: Final = 2**19  # precincts of all levels; a pixel each, as damage may claim, takes minutes


class Claim(NamedTuple):
    """The image that the DICOM header describes."""

    rows: int  # (0028,0010)
    columns: int  # (0028,0011)
    bits_allocated: int  # (0028,0100)
    signed: bool = False  # (0028,0103)
    bits_stored: int = 0  # (0028,0101)


class WrongKindError(UnreadableDicomError):
    """Pixel data is in another form than its transfer syntax says."""


def describe_syntax(syntax: str) -> str:
    """Return the beginning of a message that states the transfer syntax, by UID and name."""
    uid = UID(syntax)
    name = "a maker's private one" if uid.is_private else "unknown to this version" if uid.name == syntax else uid.name
    return f"TransferSyntaxUID (0002,0010) is {syntax} ({name})"


def require_form(pixels: bytes, syntax: str, *, encapsulated: bool) -> None:
    """Raise WrongKindError unless PixelData is a list of items where its syntax is ``encapsulated``, and only there."""
    is_list = pixels.startswith(FIRST_ITEM)
    if encapsulated != is_list:
        contrast = "is a list of items (compressed)" if is_list else "is not a list of items (uncompressed)"
        raise WrongKindError(f"{describe_syntax(syntax)}, but PixelData (7FE0,0010) {contrast}; {EXPORT_AGAIN}")


def require_no_items(pixels: bytes) -> None:
    """Raise WrongKindError where PixelData of a file that states no transfer syntax is a list of items."""
    if pixels.startswith(FIRST_ITEM):
        try:
            kind = name_stream(frame_bytes(pixels)) or "compressed, of an unknown kind"
        except UnreadableDicomError as error:
            kind = f"compressed, but {error}"
        raise WrongKindError(
            f"no TransferSyntaxUID (0002,0010), and PixelData (7FE0,0010) is a list of items ({kind}); write the file "
            f"with its meta header (group 0002), or {EXPORT_AGAIN}"
        )


def require_kind(frame: bytes, syntax: str) -> None:
    """Raise WrongKindError where a frame out of items is empty, or begins as a stream of another syntax."""
    kind = name_stream(frame) if frame else "fragments without a byte"
    if kind and kind not in _KINDS.get(syntax, {kind}):
        raise WrongKindError(f"{describe_syntax(syntax)}, but PixelData (7FE0,0010) holds {kind}; {EXPORT_AGAIN}")


def name_stream(frame: bytes) -> str:
    """Return what a compressed stream is, by how it begins; empty where that is open."""
    if frame.startswith((b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  ")):
        return _JPEG_2000_KIND
    if frame.startswith(b"\xff\xd8\xff"):
        try:
            markers = [marker for marker, _ in _read_jpeg_segments(frame)[0]]
        except UnreadableDicomError:
            return ""  # damaged: the checks of its syntax say how
        return next((_JPEG_KINDS.get(marker, "JPEG") for marker in markers if marker in _ANY_FRAME), "")
    if len(frame) > 64:
        count, *starts = struct.unpack_from("<16L", frame)
        offsets, unused = starts[:count], starts[count:]
        if 0 < count < 16 and offsets[0] == 64 and not any(unused) and offsets == sorted(offsets):
            return _RUNS_KIND if offsets[-1] < len(frame) else ""
    return ""


def frame_bytes(pixels: bytes) -> bytes:
    """Join the fragments of encapsulated PixelData that holds one frame. Raises UnreadableDicomError."""
    try:
        starts = parse_fragments(pixels)[1]
        offsets, *fragments = generate_fragments(pixels)
    except ValueError:
        raise UnreadableDicomError("a fragment does not begin as an item, or has no length") from None
    if not fragments:
        raise UnreadableDicomError("PixelData has no fragment after its table of offsets")
    if len(offsets) not in {0, 4} or offsets.strip(b"\0"):
        raise UnreadableDicomError("its table of offsets is not that of one frame")
    if int.from_bytes(pixels[starts[-1] + 4 : starts[-1] + 8], "little") > len(fragments[-1]):
        raise UnreadableDicomError("a fragment is cut short")
    return b"".join(fragments)


def require_sound(frame: bytes, syntax: str, claim: Claim) -> None:
    """Raise UnreadableDicomError unless the stream is built as ``syntax`` demands and claims the header's image.

    Other transfer syntaxes than run length, JPEG, JPEG-LS and JPEG 2000 pass.
    """
    if syntax == RUN_LENGTH:
        _run_segments(frame, claim)
    elif syntax in _FRAMES:
        _read_jpeg(frame, syntax, claim)
    elif syntax in _JPEG_2000:
        _require_jpeg_2000(frame, claim)


def is_plain(frame: bytes, syntax: str, claim: Claim) -> bool:
    """Whether imagecodecs may decode a stream: understood to the last field, of one tile or scan, and complete.

    Raises UnreadableDicomError for some damaged streams; some sound streams give False.
    """
    if syntax == RUN_LENGTH:
        return bool(_run_segments(frame, claim)) and not any(frame[4 + claim.bits_allocated // 2 : 64])
    if claim.bits_allocated != 16:
        return False
    if syntax in JPEG_LOSSLESS:
        segments, start = _read_jpeg_segments(frame)
        return (
            {marker for marker, _ in segments} <= _PLAIN_MARKERS
            and sum(4 + len(body) for _, body in segments) + 2 == start  # no fill bytes
            and frame.rstrip(b"\0\xff").endswith(b"\xff\xd9")  # liblj92 makes up what is missing
            and _is_plain_jpeg(segments, claim)
        )
    if syntax != f"{_JPEG}90" or not frame.startswith(b"\xff\x4f\xff\x51\x00\x29"):
        return False
    *grid, components, depth, across, down = struct.unpack_from(">8LHBBB", frame, 8)
    is_whole = grid[:4] == [claim.columns, claim.rows, 0, 0] and grid[6:] == [0, 0]
    is_one_tile = grid[4] >= claim.columns and grid[5] >= claim.rows
    fits = bool(depth >> 7) == claim.signed and (depth & 127) + 1 <= 16
    return is_whole and is_one_tile and components == across == down == 1 and fits


def _is_plain_jpeg(segments: list[tuple[int, bytes]], claim: Claim) -> bool:
    """Lossless JPEG (T.81, process 14): one frame of one component, sound Huffman tables, no point transform."""
    frames, tables = [body for marker, body in segments if marker == 0xC3], set()
    if len(frames) != 1 or len(frames[0]) != 9:
        return False
    precision, rows, columns, components, _, sampling, _ = struct.unpack(">BHHBBBB", frames[0])
    for number, counts, symbols in ((body[0], body[1:17], body[17:]) for marker, body in segments if marker == _TABLES):
        free = 1  # codes of a length that no shorter one begins; a code of all ones is none
        for count in counts:
            free = 2 * free - count if free > 0 else 0
        are_distinct = 0 < sum(counts) == len(symbols) == len(set(symbols)) <= _MAX_CATEGORIES
        if len(counts) != 16 or free < 1 or not are_distinct or max(symbols) >= _MAX_CATEGORIES or number > 3:
            return False
        tables.add(number)
    scan = segments[-1][1]
    is_claimed = (rows, columns) == (claim.rows, claim.columns) and components == 1 and sampling == 0x11
    has_table = len(scan) == 6 and scan[0] == 1 and scan[2] & 15 == 0 and scan[2] >> 4 in tables
    return is_claimed and 8 < precision <= 16 and has_table and 1 <= scan[3] <= 7 and scan[4:] == b"\0\0"


def _run_segments(frame: bytes, claim: Claim) -> list[bytes]:
    """Return the coded segments of a run-length frame, most significant byte of the samples first (PS3.5, G.5)."""
    if len(frame) < 64:
        raise UnreadableDicomError("no header of 64 bytes")
    (count, *starts), expected = struct.unpack_from("<16L", frame), claim.bits_allocated // 8
    if count != expected:
        raise UnreadableDicomError(f"{min(count, 99)} segments, BitsAllocated {claim.bits_allocated} needs {expected}")
    offsets = [*starts[:count], len(frame)]
    if offsets[0] != 64 or any(low >= high for low, high in pairwise(offsets)):
        raise UnreadableDicomError("the offsets of its segments are not in order")
    return [frame[low:high] for low, high in pairwise(offsets)]


def _read_jpeg(frame: bytes, syntax: str, claim: Claim) -> tuple[int, int, bytes, bytes, bytes]:
    """Split a JPEG or JPEG-LS stream: one frame of one component in one scan, and complete.

    Returns bits a sample; samples between restart markers, or 0; the Huffman table of the differences (16 counts, then
    the symbols; empty for JPEG-LS); SOS without its length; what lies between SOS and EOI, still stuffed.
    """
    segments, start = _read_jpeg_segments(frame)
    precision, restart, tables = 0, 0, dict[int, bytes]()
    for marker, body in segments[:-1]:
        if marker == _TABLES:
            tables |= _read_huffman_tables(body)
        elif marker in _ANY_FRAME:
            if precision or marker not in _FRAMES[syntax]:
                raise UnreadableDicomError(f"JPEG frame {marker:02X} does not belong to this transfer syntax")
            if len(body) != 9:
                raise UnreadableDicomError("not an image of one component")
            precision, rows, columns, components = struct.unpack_from(">BHHB", body)
            _require_claim(rows, columns, components, precision, claim)
            if syntax in _JPEG_LS and body[7:] != b"\x11\x00":
                raise UnreadableDicomError("its component is sampled otherwise than once a pixel")
        elif marker == _RESTART and len(body) == 2:
            restart = int.from_bytes(body, "big")
    _require_scan(scan := segments[-1][1], precision, syntax)
    table, coded = tables.get(scan[2] >> 4, b""), _read_coded_pixels(frame, start, restart, syntax)
    if syntax in JPEG_LOSSLESS and not table:
        raise UnreadableDicomError("its Huffman table is missing")
    if syntax in JPEG_LOSSLESS and len(coded) * 8 < claim.rows * claim.columns:  # a bit each at least
        raise UnreadableDicomError("fewer coded bits than pixels")
    return precision, restart, table, scan, coded


def _require_scan(scan: bytes, precision: int, syntax: str) -> None:
    if not precision or len(scan) != 6 or scan[0] != 1:
        raise UnreadableDicomError("no scan of one component")
    if syntax == f"{_JPEG}80" and scan[3]:
        raise UnreadableDicomError(f"coded with an error of up to {scan[3]} (NEAR), its transfer syntax is lossless")
    if syntax in _JPEG_LS and any(scan[offset] for offset in (2, 4, 5)):  # ISO 14495-1 C.2.3: not for one component
        raise UnreadableDicomError("a scan of one component names a mapping table, interleaving or a point transform")


def _read_jpeg_segments(frame: bytes) -> tuple[list[tuple[int, bytes]], int]:
    """Return the markers up to SOS, each with its segment without the length, and the offset of the coded pixels."""
    if not frame.startswith(b"\xff\xd8"):
        raise UnreadableDicomError("does not begin as JPEG")
    offset, segments = 2, list[tuple[int, bytes]]()
    while not segments or segments[-1][0] != _SCAN:
        while frame.startswith(b"\xff\xff", offset):  # fill bytes
            offset += 1
        if offset + 4 > len(frame) or frame[offset] != 0xFF:
            raise UnreadableDicomError("its JPEG markers are cut short")
        marker, length = frame[offset + 1], int.from_bytes(frame[offset + 2 : offset + 4], "big")
        end = offset + 2 + length
        if marker in {0x00, 0x01} or 0xD0 <= marker <= 0xD9 or length < 2 or end > len(frame):
            raise UnreadableDicomError("a JPEG segment is cut short or out of place")
        segments.append((marker, frame[offset + 4 : end]))
        offset = end
    return segments, offset


def _require_claim(rows: int, columns: int, components: int, precision: int, claim: Claim) -> None:
    if (rows, columns) != (claim.rows, claim.columns):
        size = f"{claim.rows} x {claim.columns}"
        raise UnreadableDicomError(f"the stream claims {rows} x {columns} pixels, the header says {size}")
    if components != 1:
        raise UnreadableDicomError(f"{components} components, CT has one")
    if not max(claim.bits_allocated - 8, 1) <= precision <= claim.bits_allocated:
        raise UnreadableDicomError(f"{precision} bits a sample, BitsAllocated is {claim.bits_allocated}")
    if claim.signed and precision < claim.bits_stored:
        raise UnreadableDicomError(
            f"{precision} bits a sample, BitsStored (0028,0101) is {claim.bits_stored}: which is the sign is unclear"
        )


def _read_huffman_tables(segment: bytes) -> dict[int, bytes]:
    """Return the tables of class 0: DC, and the differences of lossless JPEG."""
    tables, offset = {}, 0
    while offset < len(segment):
        end = offset + 17 + sum(segment[offset + 1 : offset + 17])
        if end > len(segment):
            raise UnreadableDicomError("a Huffman table is cut short")
        if segment[offset] < 0x10:
            tables[segment[offset]] = segment[offset + 1 : end]
        offset = end
    return tables


def _read_coded_pixels(frame: bytes, start: int, restart: int, syntax: str) -> bytes:
    """Return what lies between the scan's header and EOI; any other marker in it means damage."""
    # A coded FF is stuffed: by a zero byte, in JPEG-LS by a zero bit (T.87, A.1).
    markers = rb"\xff([\x80-\xfe])" if syntax in _JPEG_LS else rb"\xff([\x01-\xfe])"
    for match in re.compile(markers).finditer(frame, start):
        code = match[1][0]
        if code == 0xD9:
            if len(frame) - match.end() > _MAX_PADDING:
                raise UnreadableDicomError("bytes after its end marker")
            return frame[start : match.start()]
        if not (restart and 0xD0 <= code <= 0xD7):
            raise UnreadableDicomError(f"marker {code:02X} amid the coded pixels")
    raise UnreadableDicomError("ends without its end marker: cut short")


def _require_jpeg_2000(frame: bytes, claim: Claim) -> None:
    stream = _unwrap_jp2(frame)
    if not stream.startswith(b"\xff\x4f\xff\x51") or len(stream) < 43:
        raise UnreadableDicomError("does not begin as JPEG 2000")
    width, height, left, top, tile_x, tile_y, tile_left, tile_top, components = struct.unpack_from(">8LH", stream, 8)
    if int.from_bytes(stream[4:6], "big") != 38 + 3 * components or not (left < width and top < height):
        raise UnreadableDicomError("its size segment contradicts itself")
    own_sign = claim._replace(signed=False)  # the stream says whether it is signed
    _require_claim(height - top, width - left, components, (stream[42] & 0x7F) + 1, own_sign)
    if stream[43:45] != b"\1\1":
        raise UnreadableDicomError("its samples are subsampled")
    if not (tile_left <= left < tile_left + tile_x and tile_top <= top < tile_top + tile_y):
        raise UnreadableDicomError("its first tile lies outside the image")
    tiles = -(-(width - tile_left) // tile_x) * -(-(height - tile_top) // tile_y)
    if tiles > _MAX_TILES:
        raise UnreadableDicomError(f"{tiles} tiles")
    _require_tile_parts(stream, _read_main_header(stream, claim), tiles)


def _unwrap_jp2(frame: bytes) -> bytes:
    """Return the codestream; some writers keep the boxes of a JP2 file around it, which PS3.5 A.4.4 forbids."""
    if not frame.startswith(b"\x00\x00\x00\x0cjP  "):
        return frame
    offset, length = 0, 8
    while length >= 8 and offset + 8 <= len(frame):
        length, kind = int.from_bytes(frame[offset : offset + 4], "big"), frame[offset + 4 : offset + 8]
        if kind == b"jp2c" and length != 1:
            return frame[offset + 8 :]
        offset += length
    return b""


def _read_main_header(stream: bytes, claim: Claim) -> int:
    """Check the coding style of the main header; return the offset of the first tile part."""
    offset, styles = 2, 0
    while not stream.startswith(b"\xff\x90", offset):
        if offset + 4 > len(stream) or stream[offset] != 0xFF:
            raise UnreadableDicomError("its main header is cut short")
        marker, length = struct.unpack_from(">BH", stream, offset + 1)
        if marker == 0x52:
            _require_coding_style(stream[offset + 4 : offset + 2 + length], claim)
            styles += 1
        offset += 2 + max(length, 2)
    if styles != 1:
        raise UnreadableDicomError("it states no coding style, or several")
    return offset


def _require_coding_style(segment: bytes, claim: Claim) -> None:
    """COD (T.800, A.6.1): bounded layers and precincts, which multiply to the work that a decoder does."""
    if len(segment) < 10:
        raise UnreadableDicomError("its coding style is cut short")
    style, _, layers, _, levels, width, height = struct.unpack_from(">BBHBBBB", segment)
    if not 1 <= layers <= _MAX_LAYERS or levels > 32 or width > 8 or height > 8 or width + height > 8:
        raise UnreadableDicomError("its coding style is out of range")
    sizes, blocks = segment[10 : 11 + levels] if style & 1 else b"", 0
    if style & 1 and len(sizes) != levels + 1:
        raise UnreadableDicomError("its precincts are cut short")
    for level, size in enumerate(sizes):
        shrink = levels - level
        blocks += ((claim.columns >> shrink >> (size & 15)) + 1) * ((claim.rows >> shrink >> (size >> 4)) + 1)
    if blocks * layers > _MAX_BLOCKS:
        raise UnreadableDicomError("too many precincts")


def _require_tile_parts(stream: bytes, offset: int, tiles: int) -> None:
    """Follow the lengths of the tile parts (SOT, T.800 A.4.2): cut off, and one of them points beyond the end."""
    numbers = set()
    while stream.startswith(b"\xff\x90\x00\x0a", offset):
        if offset + 12 > len(stream):
            raise UnreadableDicomError("a tile is cut short")
        number, length = struct.unpack_from(">HL", stream, offset + 4)
        if number >= tiles or (length and length < 14):
            raise UnreadableDicomError("a tile is out of range")
        numbers.add(number)
        offset = offset + length if length else len(stream.rstrip(b"\xff\0")) - 2  # 0: the last part, up to the end
        if offset > len(stream):
            raise UnreadableDicomError("a tile is cut short")
    if len(numbers) != tiles:
        raise UnreadableDicomError(f"{len(numbers)} of {tiles} tiles: cut short")
    if offset < len(stream) and not stream.startswith(b"\xff\xd9", offset):
        raise UnreadableDicomError("bytes that are no tile after its last tile")


def require_complete(frame: bytes, syntax: str, claim: Claim, stored: NDArray[np.integer]) -> None:
    """Raise UnreadableDicomError unless the codes of a sound frame are those of the decoded pixels (rows, columns).

    Run lengths must add up, and lossless JPEG must be the codes of the pixels, bit by bit. The decoders of JPEG-LS and
    JPEG 2000 refuse wrong codes themselves, as far as the format allows.
    """
    if syntax in JPEG_LOSSLESS:
        _require_codes(frame, syntax, claim, stored)
    segments, expected = _run_segments(frame, claim) if syntax == RUN_LENGTH else [], claim.rows * claim.columns
    for segment in segments:
        offset = count = 0
        while count < expected and offset < len(segment):
            given, size = _RUNS[segment[offset]]
            count += given
            offset += size
        if count != expected or not 0 <= len(segment) - offset <= _MAX_PADDING:
            raise UnreadableDicomError(f"its runs give {count} of {expected} bytes")


def _require_codes(frame: bytes, syntax: str, claim: Claim, stored: NDArray[np.integer]) -> None:
    precision, restart, table, scan, coded = _read_jpeg(frame, syntax, claim)
    if restart % claim.columns:
        raise UnreadableDicomError("its restart interval is no whole number of lines")  # T.81, H.1.1
    shift = scan[5] & 15  # point transform
    bits = precision - shift
    samples: NDArray[np.uint16] = stored.astype(np.uint16) >> np.uint16(shift)
    if claim.signed:
        samples &= np.uint16((1 << bits) - 1)  # a decoder may have extended the sign
    elif int(samples.max()) >> bits:
        raise UnreadableDicomError(f"samples of more than {bits} bits")
    lines = restart // claim.columns or claim.rows
    differences = _subtract_predictions(samples, scan[3], 1 << (bits - 1), lines)
    parts = re.split(rb"\xff[\xd0-\xd7]", coded) if restart else [coded]
    intervals = range(0, claim.rows, lines)
    if len(parts) != len(intervals):
        raise UnreadableDicomError(f"{len(parts)} of {len(intervals)} intervals between restart markers")
    for part, first in zip(parts, intervals, strict=True):
        _require_interval(part.replace(b"\xff\x00", b"\xff"), table, differences[first : first + lines])


def _require_interval(data: bytes, table: bytes, differences: NDArray[np.uint16]) -> None:
    """Raise UnreadableDicomError unless ``data``, unstuffed, begins with the codes of the differences, bit by bit."""
    codes, lengths = _huffman_codes(table)
    sizes = lengths[differences]
    if not sizes.all():
        raise UnreadableDicomError("its Huffman table has no code for some of its pixels")
    if not 0 <= 8 * len(data) - int(sizes.sum(dtype=np.int64)) < 8:
        raise UnreadableDicomError("its codes do not end where its bytes do")
    from_each_byte: NDArray[np.uint64] = np.ndarray(len(data), ">u8", data + bytes(8), strides=(1,))
    end = 0
    for first in range(0, len(differences), _LINES_AT_ONCE):
        lines = slice(first, first + _LINES_AT_ONCE)
        ends = end + np.cumsum(sizes[lines], dtype=np.int64)
        starts, end = ends - sizes[lines].ravel(), int(ends[-1])
        found = from_each_byte[starts >> 3] << (starts & 7).astype(np.uint64)
        if (found >> (np.uint64(64) - sizes[lines].ravel()) != codes[differences[lines]].ravel()).any():
            raise UnreadableDicomError("its codes are not those of its pixels")


def _subtract_predictions(samples: NDArray[np.uint16], predictor: int, middle: int, lines: int) -> NDArray[np.uint16]:
    """Subtract the prediction of each sample, modulo 65536 (T.81, H.1.2.1). Every ``lines`` lines begin anew."""
    signed: NDArray[Any] = samples if predictor < 5 else samples.astype(np.int32)  # halves need the sign
    left, above, corner = signed[1:, :-1], signed[:-1, 1:], signed[:-1, :-1]
    formulas: dict[int, Callable[[], NDArray[Any]]] = {
        1: lambda: left, 2: lambda: above, 3: lambda: corner, 4: lambda: left + above - corner,
        5: lambda: left + ((above - corner) >> 1), 6: lambda: above + ((left - corner) >> 1),
        7: lambda: (left + above) >> 1,
    }  # fmt: skip
    if predictor not in formulas:
        raise UnreadableDicomError(f"predictor {predictor} is not defined")
    differences = np.empty_like(samples)
    differences[1:, 1:] = samples[1:, 1:] - formulas[predictor]().astype(np.uint16)
    differences[1:, 0] = samples[1:, 0] - samples[:-1, 0]
    # The left neighbour predicts the first line, and the first one after each restart.
    differences[::lines, 1:] = samples[::lines, 1:] - samples[::lines, :-1]
    differences[::lines, 0] = samples[::lines, 0] - np.uint16(middle)
    return differences


@lru_cache(maxsize=16)
def _huffman_codes(table: bytes) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Return codes and their bits, each (65536,), of each difference modulo 65536: its Huffman code, then its value.

    0 bits without a code. Codes count up within a length and double from one to the next (T.81, C.2).
    """
    counts, symbols = np.frombuffer(table[:16], dtype=np.uint8), np.frombuffer(table[16:], dtype=np.uint8)
    sizes = np.repeat(np.arange(1, 17), counts)
    if len(sizes) != len(symbols) or (symbols >= _MAX_CATEGORIES).any() or (2.0**-sizes).sum() > 1:
        raise UnreadableDicomError("its Huffman table is out of range")
    code_of, size_of = np.zeros((2, _MAX_CATEGORIES), dtype=np.int64)
    size_of[symbols] = sizes
    code_of[symbols] = (np.cumsum(2.0**-sizes) - 2.0**-sizes) * 2.0**sizes
    values = np.arange(2**16, dtype=np.uint16).view(np.int16).astype(np.int64)
    categories = np.frexp(np.abs(values))[1]  # the bit length
    # Category 16 is the difference 32768, without further bits; a negative number is one less (T.81, H.1.2.2).
    extra = np.where(categories < _MAX_CATEGORIES - 1, categories, 0)
    low = (values - (values < 0)) & ((1 << extra) - 1)
    codes = (code_of[categories] << extra | low).astype(np.uint64)
    return codes, np.where(size_of[categories], size_of[categories] + extra, 0).astype(np.uint8)
