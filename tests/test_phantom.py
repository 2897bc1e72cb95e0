"""The phantom: reproducible, labelled by its masks, physical in HU and geometry, and safe to write."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pydicom
import pytest
from scipy import ndimage

from ichpipe.common.classes import CLASSES, SUBTYPES
from ichpipe.common.errors import DataError
from ichpipe.params.schema import PhantomParams
from ichpipe.phantom import bleeds, dataset, make_study, write_dataset
from ichpipe.phantom.anatomy import build_anatomy, draw_head
from ichpipe.phantom.bleeds import MIN_AREA_MM2, MIN_SLICES, draw_lesion, slice_area_mm2, slice_of_voxel
from ichpipe.phantom.fields import draw_geometry
from ichpipe.phantom.scanner import ENCODINGS, Encoding, encode, field_of_view
from ichpipe.phantom.study import patient_of
from ichpipe.stages import phantom as phantom_stage

if TYPE_CHECKING:
    from pathlib import Path

    from ichpipe.phantom import Study
    from ichpipe.phantom.anatomy import Anatomy

SIZE = 64
STUDIES = 40

pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR UI")  # RSNA identifiers are no UIDs


@pytest.fixture(scope="module")
def studies() -> list[Study]:
    return [make_study(7, index, SIZE) for index in range(STUDIES)]


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    rng = np.random.default_rng(3)
    return build_anatomy(draw_head(rng), draw_geometry(rng, SIZE))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom")
    write_dataset(out, 3, SIZE, 7)
    return out


def _bytes_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


# Reproducible


def test_same_seed_gives_the_same_bytes_and_another_seed_others(written: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "again", 3, SIZE, 7)
    write_dataset(tmp_path / "other", 3, SIZE, 8)
    assert _bytes_of(tmp_path / "again") == _bytes_of(written)
    assert not set(_bytes_of(tmp_path / "other")) & {name for name in _bytes_of(written) if name.endswith("dcm")}


def test_a_study_does_not_depend_on_how_many_there_are(written: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path, 2, SIZE, 7)
    fewer, more = _bytes_of(tmp_path / "dicom"), _bytes_of(written / "dicom")
    assert fewer.items() < more.items()


@pytest.mark.slow
def test_identifiers_are_unique_within_and_across_levels(studies: list[Study]) -> None:
    slices = [uid for study in studies for uid in study.sop_uids]
    others = [uid for study in studies for uid in (study.study_uid, study.series_uid)]
    patients = {study.patient_id for study in studies}
    assert len({*slices, *others, *patients}) == len(slices) + len(others) + len(patients)
    assert slices != sorted(slices)  # file order tells nothing about slice order


def test_one_patient_in_ten_has_two_studies() -> None:
    per_patient = Counter(patient_of(0, index) for index in range(1500))
    assert set(per_patient.values()) == {1, 2}
    assert 0.06 < np.mean([n == 2 for n in per_patient.values()]) < 0.14


def test_two_studies_of_a_patient_show_the_same_head_in_another_scan(studies: list[Study]) -> None:
    first = next(i for i in range(500) if patient_of(7, i) == patient_of(7, i + 1))
    one, two = make_study(7, first, SIZE), make_study(7, first + 1, SIZE)
    assert one.patient_id == two.patient_id
    assert one.study_uid != two.study_uid
    assert one.geometry != two.geometry


# Labels and lesions


def test_labels_say_what_the_masks_hold(studies: list[Study]) -> None:
    for study in studies:
        assert study.labels.shape == (len(study.hu), len(CLASSES))
        area = study.masks.sum(axis=(2, 3)).T * study.geometry.pixel_mm**2
        assert np.array_equal(study.labels[:, 1:] == 1, area > 0)
        assert np.all((area == 0) | (area >= MIN_AREA_MM2))  # nothing too small to see is labelled
        assert np.array_equal(study.labels[:, 0], study.labels[:, 1:].max(axis=1))


def test_true_bleeds_span_neighbouring_slices_and_mimics_one(studies: list[Study]) -> None:
    lesions = [(study, lesion) for study in studies for lesion in study.lesions]
    assert {lesion.is_mimic for _, lesion in lesions} == {True, False}
    for study, lesion in lesions:
        present = np.flatnonzero(study.mask(lesion).any(axis=(1, 2)))
        assert np.array_equal(present, np.arange(lesion.slices[0], lesion.slices[1] + 1))
        assert present.size == 1 if lesion.is_mimic else present.size >= MIN_SLICES


def test_a_mimic_is_never_labelled(studies: list[Study]) -> None:
    for study in studies:
        for mimic in (lesion for lesion in study.lesions if lesion.is_mimic):
            column = CLASSES.index(mimic.kind)
            low, high = max(mimic.slices[0] - 1, 0), mimic.slices[0] + 2
            assert not study.labels[low:high, column].any()


def test_a_study_without_bleeds_has_no_label(studies: list[Study]) -> None:
    clean = [study for study in studies if all(lesion.is_mimic for lesion in study.lesions)]
    assert clean
    assert not any(study.labels.any() for study in clean)


@pytest.mark.parametrize("kind", SUBTYPES)
def test_a_mimic_equals_one_slice_of_a_true_bleed(kind: str, anatomy: Anatomy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bleeds, "LONGEST_SLICES", 1)  # the first source is taken, whatever its length
    source = draw_lesion(np.random.default_rng(4), anatomy, kind)
    mimic = bleeds.draw_mimic(np.random.default_rng(4), anatomy, kind, [])
    assert source is not None
    assert mimic is not None
    here = slice_of_voxel(anatomy) == mimic.slices[0]
    assert mimic.hu == source.hu
    assert np.array_equal(mimic.blood[here], source.blood[here])
    assert slice_area_mm2(anatomy, mimic.blood)[mimic.slices[0]] >= MIN_AREA_MM2
    assert not mimic.blood[~here].any()


def test_a_single_slice_leaves_real_doubt(studies: list[Study]) -> None:
    """Even a perfect slice-wise reader can't go below the entropy of 'bleed or mimic' given a suspect slice."""
    bleeding = sum(int(study.labels[:, 0].sum()) for study in studies)
    mimicked = sum(lesion.is_mimic for study in studies for lesion in study.lesions)
    share = bleeding / (bleeding + mimicked)
    assert 1.5 < mimicked / STUDIES < 3.5
    assert 0.3 < share < 0.85


