"""Sound DICOM slices in thirteen encodings, made from the phantom: what the fuzzer damages."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import gdcm
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.params.schema import PhantomParams
from ichpipe.stages import phantom

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


ENCAPSULATED = UID("1.2.840.10008.1.2.1.98")  # Encapsulated Uncompressed Explicit VR Little Endian
PLAIN = {
    "implicit": ImplicitVRLittleEndian,
    "explicit": ExplicitVRLittleEndian,
    "big-endian": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
}
COMPRESSED = {"rle": RLELossless, "jpeg-ls": JPEGLSLossless, "jpeg-2000": JPEG2000Lossless}
ENHANCED = {"enhanced-one": (1, False), "enhanced-many": (3, False), "enhanced-rle": (3, True)}
ENCODINGS = (*PLAIN, "headless", *COMPRESSED, "jpeg-lossless", "encapsulated", *ENHANCED)
OF_FRAMES = ("RescaleSlope", "RescaleIntercept", "RescaleType", "ImagePositionPatient", "ImageOrientationPatient",
             "PixelSpacing", "SliceThickness", "InstanceNumber")  # fmt: skip


def good_files(folder: Path, size_px: int = 64, slices: int = 4, seed: int = 0) -> dict[str, list[bytes]]:
    """Return the bytes of ``slices`` sound files of each of ENCODINGS; ``folder`` is for files on the way."""
    phantom.run(PhantomParams(studies=slices, size_px=size_px, seed=seed), folder / "phantom")
    files: dict[str, list[bytes]] = {name: [] for name in ENCODINGS}
    with quiet_pydicom():
        for number, dataset in enumerate(_one_a_study(folder / "phantom" / "dicom", slices)):
            _furnish(dataset, number)
            for name, content in _encodings(dataset, folder).items():
                files[name].append(content)
    return files


def _one_a_study(folder: Path, count: int) -> Iterator[Dataset]:
    """Yield the middle slice of each study: scanners differ in bits, sign, intercept and padding."""
    studies: dict[str, list[Dataset]] = {}
    for path in sorted(folder.glob("*.dcm")):
        dataset = pydicom.dcmread(path)
        studies.setdefault(dataset.StudyInstanceUID, []).append(dataset)
    for slices in list(studies.values())[:count]:
        slices.sort(key=lambda one: float(one.ImagePositionPatient[2]))
        yield slices[len(slices) // 2]


def _furnish(dataset: Dataset, number: int) -> None:
    """Add what real headers have and the phantom has not: sequences, private tags, character sets, more text."""
    dataset.SpecificCharacterSet = ["ISO_IR 100", "ISO_IR 192", "", "ISO 2022 IR 87"][number % 4]
    dataset.PatientName, dataset.SeriesDescription = "Planted^Name", "HEAD 5mm brain plain"
    dataset.ImageType, dataset.InstanceNumber, dataset.SliceThickness = ["ORIGINAL", "PRIMARY", "AXIAL"], 7, "5.0"
    dataset.ConvolutionKernel, dataset.BodyPartExamined, dataset.RescaleType = "H31s", "HEAD", "HU"
    inner = Dataset()
    inner.ReferencedSOPClassUID, inner.ReferencedSOPInstanceUID = dataset.SOPClassUID, "1.2.3.4"
    outer = Dataset()
    outer.StudyInstanceUID, outer.ReferencedImageSequence = "1.2.3", [inner, inner]
    dataset.ReferencedImageSequence, dataset.ReferencedStudySequence = [inner], [outer]
    dataset["ReferencedStudySequence"].is_undefined_length = True
    dataset.private_block(0x0009, "MAKER", create=True).add_new(0x10, "LO", "private text")


def _encodings(dataset: Dataset, folder: Path) -> dict[str, bytes]:
    found = {name: _written(dataset, syntax, folder) for name, syntax in PLAIN.items()}
    body = found["implicit"]
    found["headless"] = body[body.index(b"\x08\x00\x05\x00") :]  # from SpecificCharacterSet (0008,0005) on
    for name, syntax in COMPRESSED.items():
        coded = pydicom.dcmread(folder / "explicit.dcm")
        coded.compress(syntax, generate_instance_uid=False)
        coded.save_as(folder / "coded.dcm")
        found[name] = (folder / "coded.dcm").read_bytes()
    found["jpeg-lossless"] = _by_gdcm(folder / "explicit.dcm", gdcm.TransferSyntax.JPEGLosslessProcess14_1)
    found["encapsulated"] = _written(dataset, ENCAPSULATED, folder)
    found |= {name: _enhanced(dataset, folder, *kind) for name, kind in ENHANCED.items()}
    return found


def _enhanced(dataset: Dataset, folder: Path, count: int, coded: bool) -> bytes:
    """Return an Enhanced CT of ``count`` frames, each with its own place and rescale."""
    copy = deepcopy(dataset)
    for keyword in OF_FRAMES:
        if keyword in copy:
            del copy[keyword]
    copy.SOPClassUID, copy.NumberOfFrames = "1.2.840.10008.5.1.4.1.1.2.1", count
    pixels = np.frombuffer(dataset.PixelData, np.uint16).reshape(dataset.Rows, dataset.Columns)
    copy.PixelData = b"".join(np.roll(pixels, 5 * number, 1).tobytes() for number in range(count))
    copy.PerFrameFunctionalGroupsSequence = [
        _item(
            PixelValueTransformationSequence=[_item(
                RescaleSlope=1, RescaleIntercept=float(dataset.RescaleIntercept) - number, RescaleType="HU"
            )],
            PlanePositionSequence=[_item(ImagePositionPatient=[0, 0, 5 * number])],
            FrameContentSequence=[_item(FrameAcquisitionNumber=1)],
        )
        for number in range(count)
    ]  # fmt: skip
    copy.SharedFunctionalGroupsSequence = [
        _item(
            PlaneOrientationSequence=[_item(ImageOrientationPatient=dataset.ImageOrientationPatient)],
            PixelMeasuresSequence=[_item(PixelSpacing=[0.5, 0.5], SliceThickness=5)],
        )
    ]
    content = _written(copy, ExplicitVRLittleEndian, folder, name="enhanced.dcm")
    if not coded:
        return content
    coded_copy = pydicom.dcmread(folder / "enhanced.dcm")
    coded_copy.compress(RLELossless, generate_instance_uid=False)
    coded_copy.save_as(folder / "coded.dcm")
    return (folder / "coded.dcm").read_bytes()


def _item(**values: object) -> Dataset:
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return item


def _written(dataset: Dataset, syntax: UID, folder: Path, name: str = "plain.dcm") -> bytes:
    copy = deepcopy(dataset)
    if syntax == ExplicitVRBigEndian:
        copy.PixelData = np.frombuffer(dataset.PixelData, np.uint16).byteswap().tobytes()
    if syntax == ENCAPSULATED:
        copy.PixelData = encapsulate([dataset.PixelData])
        copy["PixelData"].VR, copy["PixelData"].is_undefined_length = "OB", True
    copy.file_meta = FileMetaDataset()
    copy.file_meta.TransferSyntaxUID = syntax
    copy.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    copy.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    path = folder / ("explicit.dcm" if syntax == ExplicitVRLittleEndian and name == "plain.dcm" else name)
    pydicom.dcmwrite(path, copy, enforce_file_format=True)
    return path.read_bytes()


def _by_gdcm(source: Path, syntax: int) -> bytes:
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    target = source.with_name("by_gdcm.dcm")
    reader.SetFileName(str(source))
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    done = reader.Read()
    change.SetInput(reader.GetImage())
    done = done and change.Change()
    writer.SetFileName(str(target))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    if not (done and writer.Write()):
        raise RuntimeError(f"GDCM can't write {syntax}")
    return target.read_bytes()


def read_folder(folder: Path) -> dict[str, list[bytes]]:
    """Return the files of a folder of one's own, each as an encoding by its name."""
    return {path.name: [path.read_bytes()] for path in sorted(folder.rglob("*")) if path.is_file()}
