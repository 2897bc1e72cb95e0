"""A NIfTI volume gives the images, order and scores of the DICOM series that it was made from, or a reason."""

import gzip
import itertools
import json
import sys
import zipfile

import nibabel
import numpy as np
import pandas as pd
import pytest
from conftest import AXIAL, ct_dataset, save_dicom

import ichpipe
from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError, UnreadableDicomError
from ichpipe.common.pseudonyms import Pseudonyms
from ichpipe.dicom.hounsfield import read_hu, read_spaced_hu, read_square_hu
from ichpipe.index.label_tables import read_labels
from ichpipe.index.scan import scan
from ichpipe.index.slice_index import read_index
from ichpipe.index.sources import read_archives
from ichpipe.params.schema import PrepareParams

TILT = np.radians(20.0)
TILTED = [1.0, 0.0, 0.0, 0.0, float(np.cos(TILT)), float(np.sin(TILT))]
PIXEL_MM = (0.488281, 0.488281)  # between rows, between columns
STEP_MM = 5.0
CORNER_MM = (-121.5, -130.25, 40.125)


def head_hu(slices=20, rows=6, columns=8, seed=0):
    """Values from air to bone, all different enough to tell every turned or mirrored image."""
    return np.random.default_rng(seed).integers(-1000, 1500, (slices, rows, columns)).astype(np.int16)


@pytest.fixture
def write_head(tmp_path):
    """A function that writes HU (n, rows, columns) as DICOM slices, table feed along z; returns the folder."""

    def write(hu, *, directions=AXIAL, pixel_mm=PIXEL_MM, name="dicom", patient="P1"):
        for number, image in enumerate(hu):
            dataset = ct_dataset(image + np.int16(1024), series=f"1.2.{sum(name.encode())}", number=number)
            dataset.PatientID, dataset.PixelSpacing = patient, list(pixel_mm)
            dataset.ImageOrientationPatient = directions
            dataset.ImagePositionPatient = [*CORNER_MM[:2], CORNER_MM[2] + STEP_MM * number]
            save_dicom(dataset, tmp_path / name / f"{number}.dcm")
        return tmp_path / name

    return write


def affine_of(directions=AXIAL, pixel_mm=PIXEL_MM, step=(0.0, 0.0, STEP_MM), corner=CORNER_MM):
    """Voxel indices (column, row, slice) to mm in NIfTI's coordinates (RAS), for DICOM's geometry (LPS)."""
    lps = np.eye(4)
    lps[:3, 0], lps[:3, 1] = np.array(directions[:3]) * pixel_mm[1], np.array(directions[3:]) * pixel_mm[0]
    lps[:3, 2], lps[:3, 3] = step, corner
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def turn(voxels, affine, order=(0, 1, 2), mirrored=()):
    """Store the same head with its axes in another order, and some of them the other way."""
    voxels, affine = voxels.transpose(order), affine[:, [*order, 3]].copy()
    for axis in mirrored:
        voxels = np.flip(voxels, axis)
        affine[:, 3] += affine[:, axis] * (voxels.shape[axis] - 1)
        affine[:, axis] *= -1
    return voxels, affine


def write_nifti(path, hu, affine=None, *, order=(0, 1, 2), mirrored=(), form="sform", kind=nibabel.Nifti1Image):
    """Write HU (n, rows, columns), or any voxels, with one of the two orientations."""
    voxels, affine = turn(hu.transpose(2, 1, 0), affine_of() if affine is None else affine, order, mirrored)
    image = kind(voxels, affine)
    image.set_sform(affine if form == "sform" else None, code=int(form == "sform"))
    image.set_qform(affine if form == "qform" else None, code=int(form == "qform"))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.to_filename(path)
    return path


def reason_of(path):
    slices, rejected = scan([path])
    assert slices.empty
    (reason,) = rejected["reason"]
    return reason


def assert_same_head(found, expected):
    assert np.array_equal(found.hu, expected.hu)
    assert found.position_mm == pytest.approx(expected.position_mm, abs=1e-4)
    assert found.spacing_mm == pytest.approx(expected.spacing_mm, abs=1e-4)
    assert found.pixel_mm == pytest.approx(expected.pixel_mm, rel=1e-6)


