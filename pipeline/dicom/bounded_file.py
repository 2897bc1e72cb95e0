"""Bounds what pydicom reads of an untrusted file: the number of pieces, zeros, character sets."""

from __future__ import annotations

import zlib
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

from pydicom.filereader import data_element_generator, read_partial

from ichpipe.common.errors import FileTooLargeError, UnreadableDicomError

if TYPE_CHECKING:
    from pydicom.dataset import FileDataset
    from pydicom.tag import BaseTag

# Reads that parsing one file may take, two or three an element or item; a usual header takes a hundred. pydicom makes
# an object of every item of every sequence: two megabytes of empty ones take seconds and 160 MB.
MAX_PARTS: Final = 10_000
_PART_BYTES: Final = 8192  # pydicom reads values of unknown length in such pieces

# Ten names of character sets take 160. pydicom looks each one up, at every text again: 64,000 bytes take seconds.
MAX_CHARACTER_SET_BYTES: Final = 1024
MAX_ZEROS: Final = 2**16  # some writers fill up a block
_CHARACTER_SET: Final = 0x00080005
_SYNTAX_TAG: Final = 0x00020010
EXPLICIT_LITTLE: Final = "1.2.840.10008.1.2.1"
DEFLATED_LITTLE: Final = "1.2.840.10008.1.2.1.99"


class TooManyElementsError(ValueError):
    """A header has more elements and items than any image needs."""


class BoundedFile(BytesIO):
    """Bytes that can be read in MAX_PARTS pieces, and those that long values need, and then TooManyElementsError."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.left = MAX_PARTS + len(data) // _PART_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        """Read like BytesIO; raises TooManyElementsError after the last allowed piece."""
        self.left -= 1
        if self.left < 0:
            raise TooManyElementsError
        return BytesIO.read(self, size)


def parse_bounded(file: BoundedFile, kept_tags: list[BaseTag | int] | None = None) -> FileDataset:
    """Parse a DICOM file, and keep the elements of ``kept_tags`` where they are given.

    Zeros end the data set: they would be elements of group 0000, which no file may hold (PS3.10, 7.1). Raises
    UnreadableDicomError for more than MAX_ZEROS bytes from there on, and for a SpecificCharacterSet (0008,0005) of more
    than MAX_CHARACTER_SET_BYTES; for damage whatever pydicom raises.
    """
    dataset = read_partial(file, _stop, force=True, specific_tags=kept_tags)
    if (rest := len(file.getbuffer()) - file.tell()) > MAX_ZEROS:
        raise UnreadableDicomError(f"{rest} bytes follow zeros where an element should begin; export the image again")
    return dataset


def inflate_file(data: bytes, largest: int) -> bytes | None:
    """Return a deflated file as an explicit little-endian one, None for another; pydicom inflates without bound.

    Raises as ``inflate`` does; for damage whatever pydicom or zlib raises.
    """
    if DEFLATED_LITTLE.encode() not in data:
        return None
    file = BoundedFile(data)
    file.seek(132 if data[128:132] == b"DICM" else 0)
    meta: list[Any] = list(data_element_generator(file, False, True, lambda tag, _kind, _length: tag.group != 2))
    syntax = next((element for element in meta if element.tag == _SYNTAX_TAG), None)
    if syntax is None or (syntax.value or b"").strip(b" \0") != DEFLATED_LITTLE.encode():
        return None
    end = syntax.value_tell + len(syntax.value)
    explicit = EXPLICIT_LITTLE.encode().ljust(len(syntax.value), b"\0")
    return data[: syntax.value_tell] + explicit + data[end : file.tell()] + inflate(data[file.tell() :], largest)


def inflate(packed: bytes, largest: int) -> bytes:
    """Inflate a deflated data set. Raises FileTooLargeError beyond ``largest`` bytes, UnreadableDicomError if cut."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    body = inflater.decompress(packed, largest + 1)
    if len(body) > largest:
        raise FileTooLargeError(f"inflates to more than {largest} bytes: too large")
    if not inflater.eof:
        raise UnreadableDicomError("its deflated data set is cut short")
    return body


def _stop(tag: BaseTag, _kind: str | None, length: int) -> bool:
    if tag == _CHARACTER_SET and length > MAX_CHARACTER_SET_BYTES:
        raise UnreadableDicomError(
            f"SpecificCharacterSet (0008,0005) has {length} bytes, at most {MAX_CHARACTER_SET_BYTES} can be read; "
            "export the image again"
        )
    return int(tag) == 0
