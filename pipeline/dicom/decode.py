"""Decodes compressed pixels to stored pixels; no other file calls a codec.

imagecodecs decodes JPEG lossless, JPEG 2000 lossless and run-length streams faster than pydicom's plug-ins
(docs/dependencies.md) and releases the interpreter lock. Some of its decoders crash where a stream's header is wrong.
They get only streams that ``stream_checks.is_plain`` accepts. pydicom's decoders get the rest; the pixels are the same.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from ichpipe.common.errors import UnreadableDicomError
from ichpipe.dicom.stream_checks import JPEG_LOSSLESS, RUN_LENGTH, frame_bytes, is_plain

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    from ichpipe.dicom.dataset import PixelFacts


def decode(pixel_data: bytes, facts: PixelFacts) -> NDArray[np.integer] | None:
    """Decode encapsulated PixelData by imagecodecs: stored pixels (rows, columns); None if pydicom should.

    Never raises: pydicom's decoders report what is wrong with a stream. Left to pydicom are also JPEG-LS, where CharLS
    in imagecodecs 2026.3.6 took 16 s to refuse a truncated stream, and lossy syntaxes, where two decoders may differ.
    """
    library, syntax, kind = imagecodecs(), facts.transfer_syntax, np.dtype(facts.stored_type)
    try:
        stream = frame_bytes(pixel_data)
        if library is None or not is_plain(stream, syntax, facts.claim):
            return None
        if syntax == RUN_LENGTH:
            pixels = np.frombuffer(library.dicomrle_decode(stream, dtype=kind.str), dtype=kind)
        elif syntax in JPEG_LOSSLESS:
            pixels = library.ljpeg_decode(stream)
        else:
            pixels = library.jpeg2k_decode(stream, numthreads=1)
    except Exception:  # each codec has its own errors
        return None
    if pixels.dtype.itemsize != kind.itemsize or pixels.size != facts.rows * facts.columns:
        return None
    stored: NDArray[np.integer] = pixels.view(kind).reshape(facts.rows, facts.columns)
    return stored


@functools.cache
def imagecodecs() -> Any:
    """Import imagecodecs at the first compressed file; None where it is not installed."""
    try:
        import imagecodecs as module  # noqa: PLC0415 - optional
    except ImportError:
        return None
    return module


def decode_by_pydicom(dataset: Dataset, facts: PixelFacts) -> NDArray[np.integer]:
    """Decode by the plug-in that pydicom finds: stored pixels (rows, columns). Raises UnreadableDicomError."""
    syntax = UID(facts.transfer_syntax)
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise UnreadableDicomError(f"no decoder for transfer syntax {syntax}; run: pip install 'ichpipe[dicom-codecs]'")
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SamplesPerPixel = 1  # pydicom demands both; old files leave them out
    dataset.PhotometricInterpretation = dataset.get("PhotometricInterpretation") or "MONOCHROME2"
    dataset.BitsStored, dataset.NumberOfFrames = facts.bits_stored, 1
    try:
        stored: NDArray[np.integer] = dataset.pixel_array
    except Exception as error:  # each codec has its own errors, and their text may quote the header
        reason = f"pixels of transfer syntax {syntax} can't be decoded ({type(error).__name__})"
        raise UnreadableDicomError(reason) from None
    if stored.shape != (facts.rows, facts.columns):
        raise UnreadableDicomError(f"decoded to {stored.shape}, the header says {facts.rows} x {facts.columns}")
    return stored.astype(stored.dtype.newbyteorder("="), copy=False)