@pytest.mark.parametrize("form", ["sform", "qform"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_each_of_48_orientations_gives_the_images_of_dicom(tmp_path, write_head, order, form):
    hu = head_hu()
    expected = ichpipe.read_series(write_head(hu))
    assert np.array_equal(expected.hu, hu)
    for mirrored in itertools.chain.from_iterable(itertools.combinations(range(3), count) for count in range(4)):
        path = write_nifti(tmp_path / "head.nii", hu, order=order, mirrored=mirrored, form=form)
        found = ichpipe.read_series(path)
        assert_same_head(found, expected)
        numbers = [int(path.rpartition("-")[2]) for path in found.paths]
        along = order.index(2)  # the number of a slice is its place among the voxels as stored
        assert numbers == (list(range(20))[::-1] if along in mirrored else list(range(20)))
        voxels = np.asarray(nibabel.load(path).dataobj)
        assert np.array_equal(np.sort(voxels.take(numbers[3], along), None), np.sort(hu[3], None))


@pytest.mark.parametrize("mirrored", [(), (2,), (0, 1)])
def test_a_tilted_gantry_is_a_sheared_affine(tmp_path, write_head, mirrored):
    hu = head_hu()
    expected = ichpipe.read_series(write_head(hu, directions=TILTED))
    path = write_nifti(tmp_path / "head.nii.gz", hu, affine_of(TILTED), mirrored=mirrored)
    assert_same_head(ichpipe.read_series(path), expected)
    assert expected.spacing_mm[3] == pytest.approx(STEP_MM * np.cos(TILT))


def test_a_head_that_lies_slightly_oblique_keeps_its_rows_and_columns(tmp_path):
    from scipy.spatial.transform import Rotation

    turned = Rotation.from_euler("xyz", [12, -9, 15], degrees=True).as_matrix()
    affine = affine_of()
    affine[:3, :3] = turned @ affine[:3, :3]
    hu = head_hu()
    for form in ("sform", "qform"):
        path = write_nifti(tmp_path / "a.nii", hu, affine, order=(2, 0, 1), mirrored=(0, 2), form=form)
        volume = ichpipe.read_series(path)
        assert np.array_equal(volume.hu, hu)
        assert volume.spacing_mm == pytest.approx(np.full(20, STEP_MM), abs=1e-4)
        assert volume.pixel_mm == pytest.approx(PIXEL_MM, abs=1e-6)


@pytest.mark.parametrize(
    ("dtype", "slope", "intercept"),
    [("<i2", None, None), (">i2", None, None), ("<f4", None, None), ("<f8", None, None), ("<u2", 1.0, -1024.0),
     ("<i2", 0.5, -1000.0), ("<i4", 2.0, 0.0), ("<u4", 1.0, -2000.0)],
)  # fmt: skip
@pytest.mark.parametrize("version", [nibabel.Nifti1Header, nibabel.Nifti2Header])
def test_every_type_of_number_and_the_scaling_give_the_same(tmp_path, dtype, slope, intercept, version):
    hu = (head_hu() // 2 * 2).astype(np.int16)
    stored = (hu - (intercept or 0.0)) / (slope or 1.0)
    header = version(endianness=np.dtype(dtype).byteorder.replace("=", "<"))
    header.set_data_dtype(dtype)
    header.set_data_shape(hu.shape[::-1])
    header.set_sform(affine_of(), code=1)
    header.set_slope_inter(slope, intercept)
    header["vox_offset"], header["magic"] = header.single_vox_offset, header.single_magic
    start = header.binaryblock.ljust(int(header.single_vox_offset), b"\0")
    (tmp_path / "a.nii").write_bytes(start + stored.transpose(2, 1, 0).astype(dtype).tobytes(order="F"))
    assert np.array_equal(nibabel.load(tmp_path / "a.nii").get_fdata(), hu.transpose(2, 1, 0))
    assert np.array_equal(ichpipe.read_series(tmp_path / "a.nii").hu, hu)


def test_values_are_rounded_and_clipped_as_those_of_dicom(tmp_path):
    hu = head_hu().astype(np.float32)
    hu[4, 0, :5] = [-3024.0, 40.4, 40.6, -0.4, 60000.0]
    volume = ichpipe.read_series(write_nifti(tmp_path / "a.nii", hu))
    assert volume.hu[4, 0, :5].tolist() == [-1024, 40, 41, 0, 32767]


def test_pixels_that_are_not_square_are_read_as_those_of_dicom(tmp_path, write_head):
    hu, pixel_mm = head_hu(), (0.5, 0.8)
    folder = write_head(hu, pixel_mm=pixel_mm)
    path = write_nifti(tmp_path / "a.nii", hu, affine_of(pixel_mm=pixel_mm), order=(1, 2, 0), mirrored=(0,))
    of_dicom, of_nifti = (ichpipe.find_slices(where).slices["path"][7] for where in (folder, path))
    assert np.array_equal(read_square_hu(of_nifti), read_square_hu(of_dicom))
    assert read_spaced_hu(of_nifti)[1] == pixel_mm


@pytest.mark.parametrize("distance", [0.488281, 0.4882812, 0.35, 1.103516, 4.550569])
def test_the_distance_of_pixels_is_that_which_was_written(tmp_path, distance):
    path = write_nifti(tmp_path / "a.nii", head_hu(), affine_of(pixel_mm=(distance, distance)), mirrored=(0,))
    assert ichpipe.read_series(path).pixel_mm == (distance, distance)  # an affine has single precision


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1.0), ("meter", 1e-3), ("micron", 1e3), ("unknown", 1.0)])
def test_units_of_length_count(tmp_path, unit, factor):
    affine = affine_of()
    affine[:3] *= factor
    image = nibabel.Nifti1Image(head_hu().transpose(2, 1, 0), affine)
    image.header.set_xyzt_units(unit)
    image.to_filename(tmp_path / "a.nii")
    assert ichpipe.read_series(tmp_path / "a.nii").pixel_mm == pytest.approx(PIXEL_MM, abs=1e-6)


