"""Ways to damage a DICOM file: one function a way, from bytes and a random generator to other bytes.

Each takes a ``Parts``, the file cut into what stands before the data set and the data set's elements (a deflated one
inflated), and returns the bytes of a file. Nothing here knows what the product does with them.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Final

from pydicom.filereader import data_element_generator

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

DEFLATED: Final = b"1.2.840.10008.1.2.1.99"
PIXELS: Final = 0x7FE00010
UNDEFINED: Final = 0xFFFFFFFF
ITEM, ITEM_END, SEQUENCE_END = ((0xFFFE, element) for element in (0xE000, 0xE00D, 0xE0DD))
SYNTAXES: Final = [b"1.2.840.10008.1.2" + end for end in (
    b"", b".1", b".2", b".1.99", b".5", b".4.50", b".4.51", b".4.57", b".4.70", b".4.80", b".4.81", b".4.90", b".4.91",
    b".4.201", b".4.100", b".7.7",
)]  # fmt: skip
NUMBERS: Final = (0, 1, 2, 7, 8, 12, 16, 17, 32, 63, 64, 65, 255, 4096, 4097, 32767, 32768, 60000, 65535)
TEXTS: Final = (
    b"nan", b"inf", b"-inf", b"1e400", b"1e308", b"-1e308", b"1_0", b"\xd9\xa3", b"", b" ", b"1\\2", b"0",
    b"-0", b"0x10", b"1,5", b"\\\\\\", b"9" * 400, b"1" * 60000, b"\0", b"\xff\xfe", b"CT\0MR", b"1.2.3" * 40,
    b"\x1b$B", b"1e-320", b"+ 1", b"..",
)  # fmt: skip
WHOLE: Final = (
    0x00280010, 0x00280011, 0x00280100, 0x00280101, 0x00280102, 0x00280103, 0x00280002, 0x00280120, 0x00280121,
)  # fmt: skip
DECIMAL: Final = (0x00281052, 0x00281053, 0x00200032, 0x00200037, 0x00180050, 0x00280030, 0x00200013, 0x00280008)
LONG_VR: Final = frozenset({b"OB", b"OW", b"OF", b"SQ", b"UT", b"UN", b"OD", b"OL", b"UC", b"UR"})


@dataclass(frozen=True)
class Parts:
    """One file: preamble and meta header, elements of the data set as bytes, and how they are encoded."""

    head: bytes
    elements: tuple[tuple[int, bytes, int], ...]  # tag, all bytes, length of what stands before the value
    implicit: bool
    little: bool
    deflated: bool

    def file(self) -> bytes:
        """Put the file together."""
        body = b"".join(data for _, data, _ in self.elements)
        if self.deflated:
            packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
            body = packer.compress(body) + packer.flush()
        return self.head + body

    def find(self, tag: int) -> int:
        """Return the number of an element, or -1."""
        return next((number for number, one in enumerate(self.elements) if one[0] == tag), -1)

    def having(self, number: int, *elements: tuple[int, bytes, int]) -> Parts:
        """Return the same file with one element replaced by none, one or several."""
        return replace(self, elements=self.elements[:number] + elements + self.elements[number + 1 :])

    def made(self, tag: int, representation: bytes, value: bytes, length: int | None = None) -> tuple[int, bytes, int]:
        """Return an element in this file's encoding."""
        order, size = "<" if self.little else ">", len(value) if length is None else length
        words = struct.pack(f"{order}HH", tag >> 16, tag & 0xFFFF)
        if self.implicit:
            before = words + struct.pack(f"{order}L", size)
        elif representation in LONG_VR:
            before = words + representation + b"\0\0" + struct.pack(f"{order}L", size)
        else:
            before = words + representation + struct.pack(f"{order}H", size & 0xFFFF)
        return tag, before + value, len(before)

    def item(self, tag: tuple[int, int], length: int = 0) -> bytes:
        """Return an item or delimiter without its content."""
        return struct.pack("<HHL" if self.little else ">HHL", *tag, length)