@pytest.mark.parametrize("kind", SUBTYPES)
def test_each_bleed_is_where_its_name_says(kind: str, anatomy: Anatomy) -> None:
    lesion = draw_lesion(np.random.default_rng(11), anatomy, kind)
    assert lesion is not None
    blood = lesion.blood > 0.5
    depth, ventricle = anatomy.depth_mm[blood], anatomy.ventricle_mm[blood]
    assert np.all(anatomy.brain[blood] >= 0.5)
    if kind in {"epidural", "subdural"}:
        assert np.percentile(depth, 5) < 3
        assert depth.max() < 20
    elif kind == "intraventricular":
        assert ventricle.max() <= 0
    elif kind == "subarachnoid":
        assert anatomy.fluid[blood].min() > 0.25
    else:
        assert depth.min() > 0
        assert lesion.oedema is not None
        assert (lesion.oedema > 0.5).sum() > blood.sum()


def test_a_lens_is_short_and_thick_and_a_crescent_long_and_thin(anatomy: Anatomy) -> None:
    def reach_over_depth(kind: str, seed: int) -> float:
        lesion = draw_lesion(np.random.default_rng(seed), anatomy, kind)
        assert lesion is not None
        blood = lesion.blood > 0.5
        at = anatomy.points
        reach = np.linalg.norm([np.ptp(at.x[blood]), np.ptp(at.y[blood])])
        return float(reach / np.percentile(anatomy.depth_mm[blood], 95))

    lens = np.median([reach_over_depth("epidural", seed) for seed in range(9)])
    crescent = np.median([reach_over_depth("subdural", seed) for seed in range(9)])
    assert crescent > 1.5 * lens


