"""The Python interface gives the numbers of the commands and the store, loads lazily, and errors name the remedy."""

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import ichpipe
from ichpipe import CLASSES, IchpipeError, find_slices, load_model, open_store, read_hu, read_series, read_studies

PROBABILITIES = list(CLASSES)


@pytest.fixture(scope="module")
def model(run):
    return load_model(run.artifacts / "finetuned", gpu="cpu", calibrated=False)


@pytest.fixture(scope="module")
def slice_cnn(run):
    return load_model(run.artifacts / "slice-cnn", gpu="cpu")


@pytest.fixture(scope="module")
def held_out(run, index):
    """Folder of links to the files of two held-out studies, and their rows of the index."""
    rows = index[index["series_uid"].isin(index.loc[index["split"] == "test", "series_uid"].unique()[:2])]
    folder = run.folder / "two-studies"
    folder.mkdir(exist_ok=True)
    for path in rows["path"]:
        if not (folder / Path(path).name).exists():
            (folder / Path(path).name).symlink_to(path)
    return folder, rows


@pytest.fixture(scope="module")
def volume(held_out):
    return next(read_studies(held_out[0]))


def test_import_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, time; before = time.perf_counter(); import ichpipe; took = time.perf_counter() - before\n"
        "print(took, *sorted(sys.modules.keys() & {'torch', 'numpy', 'pandas', 'pydicom', 'zarr', 'timm', 'pydantic'}))"
    )
    took = []
    for _ in range(3):  # the machine may be busy
        seconds, *heavy = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        assert not heavy
        took.append(float(seconds))
        if took[-1] < 0.1:
            return
        time.sleep(0.5)
    pytest.fail(f"import ichpipe took {took} s")


def test_every_public_name_exists_and_is_documented():
    assert dir(ichpipe) == sorted(ichpipe.__all__)
    for name in ichpipe.__all__:
        assert getattr(ichpipe, name) is not None
        assert name == "CLASSES" or (getattr(ichpipe, name).__doc__ or "").strip()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ichpipe.nothing


def test_series_is_hu_in_order_with_its_positions(held_out, volume):
    rows = held_out[1]
    rows = rows[rows["series_uid"] == volume.series_uid]
    assert volume.hu.dtype == np.int16
    assert volume.hu.shape == (len(rows), 48, 48)
    assert volume.sop_uids == tuple(rows["sop_uid"])
    assert np.array_equal(volume.position_mm, rows["position_mm"])
    assert np.array_equal(volume.spacing_mm, rows["spacing_mm"])
    assert (np.diff(volume.position_mm) > 0).all()
    assert all(np.array_equal(image, read_hu(path)) for image, path in zip(volume.hu, rows["path"], strict=True))
    assert volume.study_uid == rows["study_uid"].iloc[0]
    assert volume.patient_id == rows["patient_id"].iloc[0]


def test_file_names_and_instance_numbers_do_not_decide_the_order(write_ct):
    for name, number, z in (("a", 2, 30.0), ("b", 3, -10.0), ("c", 1, 10.0)):
        path = write_ct(f"series/{name}", number=number, z=z, PixelSpacing=[0.5, 0.25])
    result = read_series(path.parent)
    assert result.position_mm.tolist() == [-10.0, 10.0, 30.0]
    assert result.spacing_mm.tolist() == [20.0, 20.0, 20.0]
    assert result.hu[:, 0, 0].tolist() == [1003 - 1024, 1001 - 1024, 1002 - 1024]
    assert result.pixel_mm == (0.5, 0.25)


def test_a_zip_archive_and_a_list_of_files_read_as_the_folder_does(held_out, volume, tmp_path):
    archive = tmp_path / "scan.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in volume.paths:
            zipped.write(path, f"scan/{Path(path).name}")
    zipped = read_series(archive)
    assert np.array_equal(zipped.hu, volume.hu)
    assert zipped.pixel_mm == volume.pixel_mm
    assert str(archive) in zipped.paths[0]
    assert np.array_equal(read_series(list(volume.paths)[::-1]).hu, volume.hu)
    assert np.array_equal(read_series(held_out[0], volume.series_uid).hu, volume.hu)


