"""A DICOM file opened for its pixels: read whole, its header parsed no further than they need."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ichpipe.common.errors import UnreadableDicomError
from ichpipe.dicom.archive import read_file
from ichpipe.dicom.dataset import (
    MAX_FILE_BYTES,
    PIXEL_TAGS,
    PixelFacts,
    parse,
    pixel_facts,
    require_pixels,
    transfer_syntax,
)
from ichpipe.dicom.elements import Elements, elements_of
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.dicom.quick_parse import quick_elements

if TYPE_CHECKING:
    from pathlib import Path

    from pydicom.dataset import Dataset


class PixelFile(NamedTuple):
    """What decoding needs of one file."""

    content: bytes  # the file
    elements: Elements  # PIXEL_TAGS
    facts: PixelFacts

    @property
    def pixel_data(self) -> bytes:
        """Return PixelData (7FE0,0010) as it is stored."""
        return self.elements.value_bytes("PixelData")

    def dataset(self) -> Dataset:
        """Parse the file as pydicom does, for its decoders. Call it inside ``quiet_pydicom``."""
        return parse(self.content, PIXEL_TAGS)


def read_pixel_file(path: Path | str) -> PixelFile:
    """Read what decoding needs, checked like in ``read_header``. Call it inside ``quiet_pydicom``.

    Raises UnreadableDicomError.
    """
    content = read_file(path if isinstance(path, str) else path.as_posix(), MAX_FILE_BYTES)
    found = quick_elements(content, PIXEL_TAGS)
    if found is None:
        dataset = parse(content, PIXEL_TAGS)
        found = elements_of(dataset), transfer_syntax(dataset)
    elements, syntax = found
    facts = pixel_facts(elements, syntax)
    require_pixels(elements, facts)
    return PixelFile(content, elements, facts)


def is_compressed(path: Path | str) -> bool:
    """Whether the pixels of a file need a codec; False where it can't be read, as whoever decodes it will say."""
    try:
        with quiet_pydicom():
            return read_pixel_file(path).facts.compressed
    except UnreadableDicomError:
        return False
