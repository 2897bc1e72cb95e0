"""Hounsfield units by another way than the product's: pydicom's own values, and other decoders.

The header is read by pydicom's ``dcmread`` and its conversions, pixels by numpy, a plain run-length and a plain
lossless JPEG decoder here, and for JPEG-LS and JPEG 2000 by the decoder that pydicom would try last (the product
takes the first) or by imagecodecs. GDCM, Pillow, pylibjpeg-openjpeg and imagecodecs all hold OpenJPEG, in other
versions: for JPEG 2000 the reference is not independent. What the product shares is ``ct.stored_to_hu``, which
tests/test_ct.py checks by hand arithmetic.
"""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import pydicom
from pydicom.encaps import generate_fragments, parse_basic_offsets
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from ichpipe.dicom.dataset import PixelFacts
from ichpipe.dicom.hounsfield import stored_to_hu
from ichpipe.dicom.pydicom_quiet import quiet_pydicom

try:
    import imagecodecs
except ImportError:
    imagecodecs = None

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

IMPLICIT, EXPLICIT, BIG, DEFLATED = (f"1.2.840.10008.1.2{end}" for end in ("", ".1", ".2", ".1.99"))
RLE = "1.2.840.10008.1.2.5"
JPEG_LOSSLESS = {f"1.2.840.10008.1.2.4.{number}" for number in (57, 70)}


def reference_hu(data: bytes) -> NDArray[np.int16]:
    """Return HU (rows, columns) of a DICOM file's bytes. Raises whatever the way there raises."""
    with quiet_pydicom():
        dataset = pydicom.dcmread(BytesIO(data), force=True)
        facts = _facts(dataset)
        return stored_to_hu(_stored(dataset, facts), facts)


def _facts(dataset: Dataset) -> PixelFacts:
    allocated, signed = int(dataset.BitsAllocated), bool(dataset.PixelRepresentation)
    padding = None
    if (first := dataset.get("PixelPaddingValue")) is not None:
        last = dataset.get("PixelPaddingRangeLimit")
        kind = np.dtype(f"{'i' if signed else 'u'}{allocated // 8}")
        ends = [int(np.array(value & (1 << allocated) - 1).astype(f"u{allocated // 8}").view(kind)) for value in
                (int(first), int(first if last is None else last))]  # fmt: skip
        padding = (min(ends), max(ends))
    return PixelFacts(
        int(dataset.Rows), int(dataset.Columns), allocated, int(dataset.get("BitsStored") or allocated), signed,
        float(dataset.RescaleSlope), float(dataset.RescaleIntercept), padding, _syntax(dataset),
    )  # fmt: skip


def _syntax(dataset: Dataset) -> str:
    if stated := dataset.file_meta.get("TransferSyntaxUID"):
        return str(stated)
    implicit, little = dataset.original_encoding
    return IMPLICIT if implicit else EXPLICIT if little else BIG


def _stored(dataset: Dataset, facts: PixelFacts) -> NDArray[np.integer]:
    kind = np.dtype(f"{'i' if facts.signed else 'u'}{facts.bits_allocated // 8}")
    shape, syntax = (facts.rows, facts.columns), facts.transfer_syntax
    if syntax in {IMPLICIT, EXPLICIT, DEFLATED, BIG}:
        kind = kind.newbyteorder(">" if syntax == BIG else "<")
        words = syntax == BIG and facts.bits_allocated == 8 and dataset["PixelData"].VR == "OW"
        data = np.frombuffer(dataset.PixelData, ">u2").astype("<u2").tobytes() if words else dataset.PixelData
        return np.frombuffer(data, kind, count=shape[0] * shape[1]).reshape(shape)
    frame = _frame(dataset.PixelData)
    if syntax == RLE:
        return run_length(frame, shape, kind)
    if syntax in JPEG_LOSSLESS:
        return jpeg_lossless(frame).astype(np.int64).astype(kind)
    return _last_decoder(dataset, facts, frame).astype(kind)


def _frame(pixels: bytes) -> bytes:
    """All fragments joined; the first item is the table of offsets."""
    parse_basic_offsets(pixels)
    return b"".join(list(generate_fragments(pixels))[1:])


def _last_decoder(dataset: Dataset, facts: PixelFacts, frame: bytes) -> NDArray[Any]:
    if imagecodecs:
        decode = imagecodecs.jpegls_decode if facts.transfer_syntax[-2:] in {"80", "81"} else imagecodecs.jpeg2k_decode
        return np.asarray(decode(frame))
    dataset.file_meta.TransferSyntaxUID = UID(facts.transfer_syntax)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.NumberOfFrames = 1, "MONOCHROME2", 1
    dataset.BitsStored = facts.bits_stored
    decoder = get_decoder(UID(facts.transfer_syntax))
    return np.asarray(decoder.as_array(dataset, raw=True, decoding_plugin=decoder.available_plugins[-1])[0])


