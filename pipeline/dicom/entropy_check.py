"""Checks that the coded numbers of run-length and lossless JPEG pixels give each pixel once, with nothing left over.

Of streams with a changed byte or a missing end, some decoders fill up what is missing and report nothing
(docs/reliability.md has the counts). Here run lengths are added up; for JPEG, the bits that the decoded pixels need
are compared with the bits that the stream has. JPEG-LS and JPEG 2000 are left to their decoders, which refuse such
streams as far as the format allows. Sources: DICOM PS3.5 G.3 (run length), ITU-T T.81 H (lossless JPEG).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ichpipe.common.errors import UnreadableDicomError
from ichpipe.dicom.stream_checks import JPEG_LOSSLESS, MAX_CATEGORIES, MAX_PADDING, RUN_LENGTH, read_jpeg, run_segments

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from ichpipe.dicom.stream_checks import Claim, JpegScan

_RESTARTS: Final = re.compile(rb"\xff[\xd0-\xd7]")


def require_complete(frame: bytes, syntax: str, claim: Claim, stored: NDArray[np.integer]) -> None:
    """Raise UnreadableDicomError unless the codes of a sound frame (``require_sound``) are those of its pixels.

    ``stored`` holds the decoded pixels (rows, columns).
    """
    if syntax == RUN_LENGTH:
        for segment in run_segments(frame, claim):
            _require_runs(segment, claim.rows * claim.columns)
    elif syntax in JPEG_LOSSLESS:
        _require_codes(read_jpeg(frame, syntax, claim), claim, stored)


def _require_runs(segment: bytes, expected: int) -> None:
    offset = count = 0
    length = len(segment)
    while count < expected and offset < length:
        code = segment[offset]
        if code < 128:
            count += code + 1
            offset += code + 2
        elif code > 128:
            count += 257 - code
            offset += 2
        else:
            offset += 1
    if count != expected or not 0 <= length - offset <= MAX_PADDING:
        raise UnreadableDicomError(f"its runs give {count} of {expected} bytes")


def _require_codes(scan: JpegScan, claim: Claim, stored: NDArray[np.integer]) -> None:
    if scan.restart % claim.columns:
        raise UnreadableDicomError("its restart interval is no whole number of lines")  # T.81, H.1.1
    shift = scan.header[5] & 15  # point transform
    bits = scan.precision - shift
    samples: NDArray[np.uint16] = stored.astype(np.uint16) >> np.uint16(shift)
    if claim.signed:
        samples &= np.uint16((1 << bits) - 1)  # a decoder may have extended the sign
    elif int(samples.max()) >> bits:
        raise UnreadableDicomError(f"samples of more than {bits} bits")
    lines = scan.restart // claim.columns or claim.rows
    lengths = _count_bits(scan.table)[_subtract_predictions(samples, scan.header[3], 1 << (bits - 1), lines)]
    if not lengths.all():
        raise UnreadableDicomError("its Huffman table has no code for some of its pixels")
    needed = np.add.reduceat(lengths.sum(axis=1, dtype=np.int64), range(0, claim.rows, lines))
    parts = _RESTARTS.split(scan.coded) if scan.restart else [scan.coded]
    if len(parts) != len(needed):
        raise UnreadableDicomError(f"{len(parts)} of {len(needed)} intervals between restart markers")
    rest = 8 * np.array([len(part) - part.count(b"\xff\x00") for part in parts]) - needed
    if rest.min() < 0 or rest.max() >= 8:
        raise UnreadableDicomError("its codes do not end where its bytes do")


def _subtract_predictions(samples: NDArray[np.uint16], predictor: int, middle: int, lines: int) -> NDArray[np.uint16]:
    """Subtract the prediction of each sample, modulo 65536 (T.81, H.1.2.1).

    The left neighbour predicts the first line, and the first one after each restart (every ``lines``).
    """
    signed: NDArray[Any] = samples if predictor < 5 else samples.astype(np.int32)  # halves need the sign
    left, above, corner = signed[1:, :-1], signed[:-1, 1:], signed[:-1, :-1]
    formulas: dict[int, Callable[[], NDArray[Any]]] = {
        1: lambda: left,
        2: lambda: above,
        3: lambda: corner,
        4: lambda: left + above - corner,
        5: lambda: left + ((above - corner) >> 1),
        6: lambda: above + ((left - corner) >> 1),
        7: lambda: (left + above) >> 1,
    }
    if predictor not in formulas:
        raise UnreadableDicomError(f"predictor {predictor} is not defined")
    differences = np.empty_like(samples)
    differences[1:, 1:] = samples[1:, 1:] - formulas[predictor]().astype(np.uint16)
    differences[1:, 0] = samples[1:, 0] - samples[:-1, 0]
    differences[::lines, 1:] = samples[::lines, 1:] - samples[::lines, :-1]
    differences[::lines, 0] = samples[::lines, 0] - np.uint16(middle)
    return differences


@lru_cache(maxsize=16)
def _count_bits(table: bytes) -> NDArray[np.uint8]:
    """Return the bits of each difference modulo 65536 (65536,): its Huffman code and its value; 0 without a code."""
    counts, symbols = np.frombuffer(table[:16], dtype=np.uint8), np.frombuffer(table[16:], dtype=np.uint8)
    codes = np.repeat(np.arange(1, 17), counts)
    if len(codes) != len(symbols) or (symbols >= MAX_CATEGORIES).any() or (2.0**-codes).sum() > 1:
        raise UnreadableDicomError("its Huffman table is out of range")
    lengths = np.zeros(MAX_CATEGORIES, dtype=np.uint8)
    # Category 16 is the difference 32768, without further bits (T.81, H.1.2.2).
    lengths[symbols] = codes + np.where(symbols < MAX_CATEGORIES - 1, symbols, 0)
    values = np.arange(2**16, dtype=np.uint16).view(np.int16).astype(np.float64)
    categories = np.frexp(np.abs(values))[1]  # the bit length
    bits: NDArray[np.uint8] = lengths[categories]
    return bits
