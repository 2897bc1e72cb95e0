"""Bytes of a file that a parser can read in a limited number of pieces."""

from __future__ import annotations

from io import BytesIO
from typing import Final

# Reads that parsing one file may take, two or three an element or item; a usual header takes a hundred. pydicom makes
# an object of every item of every sequence: two megabytes of empty ones take seconds and 160 MB.
MAX_PARTS: Final = 10_000
_PART_BYTES: Final = 8192  # pydicom reads values of unknown length in such pieces


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
