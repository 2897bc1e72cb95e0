"""Reads Enhanced CT: one file of many slices, whose geometry and rescale stand in functional groups.

A frame has a path of its own, ``FILE/frame-0001``, as a member of an archive has. Its bytes are a classic CT slice
with the frame's values, so everything else reads it like any other file. DICOM PS3.3, A.38 and C.7.6.16.
"""

from __future__ import annotations

import os
import re
from copy import copy, deepcopy
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING, Final

from pydicom.datadict import dictionary_has_tag, dictionary_VR
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.tag import Tag
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from ichpipe.common.errors import FileTooLargeError, UnreadableDicomError
from ichpipe.dicom.archive import read_file, stamp_of
from ichpipe.dicom.bounded_file import BoundedFile, inflate_file, parse_bounded
from ichpipe.dicom.elements import Elements
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.dicom.stream_checks import EXPORT_AGAIN, describe_syntax, require_form, require_no_items

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydicom.dataset import FileDataset

ENHANCED_CT: Final = frozenset({"1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"})
"""SOP classes of Enhanced CT and Legacy Converted Enhanced CT."""

MAX_BYTES: Final = 2**30
MAX_FRAMES: Final = 2000
MAX_READS: Final = 500_000  # two or three an element: those of MAX_FRAMES frames
FRAME: Final = re.compile(r"(.+)/frame-(\d{4,})")
_DROPPED: Final = (
    Tag("PixelData"),
    Tag("NumberOfFrames"),
    Tag("ExtendedOffsetTable"),
    Tag("ExtendedOffsetTableLengths"),
)


class EnhancedCtError(UnreadableDicomError):
    """A file may be an Enhanced CT: read its frames instead."""


def read_slice_file(path: str, largest: int) -> bytes:
    """Read a file, a member of an archive, or a frame of an Enhanced CT, as the bytes of one slice.

    Raises UnreadableDicomError as ``archive.read_file`` does, and EnhancedCtError for a file of over ``largest`` bytes.
    """
    if frame := _split_frame(path):
        return _extract_frame(*frame)
    try:
        return read_file(path, largest)
    except FileTooLargeError as error:
        raise EnhancedCtError(str(error)) from None


def _split_frame(path: str) -> tuple[str, int] | None:
    """Return the file and the number of a frame's path; None for any other path."""
    match = FRAME.fullmatch(path)
    return (match[1], int(match[2])) if match and not os.path.exists(path) else None  # noqa: PTH110


def frame_uid(uid: str, number: int, count: int) -> str:
    """Return the UID by which tables name a frame of a file: the file's own where that has one frame."""
    return uid if count == 1 else f"{uid}.{number}"


def image_of_frame(path: str) -> dict[str, str | int]:
    """Return what a report names where ``path`` is a frame: class, UID and number of frames of its file; else nothing.

    InstanceNumber (0020,0013) of a frame's slice is the number of the frame.
    """
    frame = _split_frame(path)
    source = frame and _read_once(frame[0], stamp_of(frame[0]))
    if not source:
        return {}
    elements = Elements(source)
    uids: dict[str, str | int] = {name: elements.required_text(name) for name in ("SOPClassUID", "SOPInstanceUID")}
    return uids | {"NumberOfFrames": elements.whole("NumberOfFrames") or 1}


def list_frames(path: str) -> list[str]:
    """Return the paths of the frames of an Enhanced CT; an empty list for any other file.

    Raises UnreadableDicomError where an Enhanced CT has no functional groups, or too many frames.
    """
    try:
        with quiet_pydicom():
            return _list_frames(path)
    except UnreadableDicomError:
        raise
    except Exception as error:  # a damaged header: pydicom converts values only when they are asked for
        raise UnreadableDicomError(f"enhanced CT: can't be read ({type(error).__name__})") from None


def _list_frames(path: str) -> list[str]:
    dataset = _read_once(path, stamp_of(path))
    if dataset is None or Elements(dataset).text("SOPClassUID") not in ENHANCED_CT:
        return []
    count = Elements(dataset).whole("NumberOfFrames") or 1
    groups = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) != count or not 1 <= count <= MAX_FRAMES:
        raise UnreadableDicomError(
            f"enhanced CT with {count} frames and functional groups (5200,9230) for {len(groups)}; export it again"
        )
    return [f"{path}/frame-{number:04d}" for number in range(1, count + 1)]