def test_blood_is_bright_in_the_picture(studies: list[Study]) -> None:
    for study in studies:
        for lesion in study.lesions:
            core = ndimage.binary_erosion(study.mask(lesion), structure=np.ones((1, 3, 3)))
            if core.sum() >= 12:
                assert abs(np.median(study.hu[core]) - lesion.hu) < 12


# Tissue


@pytest.mark.slow
def test_tissue_lies_in_its_range_of_hu() -> None:
    quiet = next(study for study in (make_study(1, i, 128) for i in range(60)) if not study.lesions)
    rng = np.random.default_rng([1, 0, 0])
    head = draw_head(rng)
    plain = build_anatomy(head, quiet.geometry)
    shown = quiet.hu
    assert shown[:, 0, 0].max() < -900
    assert (shown > 700).mean() > 0.02
    values, brain = plain.hu.ravel()[plain.voxels], plain.brain > 0.99
    assert 24 < np.percentile(values[brain], 25) < 34
    assert 30 < np.percentile(values[brain], 90) < 42
    assert abs(np.median(values[plain.ventricle_mm < -2]) - 5) < 2


def test_noise_is_a_few_hu_and_correlated(studies: list[Study]) -> None:
    study = make_study(1, 0, 128)
    middle = len(study.hu) * 3 // 4
    flat = study.hu[middle].astype(np.float64)
    residual = (flat - ndimage.gaussian_filter(flat, 3))[56:72, 50:78]
    assert 1.5 < residual.std() < 7
    assert np.corrcoef(residual[:, 1:].ravel(), residual[:, :-1].ravel())[0, 1] > 0.1


# Encoding


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_gives_back_the_hu(encoding: Encoding) -> None:
    hu = np.random.default_rng(0).integers(-1000, 3001, (2, 32, 32)).astype(np.int16)
    stored = encode(hu, encoding)
    assert stored.min() >= 0 or encoding.pixel_representation == 1
    values = stored.astype(np.int64)
    if encoding.wrapped:
        assert stored.max() < 4096
        values = values + 1000  # the known repair of the 12-bit quirk
        values[values >= 4096] -= 4096
        assert np.array_equal(values - 1000, hu)
        return
    seen = field_of_view(32) if encoding.padding is not None else np.ones((32, 32), dtype=bool)
    low = hu[..., seen] if encoding.bits_stored == 16 else np.minimum(hu[..., seen], 4095 + encoding.intercept)
    assert np.array_equal((values + encoding.intercept)[..., seen], low)
    assert np.all(values[..., ~seen] == (encoding.padding if encoding.padding is not None else 0))


def test_many_studies_use_many_encodings(studies: list[Study]) -> None:
    assert len({study.scanner.encoding for study in studies}) >= 5


# Files


def test_headers_are_those_of_rsna_and_agree_with_the_geometry(written: Path) -> None:
    study = make_study(7, 0, SIZE)
    headers = [pydicom.dcmread(written / "dicom" / f"{uid}.dcm") for uid in study.sop_uids]
    assert {(h.StudyInstanceUID, h.SeriesInstanceUID, h.PatientID, h.Modality) for h in headers} == {
        (study.study_uid, study.series_uid, study.patient_id, "CT")
    }
    assert not any("InstanceNumber" in h or "SliceThickness" in h or "PatientName" in h for h in headers)
    orientation = np.array(headers[0].ImageOrientationPatient, dtype=float)
    normal = np.cross(orientation[:3], orientation[3:])
    positions = np.array([h.ImagePositionPatient for h in headers], dtype=float)
    steps = np.diff(positions, axis=0)
    assert np.allclose(steps @ normal, study.geometry.spacing_mm, atol=1e-4)
    assert np.allclose(steps, study.geometry.spacing_mm * normal, atol=1e-4)  # no drift in the plane
    stored = np.stack([h.pixel_array for h in headers])
    assert np.array_equal(stored, encode(study.hu, study.scanner.encoding))


