"""Enhanced CT: every frame becomes a slice with the geometry and rescale of its functional groups."""

import zlib

import numpy as np
import pydicom
import pytest
from conftest import AXIAL, compress, ct_dataset, save_dicom
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian

from ichpipe.dicom import dataset as classic
from ichpipe.dicom import enhanced
from ichpipe.dicom.enhanced import ENHANCED_CT
from ichpipe.dicom.hounsfield import read_hu, read_square_hu
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.dicom.slice_header import read_header
from ichpipe.index.scan import scan
from ichpipe.index.volume import read_series
from ichpipe.inference.inputs import collect_inputs
from ichpipe.params.schema import SelectionParams

FROM_CLASSIC = ("RescaleSlope", "RescaleIntercept", "ImagePositionPatient", "ImageOrientationPatient", "InstanceNumber")


def item(**tags):
    dataset = Dataset()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return dataset


def write_enhanced(path, pixels, *, intercepts, shared=None, uid="1.2.840.10008.5.1.4.1.1.2.1", **tags):
    """One file of all ``pixels`` (frames, rows, columns); frame n lies at 5 n mm and has its own intercept."""
    dataset = ct_dataset(pixels[0])
    dataset.SOPClassUID, dataset.NumberOfFrames = uid, len(pixels)
    dataset.PixelData = pixels.tobytes()
    for keyword in FROM_CLASSIC:
        delattr(dataset, keyword)
    groups = [
        item(
            PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=intercept, RescaleType="HU")],
            PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 5.0 * number])],
            FrameContentSequence=[item(FrameAcquisitionNumber=7)],
        )
        for number, intercept in enumerate(intercepts)
    ]
    dataset.PerFrameFunctionalGroupsSequence = groups
    common = item(
        PlaneOrientationSequence=[item(ImageOrientationPatient=AXIAL)],
        PixelMeasuresSequence=[item(PixelSpacing=[1, 1], SliceThickness=5)],
        FrameAnatomySequence=[item(AnatomicRegionSequence=[item(CodeMeaning="Brain")])],
    )
    dataset.SharedFunctionalGroupsSequence = [common if shared is None else shared]
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return save_dicom(dataset, path)


@pytest.fixture
def frames():
    return np.random.default_rng(0).integers(0, 2000, (4, 6, 8)).astype(np.int16)


@pytest.mark.parametrize("uid", sorted(ENHANCED_CT))
@pytest.mark.parametrize("syntax", [None, "1.2.840.10008.1.2.5"])
@pytest.mark.parametrize("count", [1, 4])
def test_each_frame_is_a_slice(tmp_path, frames, uid, syntax, count):
    intercepts = [-1024, -1000, 0, 24][:count]
    path = write_enhanced(tmp_path / "a.dcm", frames[:count], intercepts=intercepts, uid=uid)
    if syntax:
        compress(path, syntax)
    slices, rejected = scan([tmp_path])
    assert len(rejected) == 0
    assert slices["position_mm"].tolist() == [5.0 * number for number in range(count)]
    assert slices["sop_uid"].is_unique
    assert set(slices["body_part"]) == {"BRAIN"}
    assert set(slices["thickness_mm"]) == {5.0}
    for row, pixels, intercept in zip(slices.itertuples(), frames, intercepts, strict=False):
        assert np.array_equal(read_hu(row.path), np.maximum(pixels + intercept, -1024))
        assert read_header(row.path).file_digest == row.file_digest


def test_a_frame_keeps_its_own_values_before_shared_ones(tmp_path, frames):
    shared = item(
        PlaneOrientationSequence=[item(ImageOrientationPatient=AXIAL)],
        PixelValueTransformationSequence=[item(RescaleSlope=2, RescaleIntercept=5, RescaleType="HU")],
        PixelMeasuresSequence=[item(PixelSpacing=[2, 1])],
    )
    path = write_enhanced(tmp_path / "a.dcm", frames, intercepts=[0] * 4, shared=shared)
    assert np.array_equal(read_hu(f"{path}/frame-0002"), frames[1])
    assert read_square_hu(f"{path}/frame-0002").shape == (12, 8)


@pytest.mark.parametrize(("administered", "expected"), [("YES", True), ("NO", False), (None, True)])
def test_contrast_stands_in_coded_terms(tmp_path, frames, administered, expected):
    path = write_enhanced(
        tmp_path / "a.dcm", frames, intercepts=[0] * 4, ContrastBolusAgentSequence=[item(CodeMeaning="Iohexol")]
    )
    with quiet_pydicom():
        dataset = pydicom.dcmread(path)
        if administered:
            for group in dataset.PerFrameFunctionalGroupsSequence:
                group.ContrastBolusUsageSequence = [item(ContrastBolusAgentAdministered=administered)]
        dataset.save_as(path)
    assert set(scan([tmp_path])[0]["contrast_agent"]) == {expected}


def test_a_form_that_cannot_be_read_says_enhanced_ct(tmp_path, frames):
    path = write_enhanced(tmp_path / "a.dcm", frames, intercepts=[0, 0])
    _, rejected = scan([tmp_path])
    assert rejected["reason"].tolist() == [
        "enhanced CT with 4 frames and functional groups (5200,9230) for 2; export it again"
    ]
    for number, name in enumerate(("PlanePositionSequence", "PixelValueTransformationSequence")):
        path = write_enhanced(tmp_path / "a.dcm", frames, intercepts=[0] * 4)
        with quiet_pydicom():
            dataset = pydicom.dcmread(path)
            delattr(dataset.PerFrameFunctionalGroupsSequence[number], name)
            dataset.save_as(path)
        slices, rejected = scan([tmp_path])
        assert (len(slices), len(rejected)) == (3, 1)
        assert "enhanced CT: " in rejected["reason"].iloc[0]