def test_folders_and_archives_may_mix_nifti_and_dicom(tmp_path, write_head):
    first, second = head_hu(seed=1), head_hu(seed=2)
    folder = write_head(head_hu())
    write_nifti(folder / "a/head.nii.gz", first)
    member = write_nifti(tmp_path / "b.nii", second)
    with zipfile.ZipFile(folder / "scans.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(member, "x/head.NII")
    found = {volume.patient_id: volume for volume in ichpipe.read_studies(folder)}
    assert set(found) == {"P1", "a/head", "scans.zip/x/head"}
    assert np.array_equal(found["a/head"].hu, first)
    assert np.array_equal(found["scans.zip/x/head"].hu, second)
    assert np.array_equal(read_hu(f"{folder}/scans.zip/x/head.NII/slice-0003"), second[3])


def test_the_file_names_the_patient_and_its_content_the_study(tmp_path):
    names = ["x/ct.nii.gz", "y/ct.nii", "sub-07/ses-1/sub-07_ses-1_ct.nii", "sub-07/ses-2/sub-07_ses-2_ct.nii"]
    for seed, name in enumerate(names):
        write_nifti(tmp_path / "data" / name, head_hu(seed=seed))
    slices, _ = scan([tmp_path / "data"])
    assert set(slices["patient_id"]) == {"x/ct", "y/ct", "sub-07"}
    assert slices["study_uid"].nunique() == slices["series_uid"].nunique() == 4
    assert slices["sop_uid"].is_unique
    assert slices["sop_uid"].str.len().max() <= 64
    assert slices["file_digest"].is_unique
    alone, _ = scan([tmp_path / "data/x/ct.nii.gz"])
    assert set(alone["patient_id"]) == {"ct"}
    same = slices[slices["patient_id"] == "x/ct"]
    assert alone[["sop_uid", "file_digest"]].to_numpy().tolist() == same[["sop_uid", "file_digest"]].to_numpy().tolist()


def test_a_copy_under_another_name_is_named_also_when_it_is_packed(tmp_path):
    path = write_nifti(tmp_path / "a.nii", head_hu())
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
    slices, rejected = scan([tmp_path])
    assert len(slices) == len(rejected) == 20
    assert rejected["reason"].str.startswith("duplicate: a copy of ").all()


def test_pseudonyms_hide_the_name_of_the_file(tmp_path):
    write_nifti(tmp_path / "data/Miller.nii", head_hu())
    slices, _ = scan([tmp_path / "data"], cache=tmp_path / "cache", pseudonyms=Pseudonyms(b"k" * 32))
    assert slices["patient_id"].nunique() == 1
    assert "Miller" not in slices["patient_id"][0]


def with_header(**fields):
    def write(path):
        image = nibabel.Nifti1Image(head_hu().transpose(2, 1, 0), affine_of())
        content = bytearray(image.to_bytes())
        header = nibabel.Nifti1Header(bytes(content[:348]), check=False)
        for name, value in fields.items():
            header[name] = value
        content[:348] = header.binaryblock
        path.write_bytes(content)

    return write


def cut(count):
    return lambda path: path.write_bytes(write_nifti(path, head_hu()).read_bytes()[:count])


def with_values(low, high, dtype=np.int16):
    values = np.linspace(low, high, 960).reshape(20, 6, 8).astype(dtype)
    return lambda path: write_nifti(path, values)


def with_voxel(value):
    hu = head_hu().astype(np.float32)
    hu[3, 2, 1] = value
    return lambda path: write_nifti(path, hu)


HOSTILE = {
    "no orientation": (lambda path: write_nifti(path, head_hu(), form="none"), "sform_code and qform_code are 0"),
    "0 to 255": (with_values(0, 255, np.uint8), "values from 0 to 255 are no Hounsfield units"),
    "offset": (with_values(0, 4000), "values from 0 to 4000 are no Hounsfield units"),
    "window": (with_values(-160, 240), "air (-500 or lower) to bone (300 or higher)"),
    "bone cut off": (with_values(-1000, 200), "values from -1000 to 200 are no"),
    "0 to 1": (with_values(0, 1, np.float32), "without a window, an offset or other scaling"),
    "mask": (lambda path: write_nifti(path, np.zeros((20, 6, 8), np.uint8)), "values from 0 to 0 are no"),
    "NaN": (with_voxel(np.nan), "not numbers (NaN or infinite); write -1024"),
    "infinite": (with_voxel(np.inf), "not numbers"),
    "not NIfTI": (lambda path: path.write_bytes(b"x" * 5000), "not a NIfTI file, in spite of its name"),
    "empty": (lambda path: path.write_bytes(b""), "not a NIfTI file"),
    "only a header": (cut(352), "truncated: 352 of 2272 bytes"),
    "cut": (cut(2000), "truncated: 2000 of 2272 bytes"),
    "cut header": (cut(200), "not a NIfTI file"),
    "pair": (with_header(magic=b"ni1"), ".hdr/.img pair; convert it"),
    "huge": (with_header(dim=[3, 32000, 32000, 32000, 1, 1, 1, 1]), "claims voxels from byte 352 to"),
    "negative": (with_header(dim=[3, -8, -6, 20, 1, 1, 1, 1]), "not a volume"),
    "no length": (with_header(dim=[3, 8, 0, 20, 1, 1, 1, 1]), "not a volume"),
    "no dimension": (with_header(dim=[0, 8, 6, 20, 1, 1, 1, 1]), "NIfTI"),
    "an image": (with_header(dim=[2, 8, 6, 1, 1, 1, 1, 1]), "not a volume; stack its slices"),
    "offset of voxels": (with_header(vox_offset=-1e6), "claims voxels from byte"),
    "offset not a number": (with_header(vox_offset=np.nan), "header can't be read"),
    "type": (with_header(datatype=9999), "header can't be read"),
    "complex": (with_header(datatype=32, dim=[3, 2, 6, 20, 1, 1, 1, 1]), "complex numbers, not CT"),
    "colour": (with_header(datatype=128, dim=[3, 2, 6, 20, 1, 1, 1, 1]), "colours"),
    "flat affine": (with_header(srow_z=[0, 0, 0, 0]), "not invertible"),
    "affine not a number": (with_header(srow_x=[np.nan, 0, 0, 0]), "not invertible"),
    "thousandfold": (with_header(srow_x=[488, 0, 0, 0], srow_y=[0, 488, 0, 0]), "outside 0.02 to 20 mm"),
    "sheared image": (with_header(srow_x=[0.5, 0.2, 0, 0]), "shears the axial images"),
    "slope": (with_header(scl_slope=1.0, scl_inter=np.nan), "header can't be read"),
    "negative slope": (with_header(scl_slope=-1.0, scl_inter=-2000.0), "no Hounsfield units"),
    "sagittal": (
        lambda path: write_nifti(path, head_hu(), affine_of(pixel_mm=(0.5, 4.0))),
        "coronal or sagittal slices",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_volume_that_is_no_head_in_hu_has_its_reason(tmp_path, name, capfd):
    write, expected = HOSTILE[name]
    write(path := tmp_path / "scan.nii")
    assert expected in reason_of(path)
    packed = tmp_path / "packed.nii.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert expected in reason_of(packed)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_volumes_of_several_phases_are_refused_and_a_lone_one_is_read(tmp_path):
    voxels = head_hu().transpose(2, 1, 0)
    nibabel.Nifti1Image(voxels[..., None], affine_of()).to_filename(tmp_path / "one.nii.gz")
    nibabel.Nifti1Image(np.stack([voxels] * 3, -1), affine_of()).to_filename(tmp_path / "several.nii.gz")
    slices, rejected = scan([tmp_path])
    assert set(slices["patient_id"]) == {"one"}
    assert rejected["reason"].tolist() == [
        "NIfTI of 3 volumes, such as phases; write the one to read into its own file"
    ]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_cut_or_changed_gzip_file_is_refused(tmp_path, share):
    content = write_nifti(tmp_path / "a.nii.gz", head_hu()).read_bytes()
    (tmp_path / "a.nii.gz").write_bytes(content[: int(share * len(content))])
    assert "truncated" in reason_of(tmp_path / "a.nii.gz")
    (tmp_path / "a.nii.gz").write_bytes(content[:-8] + b"\0\0\0\0" + content[-4:])  # another checksum
    assert "damaged gzip file" in reason_of(tmp_path / "a.nii.gz")


def test_a_slice_that_the_file_lacks_is_named(tmp_path):
    path = write_nifti(tmp_path / "a.nii", head_hu())
    with pytest.raises(UnreadableDicomError, match=r"slice-0020: the file has 20 slices"):
        read_hu(f"{path}/slice-0020")


def test_a_changed_file_is_read_again(tmp_path):
    path = write_nifti(tmp_path / "a.nii", head_hu())
    read_hu(f"{path}/slice-0002")
    write_nifti(path, other := head_hu(slices=21, seed=1))
    assert np.array_equal(read_hu(f"{path}/slice-0002"), other[2])


def test_without_nibabel_the_reason_names_the_extra(tmp_path, monkeypatch):
    path = write_nifti(tmp_path / "a.nii", head_hu())
    monkeypatch.setitem(sys.modules, "nibabel", None)
    assert reason_of(path) == "NIfTI needs the package nibabel; run: pip install 'ichpipe[nifti]'"
    monkeypatch.undo()
    assert len(scan([path])[0]) == 20


# Labels of NIfTI files: prepare.dataset folder, and a column `file`.


def prepare(tmp_path, table, **params):
    (tmp_path / "labels.csv").write_text(table)
    params = {"dataset": "folder", "dicom_dir": str(tmp_path / "data"), "labels": str(tmp_path / "labels.csv")} | params
    settings = PrepareParams.model_validate(params)
    tables = [read_labels("folder", tmp_path / "labels.csv").hide_patients(None)]
    return read_archives(settings, tables, 1, None, None)


@pytest.fixture
def two_heads(tmp_path):
    write_nifti(tmp_path / "data/a/ct.nii.gz", head_hu(seed=1), mirrored=(2,))
    write_nifti(tmp_path / "data/b/ct.nii.gz", head_hu(seed=2))
    return tmp_path


def test_labels_of_slices_go_by_file_and_by_number_as_stored(two_heads):
    rows = [f"{name}/ct.nii.gz,{number},{int(number == 3)}" for name in "ab" for number in range(20)]
    scanned = prepare(two_heads, "\n".join(["File,Slice,any", *rows]))
    slices = scanned.slices
    positive = slices[slices["any"] == 1]
    assert positive[["patient_id", "slice_index"]].to_numpy().tolist() in (
        [["a/ct", 16], ["b/ct", 3]],
        [["b/ct", 3], ["a/ct", 16]],
    )
    assert slices["any"].notna().all()
    assert scanned.labels["labels_without_slice"] == scanned.labels["slices_without_label"] == 0


def test_labels_of_volumes_make_slices_of_a_negative_one_0(two_heads):
    scanned = prepare(two_heads, "file,any,subdural\na/ct.nii.gz,0,\nb/ct.nii.gz,1,1\n")
    by_patient = scanned.slices.groupby("patient_id")["any"]
    assert by_patient.apply(lambda values: values.eq(0).all())["a/ct"]
    assert by_patient.apply(lambda values: values.isna().all())["b/ct"]
    assert scanned.studies.set_index("patient_id")["subdural"]["b/ct"] == 1


def test_a_column_patient_id_joins_files_of_one_patient(two_heads):
    scanned = prepare(two_heads, "file,patient_id,any\na/ct.nii.gz,M1,0\nb/ct.nii.gz,M1,1\n")
    assert set(scanned.slices["patient_id"]) == set(scanned.studies["patient_id"]) == {"M1"}
    assert set(scanned.series["patient_id"]) == {"M1"}
    table = read_labels("folder", two_heads / "labels.csv").hide_patients(Pseudonyms(b"k" * 32))
    assert set(table.patients) == set(Pseudonyms(b"k" * 32).of(["M1"]))


WRONG_TABLES = {
    "one name, two folders": ("file,any\nct.nii.gz,0\n", "may be .*a/ct.nii.gz or .*b/ct.nii.gz: write the folder"),
    "from 1": (
        "\n".join(["file,slice,any", *(f"a/ct.nii.gz,{number},0" for number in range(1, 21))]),
        "column slice counts from 1 .*count from 0",
    ),
    "no whole number": ("file,slice,any\na/ct.nii.gz,1.5,0\n", "line 2: column slice is no whole number"),
    "empty": ("file,slice,any\na/ct.nii.gz,,0\n", "slice"),
    "another file": ("file,any\nc.nii.gz,0\n", "none of 2 studies is in the label table .*'ct.nii.gz'"),
    "another spelling": ("file,any\nCT.nii.gz,0\n", "in another spelling .'ct.nii.gz' is 'CT.nii.gz' there"),
    "no NIfTI": ("file,any\nc.dcm,0\n", "of NIfTI files a column file"),
    "two patients": ("file,patient_id,any\na/ct.nii.gz,1,0\na/ct.nii.gz,2,0\n", "patient_id differs within one file"),
}


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_a_table_that_does_not_fit_is_an_error(two_heads, name):
    table, message = WRONG_TABLES[name]
    with pytest.raises(DataError, match=message):
        prepare(two_heads, table)


# Scores, and the recipe from files to scores.


def nifti_of(dicom, path, index, **how):
    """Write a phantom's series as NIfTI, with the HU and the geometry that the DICOM reader finds."""
    rows = index[index["series_uid"] == ichpipe.read_series(dicom).series_uid]
    volume = ichpipe.read_series(dicom)
    first, last = (rows[[f"position_{axis}" for axis in "xyz"]].to_numpy()[end] for end in (0, -1))
    directions = rows[["row_x", "row_y", "row_z", "column_x", "column_y", "column_z"]].to_numpy()[0]
    affine = affine_of(directions, volume.pixel_mm, (last - first) / (len(rows) - 1), first)
    return write_nifti(path, volume.hu, affine, **how)


def scores(run, path, out):
    result = run("predict", path, "--out", out, "--uncalibrated")
    assert result.exit_code == 0, result.output
    return pd.read_csv(out / "slices.csv"), pd.read_csv(out / "studies.csv")


@pytest.fixture(scope="module")
def phantoms(run, tmp_path_factory):
    """Folders of DICOM files, one for each of three studies of different patients, and their headers."""
    headers, _ = scan([run.data / "dicom"])
    folders = []
    for uid, rows in headers.groupby("study_uid"):
        folder = tmp_path_factory.mktemp("phantom") / str(uid)
        folder.mkdir()
        for path in rows["path"]:
            (folder / path.rpartition("/")[2]).symlink_to(path)
        folders.append(folder)
    return folders, headers


@pytest.mark.parametrize(("order", "mirrored"), [((0, 1, 2), ()), ((0, 1, 2), (0, 1)), ((2, 0, 1), (0, 2))])
def test_scores_are_those_of_the_dicom_series(run, phantoms, tmp_path, order, mirrored):
    folders, headers = phantoms
    for number, folder in enumerate(folders[:3]):
        path = nifti_of(folder, tmp_path / "nifti/head.nii.gz", headers, order=order, mirrored=mirrored)
        assert_same_head(ichpipe.read_series(path), ichpipe.read_series(folder))
        of_dicom = scores(run, folder, tmp_path / f"dicom{number}")
        of_nifti = scores(run, path, tmp_path / f"out{number}")
        for expected, found in zip(of_dicom, of_nifti, strict=True):
            assert np.abs(found[list(CLASSES)] - expected[list(CLASSES)]).to_numpy().max() < 1e-6
        assert of_nifti[0]["position_mm"].to_numpy() == pytest.approx(of_dicom[0]["position_mm"].to_numpy(), abs=1e-3)
        assert set(of_nifti[1]["patient_id"]) == {"head"}


def test_predict_names_why_a_volume_is_left_out_and_refuses_reports(run, phantoms, tmp_path, capsys):
    folders, headers = phantoms
    path = nifti_of(folders[0], tmp_path / "head.nii.gz", headers)
    message = run.error(capsys, "predict", path, "--sr", tmp_path / "sr")
    assert "head.nii.gz is NIfTI, which names no patient and no study" in message
    assert not (tmp_path / "sr").exists()
    grey = write_nifti(tmp_path / "grey.nii", np.zeros((20, 6, 8), np.uint8))
    assert "no Hounsfield units" in " ".join(run.error(capsys, "predict", grey).split())
    result = run("predict", path, grey, "--json")
    assert [study["patient_id"] for study in json.loads(result.stdout)["studies"]] == ["head"]


def test_explain_shows_a_nifti_volume(run, phantoms, tmp_path):
    folders, headers = phantoms
    path = nifti_of(folders[0], tmp_path / "head.nii.gz", headers, mirrored=(1,))
    result = run("explain", path, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert any((tmp_path / "out").rglob("*.png"))


def test_stages_from_prepare_on_run_on_nifti_and_a_table(run, index, phantoms, tmp_path):
    folders, headers = phantoms
    rows = []
    for folder in folders:
        volume = ichpipe.read_series(folder)
        name = f"{volume.study_uid}.nii.gz"
        nifti_of(folder, tmp_path / "data" / name, headers, order=(1, 0, 2), mirrored=(2,))
        known = index.set_index("sop_uid").loc[list(volume.sop_uids)]
        for number, labels in enumerate(known[list(CLASSES)].to_numpy()[::-1]):  # the last stored slice is the lowest
            rows.append([name, number, volume.patient_id, *labels.astype(int)])
    pd.DataFrame(rows, columns=["file", "slice", "patient_id", *CLASSES]).to_csv(tmp_path / "labels.csv", index=False)
    other = run.fresh(tmp_path / "other")
    places = [f"prepare.dicom_dir={tmp_path / 'data'}", f"prepare.labels={tmp_path / 'labels.csv'}"]
    options = [word for value in ("prepare.dataset=folder", *places) for word in ("--set", value)]
    for stage in ("prepare", "fit-slices", "extract", "fit-sequence"):
        result = other(*options, stage)
        assert result.exit_code == 0, result.output
    made = read_index(other.artifacts / "index/slices.parquet")
    assert set(made["patient_id"]) == set(index["patient_id"])
    file = made["path"].str.extract(r"([^/]+)\.nii\.gz/slice-")[0]
    for study, of_dicom in index.groupby("study_uid"):
        of_nifti = made[file == study]
        assert np.array_equal(of_nifti[list(CLASSES)].to_numpy(), of_dicom[list(CLASSES)].to_numpy())
