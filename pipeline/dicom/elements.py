"""Reads a DICOM header's values from the bytes that pydicom has not decoded yet.

pydicom's own conversion costs ten times as much as parsing on a header of 30 elements; an index of 750,000 slices
needs none of its types. Tags and value representations: DICOM PS3.5, 6.2.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal

from pydicom.dataelem import RawDataElement
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag, Tag

from ichpipe.common.errors import UnreadableDicomError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

MAX_TEXT: Final = 1024
_ESCAPE: Final = b"\x1b"  # begins another character set in 7-bit text (PS3.5, 6.1.2.5.1)
# Bytes of one number in the value representations that hold whole numbers in binary; 0: as many as there are.
_BINARY_BYTES: Final = {"US": 2, "SS": 2, "UL": 4, "SL": 4, "US or SS": 2, "UN": 0, "OB": 0, "OW": 0}
# Representations of numbers as text; None where the file states none. Digits under another are another number.
_DECIMALS: Final = frozenset({None, "DS", "IS", "UN", "LO", "SH", "CS", "ST", "LT", "UT", "UC"})
_BINARY: Final = frozenset({  # where the file does not state a representation (implicit VR)
    "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel",
    "PixelPaddingValue", "PixelPaddingRangeLimit",
})  # fmt: skip


def tags(*keywords: str) -> list[BaseTag | int]:
    """Return the tags of DICOM keywords. Raises ValueError for an unknown keyword."""
    return [Tag(keyword) for keyword in keywords]


@cache
def _tag(keyword: str) -> int:
    return int(Tag(keyword))


class Elements:
    """Values of one dataset by keyword. Every method raises UnreadableDicomError that names the keyword."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._by_tag: dict[int, Any] = {int(tag): element for tag, element in dataset.items()}  # int: hashed in C

    def text(self, keyword: str) -> str:
        """Return text without padding; several values joined by a backslash; empty where absent."""
        element = self._by_tag.get(_tag(keyword))
        if element is None:
            return ""
        value = element.value
        if isinstance(value, str):  # pydicom has converted it already
            return value.strip(" \0")
        if element.VR == "SQ":  # not parsed: its items may be any number
            raise UnreadableDicomError(f"{keyword} is not text")
        if not isinstance(value, bytes) or not value.isascii() or _ESCAPE in value:
            return "" if value is None else self._convert(keyword)
        text = value.decode("ascii").strip(" \0")
        return "\\".join(part.strip(" \0") for part in text.split("\\")) if "\\" in text else text

    def short_text(self, keyword: str) -> str:
        """Return the first MAX_TEXT characters of a text; the standard allows 64 in most elements."""
        return self.text(keyword)[:MAX_TEXT]

    def required_text(self, keyword: str) -> str:
        """Return text that may not be absent or empty."""
        text = self.text(keyword)
        if not text:
            raise UnreadableDicomError(f"{keyword} is missing")
        return text

    def whole(self, keyword: str) -> int | None:
        """Return one whole number, or None where it is absent or empty."""
        element = self._by_tag.get(_tag(keyword))
        if element is None or element.value is None or element.value == b"":
            return None
        representation = element.VR or ("US" if keyword in _BINARY else "IS")
        if isinstance(element, RawDataElement) and representation in _BINARY_BYTES:
            length = len(element.value)
            if length != (_BINARY_BYTES[representation] or length) or length > 4:
                raise UnreadableDicomError(f"{keyword} is not a whole number")
            order: Literal["little", "big"] = "little" if element.is_little_endian else "big"
            return int.from_bytes(element.value, order, signed=representation in {"SS", "SL"})
        text = self._decimals(keyword)
        if not text:
            return None
        number = _float(text, keyword, "a whole number")
        if not number.is_integer():  # neither a fraction nor infinite
            raise UnreadableDicomError(f"{keyword} is not a whole number")
        return int(number)

    def optional_whole(self, keyword: str) -> int | None:
        """Return one whole number that a float64 can hold; None where it is absent or anything else."""
        try:
            value = self.whole(keyword)
        except UnreadableDicomError:
            return None
        return value if value is None or abs(value) < 1 << 53 else None

    def required_whole(self, keyword: str) -> int:
        """Return one whole number that may not be absent."""
        value = self.whole(keyword)
        if value is None:
            raise UnreadableDicomError(f"{keyword} is missing")
        return value

    def floats(self, keyword: str, count: int) -> list[float]:
        """Return exactly ``count`` finite decimal numbers."""
        text = self._decimals(keyword)
        if not text:
            raise UnreadableDicomError(f"{keyword} is missing")
        numbers = [_float(part, keyword) for part in text.split("\\")]
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            raise UnreadableDicomError(f"{keyword} should hold {count} finite number(s), found {len(numbers)} value(s)")
        return numbers

    def optional_float(self, keyword: str) -> float:
        """Return one decimal number; NaN where it is absent or no finite number."""
        try:
            return self.floats(keyword, 1)[0]
        except UnreadableDicomError:
            return math.nan

    def has(self, keyword: str) -> bool:
        """Say whether an element is present and not empty."""
        element = self._by_tag.get(_tag(keyword))
        return element is not None and bool(element.value)

    def nonzero(self, tag: int) -> bool:
        """Say whether the element of a tag holds a binary number other than 0."""
        element = self._by_tag.get(tag)
        value = None if element is None else element.value
        return any(value) if isinstance(value, bytes) else bool(value)

    def value_bytes(self, keyword: str) -> bytes:
        """Return a value as stored; empty where absent."""
        element = self._by_tag.get(_tag(keyword))
        value = None if element is None else element.value
        return value if isinstance(value, bytes) else b""

    def _decimals(self, keyword: str) -> str:
        element = self._by_tag.get(_tag(keyword))
        if isinstance(element, RawDataElement) and element.VR not in _DECIMALS:
            raise UnreadableDicomError(f"{keyword} is stored as {element.VR}, which is no decimal text")
        return self.text(keyword)

    def _convert(self, keyword: str) -> str:
        """Let pydicom decode what is not plain ASCII: (0008,0005) names its character set."""
        if (length := len(self.value_bytes(keyword))) > MAX_TEXT:  # an escape sequence each three bytes takes a second
            raise UnreadableDicomError(
                f"{keyword} is not plain ASCII and has {length} bytes, at most {MAX_TEXT} can be read; "
                "export the image again"
            )
        try:
            value = self._dataset.get(keyword)
        except Exception as error:  # a damaged element; its text may quote the value, so it is not repeated
            raise UnreadableDicomError(f"{keyword} can't be read ({type(error).__name__})") from None
        if isinstance(value, (Sequence, bytes)):
            raise UnreadableDicomError(f"{keyword} is not text")
        parts = value if isinstance(value, MultiValue) else [] if value is None else [value]
        return "\\".join(str(part).strip(" \0") for part in parts)


def _float(text: str, keyword: str, kind: str = "a number") -> float:
    try:
        return float(text if "_" not in text else "")  # 1_000 is Python's own notation, not DICOM's
    except ValueError:
        raise UnreadableDicomError(f"{keyword} is not {kind}") from None
