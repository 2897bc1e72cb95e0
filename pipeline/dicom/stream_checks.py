"""Compressed pixels looked at before any codec is called: their structure, and the image that they claim.

A codec is native code: it believes a stream that says 60,000 x 60,000, and a damaged one may keep it busy for seconds.
What is read here are lengths and markers, in microseconds and whatever the codec; the coded numbers themselves are
checked by ``entropy.py``. Sources: DICOM PS3.5 A.4 and G (fragments, run length), ITU-T T.81 B (JPEG), T.87 C
(JPEG-LS), T.800 A (JPEG 2000).
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from ichpipe.common.errors import UnreadableDicomError

if TYPE_CHECKING:
    from collections.abc import Iterator

RUN_LENGTH: Final = "1.2.840.10008.1.2.5"
JPEG_LOSSLESS: Final = frozenset(f"1.2.840.10008.1.2.4.{number}" for number in (57, 70))
_JPEG: Final = "1.2.840.10008.1.2.4."
# Frame headers (SOFn) that a transfer syntax allows: baseline 0, extended 1, lossless 3, JPEG-LS 55.
_FRAMES: Final = {
    f"{_JPEG}50": {0xC0}, f"{_JPEG}51": {0xC0, 0xC1}, f"{_JPEG}57": {0xC3}, f"{_JPEG}70": {0xC3},
    f"{_JPEG}80": {0xF7}, f"{_JPEG}81": {0xF7},
}  # fmt: skip
_JPEG_LS: Final = frozenset({f"{_JPEG}80", f"{_JPEG}81"})
_ANY_FRAME: Final = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
_TABLES, _RESTART, _SCAN = 0xC4, 0xDD, 0xDA  # DHT, DRI, SOS
_JPEG_2000: Final = frozenset(f"{_JPEG}{number}" for number in (90, 91, 201, 202, 203))
_ITEM: Final = b"\xfe\xff\x00\xe0"
_DELIMITER: Final = b"\xfe\xff\xdd\xe0"
_MAX_TILES: Final = 4096  # 64 pixels a side in the largest image; each tile costs a decoder memory and time
_MAX_LAYERS: Final = 256
_MAX_BLOCKS: Final = 2**19  # precincts of all levels; a pixel each, as damage may claim, takes minutes
_MAX_PADDING: Final = 16  # bytes after the end of a stream: one is usual, to make the length even


class Claim(NamedTuple):
    """What the DICOM header says of the stream."""

    rows: int  # (0028,0010)
    columns: int  # (0028,0011)
    bits_allocated: int  # (0028,0100)


class JpegScan(NamedTuple):
    """A JPEG stream of one component, taken apart."""

    precision: int  # bits a sample
    restart: int  # samples between restart markers; 0: none
    tables: dict[int, bytes]  # Huffman tables for differences (class 0): 16 counts, then the symbols
    header: bytes  # SOS without its length
    coded: bytes  # what lies between SOS and EOI, still stuffed


def frame_bytes(pixels: bytes) -> bytes:
    """Join the fragments of encapsulated PixelData that holds one frame. Raises UnreadableDicomError."""
    items = list(_items(pixels))
    if len(items) < 2:
        _damaged("PixelData has no fragment")
    offsets = items[0]
    if len(offsets) not in {0, 4} or offsets.strip(b"\0"):
        _damaged("its table of offsets is not that of one frame")
    return b"".join(items[1:])


def require_sound(frame: bytes, syntax: str, claim: Claim) -> None:
    """Raise UnreadableDicomError unless the stream is built as ``syntax`` wants and claims the image of the header.

    A transfer syntax that is unknown here passes; whether there is a decoder for it is asked elsewhere.
    """
    if syntax == RUN_LENGTH:
        run_segments(frame, claim)
    elif syntax in _FRAMES:
        read_jpeg(frame, syntax, claim)
    elif syntax in _JPEG_2000:
        _require_jpeg_2000(frame, claim)


def run_segments(frame: bytes, claim: Claim) -> list[bytes]:
    """Return the coded segments of a run-length frame, most significant byte of the samples first (PS3.5, G.5)."""
    if len(frame) < 64:
        _damaged("no header of 64 bytes")
    count, *starts = struct.unpack_from("<16L", frame)
    wanted = claim.bits_allocated // 8
    if count != wanted:
        _damaged(f"{min(count, 99)} segments, BitsAllocated {claim.bits_allocated} needs {wanted}")
    places = [*starts[:count], len(frame)]
    if places[0] != 64 or any(low >= high for low, high in pairwise(places)):
        _damaged("the places of its segments are not in order")
    return [frame[low:high] for low, high in pairwise(places)]


def read_jpeg(frame: bytes, syntax: str, claim: Claim) -> JpegScan:
    """Take a JPEG or JPEG-LS stream apart: one frame of one component in one scan, and nothing cut off."""
    if not frame.startswith(b"\xff\xd8"):
        _damaged("does not begin as JPEG")
    place, precision, restart = 2, 0, 0
    tables: dict[int, bytes] = {}
    while True:
        marker, segment, place = _segment(frame, place)
        if marker == _TABLES:
            tables |= _huffman_tables(segment)
        elif marker in _ANY_FRAME:
            if precision or marker not in _FRAMES[syntax]:
                _damaged(f"JPEG frame {marker:02X} does not belong to this transfer syntax")
            precision = _precision(segment, claim)
            if syntax in _JPEG_LS and segment[7:] != b"\x11\x00":
                _damaged("its component is sampled otherwise than once a pixel")
        elif marker == _RESTART and len(segment) == 2:
            restart = int.from_bytes(segment, "big")
        elif marker == _SCAN:
            break
    _require_scan(segment, precision, syntax)
    stuffed = bytes(range(0x80)) if syntax in _JPEG_LS else b"\0"
    return JpegScan(precision, restart, tables, segment, _coded(frame, place, restart, stuffed))


def _items(pixels: bytes) -> Iterator[bytes]:
    place = 0
    while place < len(pixels) and not pixels.startswith(_DELIMITER, place):
        if not pixels.startswith(_ITEM, place):
            _damaged("a fragment does not begin as an item")
        length = int.from_bytes(pixels[place + 4 : place + 8], "little")
        place += 8
        if place + length > len(pixels):
            _damaged("a fragment is cut short")
        yield pixels[place : place + length]
        place += length


def _segment(frame: bytes, place: int) -> tuple[int, bytes, int]:
    """Return a marker, its segment without the length, and the place after it."""
    while frame.startswith(b"\xff\xff", place):  # fill bytes
        place += 1
    if place + 4 > len(frame) or frame[place] != 0xFF:
        _damaged("its JPEG markers are cut short")
    marker, length = frame[place + 1], int.from_bytes(frame[place + 2 : place + 4], "big")
    end = place + 2 + length
    if marker in {0x00, 0x01} or 0xD0 <= marker <= 0xD9 or length < 2 or end > len(frame):
        _damaged("a JPEG segment is cut short or out of place")
    return marker, frame[place + 4 : end], end


def _precision(segment: bytes, claim: Claim) -> int:
    if len(segment) != 9:
        _damaged("not an image of one component")
    precision, rows, columns, components = struct.unpack_from(">BHHB", segment)
    _require_claim(rows, columns, components, precision, claim)
    return int(precision)


def _require_scan(segment: bytes, precision: int, syntax: str) -> None:
    if not precision or len(segment) != 6 or segment[0] != 1:
        _damaged("no scan of one component")
    if syntax == f"{_JPEG}80" and segment[3]:
        _damaged(f"coded with an error of up to {segment[3]} (NEAR), its transfer syntax is lossless")
    if syntax in _JPEG_LS and any(segment[place] for place in (2, 4, 5)):  # ISO 14495-1 C.2.3: not for one component
        _damaged("a scan of one component names a mapping table, interleaving or a point transform")


def _require_claim(rows: int, columns: int, components: int, precision: int, claim: Claim) -> None:
    if (rows, columns) != (claim.rows, claim.columns):
        _damaged(f"the stream claims {rows} x {columns} pixels, the header says {claim.rows} x {claim.columns}")
    if components != 1:
        _damaged(f"{components} components, CT has one")
    if not max(claim.bits_allocated - 8, 1) <= precision <= claim.bits_allocated:
        _damaged(f"{precision} bits a sample, BitsAllocated is {claim.bits_allocated}")


def _huffman_tables(segment: bytes) -> dict[int, bytes]:
    tables, place = {}, 0
    while place + 17 <= len(segment):
        length = 17 + sum(segment[place + 1 : place + 17])
        table = segment[place + 1 : place + length]
        if place + length > len(segment):
            break
        if segment[place] < 0x10:  # class 0: DC, and the differences of lossless JPEG
            tables[segment[place]] = table
        place += length
    if place != len(segment):
        _damaged("a Huffman table is cut short")
    return tables


def _coded(frame: bytes, start: int, restart: int, stuffed: bytes) -> bytes:
    """Return what lies between the scan's header and EOI; any other marker in it means damage."""
    place = start
    while True:
        place = frame.find(b"\xff", place)
        if place < 0 or place + 1 >= len(frame):
            _damaged("ends without its end marker: cut short")
        code = frame[place + 1]
        if code == 0xD9:
            break
        if code not in stuffed and not (restart and 0xD0 <= code <= 0xD7) and code != 0xFF:
            _damaged(f"marker {code:02X} amid the coded pixels")
        place += 1 if code == 0xFF else 2
    if len(frame) - place - 2 > _MAX_PADDING:
        _damaged("bytes after its end marker")
    return frame[start:place]


