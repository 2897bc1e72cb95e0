"""Reads a NIfTI volume of a head as axial slices: geometry from the affine, Hounsfield units from the voxels.

A slice has a path of its own, ``FILE.nii.gz/slice-0000``, as a frame of an Enhanced CT has. Its number is the index of
the voxels along the axis that is nearest to the body's, as stored. Images are turned and mirrored as DICOM stores axial
slices: rows run to the patient's left, columns to the back. https://nifti.nimh.nih.gov/nifti-1
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import uuid
import zlib
from functools import lru_cache
from io import BytesIO
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from ichpipe.common.constants import MAX_HU, MAX_SIDE_PX, MIN_HU
from ichpipe.common.errors import UnreadableDicomError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Read = Callable[[str, int], bytes]  # of a file or a member of an archive, up to so many bytes

SYNTAX: Final = "NIfTI"  # stands in the index in place of a transfer syntax
MAX_BYTES: Final = 2**30  # of a file, also unpacked
MAX_SLICES: Final = 2000
AIR_BELOW_HU: Final = -500  # the lowest value of a head's volume is lower: air
BONE_ABOVE_HU: Final = 300  # its highest value is higher: bone
_NAME: Final = re.compile(r".+\.nii(?:\.gz)?", re.IGNORECASE)
_SLICE: Final = re.compile(r"(.+\.nii(?:\.gz)?)/slice-(\d{4,})", re.IGNORECASE)
_GZIP: Final = b"\x1f\x8b"
_HEADER_BYTES: Final = {348: b"n+1\0", 540: b"n+2\0"}  # sizeof_hdr of the two versions, and the mark of a single file
_MARK_AT: Final = {348: 344, 540: 4}
_MM: Final = {"meter": 1000.0, "micron": 0.001}  # other units count as mm, also an unknown one
_PIXELS_MM: Final = (0.02, 20.0)  # beyond, affine or unit must be wrong
_MAX_ASPECT: Final = 2.0  # of the pixels of axial slices; above, the volume is a stack of other slices
_LPS: Final = np.array([-1.0, -1.0, 1.0])  # NIfTI's axes run to the right and to the front, DICOM's the other way


class NiftiVolume(NamedTuple):
    """The slices of one file, in the order of storage."""

    hu: NDArray[np.int16]  # (n, rows, columns), HU, -1024 to 32767
    origin_mm: Floats  # (3,), centre of the first pixel of slice 0, in DICOM's patient coordinates
    step_mm: Floats  # (3,), from a slice to the next one as stored
    row_direction: Floats  # (3,), unit vector along a row, to the patient's left
    column_direction: Floats  # (3,), unit vector along a column, to the back
    pixel_mm: tuple[float, float]  # distance of rows and of columns
    digest: str  # SHA-256 of the unpacked content up to the last voxel, 64 hexadecimal digits

    @property
    def uid(self) -> str:
        """A UID made from the content, so that a moved or packed file keeps it (DICOM PS3.5, B.2)."""
        return f"2.25.{uuid.UUID(self.digest[:32], version=5).int}"


def is_nifti(path: str) -> bool:
    """Whether a file is NIfTI by its name: ``.nii`` or ``.nii.gz``."""
    return _NAME.fullmatch(path) is not None


def slice_path(path: str, number: int) -> str:
    """Return the path of a slice of a file."""
    return f"{path}/slice-{number:04d}"


def split_slice(path: str) -> tuple[str, int] | None:
    """Return the file and the number of a slice's path; None for any other path."""
    match = _SLICE.fullmatch(path)
    return (match[1], int(match[2])) if match and not os.path.exists(path) else None  # noqa: PTH110


_LOCK: Final = Lock()  # threads that want slices of one file wait for one of them to unpack it


def read_volume(path: str, stamp: tuple[int, int], read: Read) -> NiftiVolume:
    """Read a file; the last two stay in memory.

    Parameters
    ----------
    path
        The file, or a member of a zip archive.
    stamp
        Changes with the file; another stamp reads it again.
    read
        Returns the bytes of ``path``.

    Raises
    ------
    UnreadableDicomError
        The message is the reason: not NIfTI, cut, several volumes, no orientation, values that are no Hounsfield units
        of a head (docs/data.md lists them all), or nibabel is not installed.

    """
    with _LOCK:
        return _read_once(path, stamp, read)