def parts_of(data: bytes) -> Parts:
    """Cut a sound file into its parts."""
    file = BytesIO(data)
    has_meta = data[128:132] == b"DICM"
    syntax = b"1.2.840.10008.1.2"
    if has_meta:
        file.seek(132)
        for one in data_element_generator(file, False, True, lambda tag, *_: tag.group != 2):
            if one.tag == 0x00020010:
                syntax = one.value.strip(b" \0")
    start = file.tell() if has_meta else 0
    head, body, deflated = data[:start], data[start:], syntax == DEFLATED
    if deflated:
        body = zlib.decompress(body, -zlib.MAX_WBITS)
    implicit, little = syntax == SYNTAXES[0], syntax != SYNTAXES[2]
    return Parts(head, tuple(_elements(body, implicit, little)), implicit, little, deflated)


def _elements(body: bytes, implicit: bool, little: bool) -> list[tuple[int, bytes, int]]:
    found = list(data_element_generator(BytesIO(body), implicit, little))
    starts, values = [], []
    for one in found:
        value = getattr(one, "value_tell", None) or one.file_tell
        short = implicit or str(one.VR).encode() not in LONG_VR
        values.append(value)
        starts.append(value - (8 if short else 12))
    ends = [*starts[1:], len(body)]
    return [(int(one.tag), body[start:end], value - start) for one, start, value, end in
            zip(found, starts, values, ends, strict=True)]  # fmt: skip


def _any(parts: Parts, random: Random) -> int:
    return random.randrange(len(parts.elements))


def flip_bytes(parts: Parts, random: Random) -> bytes:
    """Change one to eight bytes anywhere."""
    data = bytearray(parts.file())
    for _ in range(random.choice((1, 1, 2, 8))):
        data[random.randrange(len(data))] = random.randrange(256)
    return bytes(data)


def flip_header(parts: Parts, random: Random) -> bytes:
    """Change one to four bytes before the pixels."""
    data = bytearray(parts.file())
    end = len(data) - len(parts.elements[-1][1]) if not parts.deflated else len(data)
    for _ in range(random.choice((1, 2, 4))):
        data[random.randrange(max(end, 1))] = random.choice((0, 255, random.randrange(256)))
    return bytes(data)


def flip_pixels(parts: Parts, random: Random) -> bytes:
    """Change one to three bits of the pixels."""
    number = parts.find(PIXELS)
    tag, data, before = parts.elements[number]
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 3))):
        changed[random.randrange(before, len(changed))] ^= 1 << random.randrange(8)
    return parts.having(number, (tag, bytes(changed), before)).file()


def truncate(parts: Parts, random: Random) -> bytes:
    """Cut the end off: anywhere, or a few bytes."""
    data = parts.file()
    return data[: random.choice((random.randrange(len(data)), len(data) - random.randrange(1, 40)))]


def append(parts: Parts, random: Random) -> bytes:
    """Put bytes behind the end: zeros, noise, or another element."""
    tail = random.choice((bytes(7), random.randbytes(300), parts.made(0xFFFCFFFC, b"OB", bytes(99))[1], b"\xff" * 64))
    return parts.file() + tail


def remove_elements(parts: Parts, random: Random) -> bytes:
    """Take one to three elements out."""
    for _ in range(random.choice((1, 1, 1, 3))):
        parts = parts.having(_any(parts, random))
    return parts.file()


def swap_values(parts: Parts, random: Random) -> bytes:
    """Give two elements each other's value."""
    one, other = _any(parts, random), _any(parts, random)
    (tag_a, a, before_a), (tag_b, b, before_b) = parts.elements[one], parts.elements[other]
    vr_a, vr_b = a[4:6], b[4:6]
    parts = parts.having(one, parts.made(tag_a, vr_a, b[before_b:]))
    return parts.having(other, parts.made(tag_b, vr_b, a[before_a:])).file()


