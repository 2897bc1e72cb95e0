"""The benchmarks run at a tiny size and count what they should; nothing here looks at time."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
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
