"""Compressed pixels to stored pixels: the one place from which a codec is called.

imagecodecs, where it is installed, decodes JPEG lossless, JPEG 2000 lossless and run-length streams faster than
pydicom's plug-ins (docs/dependencies.md), and lets other threads run meanwhile. Some of its decoders trust a stream's
header and crash where it lies, so a stream is given to them only if its header is ordinary and says what the DICOM
header says (``ordinary_streams``). Everything else goes to pydicom's decoders; the pixels are the same.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from ichpipe.common.errors import UnreadableDicomError
from ichpipe.dicom import ordinary_streams
from ichpipe.dicom.dataset import stored_type

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

    from ichpipe.dicom.dataset import PixelFacts

    Decode = Callable[[Any, bytes, PixelFacts], Any]


def decode(pixel_data: bytes, facts: PixelFacts) -> NDArray[np.integer] | None:
    """Decode encapsulated PixelData by imagecodecs: stored pixels (rows, columns); None if pydicom should.

    Never raises: whatever is wrong with a stream is pydicom's to say.
    """
    usual = _USUAL.get(facts.transfer_syntax)
    library = imagecodecs()
    if usual is None or library is None:
        return None
    is_ordinary, by = usual
    try:
        stream = get_frame(pixel_data, 0, number_of_frames=1)
        return _as_stored(by(library, stream, facts), facts) if is_ordinary(stream, facts) else None
    except Exception:  # each codec has its own errors
        return None


@functools.cache
def imagecodecs() -> Any:
    """Return the module, or None where it is not installed; imported by the first compressed file."""
    try:
        import imagecodecs as module  # noqa: PLC0415 - optional
    except ImportError:
        return None
    return module


def _as_stored(found: Any, facts: PixelFacts) -> NDArray[np.integer] | None:
    kind = np.dtype(stored_type(facts))
    pixels = np.frombuffer(found, dtype=kind) if isinstance(found, bytes) else found
    if pixels is None or pixels.dtype.itemsize != kind.itemsize or pixels.size != facts.rows * facts.columns:
        return None
    stored: NDArray[np.integer] = pixels.view(kind).reshape(facts.rows, facts.columns)
    return stored


def _jpeg_lossless(library: Any, stream: bytes, _facts: PixelFacts) -> Any:
    return library.ljpeg_decode(stream)


def _jpeg_2000(library: Any, stream: bytes, _facts: PixelFacts) -> Any:
    return library.jpeg2k_decode(stream, numthreads=1)


def _run_length(library: Any, stream: bytes, facts: PixelFacts) -> Any:
    return library.dicomrle_decode(stream, dtype=stored_type(facts))


_USUAL: Final[dict[str, tuple[Callable[[bytes, PixelFacts], bool], Decode]]] = {
    "1.2.840.10008.1.2.4.57": (ordinary_streams.is_ordinary_lossless_jpeg, _jpeg_lossless),
    "1.2.840.10008.1.2.4.70": (ordinary_streams.is_ordinary_lossless_jpeg, _jpeg_lossless),
    "1.2.840.10008.1.2.4.90": (ordinary_streams.is_ordinary_jpeg_2000, _jpeg_2000),
    "1.2.840.10008.1.2.5": (ordinary_streams.is_ordinary_run_length, _run_length),
}
"""By transfer syntax (PS3.5, 8.2 and 10): the check of a stream, and what decodes it.

Left out: JPEG-LS, where CharLS in imagecodecs 2026.3.6 took 16 s to refuse a stream that was cut short, and what loses
information, where two decoders need not agree.
"""


def decode_by_pydicom(dataset: Dataset, facts: PixelFacts) -> NDArray[np.integer]:
    """Decode by whatever plug-in pydicom finds: stored pixels (rows, columns). Raises UnreadableDicomError."""
    if not _has_decoder(facts.transfer_syntax):
        raise UnreadableDicomError(
            f"no decoder for transfer syntax {facts.transfer_syntax}; run: pip install 'ichpipe[dicom-codecs]'"
        )
    dataset.file_meta.TransferSyntaxUID = UID(facts.transfer_syntax)
    dataset.SamplesPerPixel = 1  # pydicom demands both; old files leave them out
    dataset.PhotometricInterpretation = dataset.get("PhotometricInterpretation") or "MONOCHROME2"
    dataset.BitsStored, dataset.NumberOfFrames = facts.bits_stored, 1
    try:
        stored: NDArray[np.integer] = dataset.pixel_array
    except Exception as error:  # each codec has its own errors
        reason = f"pixels of transfer syntax {facts.transfer_syntax} can't be decoded ({type(error).__name__})"
        raise UnreadableDicomError(reason) from None  # its message may quote the header
    if stored.shape != (facts.rows, facts.columns):
        raise UnreadableDicomError(f"decoded to {stored.shape}, the header says {facts.rows} x {facts.columns}")
    return stored.astype(stored.dtype.newbyteorder("="), copy=False)


def _has_decoder(transfer_syntax: str) -> bool:
    try:
        return bool(get_decoder(UID(transfer_syntax)).is_available)
    except NotImplementedError:
        return False