def absurd_number(parts: Parts, random: Random) -> bytes:
    """Give size, bits, sign, samples or padding another number, the two sides often the same one."""
    order = "<H" if parts.little else ">H"
    value = random.choice(NUMBERS)
    chosen = random.choice((WHOLE[:2], WHOLE[:1], WHOLE[1:2], *[(tag,) for tag in WHOLE[2:]]))
    for tag in chosen:
        parts = put(
            parts, parts.made(tag, random.choice((b"US", b"US", b"US", b"SS", b"UL")), struct.pack(order, value))
        )
    return parts.file()


def absurd_text(parts: Parts, random: Random) -> bytes:
    """Give a number that is text, or any text, an absurd one."""
    tag = random.choice((*DECIMAL, parts.elements[_any(parts, random)][0]))
    text = random.choice(TEXTS)
    if tag in {0x00200032, 0x00200037} and random.random() < 0.5:
        text = b"\\".join([text[:20]] * random.choice((3, 6)))
    return put(parts, parts.made(tag, b"DS", text + b" " * (len(text) % 2))).file()


def wrong_length(parts: Parts, random: Random) -> bytes:
    """State a length that is not that of the value: 4 GB, undefined, none, or a little more or less."""
    number = _any(parts, random)
    tag, data, before = parts.elements[number]
    size = len(data) - before
    wrong = random.choice((UNDEFINED, UNDEFINED - 1, 0x7FFFFFFF, 0, 1, size + 2, max(size - 2, 0), size + 100, 0xFFFE))
    representation = data[4:6] if not parts.implicit else b"UN"
    return parts.having(number, parts.made(tag, representation, data[before:], wrong)).file()


def nested_sequences(parts: Parts, random: Random) -> bytes:
    """Put sequences within sequences, 3 to 4,000 deep, of defined or undefined lengths, closed or not."""
    depth, closed = random.choice((3, 30, 300, 1000, 4000)), random.random() < 0.7
    opening = parts.made(0x00081115, b"SQ", b"", UNDEFINED)[1] + parts.item(ITEM, UNDEFINED)
    ending = (parts.item(ITEM_END) + parts.item(SEQUENCE_END)) * depth if closed else b""
    return _insert(parts, random, opening * depth + ending)


def many_items(parts: Parts, random: Random) -> bytes:
    """Put a sequence of up to 100,000 empty items in, or as many empty elements, alone or in an item."""
    count = random.choice((10, 1000, 20_000, 100_000))
    tiny = parts.made(0x00090010, b"LO", b"")[1] * count
    content = random.choice((parts.item(ITEM) * count, parts.item(ITEM, UNDEFINED) + tiny + parts.item(ITEM_END)))
    inside = parts.made(0x00081115, b"SQ", content + parts.item(SEQUENCE_END), UNDEFINED)[1]
    return _insert(parts, random, random.choice((inside, tiny)))


def duplicate(parts: Parts, random: Random) -> bytes:
    """Put an element in twice, the second time with another element's value or its own changed."""
    number, other = _any(parts, random), _any(parts, random)
    tag, data, before = parts.elements[number]
    value = random.choice((data[before:], parts.elements[other][1][parts.elements[other][2] :], data[before:][::-1]))
    again = parts.made(tag, data[4:6] if not parts.implicit else b"UN", value)
    place = random.choice((number + 1, number, len(parts.elements)))
    return replace(parts, elements=(*parts.elements[:place], again, *parts.elements[place:])).file()