def test_most_gantries_are_tilted_and_spacings_differ(studies: list[Study]) -> None:
    assert 0.75 < np.mean([study.geometry.tilt_deg != 0 for study in studies]) < 1
    spacings = [study.geometry.spacing_mm for study in studies]
    assert min(spacings) >= 4
    assert max(spacings) <= 6
    assert len(set(spacings)) > STUDIES // 3
    assert {len(study.hu) for study in studies} <= set(range(20, 29))


def test_the_table_is_kaggles(written: Path) -> None:
    text = (written / "stage_2_train.csv").read_text(encoding="utf-8")
    rows = list(csv.reader(text.splitlines()))
    assert rows[0] == ["ID", "Label"]
    names = [name.rpartition("_")[2] for name, _ in rows[1:]]
    order = ["epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any"]
    assert names == order * (len(names) // 6)
    table = {name: int(label) for name, label in rows[1:]}
    assert {name.rpartition("_")[0] for name in table} == {path.stem for path in (written / "dicom").iterdir()}
    for index in range(3):
        study = make_study(7, index, SIZE)
        for uid, labels in zip(study.sop_uids, study.labels, strict=True):
            assert [table[f"{uid}_{name}"] for name in CLASSES] == labels.tolist()


def test_the_summary_counts_the_table(tmp_path: Path) -> None:
    summary = write_dataset(tmp_path, 4, SIZE, 7)
    rows = list(csv.reader((tmp_path / "stage_2_train.csv").read_text(encoding="utf-8").splitlines()))[1:]
    assert summary.n_slices == len(rows) // 6 == len(list((tmp_path / "dicom").iterdir()))
    for name in CLASSES:
        assert summary.n_positive[name] == sum(int(label) for row, label in rows if row.endswith(f"_{name}"))


def test_the_stage_writes_what_the_function_writes(written: Path, tmp_path: Path) -> None:
    phantom_stage.run(PhantomParams(studies=3, size_px=SIZE, seed=7), tmp_path)
    assert _bytes_of(tmp_path) == _bytes_of(written)


def test_an_earlier_phantom_is_replaced(tmp_path: Path) -> None:
    write_dataset(tmp_path, 2, SIZE, 1)
    (tmp_path / ".dicom.tmp").mkdir()  # what a killed run leaves: a file cut short
    (tmp_path / ".dicom.tmp" / "ID_000000000.dcm").write_bytes(b"")
    write_dataset(tmp_path, 1, SIZE, 2)
    write_dataset(tmp_path / "fresh", 1, SIZE, 2)
    fresh = _bytes_of(tmp_path / "fresh")
    shutil.rmtree(tmp_path / "fresh")
    assert _bytes_of(tmp_path) == fresh


@pytest.mark.parametrize("name", ["notes.txt", "ID_0123456ab.dcm"])
def test_a_folder_of_others_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / name).write_bytes(b"\0" * 128 + b"DICM not ours")
    (tmp_path / "stage_2_train.csv").write_text("ID,Label\n", encoding="utf-8")
    before = _bytes_of(tmp_path)
    with pytest.raises(DataError, match=name):
        write_dataset(tmp_path, 1, SIZE, 0)
    assert _bytes_of(tmp_path) == before


def test_a_table_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "stage_2_train.csv").write_text("mine", encoding="utf-8")
    with pytest.raises(DataError, match="stage_2_train"):
        write_dataset(tmp_path, 1, SIZE, 0)
    assert _bytes_of(tmp_path) == {"stage_2_train.csv": b"mine"}


def test_an_interrupted_run_never_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path, 1, SIZE, 0)
    before = _bytes_of(tmp_path)

    def stop(seed: int, study_index: int, size_px: int) -> Study:
        if study_index == 1:
            raise KeyboardInterrupt
        return make_study(seed, study_index, size_px)

    monkeypatch.setattr(dataset, "make_study", stop)
    for out in (tmp_path, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            write_dataset(out, 2, SIZE, 5)
    assert _bytes_of(tmp_path) == before
    assert not any((tmp_path / "new").iterdir())


@pytest.mark.parametrize(("n_studies", "size_px"), [(0, 64), (1, 16)])
def test_nonsense_is_refused(n_studies: int, size_px: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="studies >= 1"):
        write_dataset(tmp_path, n_studies, size_px, 0)
