"""Hounsfield units by another way than the product's: pydicom's modality LUT, and other decoders.

The header is read by pydicom's ``dcmread`` and its conversions, pixels by numpy, a plain run-length and a plain
lossless JPEG decoder here, and for JPEG-LS and JPEG 2000 by the decoder that pydicom would try last (the product
takes the first) or by imagecodecs. GDCM, Pillow, pylibjpeg-openjpeg and imagecodecs all hold OpenJPEG, in other
versions: for JPEG 2000 the reference is not independent. pydicom then takes the pixel out of its word and applies the
modality LUT. Where docs/data.md says that the product differs from pydicom, the reference does by that text.
"""

from __future__ import annotations

import math
from contextlib import suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_fragments, get_frame, parse_basic_offsets
from pydicom.pixels import apply_modality_lut
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID, ExplicitVRLittleEndian

from ichpipe.dicom.pydicom_quiet import quiet_pydicom

try:
    import imagecodecs
except ImportError:
    imagecodecs = None

if TYPE_CHECKING:
    from numpy.typing import NDArray

IMPLICIT, EXPLICIT, BIG, DEFLATED, ENCAPSULATED = (f"1.2.840.10008.1.2{end}" for end in
                                                   ("", ".1", ".2", ".1.99", ".1.98"))  # fmt: skip
RLE = "1.2.840.10008.1.2.5"
JPEG_LOSSLESS = {f"1.2.840.10008.1.2.4.{number}" for number in (57, 70)}
NEARLY_SQUARE: Final = 0.01


def reference_hu(data: bytes, frame: int | None = None) -> tuple[NDArray[np.int16], NDArray[np.float64]]:
    """Return HU (rows, columns) of a DICOM file's bytes, and HU with square pixels, not rounded.

    ``frame`` counts the frames of an Enhanced CT from 0. Raises whatever the way there raises.
    """
    with quiet_pydicom():
        dataset = pydicom.dcmread(BytesIO(data), force=True)
        if frame is not None:
            dataset = _classic(dataset, frame)
        hu = _modality_hu(_stored(dataset), dataset)
        return hu, _square(hu, _aspect(dataset))


def _classic(source: Dataset, number: int) -> Dataset:
    """Return one frame with the values of its functional groups, its own before the shared ones."""
    count = int(source.get("NumberOfFrames") or 1)
    groups = [
        *(source.get("SharedFunctionalGroupsSequence") or [])[:1],
        source.PerFrameFunctionalGroupsSequence[number],
    ]
    for group in groups:
        for keyword in ("PixelValueTransformationSequence", "PixelMeasuresSequence"):
            for element in (group.get(keyword) or [[]])[0]:
                source[element.tag] = element
    if source.file_meta.TransferSyntaxUID.is_encapsulated:
        source.PixelData = encapsulate([get_frame(source.PixelData, number, number_of_frames=count)])
    else:
        size = source.Rows * source.Columns * source.BitsAllocated // 8
        source.PixelData = source.PixelData[number * size : (number + 1) * size]
    return source


def _modality_hu(stored: NDArray[np.integer], dataset: Dataset) -> NDArray[np.int16]:
    """Return HU, rounded and clipped, of the words (rows, columns) that the file stores."""
    allocated, signed = int(dataset.BitsAllocated), bool(dataset.PixelRepresentation)
    bits = int(dataset.get("BitsStored") or allocated)
    word = np.ascontiguousarray(stored.astype(stored.dtype.newbyteorder("=")))
    low = int(dataset.get("HighBit") or 0) + 1 - bits
    if bits < allocated and 0 < low <= allocated - bits and not (word & word.dtype.type((1 << low) - 1)).any():
        word = word >> low  # the pixel lies at the upper end of its word; pydicom does not look
    clean = Dataset()
    clean.file_meta = FileMetaDataset()
    clean.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    clean.Rows, clean.Columns, clean.SamplesPerPixel = *word.shape, 1
    clean.BitsAllocated, clean.BitsStored, clean.HighBit = allocated, bits, bits - 1
    clean.PixelRepresentation, clean.PhotometricInterpretation = int(signed), "MONOCHROME2"
    clean.RescaleSlope, clean.RescaleIntercept = dataset.RescaleSlope, dataset.RescaleIntercept
    clean.PixelData = word.tobytes() + bytes(word.nbytes % 2)
    clean["PixelData"].VR = "OB" if allocated == 8 else "OW"
    values = clean.pixel_array.astype(np.int64)
    if signed and bits < allocated and not _has_overlay(dataset):
        above = word >> bits
        whole = (above == -1) | (word == np.iinfo(word.dtype).min)
        if (whole | (above == 0)).all():  # negative numbers written with all bits
            values = np.where(whole, word, values)
    numbers = values
    slope, intercept = float(dataset.RescaleSlope), float(dataset.RescaleIntercept)
    if bits == 12 and not signed and slope == 1 and abs(intercept) <= 1:
        values = np.where(values >= 3096, values - 4096, values)  # HU in 12 bits, wrapped
    hu = np.clip(np.rint(apply_modality_lut(values, clean)), -1024, 32767).astype(np.int16)
    if (first := dataset.get("PixelPaddingValue")) is not None:
        last = dataset.get("PixelPaddingRangeLimit")
        values = [int(value) for value in (first, first if last is None else last)]
        is_short = min(values) >= -(1 << 15) and max(values) < 1 << 16  # as the tag should be; its sign is the pixels'
        width = min(allocated, 16) if is_short else allocated
        ends = [value & (1 << width) - 1 for value in values]
        padding = [end - (1 << width) if signed and end >> (width - 1) else end for end in ends]
        half = 1 << (bits - 1)
        if signed and all(half <= end < 2 * half for end in padding):  # two's complement without its leading ones
            padding = [end - 2 * half for end in padding]
        compared = stored if not signed and min(padding) >= 2 * half else numbers
        hu[(compared >= min(padding)) & (compared <= max(padding))] = -1024
    return hu