def test_missing_pixel_spacing_is_nan(write_series):
    paths = write_series("bare", [0.0, 5.0])
    assert np.isnan(read_series(paths[0].parent).pixel_mm).all()


def test_slices_of_different_size_are_refused_as_an_array(write_ct):
    write_ct("mixed/1", np.zeros((4, 6), np.int16), number=1, z=0.0)
    path = write_ct("mixed/2", np.zeros((8, 6), np.int16), number=2, z=5.0)
    with pytest.raises(IchpipeError, match=r"slices of 4 x 6, 8 x 6 pixels.*predict_folder"):
        read_series(path.parent)


def test_folder_predicts_as_the_command_does(run, model, held_out, tmp_path):
    folder = held_out[0]
    assert run("predict", folder, "--out", tmp_path, "--gpu", "cpu", "--uncalibrated").exit_code == 0
    result = model.predict_folder(folder)
    for name, table in (("slices", result.slices), ("studies", result.studies)):
        written = pd.read_csv(tmp_path / f"{name}.csv", dtype={"patient_id": str, "study_uid": str, "series_uid": str})
        assert list(written.columns) == list(table.columns)
        rest = [column for column in written.columns if column not in (*PROBABILITIES, "position_mm")]
        pd.testing.assert_frame_equal(written[rest], table[rest].reset_index(drop=True), check_dtype=False)
        np.testing.assert_allclose(written[PROBABILITIES], table[PROBABILITIES], rtol=np.finfo(np.float32).eps)
    assert result.classes == CLASSES
    assert len(result.series) == 2
    assert result.rejected.empty


def test_calibration_beside_the_model_is_applied_as_the_command_does(branch, held_out, volume, tmp_path):
    from ichpipe.common.files import digest_of_file
    from ichpipe.scoring.calibration import Calibration, write_calibration

    folder = branch.artifacts / "finetuned"
    digest = digest_of_file(folder / "model.safetensors")
    write_calibration(folder, Calibration(method="temperature", model_sha256=digest, temperature={"any": 3.0}))
    calibrated, plain = load_model(folder, gpu="cpu"), load_model(folder, gpu="cpu", calibrated=False)
    assert branch("predict", held_out[0], "--out", tmp_path, "--gpu", "cpu").exit_code == 0
    result = calibrated.predict_folder(held_out[0])
    for name in ("slices", "studies"):
        written = pd.read_csv(tmp_path / f"{name}.csv")[PROBABILITIES]
        np.testing.assert_allclose(written, getattr(result, name)[PROBABILITIES], rtol=np.finfo(np.float32).eps)
    one, raw = calibrated.predict(volume), plain.predict(volume)
    here = (result.slices["series_uid"] == volume.series_uid).to_numpy()
    assert np.array_equal(one.slices, result.slices[PROBABILITIES].to_numpy()[here])
    assert np.array_equal(one.slices[:, 1:], raw.slices[:, 1:])
    assert not np.allclose(one.slices[:, 0], raw.slices[:, 0])


def test_what_is_no_head_ct_is_refused_unless_forced(model, write_series):
    paths = write_series("few", [0.0, 5.0, 10.0])
    with pytest.raises(IchpipeError, match="nothing to predict: 3 files can't be used; "):
        model.predict_folder(paths[0].parent)
    assert len(model.predict_folder(paths[0].parent, force=True).slices) == 3


def test_array_predicts_as_the_folder_does(model, held_out, volume):
    folder = model.predict_folder(held_out[0])
    slices = folder.slices[folder.slices["series_uid"] == volume.series_uid][PROBABILITIES].to_numpy()
    study = folder.studies.set_index("series_uid").loc[volume.series_uid, PROBABILITIES].to_numpy(float)
    by_volume = model.predict(volume)
    by_array = model.predict(volume.hu, volume.position_mm)
    floats = model.predict(volume.hu.astype(np.float32), list(volume.position_mm))
    for result in (by_volume, by_array, floats):
        assert np.array_equal(result.slices, slices)
        assert np.array_equal(result.study, study)
        assert result.classes == CLASSES
    assert np.array_equal(by_volume.study, slices.max(axis=0))
    moved = model.predict(volume.hu, volume.position_mm + 1000.0)
    np.testing.assert_allclose(moved.slices, slices, rtol=1e-5)