def run_length(frame: bytes, shape: tuple[int, int], kind: np.dtype[Any]) -> NDArray[np.integer]:
    """Decode by the letter of PS3.5 G.3.2; whatever is too short raises."""
    count = int.from_bytes(frame[:4], "little")
    starts = [int.from_bytes(frame[4 * number : 4 * number + 4], "little") for number in range(1, count + 1)]
    planes = []
    for start, end in zip(starts, [*starts[1:], len(frame)], strict=True):
        made, place = bytearray(), start
        while len(made) < shape[0] * shape[1]:
            if place >= end:
                raise ValueError("too short")
            code = frame[place]
            if code < 128:
                made += frame[place + 1 : place + 2 + code]
                place += code + 2
            elif code > 128:
                made += frame[place + 1 : place + 2] * (257 - code)
                place += 2
            else:
                place += 1
        planes.append(np.frombuffer(bytes(made), np.uint8))
    joined = np.stack(planes, axis=1)
    return np.ascontiguousarray(joined).view(kind.newbyteorder(">")).reshape(shape)


def jpeg_lossless(frame: bytes) -> NDArray[np.int64]:
    """Decode bit by bit by the letter of T.81, annex H; whatever does not fit raises."""
    tables, place, restart = {}, 2, 0
    while (marker := frame[place + 1]) != 0xDA:
        length = int.from_bytes(frame[place + 2 : place + 4], "big")
        segment = frame[place + 4 : place + 2 + length]
        if marker == 0xC3:
            precision, rows, columns = segment[0], *np.frombuffer(segment[1:5], ">u2").tolist()
        elif marker == 0xC4:
            tables |= _huffman(segment)
        elif marker == 0xDD:
            restart = int.from_bytes(segment, "big")
        place += 2 + length
    length = int.from_bytes(frame[place + 2 : place + 4], "big")
    scan = frame[place + 4 : place + 2 + length]
    if restart:
        raise NotImplementedError("restart markers")
    data = frame[place + 2 + length : frame.rindex(b"\xff\xd9")].replace(b"\xff\x00", b"\xff")
    bits = "".join(f"{byte:08b}" for byte in data)
    return _predict(bits, tables[scan[2] >> 4], (rows, columns), scan[3], precision, scan[5] & 15)


def _huffman(segment: bytes) -> dict[int, dict[str, int]]:
    tables, place = {}, 0
    while place < len(segment):
        counts, number, code, table = segment[place + 1 : place + 17], place + 17, 0, {}
        for length, count in enumerate(counts, 1):
            for symbol in segment[number : number + count]:
                table[f"{code:0{length}b}"] = symbol
                code += 1
            number += count
            code <<= 1
        tables[segment[place]] = table
        place = number
    return tables


def _predict(
    bits: str, table: dict[str, int], shape: tuple[int, int], selection: int, precision: int, point: int
) -> NDArray[np.int64]:
    image, place = np.zeros(shape, dtype=np.int64), 0
    rows = image.tolist()
    for row in range(shape[0]):
        for column in range(shape[1]):
            end = place + 1
            while bits[place:end] not in table:
                end += 1
                if end - place > 16 or end > len(bits):
                    raise ValueError("no such code")
            category = table[bits[place:end]]
            extra = 0 if category == 16 else category
            place = end + extra
            if place > len(bits):
                raise ValueError("too short")
            value = int(bits[end:place] or "0", 2)
            if category == 16:
                value = 1 << 15
            elif category and not value >> (category - 1):
                value -= (1 << category) - 1
            rows[row][column] = (value + _prediction(rows, row, column, selection, precision - point)) & 0xFFFF
    return np.array(rows, dtype=np.int64) << point


def _prediction(rows: list[list[int]], row: int, column: int, selection: int, bits: int) -> int:
    if row == 0:
        return rows[0][column - 1] if column else 1 << (bits - 1)
    above = rows[row - 1][column]
    if column == 0:
        return above
    left, corner = rows[row][column - 1], rows[row - 1][column - 1]
    return {
        1: left, 2: above, 3: corner, 4: left + above - corner, 5: left + ((above - corner) >> 1),
        6: above + ((left - corner) >> 1), 7: (left + above) >> 1,
    }[selection]  # fmt: skip