def _has_overlay(dataset: Dataset) -> bool:
    values = [dataset.get_item((0x6000 + 2 * plane, 0x0102)) for plane in range(16)]
    return any(any(item.value) if isinstance(item.value, bytes) else bool(item.value) for item in values if item)


def _aspect(dataset: Dataset) -> float:
    """Return the distance of rows over that of columns."""
    for keyword in ("PixelSpacing", "PixelAspectRatio"):
        with suppress(Exception):
            down, across = (float(value) for value in dataset[keyword].value)
            if min(down, across) > 0 and math.isfinite(down) and math.isfinite(across):
                return down / across if abs(down / across - 1) > NEARLY_SQUARE else 1.0
    return 1.0


def _square(hu: NDArray[np.int16], aspect: float) -> NDArray[np.float64]:
    """Interpolate linearly, at the middles of as many pixels as make the coarser side as fine as the other."""
    axis, factor = (0, aspect) if aspect > 1 else (1, 1 / aspect)
    length = hu.shape[axis]
    count = round(length * factor)
    middles = (np.arange(count) + 0.5) * (length / count) - 0.5
    result: NDArray[np.float64] = np.apply_along_axis(
        lambda line: np.interp(middles, np.arange(length), line), axis, hu.astype(np.float64)
    )
    return result


def _syntax(dataset: Dataset) -> str:
    if stated := dataset.file_meta.get("TransferSyntaxUID"):
        return str(stated)
    implicit, little = dataset.original_encoding
    return IMPLICIT if implicit else EXPLICIT if little else BIG


def _stored(dataset: Dataset) -> NDArray[np.integer]:
    allocated, syntax = int(dataset.BitsAllocated), _syntax(dataset)
    kind, shape = (
        np.dtype(f"{'i' if dataset.PixelRepresentation else 'u'}{allocated // 8}"),
        (int(dataset.Rows), int(dataset.Columns)),
    )
    if syntax in {IMPLICIT, EXPLICIT, DEFLATED, BIG, ENCAPSULATED}:
        kind = kind.newbyteorder(">" if syntax == BIG else "<")
        data = _frame(dataset.PixelData) if syntax == ENCAPSULATED else dataset.PixelData
        if syntax == BIG and allocated == 8 and dataset["PixelData"].VR == "OW":
            data = np.frombuffer(data, ">u2").astype("<u2").tobytes()
        return np.frombuffer(data, kind, count=shape[0] * shape[1]).reshape(shape)
    frame = _frame(dataset.PixelData)
    if syntax == RLE:
        return run_length(frame, shape, kind)
    if syntax in JPEG_LOSSLESS:
        return jpeg_lossless(frame).astype(np.int64).astype(kind)
    return _last_decoder(dataset, syntax, frame).astype(kind)


def _frame(pixels: bytes) -> bytes:
    """All fragments joined; the first item is the table of offsets."""
    parse_basic_offsets(pixels)
    return b"".join(list(generate_fragments(pixels))[1:])


def _last_decoder(dataset: Dataset, syntax: str, frame: bytes) -> NDArray[Any]:
    if imagecodecs:
        decode = imagecodecs.jpegls_decode if syntax[-2:] in {"80", "81"} else imagecodecs.jpeg2k_decode
        return np.asarray(decode(frame))
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.NumberOfFrames = 1, "MONOCHROME2", 1
    dataset.BitsStored = int(dataset.get("BitsStored") or dataset.BitsAllocated)
    decoder = get_decoder(UID(syntax))
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