def test_one_spacing_serves_where_slices_are_even(model, volume):
    even = model.predict(volume.hu, np.arange(len(volume)) * 5.0)
    assert np.array_equal(model.predict(volume.hu, spacing_mm=5.0).slices, even.slices)
    thin = model.predict(np.repeat(volume.hu, 8, axis=0), spacing_mm=0.625)
    np.testing.assert_allclose(thin.slices[::8], even.slices, atol=1e-5)  # eight interleaved series
    mean = model.predict(volume.hu, spacing_mm=5.0, study_score="mean")
    np.testing.assert_allclose(mean.study, even.slices.mean(axis=0))


def test_embeddings_are_those_of_the_store(run, slice_cnn, held_out):
    store = open_store(run.artifacts / "embeddings.zarr", model=run.artifacts / "slice-cnn")
    folder, rows = held_out
    result = slice_cnn.embed_folder(folder)
    assert result.values.shape == (len(rows), store.embedding_dim)
    assert result.values.dtype == np.float32
    assert result.slices["sop_uid"].tolist() == rows["sop_uid"].tolist()
    for series in read_studies(folder):
        cached = store.series(series.series_uid)
        assert cached.sop_uids == series.sop_uids
        assert cached.embedding.dtype == np.float32
        values = slice_cnn.embed(series)
        np.testing.assert_allclose(values, cached.embedding, rtol=2**-10, atol=1e-5)  # kept as float16
        rows = (result.slices["series_uid"] == series.series_uid).to_numpy()
        np.testing.assert_allclose(values, result.values[rows], atol=1e-5)
        with pytest.raises(ValueError, match="read-only"):
            cached.embedding[0] = 0


def test_store_yields_every_series(run, index):
    store = open_store(run.artifacts / "embeddings.zarr")
    assert store.classes == CLASSES
    assert len(store) == len(index)
    assert [uid for series in store for uid in series.sop_uids] == index["sop_uid"].tolist()
    assert store.series_uids == index["series_uid"].unique().tolist()


def test_undecodable_slices_are_rejected_and_the_rest_goes_on(model, volume, monkeypatch):
    from ichpipe.common.errors import UnreadableDicomError
    from ichpipe.images import slice_dataset

    read = slice_dataset.hounsfield.read_square_hu

    def broken(path, **options):
        if str(path) == volume.paths[1]:
            raise UnreadableDicomError(f"{path}: damaged")
        return read(path, **options)

    monkeypatch.setattr(slice_dataset.hounsfield, "read_square_hu", broken)
    for result in (model.predict_folder(volume.paths), model.embed_folder(volume.paths)):
        assert len(result.slices) == len(volume) - 1
        assert result.rejected.values.tolist() == [[volume.paths[1], f"{volume.paths[1]}: damaged"]]


HU = np.zeros((3, 8, 8), np.int16)


@pytest.mark.parametrize(
    ("hu", "positions", "message"),
    [
        (HU[0], {"spacing_mm": 5.0}, r"\(slices, rows, columns\).*found \(8, 8\)"),
        (HU[:0], {"spacing_mm": 5.0}, "at least one slice"),
        (HU.astype(complex), {"spacing_mm": 5.0}, "whole or floating-point numbers, found complex128"),
        (np.full((1, 8, 8), np.nan), {"spacing_mm": 5.0}, "not finite; set what lies outside the scan to -1024"),
        (HU, {}, "position_mm, one number a slice, or spacing_mm"),
        (HU, {"position_mm": [0, 5, 10], "spacing_mm": 5.0}, "position_mm, one number a slice, or spacing_mm"),
        (HU, {"position_mm": [0, 5]}, r"each of 3 slices, found shape \(2,\)"),
        (HU, {"position_mm": [10, 5, 0]}, "must not fall.*argsort"),
        (HU, {"position_mm": [0, 5, np.nan]}, "must be finite"),
        (HU, {"spacing_mm": 0.0}, "a distance above 0"),
    ],
)
def test_wrong_arrays_are_refused_with_the_remedy(model, hu, positions, message):
    with pytest.raises(IchpipeError, match=message):
        model.predict(hu, **positions)