def test_an_archive_may_hold_enhanced_ct(tmp_path, frames):
    import zipfile

    path = write_enhanced(tmp_path / "a.dcm", frames, intercepts=[0] * 4)
    (tmp_path / "zip").mkdir()
    with zipfile.ZipFile(tmp_path / "zip" / "b.zip", "w") as archive:
        archive.write(path, "x/a.dcm")
    slices, _ = scan([tmp_path / "zip"])
    assert np.array_equal(read_hu(slices["path"].iloc[2]), frames[2])


def test_a_volume_is_read_from_frames(tmp_path, frames):
    write_enhanced(tmp_path / "a.dcm", frames, intercepts=[0] * 4)
    volume = read_series(tmp_path)
    assert np.array_equal(volume.hu, frames)
    assert volume.pixel_mm == (1.0, 1.0)


def test_a_frame_that_is_a_localizer_is_no_slice(tmp_path, frames):
    path = write_enhanced(tmp_path / "a.dcm", frames, intercepts=[0] * 4)
    with quiet_pydicom():
        dataset = pydicom.dcmread(path)
        for kind, group in zip(("LOCALIZER", *["VOLUME"] * 3), dataset.PerFrameFunctionalGroupsSequence, strict=True):
            group.CTImageFrameTypeSequence = [item(FrameType=["ORIGINAL", "PRIMARY", kind, "NONE"])]
        dataset.save_as(path)
    slices, rejected = scan([tmp_path])
    assert (len(slices), len(rejected)) == (3, 1)
    assert "LOCALIZER" in rejected["reason"].iloc[0]


def test_force_accepts_frames(tmp_path, frames):
    write_enhanced(tmp_path / "a.dcm", frames, intercepts=[0] * 4, Modality="MR")
    found = collect_inputs([tmp_path], SelectionParams(), force=True)
    assert len(found.slices) == 4
    assert len(found.forced) == 1
    assert found.rejected.empty


def restate(path, syntax):
    """Name another transfer syntax of as many characters in the file; its bytes stay."""
    data = path.read_bytes()
    with quiet_pydicom():
        old = str(pydicom.dcmread(path).file_meta.TransferSyntaxUID).encode()
    assert len(old) == len(syntax)
    path.write_bytes(data.replace(old, syntax.encode(), 1))


@pytest.mark.parametrize(
    ("compressed", "stated", "expected"),
    [
        (True, "1.2.840.10008.1.2.1", r"1\.2\.1 \(Explicit.*is a list of items.*; export"),
        (False, "1.2.840.10008.1.2.5", r"1\.2\.5 \(RLE.*is not a list of items.*; export"),
        (False, "1.2.840.10008.1.2.7", r"1\.2\.7 \(unknown.*can't be read; export"),
    ],
)
def test_pixels_of_another_form_than_the_syntax_are_named_for_every_frame(
    tmp_path, frames, compressed, stated, expected
):
    path = write_enhanced(tmp_path / "a.dcm", frames, intercepts=[0] * 4)
    restate(compress(path, "1.2.840.10008.1.2.5") if compressed else path, stated)
    slices, rejected = scan([tmp_path])
    assert (len(slices), len(rejected)) == (0, 4)
    assert rejected["reason"].str.contains(f"enhanced CT: .*{expected}").all()


def test_frames_of_a_file_without_meta_header_are_read(tmp_path, frames):
    path = write_enhanced(tmp_path / "a.dcm", frames, intercepts=[0] * 4)
    data = path.read_bytes()
    path.write_bytes(data[144 + int.from_bytes(data[140:144], "little") :])
    slices, rejected = scan([tmp_path])
    assert (len(slices), len(rejected)) == (4, 0)
    assert np.array_equal(read_hu(slices["path"].iloc[2]), frames[2])


def write_deflated(path, frames):
    write_enhanced(path, frames, intercepts=[0] * 4)
    with quiet_pydicom():
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        dataset.save_as(path)
    return path


def test_a_deflated_file_is_inflated_within_bounds(tmp_path, frames, monkeypatch):
    path = write_deflated(tmp_path / "a.dcm", frames)
    slices, _ = scan([tmp_path])
    assert [np.array_equal(read_hu(name), frame) for name, frame in zip(slices["path"], frames, strict=True)] == [
        True
    ] * 4
    data = path.read_bytes()
    start = 144 + int.from_bytes(data[140:144], "little")
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    block = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    path.write_bytes(data[:start] + block * 64)  # 1 GiB
    monkeypatch.setattr(enhanced, "MAX_BYTES", 2**27)  # the rule, without a gigabyte of memory
    assert scan([tmp_path])[1]["reason"].tolist() == ["inflates to more than 134217728 bytes: too large"]
    path.write_bytes(data[:-8])
    assert "deflated data set is cut short" in scan([tmp_path])[1]["reason"].iloc[0]


def test_a_deflated_file_may_be_larger_than_one_slice(tmp_path, frames, monkeypatch):
    path = write_deflated(tmp_path / "a.dcm", frames)
    monkeypatch.setattr(classic, "MAX_FILE_BYTES", path.stat().st_size + 10)
    assert len(scan([tmp_path])[0]) == 4
