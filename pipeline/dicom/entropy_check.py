"""The coded numbers of run-length and lossless JPEG pixels, counted: as many as there are pixels, and nothing over.

Codecs are kind to damage: of streams with a byte changed or the end cut off, some fill up what is missing and say
nothing (docs/reliability.md has the counts). Here each code is stepped over, by tables, without making the image; a
stream whose codes do not end where its bytes do, or whose samples leave their range, is damaged. JPEG-LS and JPEG 2000
are left to their decoders, which refuse such streams as far as the format lets them know.
Sources: DICOM PS3.5 G.3 (run length), ITU-T T.81 F.1.2.1 and H (lossless JPEG).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NoReturn

import numpy as np

from ichpipe.common.errors import UnreadableDicomError
from ichpipe.dicom.stream_checks import JPEG_LOSSLESS, RUN_LENGTH, Claim, JpegScan, read_jpeg, run_segments

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_PADDING: Final = 16  # bytes after the last run: one is usual, to make the length even
_CODE_BITS: Final = 16  # longest Huffman code
_LONGEST_STEP: Final = 31  # bits: a code, and the bits of its difference
_PIECE: Final = 2**16  # samples stepped over at a time
_RESTARTS: Final = re.compile(rb"\xff[\xd0-\xd7]")


def require_complete(frame: bytes, syntax: str, claim: Claim) -> None:
    """Raise UnreadableDicomError unless the codes of a frame that is ``require_sound`` give each pixel once."""
    if syntax == RUN_LENGTH:
        for segment in run_segments(frame, claim):
            _require_runs(segment, claim.rows * claim.columns)
    elif syntax in JPEG_LOSSLESS:
        _require_differences(read_jpeg(frame, syntax, claim), claim)


def _require_runs(segment: bytes, wanted: int) -> None:
    place = made = 0
    length = len(segment)
    while made < wanted and place < length:
        code = segment[place]
        if code < 128:
            made += code + 1
            place += code + 2
        elif code > 128:
            made += 257 - code
            place += 2
        else:
            place += 1
    if made != wanted or not 0 <= length - place <= _MAX_PADDING:
        _damaged(f"its runs give {made} of {wanted} bytes")


def _require_differences(scan: JpegScan, claim: Claim) -> None:
    table = scan.tables.get(scan.header[2] >> 4)
    if table is None:
        _damaged("its Huffman table is missing")
    steps, categories = _code_tables(table)
    wanted = claim.rows * claim.columns
    parts = _RESTARTS.split(scan.coded) if scan.restart else [scan.coded]
    counts = [scan.restart] * (wanted // scan.restart) + [wanted % scan.restart] if scan.restart else [wanted]
    counts = [count for count in counts if count]
    if len(parts) != len(counts):
        _damaged(f"{len(parts)} of {len(counts)} intervals between restart markers")
    differences = [
        _differences(part.replace(b"\xff\x00", b"\xff"), steps, categories, count)
        for part, count in zip(parts, counts, strict=True)
    ]
    if scan.header[3] == 1 and not scan.restart:  # the sample to the left predicts
        _require_range(differences[0].reshape(claim.rows, claim.columns), scan)


def _code_tables(table: bytes) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return, by the next 16 bits, how many bits the code and its difference take (0: no code), and the category."""
    steps = np.zeros(1 << _CODE_BITS, dtype=np.uint8)
    categories = np.zeros(1 << _CODE_BITS, dtype=np.uint8)
    start, number = 0, 16
    for length in range(1, _CODE_BITS + 1):
        span = 1 << (_CODE_BITS - length)
        for category in table[number : number + table[length - 1]]:
            if category > 16 or start + span > len(steps):
                _damaged("its Huffman table is out of range")
            # Category 16 is the difference 32768, without further bits (T.81, H.1.2.2).
            steps[start : start + span] = length + (category if category < 16 else 0)
            categories[start : start + span] = category
            start += span
        number += table[length - 1]
    return steps, categories


def _differences(data: bytes, steps: NDArray[np.uint8], categories: NDArray[np.uint8], count: int) -> NDArray[np.int32]:
    """Step over ``count`` codes of unstuffed data; return their differences (count,). All bits must be used up."""
    if len(data) * 8 > count * _LONGEST_STEP + 8:
        _damaged("more coded bytes than its pixels can take")
    if len(data) * 8 < count:  # a bit each at least: said before the pixels that a header claims are counted
        _damaged("fewer coded bits than pixels")
    padded = np.frombuffer(data + bytes(8), dtype=np.uint8).astype(np.uint32)
    windows = padded[:-2] << np.uint32(16) | padded[1:-1] << np.uint32(8) | padded[2:]  # 24 bits from each byte on
    ahead = np.empty((len(windows), 8), dtype=np.uint8)  # bits to the next code, from each bit on
    for shift in range(8):
        ahead[:, shift] = steps[windows >> np.uint32(8 - shift) & np.uint32(0xFFFF)]
    ahead[len(data) :] = 0
    begins = _begins(ahead.tobytes(), count)
    ends = begins + ahead.reshape(-1)[begins]
    if (ends == begins).any() or not 0 <= len(data) * 8 - int(ends[-1]) < 8:
        _damaged("its codes do not end where its bytes do")
    return _values(windows, begins, ends, categories)


def _begins(ahead: bytes, count: int) -> NDArray[np.int64]:
    """Return the bit at which each code begins; where there is no code it stays in place."""
    pieces, place = [np.zeros(1, dtype=np.int64)], 0
    for start in range(1, count, _PIECE):
        piece = [place := place + ahead[place] for _ in range(min(_PIECE, count - start))]
        pieces.append(np.array(piece, dtype=np.int64))
    return np.concatenate(pieces)


def _values(
    windows: NDArray[np.uint32], begins: NDArray[np.int64], ends: NDArray[np.int64], categories: NDArray[np.uint8]
) -> NDArray[np.int32]:
    category = categories[windows[begins >> 3] >> (8 - (begins & 7)).astype(np.uint32) & np.uint32(0xFFFF)]
    bits = np.where(category < 16, category, 0).astype(np.int64)
    places = ends - bits
    found = windows[places >> 3].astype(np.int64) >> (24 - (places & 7) - bits)
    found &= (1 << bits) - 1
    values = np.where(found >> np.maximum(bits - 1, 0), found, found - (1 << bits) + 1)
    values[category == 16] = 1 << 15
    result: NDArray[np.int32] = values.astype(np.int32)
    return result


def _require_range(differences: NDArray[np.int32], scan: JpegScan) -> None:
    """Add up the differences (rows, columns) and demand that no sample leaves its bits."""
    bits = scan.precision - (scan.header[5] & 15)
    first = np.cumsum(differences[:, 0], dtype=np.int64) + (1 << (bits - 1))
    samples = differences.astype(np.int64)
    samples[:, 0] = first
    if (np.cumsum(samples, axis=1) & 0xFFFF).max() >> bits:
        _damaged(f"samples of more than {bits} bits")


def _damaged(what: str) -> NoReturn:
    raise UnreadableDicomError(what)
