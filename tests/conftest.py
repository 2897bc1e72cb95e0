"""What every test shares: few threads, skips by machine, and a writer of small DICOM files."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from ichpipe.quiet import quiet_pydicom

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
AXIAL = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]

# torch is imported later, by the tests; numpy's arrays are small here, and its threads don't matter.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_cuda():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if not os.environ.get("ICHPIPE_REAL_DATA"):
        for item in items:
            if item.get_closest_marker("real_data"):
                item.add_marker(pytest.mark.skip(reason="ICHPIPE_REAL_DATA names no folder"))


def pytest_sessionfinish():
    # Folders of the checkout install as parts of ichpipe; under their own names they would be second copies.
    strays = {"pipeline", "stages", "cache"} & set(sys.modules)
    assert not strays, f"imported under the folder's name instead of ichpipe's: {sorted(strays)}"


def _has_cuda():
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def real_data() -> Path:
    return Path(os.environ["ICHPIPE_REAL_DATA"])


def ct_dataset(pixels, *, series="1.2.3.1", number=1, z=0.0, patient="P1"):
    """One CT slice with the tags that matter; ``pixels`` (rows, columns) are stored as they are."""
    dataset = Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = CT_IMAGE, f"{series}.{number}"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"{series}.0.1", series
    dataset.PatientID, dataset.Modality, dataset.ImageType = patient, "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.InstanceNumber = number
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [-100.0, -100.0, float(z)], AXIAL
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    bits = pixels.dtype.itemsize * 8
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


def save_dicom(dataset, path, transfer_syntax=ExplicitVRLittleEndian):
    """Write ``dataset`` as a DICOM file; tags set to None are left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet_pydicom():
        if getattr(dataset, "file_meta", None) is None:
            dataset.file_meta = FileMetaDataset()
            dataset.file_meta.TransferSyntaxUID = transfer_syntax
        dataset.file_meta.MediaStorageSOPClassUID = dataset.get("SOPClassUID") or CT_IMAGE
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.get("SOPInstanceUID") or "1.2.3"
        dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def write_ct(tmp_path):
    """A function that writes one small CT slice and returns its path.

    Further keywords are DICOM keywords to set, or to remove with None.
    """

    def write(name="slice.dcm", pixels=None, *, series="1.2.3.1", number=1, z=0.0, patient="P1", **tags):
        if pixels is None:
            pixels = np.full((4, 6), 1000 + number, dtype=np.int16)
        syntax = tags.pop("transfer_syntax", ExplicitVRLittleEndian)
        with quiet_pydicom():
            dataset = ct_dataset(pixels, series=series, number=number, z=z, patient=patient)
            for keyword, value in tags.items():
                if value is None:
                    del dataset[keyword]
                else:
                    setattr(dataset, keyword, value)
        return save_dicom(dataset, tmp_path / name, syntax)

    return write


@pytest.fixture
def write_series(write_ct):
    """A function that writes one slice for each position (mm), in that order, into ``folder``."""

    def write(folder, positions, *, series="1.2.3.1", patient="P1", **tags):
        def one(number, z):
            name = f"{folder}/{series}-{number}"
            return write_ct(name, series=series, number=number, z=z, patient=patient, **tags)

        return [one(number, z) for number, z in enumerate(positions, 1)]

    return write