@lru_cache(maxsize=2)
def _read_once(path: str, _stamp: tuple[int, int], read: Read) -> NiftiVolume:
    try:
        import nibabel as _  # noqa: F401, PLC0415  (an extra)
    except ImportError:
        raise UnreadableDicomError("NIfTI needs the package nibabel; run: pip install 'ichpipe[nifti]'") from None
    try:
        header, content = _unpack(read(path, MAX_BYTES))
        return _build_volume(header, content)
    except UnreadableDicomError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UnreadableDicomError("truncated or damaged gzip file; copy or convert it again") from None
    except Exception as error:  # a hostile header makes nibabel raise almost anything
        raise UnreadableDicomError(f"NIfTI header can't be read ({type(error).__name__}); convert it again") from None


def _unpack(data: bytes) -> tuple[Any, bytes]:
    """Return nibabel's header, and the bytes of the file up to the last voxel."""
    packed = data.startswith(_GZIP)
    with gzip.GzipFile(fileobj=BytesIO(data)) if packed else BytesIO(data) as handle:
        header = _parse_header(head := handle.read(max(_HEADER_BYTES)))
        count = int(np.prod([int(length) for length in header.get_data_shape()], dtype=object))
        start = int(header.get_data_offset())
        size = start + count * header.get_data_dtype().itemsize
        if not len(header.binaryblock) <= start <= size <= MAX_BYTES:
            raise UnreadableDicomError(
                f"NIfTI header claims voxels from byte {start} to {size}; files of up to {MAX_BYTES} bytes are read"
            )
        content: bytes = head[:size] + handle.read(max(0, size - len(head)))
        if len(content) < size:
            raise UnreadableDicomError(f"truncated: {len(content)} of {size} bytes; copy or convert it again")
        handle.read(1)  # at its end, gzip compares the checksum
    return header, content


def _parse_header(head: bytes) -> Any:
    from nibabel.nifti1 import Nifti1Header  # noqa: PLC0415  (an extra)
    from nibabel.nifti2 import Nifti2Header  # noqa: PLC0415

    kinds: dict[int, Any] = {348: Nifti1Header, 540: Nifti2Header}
    for order in ("little", "big"):
        size = int.from_bytes(head[:4], order)
        if size in _HEADER_BYTES and head[(at := _MARK_AT[size]) : at + 4] == _HEADER_BYTES[size]:
            return kinds[size](head[:size], endianness=">" if order == "big" else "<", check=False)
    if head[344:347] == b"ni1" or head[4:7] == b"ni2":
        raise UnreadableDicomError("NIfTI header of a .hdr/.img pair; convert it to one .nii.gz file")
    raise UnreadableDicomError("not a NIfTI file, in spite of its name; give it its right ending, or convert it again")


def _build_volume(header: Any, content: bytes) -> NiftiVolume:
    kind, shape = header.get_data_dtype(), [int(length) for length in header.get_data_shape()]
    if kind.kind not in "iuf" or kind.itemsize > 8:
        raise UnreadableDicomError(f"NIfTI voxels of type {kind.name}: colours or complex numbers, not CT")
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) > 3:
        count = int(np.prod(shape[3:]))
        raise UnreadableDicomError(f"NIfTI of {count} volumes, such as phases; write the one to read into its own file")
    if len(shape) < 3 or min(shape) < 1:
        raise UnreadableDicomError(f"NIfTI of size {' x '.join(map(str, shape))}: not a volume; stack its slices")
    affine = _read_affine(header)
    across, down, along, mirrored = _find_axes(affine)
    if shape[along] > MAX_SLICES or max(shape[across], shape[down]) > MAX_SIDE_PX:
        raise UnreadableDicomError(f"NIfTI of size {' x '.join(map(str, shape))} is too large for a head")
    voxels = np.frombuffer(content, kind, count=int(np.prod(shape)), offset=int(header.get_data_offset()))
    slices = voxels.reshape(shape, order="F").transpose(along, down, across)
    slices = slices[:, :: -1 if mirrored[down] else 1, :: -1 if mirrored[across] else 1]
    corner = np.zeros(3)
    for axis in (across, down):
        if mirrored[axis]:
            corner[axis] = shape[axis] - 1
    origin = affine[:, :3] @ corner + affine[:, 3]
    row, column = (affine[:, axis] * (-1 if mirrored[axis] else 1) for axis in (across, down))
    # The header has single precision: seven digits give the distance that was written.
    between_rows, between_columns = (float(f"{np.linalg.norm(side):.7g}") for side in (column, row))
    pixel_mm = between_rows, between_columns
    row, column = row / np.linalg.norm(row), column / np.linalg.norm(column)
    _require_plane(row, column, pixel_mm)
    hu = _to_hu(slices, *header.get_slope_inter())
    return NiftiVolume(hu, origin, affine[:, along], row, column, pixel_mm, hashlib.sha256(content).hexdigest())


