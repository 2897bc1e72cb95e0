"""The benchmarks run at a tiny size and count what they should; nothing here looks at time."""

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_store(tmp_path):
    bench = load("store")
    result = bench.run(tmp_path, 6000, 173, 16, rounds=1, with_dvc=False)
    assert result["write"]["rows_computed"] == 6000
    assert result["unchanged"]["rows_computed"] == 0
    part = result["one_percent_changed"]
    assert part["series_changed"] == 2
    assert part["rows_computed"] == part["rows_changed"] > 0
    assert result["upkeep"]["problems"] == 0
    assert result["open"]["files"] < 60
    for name in ("epoch_ratio", "random_series_times_slower", "first_epoch_ratio"):
        assert result["read"][name] > 0


def test_series_lengths_sum_up():
    lengths = load("store").series_lengths(752_803, 21_744)
    assert lengths.sum() == 752_803
    assert (lengths.min(), lengths.max()) == (20, 60)


def test_extract_unchanged(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    result = load("extract_unchanged").run(tmp_path, 3000, 87)
    assert len(result["seconds"]) == 3
    assert result["said"] == "slice CNN: all 3000 slices are there"


def test_prepare(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    bench = load("prepare")
    result = bench.run(tmp_path, bench.archives.make_headers(12), 600, 100, 2)  # outputs that differ would end it
    assert result["bare_pydicom"]["ratio"] > 0
    assert result["ratio_of_the_whole_command"] > 0
    for name in ("one_worker", "again", "workers", "stopped"):
        assert result[name]["peak_mb"] > 0


def test_score(tmp_path):
    result = load("score").run(tmp_path, 600, 30)
    assert len(result["seconds"]) == 4
    assert min(result["seconds"].values()) > 0


@pytest.mark.slow
def test_kills(tmp_path):
    result = load("kills").run(tmp_path, 2, 0)
    assert result["kills"] >= 2
    assert result["wrong_numbers_read_after_a_kill"] == 0
    assert result["rows_identical_to_an_undisturbed_store"]
    assert result["chunk_files_identical"]


def test_sequence(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    bench = load("sequence")
    options = argparse.Namespace(
        slices=12_000, series=346, backbone="resnet10t", size=32, epochs=2, batch_series=8, precision="fp32", labels=[],
        headers=None, folder=None, out=None,
    )  # fmt: skip
    result = bench.run(tmp_path, options)
    assert result["labels"]["linear_head_loss"] == pytest.approx(0.063, abs=0.002)
    drawn, wanted = (result["labels"][name]["any"] for name in ("prevalence", "prevalence_of_the_table"))
    assert drawn == pytest.approx(wanted, abs=0.06)
    assert len(result["arms"]["paper"]["epochs"]) == 2
    assert all(one["seconds"] > 0 for one in result["arms"]["paper"]["epochs"])
    assert result["end_to_end_epoch_over_cached_epoch"] > 0
    scores = {row["arm"]: row["weighted_log_loss"]["mean"] for row in result["compare"]["arms"]}
    assert set(scores) == {"slice-cnn", "moving-average", "paper"}


def test_simulated_neighbours_correlate_as_asked(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    simulate = load("simulate")
    lengths = np.full(400, 30)
    noise = simulate.neighbourly(lengths, 4, 0.7, np.random.default_rng(0)).reshape(400, 30, 4)
    assert float((noise[:, 1:] * noise[:, :-1]).mean()) == pytest.approx(0.7, abs=0.03)
    assert float(noise.std()) == pytest.approx(1, abs=0.03)
    assert abs(float((noise[1:, 0] * noise[:-1, -1]).mean())) < 0.1  # another study's neighbour is no neighbour


def test_end_to_end(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    bench = load("end_to_end")
    options = argparse.Namespace(
        backbone="resnet10t", size=64, slices=[4, 12], plain=[12], chunk=4, precision="fp32", one=None, out=None
    )
    result = bench.run(options)
    assert [one["slices"] for one in result["chunked"]] == [4, 12]
    assert all(one["seconds"] > 0 for one in result["chunked"] + result["plain"])
    assert result["ratios"][0]["slices"] == 12


def test_feeding(tmp_path, monkeypatch):
    pytest.importorskip("gdcm")
    monkeypatch.syspath_prepend(FOLDER)
    options = argparse.Namespace(dicom=None, file_px=64, sizes=[32], slices=20, out=None)
    (found,) = load("feeding").run(tmp_path, options)["sizes"]
    assert set(found["cache_over_decoding"]) == {"uncompressed", "jpeg_lossless", "jpeg_2000_lossless"}
    assert all(value > 0 for value in found["slices_per_second"].values())


def test_extract(tmp_path, monkeypatch):
    pytest.importorskip("gdcm")
    monkeypatch.syspath_prepend(FOLDER)
    options = argparse.Namespace(
        backbone="test_byobnet", size=32, file_px=64, slices=130, encodings=["uncompressed", "jpeg_lossless"],
        precision="fp32", batch=64, gpu="cpu", loaders=2, rounds=1, out=None,
    )  # fmt: skip
    found = load("extract").run(tmp_path, options)["encodings"]
    assert set(found) == {"uncompressed", "jpeg_lossless"}
    for one in found.values():
        assert one["slices"] == 130
        assert 0 < one["extract_over_forward"]["whole_call"] <= one["extract_over_forward"]["from_first_slice"]
        assert all(value > 0 for value in one["slices_per_second"].values())