def test_values_outside_what_files_can_hold_are_clipped(model, volume):
    padded = volume.hu.astype(np.float64)
    padded[:, 0, 0] = -3024.0
    clipped = volume.hu.copy()
    clipped[:, 0, 0] = -1024
    assert np.array_equal(model.embed(padded), model.embed(clipped))


def test_errors_name_what_is_there_and_what_to_do(run, slice_cnn, volume, held_out, tmp_path):
    cases = [
        (lambda: load_model(tmp_path), "model.safetensors does not exist; name a model folder"),
        (lambda: load_model(run.artifacts / "sequence" / "paper"), "a sequence model, which reads embeddings"),
        (lambda: load_model(run.artifacts / "finetuned", gpu="99"), "no GPU 99"),
        (lambda: slice_cnn.predict(volume), "a slice CNN, which embeds; to predict, load"),
        (lambda: slice_cnn.predict_folder(held_out[0]), "a slice CNN, which embeds; to predict, load"),
        (lambda: read_series(tmp_path / "nowhere"), "does not exist; name a folder"),
        (lambda: read_series(tmp_path), "none of 0 files"),
        (lambda: read_series(held_out[0]), "holds 2 studies; name one by series_uid"),
        (lambda: read_series(held_out[0], "1.2"), "no usable slice of series 1.2; ichpipe.find_slices lists all"),
        (lambda: open_store(tmp_path / "none.zarr"), "none.zarr"),
        (lambda: open_store(run.artifacts / "embeddings.zarr").series("1.2"), "series 1.2 is not among the"),
    ]
    for call, message in cases:
        with pytest.raises(IchpipeError, match=message):
            call()


def test_only_a_store_of_several_networks_asks_which(tmp_path):
    """Its class says so, not a word in its address."""
    with pytest.raises(IchpipeError, match=r"none\.zarr") as error:
        open_store(tmp_path / "generations" / "none.zarr")
    assert "model=" not in str(error.value)


@pytest.mark.slow
def test_a_store_of_two_networks_asks_which(branch):
    branch.params.write_text(
        branch.params.read_text().replace("backbone: resnet10t, epochs: 2", "backbone: resnet10t, epochs: 1")
    )
    branch.steps("fit-slices", "extract")
    store = branch.artifacts / "embeddings.zarr"
    with pytest.raises(IchpipeError, match=r"2 generations.*open_store\(address, model="):
        open_store(store)
    assert len(open_store(store, model=branch.artifacts / "slice-cnn"))


def test_finding_reads_no_pixels_and_says_why(held_out, monkeypatch):
    from ichpipe.dicom import hounsfield

    monkeypatch.setattr(hounsfield, "read_hu", lambda _path: pytest.fail("pixels were read"))
    result = find_slices(held_out[0])
    assert result.slices["slice_index"].iloc[0] == 0
    assert result.series["chosen"].all()
    assert result.rejected.empty


@pytest.mark.real_data
def test_real_series_with_a_tilted_gantry_and_uneven_spacing(real_data, tmp_path):
    import tarfile

    (archive,) = (real_data / "ge_headct_bsd").glob("*.tar.xz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    result = read_series(tmp_path)
    assert result.hu.shape == (28, 512, 512)
    assert result.spacing_mm.min() == pytest.approx(1.08, abs=0.01)
    assert result.spacing_mm.max() == pytest.approx(7.0, abs=0.01)
    assert result.pixel_mm == pytest.approx((0.488, 0.488), abs=0.001)
    assert -200 < np.median(result.hu[14, 200:300, 200:300]) < 100