def _read_affine(header: Any) -> Floats:
    """Return (3, 4): voxel indices to mm in DICOM's patient coordinates; the sform counts first, as in nibabel."""
    if int(header["sform_code"]) > 0:
        affine = header.get_sform()
    elif int(header["qform_code"]) > 0:
        affine = header.get_qform()
    else:
        raise UnreadableDicomError(
            "NIfTI without orientation (sform_code and qform_code are 0): which side is left, and which slice is the "
            "lowest, is unknown; convert the DICOM files again, or set the sform"
        )
    scale = _MM.get(header.get_xyzt_units()[0], 1.0)
    lps: Floats = affine[:3].astype(np.float64) * scale * _LPS[:, None]
    if not np.isfinite(lps).all() or abs(np.linalg.det(lps[:, :3])) < 1e-9:
        raise UnreadableDicomError("NIfTI affine (sform or qform) is not invertible; convert the DICOM files again")
    return lps


def _find_axes(affine: Floats) -> tuple[int, int, int, list[bool]]:
    """Return the voxel axes that run to the left, to the back and up, and which ones run the other way."""
    from nibabel import orientations  # noqa: PLC0415  (an extra)

    find_nearest: Any = orientations.io_orientation
    nearest = find_nearest(np.vstack([affine, [0.0, 0.0, 0.0, 1.0]]))
    if not np.isfinite(nearest).all():
        raise UnreadableDicomError("NIfTI affine (sform or qform) is not invertible; convert the DICOM files again")
    across, down, along = (int(axis) for axis in np.argsort(nearest[:, 0]))
    return across, down, along, (nearest[:, 1] < 0).tolist()


def _require_plane(row: Floats, column: Floats, pixel_mm: tuple[float, float]) -> None:
    """Raise UnreadableDicomError where the pixels of axial slices are not nearly rectangles of a CT image."""
    if abs(row @ column) > 0.05:
        raise UnreadableDicomError(
            "NIfTI affine shears the axial images; resample it to perpendicular rows and columns"
        )
    (low, high), sides = _PIXELS_MM, " x ".join(f"{side:.4g}" for side in pixel_mm)
    if not low <= min(pixel_mm) <= max(pixel_mm) <= high:
        raise UnreadableDicomError(
            f"NIfTI pixels of {sides} mm, outside {low:g} to {high:g} mm; correct the affine or its unit"
        )
    if max(pixel_mm) > _MAX_ASPECT * min(pixel_mm):
        raise UnreadableDicomError(
            f"NIfTI with axial pixels of {sides} mm: a stack of coronal or sagittal slices; the models know axial ones"
        )


def _to_hu(slices: NDArray[Any], slope: float | None, intercept: float | None) -> NDArray[np.int16]:
    """Return voxels (n, rows, columns) x scl_slope + scl_inter, rounded and clipped as `stored_to_hu` does."""
    hu = np.empty(slices.shape, dtype=np.int16)
    slope, intercept = (1.0, 0.0) if slope is None or intercept is None else (float(slope), float(intercept))
    whole = slices.dtype.kind in "iu" and slices.dtype.itemsize <= 2 and slope == 1 and intercept.is_integer()
    for number, stored in enumerate(slices):
        if whole and abs(intercept) <= MAX_HU:  # nearly every file; floats take twice as long
            hu[number] = np.clip(stored.astype(np.int32) + int(intercept), MIN_HU, MAX_HU)
            continue
        values = stored.astype(np.float64) * slope + intercept
        if not np.isfinite(values).all():
            raise UnreadableDicomError(
                "NIfTI voxels that are not numbers (NaN or infinite); write -1024 where the image has no value"
            )
        hu[number] = np.clip(np.rint(values), MIN_HU, MAX_HU)
    low, high = int(hu.min()), int(hu.max())
    if low > AIR_BELOW_HU or high < BONE_ABOVE_HU:
        raise UnreadableDicomError(
            f"NIfTI values from {low} to {high} are no Hounsfield units of a head, which reach from air "
            f"({AIR_BELOW_HU} or lower) to bone ({BONE_ABOVE_HU} or higher); convert the DICOM files again, without a "
            "window, an offset or other scaling"
        )
    return hu