@lru_cache(maxsize=2)
def _read_once(path: str, _stamp: tuple[int, int]) -> FileDataset | None:
    """Parse a file that names a class of Enhanced CT near its beginning; None for any other."""
    data = read_file(path, MAX_BYTES)
    if not any(uid.encode() in data[: 1 << 16] for uid in ENHANCED_CT):
        return None
    try:
        data = inflate_file(data, MAX_BYTES) or data
        file = BoundedFile(data)
        file.left += min(len(data) // 32, MAX_READS)
        return parse_bounded(file)
    except UnreadableDicomError:
        raise
    except Exception as error:  # hostile bytes make the parser raise almost anything, and its text may quote a value
        raise UnreadableDicomError(f"can't be parsed as DICOM ({type(error).__name__})") from None


def _extract_frame(path: str, number: int) -> bytes:
    """Return one frame as a classic slice: the file's own elements, and those of the frame's functional groups."""
    try:
        with quiet_pydicom():
            slice_ = _build_slice(_read_once(path, stamp_of(path)), number)
            buffer = BytesIO()
            slice_.save_as(buffer, enforce_file_format=True)
    except UnreadableDicomError:
        raise
    except Exception as error:
        raise UnreadableDicomError(f"enhanced CT: frame {number} can't be read ({type(error).__name__})") from None
    return buffer.getvalue()


def _build_slice(source: FileDataset | None, number: int) -> Dataset:
    if source is None:
        raise UnreadableDicomError("no enhanced CT, so it has no frames")
    elements = Elements(source)
    count = elements.whole("NumberOfFrames") or 1
    slice_ = Dataset()
    slice_.file_meta = copy(source.file_meta)
    # Raw values are then written as they are: converting a text of 64,000 escape sequences takes a second.
    is_implicit, is_little = source.original_encoding
    if "TransferSyntaxUID" not in slice_.file_meta and is_little:
        slice_.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else ExplicitVRLittleEndian
    slice_.set_original_encoding(is_implicit, is_little, source.original_character_set)
    shared, own = source.get("SharedFunctionalGroupsSequence") or [], source.PerFrameFunctionalGroupsSequence
    groups = [*(shared[0] if shared else ()), *own[number - 1]]
    regions = list[Dataset]()
    for part in [source, *(group.value[0] for group in groups if group.VR == "SQ" and group.value)]:
        regions += part.get("AnatomicRegionSequence") or []
        for tag in list(part.keys()):  # as they were read: a value that can't be converted costs no frame
            element = part.get_item(tag)
            vr = element.VR or (dictionary_VR(tag) if dictionary_has_tag(tag) else "UN")
            if vr != "SQ" and tag not in _DROPPED:
                slice_[tag] = deepcopy(element)  # assigning to an attribute would change the shared element
    _replace(slice_, SOPClassUID=CTImageStorage, InstanceNumber=number)
    _replace(slice_, SOPInstanceUID=frame_uid(elements.required_text("SOPInstanceUID"), number, count))
    _name_terms(slice_, source.get("ContrastBolusAgentSequence") or [], regions)
    if pixels := source.get("PixelData"):
        slice_.PixelData = _frame_pixels(source, pixels, number, count)
        slice_["PixelData"].VR = "OW" if source.BitsAllocated > 8 else "OB"
    return slice_


def _frame_pixels(source: FileDataset, pixels: bytes, number: int, count: int) -> bytes:
    """Return PixelData of one frame. Raises UnreadableDicomError where the file holds less than its header says."""
    if _is_encapsulated(source, pixels):
        return encapsulate([get_frame(pixels, number - 1, number_of_frames=count)])
    size = source.Rows * source.Columns * source.BitsAllocated // 8
    frame = pixels[(number - 1) * size : number * size]
    if len(frame) < size:  # writing would add a byte where one is missing
        raise UnreadableDicomError(f"truncated: frame {number} has {len(frame)} of {size} bytes")
    return frame


def _is_encapsulated(source: FileDataset, pixels: bytes) -> bool:
    """Whether PixelData is a list of items. Raises UnreadableDicomError unless it is what the transfer syntax says."""
    syntax = UID(source.file_meta.get("TransferSyntaxUID", ""))
    if not syntax:
        require_no_items(pixels)
        return False
    try:
        encapsulated = syntax.is_encapsulated
    except ValueError:
        raise UnreadableDicomError(f"{describe_syntax(syntax)}, which can't be read; {EXPORT_AGAIN}") from None
    require_form(pixels, syntax, encapsulated=encapsulated)
    return encapsulated


def _name_terms(slice_: Dataset, agents: Sequence[Dataset], regions: Sequence[Dataset]) -> None:
    """Write coded terms into the elements that a classic slice has for them."""
    if "FrameAcquisitionNumber" in slice_:
        _replace(slice_, AcquisitionNumber=slice_.FrameAcquisitionNumber)
    if slice_.get("FrameType"):  # (0008,9007): one file may hold localizers too
        _replace(slice_, ImageType=slice_.FrameType)
    if regions and not slice_.get("BodyPartExamined"):
        _replace(slice_, BodyPartExamined=Elements(regions[0]).text("CodeMeaning")[:16].upper())
    if agents and str(slice_.get("ContrastBolusAgentAdministered", "YES")) == "YES":
        _replace(slice_, ContrastBolusAgent=(Elements(agents[0]).text("CodeMeaning") or "YES")[:64])


def _replace(slice_: Dataset, **values: str | int | Sequence[str]) -> None:
    """Set elements without converting the values that they had."""
    for keyword, value in values.items():
        slice_.pop(Tag(keyword), None)
        setattr(slice_, keyword, value)
