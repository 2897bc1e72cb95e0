"""Ways to damage the compressed pixels of a DICOM file, and files in zip archives."""

from __future__ import annotations

import struct
import zipfile
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final

import mutations
from mutations import PIXELS, UNDEFINED, Parts

if TYPE_CHECKING:
    from random import Random

SIDES: Final = (0, 1, 63, 65, 128, 4096, 8192, 60000, 65535)
MEMBER: Final = "slice.dcm"


def fragments_of(parts: Parts) -> list[bytes]:
    """Return the items of encapsulated pixels, the table of offsets first; none where they are not encapsulated."""
    _, data, before = parts.elements[parts.find(PIXELS)]
    place, found = before, []
    while data.startswith(b"\xfe\xff\x00\xe0", place):
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        found.append(data[place + 8 : place + 8 + length])
        place += 8 + length
    return found


def with_fragments(parts: Parts, items: list[bytes], lengths: list[int] | None = None) -> bytes:
    """Put the file together with other items, and lengths that need not be theirs."""
    lengths = lengths or [len(item) for item in items]
    content = b"".join(parts.item(mutations.ITEM, size) + one for one, size in zip(items, lengths, strict=True))
    element = parts.made(PIXELS, b"OB", content + parts.item(mutations.SEQUENCE_END), UNDEFINED)
    return parts.having(parts.find(PIXELS), element).file()


def fragments(parts: Parts, random: Random) -> bytes:
    """Cut, drop, repeat or reorder fragments, state false lengths, or a table of offsets that is wrong."""
    table, *rest = fragments_of(parts)
    frame = b"".join(rest)
    cut = random.randrange(1, len(frame))
    first, last = frame[:cut], frame[cut:]
    choices: list[tuple[list[bytes], list[int] | None]] = [
        ([table, first, last], None),
        ([table, first], None),
        ([table, last, first], None),
        ([table, frame, frame], None),
        ([table, frame], [len(table), random.choice((UNDEFINED, 2**31, len(frame) + 10, len(frame) - 10, 0))]),
        ([struct.pack("<L", random.choice((1, 2**31, UNDEFINED))), frame], None),
        ([struct.pack("<2L", 0, len(first) + 8), first, last], None),
        ([random.randbytes(random.randrange(1, 64)), frame], None),
        ([frame], None),
        ([table], None),
        ([table, b""], None),
    ]
    return with_fragments(parts, *random.choice(choices))


def claim(parts: Parts, random: Random) -> bytes:
    """Let the stream's own header claim another size, depth or number of components; at times the DICOM header too."""
    table, *rest = fragments_of(parts)
    frame, side, other = bytearray(b"".join(rest)), random.choice(SIDES), random.choice((64, *SIDES))
    if frame[:2] == b"\xff\xd8":
        start = max(frame.find(b"\xff\xc3"), frame.find(b"\xff\xf7"))
        struct.pack_into(">BHHB", frame, start + 4, random.choice((8, 12, 16, 0, 255, frame[start + 4])), side, other,
                         random.choice((1, 1, 1, 0, 3, 255)))  # fmt: skip
    elif frame[:4] == b"\xff\x4f\xff\x51":
        big = random.choice((side, 2**31 - 1, 2**32 - 1))
        struct.pack_into(">LL", frame, 8, big, other)
        if random.random() < 0.5:
            struct.pack_into(">LL", frame, 24, random.choice((1, 2, 64, big)), random.choice((1, 64, big)))
        if random.random() < 0.2:
            struct.pack_into(">H", frame, 40, random.choice((0, 2, 16384, 65535)))
    else:
        struct.pack_into(
            "<LL", frame, 0, random.choice((0, 1, 2, 3, 15, 16, UNDEFINED)), random.choice((0, 64, 65, UNDEFINED))
        )
    if random.random() < 0.5:
        order = "<H" if parts.little else ">H"
        for tag, value in ((0x00280010, side), (0x00280011, other)):
            parts = parts.having(parts.find(tag), parts.made(tag, b"US", struct.pack(order, value & 0xFFFF)))
    return with_fragments(parts, [table, bytes(frame)])


def stream_header(parts: Parts, random: Random) -> bytes:
    """Change one to three of the stream's first 120 bytes: markers, tables, coding style."""
    table, *rest = fragments_of(parts)
    frame = bytearray(b"".join(rest))
    for _ in range(random.choice((1, 1, 3))):
        frame[random.randrange(min(120, len(frame)))] = random.choice((0, 1, 127, 128, 255, random.randrange(256)))
    return with_fragments(parts, [table, bytes(frame)])


def stream_body(parts: Parts, random: Random) -> bytes:
    """Change, cut, repeat or blank the coded numbers."""
    table, *rest = fragments_of(parts)
    frame = b"".join(rest)
    low, high = sorted(random.randrange(2, len(frame)) for _ in range(2))
    blank = random.choice((b"\0", b"\xff", b"\x80", b"\x7f", b"\xff\xd9", b"\xff\xda")) * (high - low)
    changed = random.choice((
        frame[:low] + blank[: high - low] + frame[high:], frame[:low] + random.randbytes(high - low) + frame[high:],
        frame[:low], frame[:low] + frame[high:], frame[:high] + frame[low:], frame[:low] + frame[-2:],
        frame[:low] + bytes([frame[low] ^ 1 << random.randrange(8)]) + frame[low + 1 :],
    ))  # fmt: skip
    return with_fragments(parts, [table, changed])


def in_zip(parts: Parts, random: Random) -> bytes:
    """Pack the file, and then damage the archive: any byte, the sizes it states, its end; or pack a bomb."""
    kind = random.choice(("flip", "cut", "size", "bomb", "sound"))
    content = parts.file()
    if kind == "bomb":
        content = random.choice((b"", content)) + bytes(random.choice((2**20, 2**27, 300 * 2**20)))
    file = BytesIO()
    with zipfile.ZipFile(file, "w", random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
                         if kind != "bomb" else zipfile.ZIP_DEFLATED) as archive:  # fmt: skip
        archive.writestr(MEMBER, content)
    data = bytearray(file.getvalue())
    if kind == "flip":
        data[random.randrange(len(data))] = random.randrange(256)
    elif kind == "cut":
        del data[random.randrange(len(data)) :]
    elif kind == "size":
        start = data.rindex(b"PK\x01\x02")
        struct.pack_into(
            "<L", data, start + random.choice((20, 24)), random.choice((0, 1, 2**20, 2**27, 2**31, UNDEFINED))
        )
    return bytes(data)


COMPRESSED: Final[tuple[Any, ...]] = (fragments, claim, stream_header, stream_body, stream_body)
