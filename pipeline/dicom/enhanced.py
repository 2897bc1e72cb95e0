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

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.tag import Tag
from pydicom.uid import CTImageStorage

from ichpipe.common.errors import FileTooLargeError, UnreadableDicomError
from ichpipe.dicom.archive import read_file
from ichpipe.dicom.pydicom_quiet import quiet_pydicom

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydicom.dataset import FileDataset

ENHANCED_CT: Final = frozenset({"1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"})
"""SOP classes of Enhanced CT and Legacy Converted Enhanced CT."""

MAX_BYTES: Final = 2**30
MAX_FRAMES: Final = 5000
MAX_READS: Final = 500_000  # two or three an element
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
    match = FRAME.fullmatch(path)
    if match and not os.path.exists(path):  # noqa: PTH110
        return _extract_frame(match[1], int(match[2]))
    try:
        return read_file(path, largest)
    except FileTooLargeError as error:
        raise EnhancedCtError(str(error)) from None


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
    dataset = _read(path)
    if dataset is None or str(dataset.get("SOPClassUID", "")) not in ENHANCED_CT:
        return []
    count, groups = int(dataset.get("NumberOfFrames") or 1), dataset.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) != count or not 1 <= count <= MAX_FRAMES:
        raise UnreadableDicomError(
            f"enhanced CT with {count} frames and functional groups (5200,9230) for {len(groups)}; export it again"
        )
    return [f"{path}/frame-{number:04d}" for number in range(1, count + 1)]


def _read(path: str) -> FileDataset:
    stamp = ""
    if os.path.isfile(path):  # noqa: PTH113
        status = os.stat(path)  # noqa: PTH116
        stamp = f"{status.st_size} {status.st_mtime_ns}"
    return _read_once(path, stamp)


@lru_cache(maxsize=1)
def _read_once(path: str, _stamp: str) -> FileDataset:
    data = read_file(path, MAX_BYTES)
    if not any(uid.encode() in data[: 1 << 16] for uid in ENHANCED_CT):
        return None
    try:
        from ichpipe.dicom.dataset import _BoundedFile  # move the class here or into a file of its own

        file = _BoundedFile(data)
        file.left += min(len(data) // 32, MAX_READS)
        return dcmread(file, force=True)
    except Exception as error:  # hostile bytes make the parser raise almost anything, and its text may quote a value
        raise UnreadableDicomError(f"can't be parsed as DICOM ({type(error).__name__})") from None


def _extract_frame(path: str, number: int) -> bytes:
    """Return one frame as a classic slice: the file's own elements, and those of the frame's functional groups."""
    try:
        with quiet_pydicom():
            slice_ = _build_slice(_read(path), number)
            buffer = BytesIO()
            slice_.save_as(buffer, enforce_file_format=True)
    except UnreadableDicomError:
        raise
    except Exception as error:
        raise UnreadableDicomError(f"enhanced CT: frame {number} can't be read ({type(error).__name__})") from None
    return buffer.getvalue()


def _build_slice(source: FileDataset, number: int) -> Dataset:
    count = int(source.get("NumberOfFrames") or 1)
    slice_ = Dataset()
    slice_.file_meta = copy(source.file_meta)
    # Copies: assigning to an attribute changes the element, which the source shares.
    kept = [element for element in source if element.VR != "SQ" and element.tag not in _DROPPED]
    slice_.update({element.tag: deepcopy(element) for element in kept})
    shared, own = source.get("SharedFunctionalGroupsSequence") or [], source.PerFrameFunctionalGroupsSequence
    for group in [*(shared[0] if shared else ()), *own[number - 1]]:
        if group.VR == "SQ" and group.value:
            slice_.update(deepcopy(group.value[0]))
    slice_.SOPClassUID, slice_.InstanceNumber = CTImageStorage, number
    if count > 1:
        slice_.SOPInstanceUID = f"{source.SOPInstanceUID}.{number}"
    _name_terms(slice_, source.get("ContrastBolusAgentSequence") or [])
    pixels = source.get("PixelData")
    if pixels and source.file_meta.TransferSyntaxUID.is_encapsulated:
        slice_.PixelData = encapsulate([get_frame(pixels, number - 1, number_of_frames=count)])
    elif pixels:
        size = source.Rows * source.Columns * source.BitsAllocated // 8
        slice_.PixelData = pixels[(number - 1) * size : number * size]
        if len(slice_.PixelData) < size:  # writing would add a byte where one is missing
            raise UnreadableDicomError(f"truncated: frame {number} has {len(slice_.PixelData)} of {size} bytes")
    if pixels:
        slice_["PixelData"].VR = "OW" if source.BitsAllocated > 8 else "OB"
    for element in [element for element in slice_ if element.VR == "SQ"]:
        del slice_[element.tag]
    return slice_


def _name_terms(slice_: Dataset, agents: Sequence[Dataset]) -> None:
    """Write coded terms into the elements that a classic slice has for them."""
    if "FrameAcquisitionNumber" in slice_:
        slice_.AcquisitionNumber = slice_.FrameAcquisitionNumber
    region = slice_.get("AnatomicRegionSequence") or []
    if region and not slice_.get("BodyPartExamined"):
        slice_.BodyPartExamined = str(region[0].get("CodeMeaning", ""))[:16].upper()
    if agents and str(slice_.get("ContrastBolusAgentAdministered", "YES")) == "YES":
        slice_.ContrastBolusAgent = str(agents[0].get("CodeMeaning", "YES"))[:64]
