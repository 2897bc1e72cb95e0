"""Reads a DICOM file for its pixels: the elements that decoding needs, checked."""

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
from ichpipe.dicom.elements import Elements
from ichpipe.dicom.pydicom_quiet import quiet_pydicom

if TYPE_CHECKING:
    from pathlib import Path

    from pydicom.dataset import Dataset


class PixelFile(NamedTuple):
    """What decoding needs of one file."""

    dataset: Dataset
    elements: Elements  # PIXEL_TAGS
    facts: PixelFacts

    @property
    def pixel_data(self) -> bytes:
        """Return PixelData (7FE0,0010) as it is stored."""
        return self.elements.value_bytes("PixelData")


def read_pixel_file(path: Path | str) -> PixelFile:
    """Read what decoding needs, checked like in ``read_header``. Call it inside ``quiet_pydicom``.

    Raises UnreadableDicomError.
    """
    content = read_file(path if isinstance(path, str) else path.as_posix(), MAX_FILE_BYTES)
    dataset = parse(content, PIXEL_TAGS)
    elements = Elements(dataset)
    facts = pixel_facts(elements, transfer_syntax(dataset))
    require_pixels(elements, facts)
    return PixelFile(dataset, elements, facts)


def is_compressed(path: Path | str) -> bool:
    """Whether the pixels of a file need a codec; False where it can't be read, as whoever decodes it will say."""
    try:
        with quiet_pydicom():
            return read_pixel_file(path).facts.compressed
    except UnreadableDicomError:
        return False