def _require_jpeg_2000(frame: bytes, claim: Claim) -> None:
    stream = _unwrapped(frame)
    if not stream.startswith(b"\xff\x4f\xff\x51") or len(stream) < 43:
        _damaged("does not begin as JPEG 2000")
    width, height, left, top, tile_x, tile_y, tile_left, tile_top, components = struct.unpack_from(">8LH", stream, 8)
    if int.from_bytes(stream[4:6], "big") != 38 + 3 * components or not (left < width and top < height):
        _damaged("its size segment contradicts itself")
    depth, *steps = stream[42], *stream[43:45]
    _require_claim(height - top, width - left, components, (depth & 0x7F) + 1, claim)
    if steps != [1, 1]:
        _damaged("its samples are subsampled")
    if not (tile_left <= left < tile_left + tile_x and tile_top <= top < tile_top + tile_y):
        _damaged("its first tile lies outside the image")
    tiles = -(-(width - tile_left) // tile_x) * -(-(height - tile_top) // tile_y)
    if tiles > _MAX_TILES:
        _damaged(f"{tiles} tiles")
    _require_tile_parts(stream, _main_header(stream, claim), tiles)


def _unwrapped(frame: bytes) -> bytes:
    """Return the codestream; some writers keep the boxes of a JP2 file around it, which PS3.5 A.4.4 forbids."""
    if not frame.startswith(b"\x00\x00\x00\x0cjP  "):
        return frame
    place, length = 0, 8
    while length >= 8 and place + 8 <= len(frame):
        length, kind = int.from_bytes(frame[place : place + 4], "big"), frame[place + 4 : place + 8]
        if kind == b"jp2c" and length != 1:
            return frame[place + 8 :]
        place += length
    return b""


def _main_header(stream: bytes, claim: Claim) -> int:
    """Check the coding style of the main header; return the place of the first tile part."""
    place, styles = 2, 0
    while not stream.startswith(b"\xff\x90", place):
        if place + 4 > len(stream) or stream[place] != 0xFF:
            _damaged("its main header is cut short")
        length = int.from_bytes(stream[place + 2 : place + 4], "big")
        if stream[place + 1] == 0x52:
            _require_coding_style(stream[place + 4 : place + 2 + length], claim)
            styles += 1
        place += 2 + max(length, 2)
    if styles != 1:
        _damaged("it states no coding style, or several")
    return place


def _require_coding_style(segment: bytes, claim: Claim) -> None:
    """COD (T.800, A.6.1): bounded layers and precincts, which multiply to the work that a decoder does."""
    if len(segment) < 10:
        _damaged("its coding style is cut short")
    style, _, layers, _, levels, width, height = struct.unpack_from(">BBHBBBB", segment)
    if not 1 <= layers <= _MAX_LAYERS or levels > 32 or width > 8 or height > 8 or width + height > 8:
        _damaged("its coding style is out of range")
    if not style & 1:
        return
    sizes = segment[10 : 11 + levels]
    if len(sizes) != levels + 1:
        _damaged("its precincts are cut short")
    blocks = 0
    for level, size in enumerate(sizes):
        shrink = levels - level
        blocks += ((claim.columns >> shrink >> (size & 15)) + 1) * ((claim.rows >> shrink >> (size >> 4)) + 1)
    if blocks * layers > _MAX_BLOCKS:
        _damaged("too many precincts")


def _require_tile_parts(stream: bytes, place: int, tiles: int) -> None:
    """Follow the lengths of the tile parts (SOT, T.800 A.4.2): cut off, and one of them points beyond the end."""
    seen = set()
    while stream.startswith(b"\xff\x90\x00\x0a", place):
        if place + 12 > len(stream):
            _damaged("a tile is cut short")
        number, length = struct.unpack_from(">HL", stream, place + 4)
        if number >= tiles or (length and length < 14):
            _damaged("a tile is out of range")
        seen.add(number)
        place = place + length if length else len(stream.rstrip(b"\xff\0")) - 2  # 0: the last part, up to the end
        if place > len(stream):
            _damaged("a tile is cut short")
    if len(seen) != tiles:
        _damaged(f"{len(seen)} of {tiles} tiles: cut short")
    rest = stream[place:]
    if rest and not rest.startswith(b"\xff\xd9"):
        _damaged("bytes that are no tile after its last tile")


def _damaged(what: str) -> NoReturn:
    raise UnreadableDicomError(what)
