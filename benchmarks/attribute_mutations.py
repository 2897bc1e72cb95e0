"""Ways to redraw what a header says: attributes of the pixels, transfer syntax, functional groups, numbers and texts.

Files stay well formed. What the attributes say together is drawn at random, and often unusual or contradictory.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from io import BytesIO
from typing import TYPE_CHECKING, Final

import numpy as np
import pydicom
import stream_mutations
from mutations import DEFLATED, PIXELS, SYNTAXES, Parts, put
from pydicom.dataset import Dataset
from stream_mutations import fragments_of

from ichpipe.dicom.pydicom_quiet import quiet_pydicom

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from numpy.typing import NDArray

ENCAPSULATED: Final = b"1.2.840.10008.1.2.1.98"
PER_FRAME, SHARED = 0x52009230, 0x52009229
OTHER_SYNTAXES: Final = (
    ENCAPSULATED, b"1.2.840.113619.5.2", b"1.3.46.670589.33.14", b"1.2.840.10008.1.2.7", b"1.2.840.10008.1.2.4.94",
    b"1.2.840.10008.1.2.4.102", b"1.2.840.10008.1.2.4.110", b"1.2.840.10008.1.20", b"9.9", b"CT",
)  # fmt: skip
PHOTOMETRIC: Final = (b"MONOCHROME1 ", b"MONOCHROME2 ") * 4 + (b"PALETTE COLOR ", b"RGB ", b"YBR_FULL", b"monochrome2 ")
SLOPES: Final = (b"1 ", b"1 ", b"1.0 ", b"0.5 ", b"2 ", b"0.1 ", b"1.0000001 ", b"3.333333", b"-1", b"0 ", b"1000")
INTERCEPTS: Final = (
    b"-1024 ", b"-1000 ", b"0 ", b"1 ", b"-1", b"24", b"-50 ", b"-99 ", b"-1000.5 ", b"0.5 ", b"100 ", b"-8192 ",
    b"40000 ", b"-100000 ", b"32767 ",
)  # fmt: skip
SIDES: Final = (
    b"0.5\\0.5 ", b"2\\4 ", b"1\\0.5 ", b"0.5\\0.503 ", b"0.4\\0.6 ", b"1\\1.011 ", b"0\\1 ", b"-1\\1", b"1e-5\\1",
    b"1\\0.02", b"60\\1", b"1 ", b"x\\y ", b"",
)  # fmt: skip
NUMBER_TEXTS: Final = (
    b"4.1 ", b"9" * 30, b"-9223372036854775809", b"1e5 ", b"1e400 ", b"nan ", b"abc ", b"IM 7", b"0x10", b"1\\2 ", b"",
    b"\xd9\xa3", b"1_0 ", b"9007199254740993", b" 7", b"+7", b"-0", b"inf ", b"7" * 4000,
)  # fmt: skip
AGENTS: Final = (
    b"- ", b"NO IV CONTRAST", b"UNENHANCED", b"NONE", b"OMNIPAQUE 350", b"W/O ", b"0 ", b"ohne KM ", b"YES ", b"\0\0",
)  # fmt: skip
PATTERNS: Final = (
    b"A", b" ", b"-", b"(", b"W/", b"WITH ", b"CONTRAST ", b"NO ", b"1", b"1.", b"\\", b"\\ ", b"C+ ", b"HEAD ", b"_",
    b"5MM ", b"5 MM X ", b"AXIAL\\", b"\x1b$B", b"\xe4", b"a.b", b"W/O CONTRAST ", b"\n", b"\0",
)  # fmt: skip
TEXT_TAGS: Final = (
    0x00080005, 0x00080008, 0x00080018, 0x00080060, 0x00081030, 0x0008103E, 0x00100020, 0x00180010, 0x00180015,
    0x00180050, 0x00181030, 0x00181210, 0x0020000D, 0x0020000E, 0x00200012, 0x00200013, 0x00200032, 0x00200037,
    0x00280004, 0x00280008, 0x00280030, 0x00280034, 0x00281052, 0x00281053, 0x00281054, 0x00282110,
)  # fmt: skip
LONG: Final = 64_000
MAX_PIXELS: Final = 1 << 20


def redrawn_pixels(parts: Parts, random: Random) -> bytes:
    """Draw bits, sign, position, overlays, padding, rescale and sides anew; uncompressed pixels follow the bits."""
    number = parts.find(PIXELS)
    plain = not fragments_of(parts) and parts.find(PER_FRAME) < 0
    allocated = random.choice((16, 16, 16, 16, 8, 32)) if plain else 16
    bits = random.choice((12, 12, random.randint(2, allocated)))
    bits = min(bits, allocated)
    low = random.choice((0, 0, 0, allocated - bits, random.randint(0, allocated - bits)))
    high = random.choice((bits - 1 + low,) * 6 + (15, 0, allocated))
    overlays = [random.randint(min(bits, allocated - 1), allocated - 1) for _ in range(random.choice((0, 0, 0, 1, 2)))]
    if plain:
        count = min(
            _side(parts, 0x00280010) * _side(parts, 0x00280011), MAX_PIXELS
        )  # a mutation may have drawn the sides
        words = _draw_words(count, allocated, bits, low, random)
        for bit in overlays if random.random() < 0.8 else ():
            words[:: random.randint(2, 9)] |= 1 << bit
        order = "<" if parts.little else ">"
        value = words.astype(f"{order}u{allocated // 8}").tobytes()
        if allocated == 8 and not parts.little:
            value = words.astype("u1").view("<u2").astype(">u2").tobytes()  # OW: pairs are swapped
        parts = parts.having(number, parts.made(PIXELS, b"OW", value))
        parts = put(parts, _short(parts, 0x00280100, allocated))
    for tag, whole in ((0x00280101, bits), (0x00280102, high), (0x00280103, random.choice((0, 1)))):
        parts = put(parts, _short(parts, tag, whole))
    for plane, bit in enumerate(overlays):
        tag = (0x6000 + 2 * random.choice((plane, 15 - plane))) << 16 | 0x0102
        parts = put(parts, _short(parts, tag, bit))
    parts = put(parts, parts.made(0x00280004, b"CS", random.choice(PHOTOMETRIC)))
    parts = put(parts, parts.made(0x00281053, b"DS", random.choice(SLOPES[:8] * 2 + SLOPES)))
    parts = put(parts, parts.made(0x00281052, b"DS", random.choice(INTERCEPTS)))
    return _redraw_sides(_redraw_padding(parts, random), random).file()


def redrawn_sides(parts: Parts, random: Random) -> bytes:
    """Draw PixelSpacing and PixelAspectRatio anew."""
    return _redraw_sides(parts, random, often=1.0).file()


def _redraw_padding(parts: Parts, random: Random) -> Parts:
    for tag in random.choice(((), (), (0x00280120,), (0x00280120, 0x00280121))):
        value = random.choice((0, 0xF830, 63536, 0x8000, 2047, 4095, 0x0830, random.randrange(65536)))
        signed = b"SS" if value > 32767 and random.random() < 0.5 else b"US"
        parts = put(parts, parts.made(tag, signed, struct.pack("<H" if parts.little else ">H", value)))
    return parts


def _redraw_sides(parts: Parts, random: Random, often: float = 0.3) -> Parts:
    for tag, representation in ((0x00280030, b"DS"), (0x00280034, b"IS")):
        if random.random() < often:
            text = random.choice(SIDES)
            parts = put(parts, parts.made(tag, representation, text + b" " * (len(text) % 2)))
        elif tag == 0x00280030 and (number := parts.find(tag)) >= 0 and random.random() < often:
            parts = parts.having(number)
    return parts


def _draw_words(count: int, allocated: int, bits: int, low: int, random: Random) -> NDArray[np.uint64]:
    """Return numbers of ``bits`` bits above ``low``, and what lies above them: nothing, their sign, or noise."""
    draw = np.random.default_rng(random.randrange(2**32))
    span = 1 << bits
    own = draw.integers(0, span, count, dtype=np.uint64)
    if random.random() < 0.5:  # most of a head lies in few values
        own = (own[0] + draw.integers(0, max(span // 50, 2), count, dtype=np.uint64)) % span
    above = random.choice(("nothing", "sign", "noise", "padding"))
    words = own << np.uint64(low)
    unused = allocated - bits - low
    if unused and above == "sign":
        words |= np.where(own >= span // 2, ((1 << unused) - 1) << (bits + low), 0).astype(np.uint64)
    elif unused and above == "noise":
        words |= draw.integers(0, 1 << unused, count, dtype=np.uint64) << np.uint64(bits + low)
    elif unused and above == "padding":
        words[:: random.randint(2, 99)] = random.choice((1 << (allocated - 1), (1 << allocated) - 2000 % span))
    return words & np.uint64((1 << allocated) - 1)


def _side(parts: Parts, tag: int) -> int:
    _, data, before = parts.elements[parts.find(tag)]
    return int.from_bytes(data[before : before + 2], "little" if parts.little else "big")


def _short(parts: Parts, tag: int, value: int) -> tuple[int, bytes, int]:
    return parts.made(tag, b"US", struct.pack("<H" if parts.little else ">H", value))


def relabelled(parts: Parts, random: Random) -> bytes:
    """State another transfer syntax, private and unknown ones among them, in a sound meta header."""
    return with_syntax(parts, random.choice((*OTHER_SYNTAXES, *SYNTAXES))).file()


def with_syntax(parts: Parts, syntax: bytes) -> Parts:
    """Return the same file with another TransferSyntaxUID (0002,0010), and a group length that fits."""
    start = parts.head.find(b"\x02\x00\x10\x00UI")
    if start < 0:
        return parts
    length = int.from_bytes(parts.head[start + 6 : start + 8], "little")
    syntax += b"\0" * (len(syntax) % 2)
    head = parts.head[: start + 6] + struct.pack("<H", len(syntax)) + syntax + parts.head[start + 8 + length :]
    if head[132:140] == b"\x02\x00\x00\x00UL\x04\x00":
        head = head[:140] + struct.pack("<L", len(head) - 144) + head[144:]
    return replace(parts, head=head, deflated=syntax == DEFLATED)


def encapsulation(parts: Parts, random: Random) -> bytes:
    """Put uncompressed pixels into items, or take compressed ones out of theirs, and often change the syntax."""
    number = parts.find(PIXELS)
    if items := fragments_of(parts):
        parts = parts.having(number, parts.made(PIXELS, b"OB", b"".join(items[1:])))
        return with_syntax(parts, random.choice((ENCAPSULATED, *SYNTAXES[:5]))).file()
    _, data, before = parts.elements[number]
    value = data[before:]
    cut = random.choice((len(value), len(value) // 2, len(value) // 2 + 1, 2))
    table = random.choice((b"", b"", struct.pack("<L", 0), struct.pack("<2L", 0, cut + 8)))
    pieces = [piece for piece in (value[:cut], value[cut:]) if piece]
    if random.random() < 0.6:
        parts = with_syntax(parts, ENCAPSULATED)
    return stream_mutations.with_fragments(parts, [table, *pieces])


def functional_groups(parts: Parts, random: Random) -> bytes:
    """Take groups of an Enhanced CT away, give others, or count its frames wrongly; other files become one by name."""
    with quiet_pydicom():
        dataset = pydicom.dcmread(BytesIO(parts.file()), force=True)
        frames = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])
        if frames:
            _change_groups(dataset, frames, random)
        else:
            dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
            if random.random() < 0.5:
                dataset.PerFrameFunctionalGroupsSequence = [Dataset()] * random.choice((0, 1, 2))
        buffer = BytesIO()
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _change_groups(dataset: Dataset, frames: list[Dataset], random: Random) -> None:
    one = random.choice(frames)
    kind = random.choice(("drop", "drop", "rescale", "rescale", "sides", "count", "items", "shared", "empty", "kind"))
    if kind == "drop":
        del one[random.choice([element.tag for element in one])]
    elif kind == "rescale":
        for frame in frames:
            values = frame.PixelValueTransformationSequence[0]
            values.RescaleSlope, values.RescaleIntercept = random.choice((1, 0.5, 2)), random.choice((-1024, 0, 24, 1))
        dataset.BitsStored, dataset.PixelRepresentation = random.choice((12, 16)), random.choice((0, 1))
    elif kind == "sides":
        measures = Dataset()
        measures.PixelSpacing = random.choice(([2, 4], [1, 0.5], [1, 1], [0, 1]))
        one.PixelMeasuresSequence = [measures]
    elif kind == "count":
        dataset.NumberOfFrames = random.choice((0, 1, 2, 3, 5, 4000, 10**6, None))
    elif kind == "items":
        dataset.PerFrameFunctionalGroupsSequence = frames[:: random.choice((-1, 2))] + frames * random.choice((0, 1))
    elif kind == "shared":
        del dataset.SharedFunctionalGroupsSequence
    elif kind == "empty":
        one[random.choice([element.tag for element in one])].value = []
    else:
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"


def number_texts(parts: Parts, random: Random) -> bytes:
    """Write InstanceNumber and other numbers that decide little as large ones, fractions or words; name an agent."""
    for tag, representation in random.sample(((0x00200013, b"IS"), (0x00200012, b"IS"), (0x00180050, b"DS")), 2):
        text = random.choice(NUMBER_TEXTS)
        parts = put(parts, parts.made(tag, representation, text + b" " * (len(text) % 2)))
    return put(parts, parts.made(0x00180010, b"LO", random.choice(AGENTS))).file()


def long_text(parts: Parts, random: Random) -> bytes:
    """Fill one or three text elements with 64,000 characters."""
    for tag in random.sample(TEXT_TAGS, random.choice((1, 1, 3))):
        text = (random.choice(PATTERNS) * LONG)[: LONG - 2]
        ending = random.choice((b"", b"", b"!", b"CONTRAST", b"9"))
        text = text[: len(text) - len(ending)] + ending
        parts = put(parts, parts.made(tag, b"LO", text))
    return parts.file()


REDRAWN: Final[tuple[Callable[[Parts, Random], bytes], ...]] = (
    redrawn_pixels, redrawn_pixels, redrawn_pixels, redrawn_sides, relabelled, encapsulation, functional_groups,
    number_texts, long_text,
)  # fmt: skip
