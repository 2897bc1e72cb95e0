"""Reads one slice, of a DICOM file or a NIfTI volume, as Hounsfield units."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ichpipe.common.constants import MAX_HU, MAX_SIDE_PX, MIN_HU, SPACINGS_MM, SQUARE_WITHIN
from ichpipe.common.errors import UnreadableDicomError
from ichpipe.dicom import decode
from ichpipe.dicom.archive import read_file, stamp_of
from ichpipe.dicom.dataset import EXPLICIT_BIG, PixelFacts, PixelFile, read_pixel_file, require_stream
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.nifti.volume_file import read_volume, split_slice

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_WRAPPED_FROM = 3096  # -1000 HU in 12 unsigned bits


def read_hu(path: Path | str, *, scanned: bool = False) -> NDArray[np.int16]:
    """Decode one CT slice to Hounsfield units.

    Parameters
    ----------
    path
        The file, a member of a zip archive, a frame of an Enhanced CT, or a slice of a NIfTI volume.
    scanned
        ``scan`` has accepted the file: its compressed stream need not be checked again for completeness.

    Returns
    -------
    NDArray[np.int16]
        HU (rows, columns), from -1024 to 32767.

    Raises
    ------
    UnreadableDicomError
        Names the file, and the transfer syntax where the codec failed.

    """
    return _read(path, scanned=scanned).hu


def read_square_hu(path: Path | str, *, scanned: bool = False) -> NDArray[np.int16]:
    """Decode one CT slice like ``read_hu``, with pixels as high as wide.

    Where PixelSpacing (0028,0030), or else PixelAspectRatio (0028,0034), says that they are not, rows or columns are
    interpolated, so that the coarser of the two gets the spacing of the finer.
    """
    hu, aspect, _ = _read(path, scanned=scanned)
    if aspect == 1:
        return hu
    axis, factor = (0, aspect) if aspect > 1 else (1, 1 / aspect)
    length = hu.shape[axis]
    count = round(length * factor)
    if count > MAX_SIDE_PX:
        raise UnreadableDicomError(f"{path}: pixels {factor:.3g} times as long as wide; PixelSpacing (0028,0030)")
    places = np.clip((np.arange(count) + 0.5) * length / count - 0.5, 0, length - 1)
    before = np.minimum(places.astype(int), max(length - 2, 0))
    weight = np.expand_dims(places - before, 1 - axis)
    first, second = (
        np.take(hu, rows, axis).astype(np.float64) for rows in (before, np.minimum(before + 1, length - 1))
    )
    square: NDArray[np.int16] = np.rint(first + (second - first) * weight).astype(np.int16)
    return square


def read_spaced_hu(path: Path | str, *, scanned: bool = False) -> tuple[NDArray[np.int16], tuple[float, float] | None]:
    """Decode one CT slice like ``read_hu``; also return the distance of its rows and of its columns, mm.

    None where PixelSpacing (0028,0030) is not a pair of numbers within SPACINGS_MM.
    """
    image = _read(path, scanned=scanned)
    return image.hu, image.spacing_mm


class _Image(NamedTuple):
    hu: NDArray[np.int16]  # (rows, columns)
    aspect: float  # distance of rows / distance of columns
    spacing_mm: tuple[float, float] | None  # distance of rows and of columns


def _read(path: Path | str, *, scanned: bool) -> _Image:
    try:
        if nifti_slice := split_slice(path if isinstance(path, str) else path.as_posix()):
            return _read_nifti(*nifti_slice)
        with quiet_pydicom():
            file = read_pixel_file(path)
            stored = stored_pixels(file)
            if file.facts.compressed and not scanned:
                require_stream(file.pixel_data, file.facts, stored)
            return _Image(stored_to_hu(stored, file.facts), file.facts.aspect, file.facts.spacing_mm)
    except UnreadableDicomError as error:
        raise UnreadableDicomError(f"{path}: {error}") from error


def _read_nifti(path: str, number: int) -> _Image:
    volume = read_volume(path, stamp_of(path), read_file)
    if number >= len(volume.hu):
        raise UnreadableDicomError(f"the file has {len(volume.hu)} slices, counted from 0")
    (down, across), (low, high) = volume.pixel_mm, SPACINGS_MM
    spacing_mm = volume.pixel_mm if low <= min(down, across) <= max(down, across) <= high else None
    aspect = down / across if abs(down / across - 1) > SQUARE_WITHIN else 1.0
    return _Image(volume.hu[number], aspect, spacing_mm)


def stored_to_hu(stored: NDArray[np.integer], facts: PixelFacts) -> NDArray[np.int16]:
    """Convert stored pixels (rows, columns) to Hounsfield units (rows, columns), rounded, in [-1024, 32767].

    HU = RescaleSlope (0028,1053) * stored + RescaleIntercept (0028,1052), PS3.3 C.11.1. Padding becomes
    -1024. PhotometricInterpretation MONOCHROME1 turns the display round, not the HU (C.7.6.3.1.2).
    Raises UnreadableDicomError where it is open which bits hold the pixel.
    """
    values = numbers = _own_bits(stored, facts)
    # Some RSNA 2019 files store HU in 12 unsigned bits without an offset: numbers from 3096 on are HU below 0.
    wraps = facts.bits_stored == 12 and not facts.signed and facts.slope == 1 and abs(facts.intercept) <= 1
    if wraps:
        values = values.astype(np.int16)
        np.subtract(values, 4096, out=values, where=values >= _WRAPPED_FROM)
    hu = _rescale(values, facts.slope, facts.intercept)
    if facts.padding is not None:
        low, high = facts.padding
        # Most padding values end below -1024 HU anyway; bits that are dropped may change them.
        if wraps or values is not stored or facts.slope <= 0 or high * facts.slope + facts.intercept > MIN_HU:
            if not facts.signed and low >> facts.bits_stored:  # no pixel of these bits: it was written whole
                numbers = stored
            hu[(numbers >= low) & (numbers <= high)] = MIN_HU
    return hu


def _rescale(values: NDArray[np.integer], slope: float, intercept: float) -> NDArray[np.int16]:
    if slope != 1.0 or not intercept.is_integer() or abs(intercept) > MAX_HU or values.dtype.itemsize != 2:
        scaled = values.astype(np.float64) * slope + intercept
        hu: NDArray[np.int16] = np.clip(np.rint(scaled), MIN_HU, MAX_HU).astype(np.int16)
        return hu
    # Nearly every file: whole numbers of 16 bits, clipped before the sum so that it does not overflow.
    low, high = MIN_HU - int(intercept), MAX_HU - int(intercept)
    if values.min() < low:  # then the limit lies within the type, as the values do
        values = np.maximum(values, low)
    if values.max() > high:
        values = np.minimum(values, high)
    return values.view(np.int16) + np.int16(intercept)  # signed and unsigned numbers add alike, modulo 65536


def _own_bits(stored: NDArray[np.integer], facts: PixelFacts) -> NDArray[np.integer]:
    """Return the numbers in the bits that BitsStored (0028,0101) and HighBit (0028,0102) name (PS3.5, 8.1.1).

    Bits above them are no part of the pixel: an overlay may lie there. Negative numbers that were written whole stay
    as they are: -3024 is common beside BitsStored 12. 8 bits become 16, so that later steps can add to them.
    """
    values: NDArray[np.integer] = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    values = values.astype(np.int16) if values.dtype.itemsize == 1 else values
    if facts.bits_stored == facts.bits_allocated:
        return values
    span, unused = 1 << facts.bits_stored, 8 * values.dtype.itemsize - facts.bits_stored
    low = facts.high_bit + 1 - facts.bits_stored if facts.high_bit < facts.bits_allocated else 0
    fits = facts.signed and -span // 2 <= values.min(initial=0) and values.max(initial=0) < span // 2
    if fits and low <= 0 and not facts.overlay:
        return values
    above = values >> facts.bits_stored  # 0, and -1 for a negative number, where nothing else lies there
    if low > 0:
        if not (values & values.dtype.type((1 << low) - 1)).any():
            values = values >> low
            above = values >> facts.bits_stored
        elif not np.isin(above, (0, -1) if facts.signed else 0).all():
            raise UnreadableDicomError(
                f"HighBit (0028,0102) is {facts.high_bit} with BitsStored (0028,0101) {facts.bits_stored}, and all "
                "bits are in use: it is open which of them hold the pixel; export the image again"
            )
    if not facts.signed:
        masked: NDArray[np.integer] = values & values.dtype.type(span - 1)
        return masked
    lowest = np.iinfo(stored.dtype).min  # padding, not an overlay over 0
    if facts.overlay or ((above != 0) & (above != -1) & (values != lowest)).any():
        own: NDArray[np.integer] = (values << unused) >> unused
        return own
    not_extended = (values >= span // 2) & (values < span)  # two's complement without its leading ones
    extended: NDArray[np.integer] = np.add(values, -span, out=values.copy(), where=not_extended)
    return extended


def stored_pixels(file: PixelFile) -> NDArray[np.integer]:
    """Return pixels as stored, (rows, columns), of the integer type that BitsAllocated and the sign give."""
    facts, pixels = file.facts, file.pixel_data
    if facts.compressed:
        stored = decode.decode(pixels, facts)
        return decode.decode_by_pydicom(file.dataset, facts) if stored is None else stored
    kind = np.dtype(facts.stored_type)
    if facts.transfer_syntax == EXPLICIT_BIG:
        element = file.dataset["PixelData"]
        pixels = element.value
        if facts.bits_allocated == 8 and element.VR == "OW":  # 8-bit samples in swapped pairs (PS3.5, 8.1.1)
            pixels = np.frombuffer(pixels[: len(pixels) // 2 * 2], dtype=">u2").astype("<u2").tobytes()
        samples = np.frombuffer(pixels, kind.newbyteorder(">"), count=facts.rows * facts.columns).astype(kind)
    else:
        samples = np.frombuffer(pixels, kind, count=facts.rows * facts.columns)
    return samples.reshape(facts.rows, facts.columns)