def character_set(parts: Parts, random: Random) -> bytes:
    """Name a character set, known or not, and put bytes beyond ASCII into identifiers and descriptions."""
    sets = (
        b"ISO_IR 100",
        b"ISO_IR 192",
        b"ISO 2022 IR 87\\ISO 2022 IR 149",
        b"GB18030",
        b"\\ISO 2022 IR 58",
        b"utf8",
        b"XXX",
    )
    parts = put(parts, parts.made(0x00080005, b"CS", random.choice(sets)))
    texts = (
        "Müller Łódź".encode(),
        b"\xff\xfe\x80",
        b"\x1b$B;3ED\x1b(B",
        b"\x1b",
        b"\xb0\xa1" * 20,
        "東京".encode("gb18030"),
    )
    for tag in random.sample((0x00100020, 0x0020000D, 0x0020000E, 0x00080018, 0x0008103E, 0x00181210, 0x00080008), 2):
        parts = put(parts, parts.made(tag, b"LO", random.choice(texts)))
    return parts.file()


def other_representation(parts: Parts, random: Random) -> bytes:
    """State another value representation; in an implicit file, put the two letters of one where there are none."""
    number = _any(parts, random)
    tag, data, before = parts.elements[number]
    letters = random.choice(
        (b"US", b"SS", b"SQ", b"UN", b"OB", b"OW", b"DS", b"UI", b"AT", b"FD", b"ZZ", b"??", b"\0\0", b"PN")
    )
    return parts.having(number, (tag, data[:4] + letters + data[6:], before)).file()


def other_syntax(parts: Parts, random: Random) -> bytes:
    """State another transfer syntax than the file is written in."""
    start = parts.head.find(b"\x02\x00\x10\x00UI")
    if start < 0:
        return flip_header(parts, random)
    length = int.from_bytes(parts.head[start + 6 : start + 8], "little")
    syntax = random.choice(SYNTAXES)
    syntax += b"\0" * (len(syntax) % 2)
    stated = b"\x02\x00\x10\x00UI" + struct.pack("<H", len(syntax)) + syntax
    return parts.head[:start] + stated + parts.head[start + 8 + length :] + parts.file()[len(parts.head) :]


def splice(parts: Parts, random: Random) -> bytes:
    """Repeat or drop a stretch, or move it elsewhere."""
    data = parts.file()
    low, high = sorted(random.randrange(len(data)) for _ in range(2))
    place = random.randrange(len(data))
    return random.choice(
        (data[:low] + data[high:], data[:high] + data[low:], data[:place] + data[low:high] + data[place:])
    )


def deflate_bomb(parts: Parts, random: Random) -> bytes:
    """A deflated data set that inflates to 64 MiB, 1 or 4 GiB of zeros, behind the elements or in their place."""
    stated = b"\x02\x00\x10\x00UI" + struct.pack("<H", 22) + DEFLATED
    size = random.choice((64, 1024, 4096))
    body = b"".join(data for _, data, _ in parts.elements) if not parts.implicit and random.random() < 0.5 else b""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return (
        bytes(128)
        + b"DICM"
        + stated
        + packer.compress(body)
        + packer.flush(zlib.Z_FULL_FLUSH)
        + _zeros() * (size // 16)
    )


@cache
def _zeros() -> bytes:
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)


def put(parts: Parts, element: tuple[int, bytes, int]) -> Parts:
    """Replace an element, or put it before the first one of a higher tag."""
    number = parts.find(element[0])
    if number >= 0:
        return parts.having(number, element)
    place = next((at for at, one in enumerate(parts.elements) if one[0] > element[0]), len(parts.elements))
    return replace(parts, elements=(*parts.elements[:place], element, *parts.elements[place:]))


def _insert(parts: Parts, random: Random, content: bytes) -> bytes:
    place = random.choice((1, _any(parts, random)))
    return replace(parts, elements=(*parts.elements[:place], (0, content, 0), *parts.elements[place:])).file()


ANY_FILE: Final[tuple[Callable[[Parts, Random], bytes], ...]] = (
    flip_bytes, flip_header, flip_pixels, truncate, append, remove_elements, swap_values, absurd_number, absurd_text,
    wrong_length, nested_sequences, many_items, duplicate, character_set, other_representation, other_syntax, splice,
    deflate_bomb,
)  # fmt: skip
