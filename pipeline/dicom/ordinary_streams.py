"""Headers of compressed image streams: ordinary, and of the image that the DICOM header describes.

True is said only of what was understood to the last field; a stream of which these functions say False may be sound.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ichpipe.dicom.dataset import PixelFacts

_SOF3, _DHT, _SOI, _EOI, _SOS = 0xC3, 0xC4, 0xD8, 0xD9, 0xDA  # markers of JPEG, ITU-T T.81, table B.1
_IGNORED: Final = frozenset({*range(0xE0, 0xF0), 0xFE})  # APPn and COM
_MOST_CODES: Final = 17  # differences of up to 16 bits have 17 categories, T.81 table H.2
_SIZ_LENGTH: Final = 41  # of a stream with one component, T.800 table A.9


def is_ordinary_lossless_jpeg(stream: bytes, facts: PixelFacts) -> bool:
    """Whether this is JPEG lossless, Huffman (ITU-T T.81, process 14): one component of the image's size, one scan.

    It must reach its end: liblj92 makes up what is missing.
    """
    if stream[:2] != bytes([0xFF, _SOI]) or not stream.rstrip(b"\0\xff").endswith(bytes([0xFF, _EOI])):
        return False
    place, frame = 2, False
    tables: set[int] = set()
    while True:
        if len(stream) < place + 4 or stream[place] != 0xFF:
            return False
        marker, length = stream[place + 1], int.from_bytes(stream[place + 2 : place + 4])
        body = stream[place + 4 : place + 2 + length]
        if length < 2 or len(body) != length - 2:
            return False
        if marker == _SOS:
            return frame and _is_sound_scan(body, tables)
        if marker == _SOF3 and not frame and _is_sound_frame(body, facts):
            frame = True
        elif marker == _DHT and (found := _table(body)) is not None:
            tables.add(found)
        elif marker not in _IGNORED:
            return False
        place += 2 + length


def _is_sound_frame(body: bytes, facts: PixelFacts) -> bool:
    """Check precision, lines, samples, and one component that is not subsampled (T.81, B.2.2)."""
    if len(body) != 9:
        return False
    precision, rows, columns, components, _, sampling, _ = struct.unpack(">BHHBBBB", body)
    size = (rows, columns) == (facts.rows, facts.columns)
    return size and components == 1 and sampling == 0x11 and 8 < precision <= 16 == facts.bits_allocated


def _table(body: bytes) -> int | None:
    """Return the number of the one Huffman table that a DHT segment defines (T.81, B.2.4.2); None if it is unsound."""
    counts, values = body[1:17], body[17:]
    total = sum(counts)
    free = 1  # codes of the length at hand that no shorter one begins; all ones is no code
    for count in counts:
        free = 2 * free - count
        if free < 1:
            return None
    whole = len(counts) == 16 and 0 < total <= _MOST_CODES and len(values) == total == len(set(values))
    return body[0] if whole and max(values) < _MOST_CODES and body[0] < 4 else None


def _is_sound_scan(body: bytes, tables: set[int]) -> bool:
    """Check one component, a table that is there, a predictor and no point transform (T.81, B.2.3 and H.1.2)."""
    return (
        len(body) == 6
        and body[0] == 1
        and body[2] & 15 == 0
        and body[2] >> 4 in tables
        and (1 <= body[3] <= 7 and body[4:] == b"\0\0")
    )


def is_ordinary_jpeg_2000(stream: bytes, facts: PixelFacts) -> bool:
    """Whether this is a JPEG 2000 code stream (ITU-T T.800, A.5.1) of one component, one tile and the image's size."""
    if stream[:4] != b"\xff\x4f\xff\x51" or len(stream) < 4 + _SIZ_LENGTH:
        return False
    length, _, *grid, components, depth, across, down = struct.unpack(">HHIIIIIIIIHBBB", stream[4 : 4 + _SIZ_LENGTH])
    tile = grid[4] >= facts.columns and grid[5] >= facts.rows and grid[6:] == [0, 0]
    size = grid[:4] == [facts.columns, facts.rows, 0, 0]
    bits = bool(depth >> 7) == facts.signed and (depth & 127) + 1 <= facts.bits_allocated == 16
    return length == _SIZ_LENGTH and size and tile and components == across == down == 1 and bits


def is_ordinary_run_length(stream: bytes, facts: PixelFacts) -> bool:
    """Whether the 64 bytes before the segments (DICOM PS3.5, G.5) name one for each byte of a pixel, in order."""
    if len(stream) < 64:
        return False
    count, *offsets = struct.unpack("<16I", stream[:64])
    used = [*offsets[:count], len(stream)] if count == facts.bits_allocated // 8 else []
    ordered = all(first < second for first, second in pairwise(used))
    return bool(used) and used[0] == 64 and ordered and not any(offsets[count:])
