"""The benchmarks run at a tiny size and count what they should; nothing here looks at time."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ichpipe.common.classes import CLASSES

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)  # the scripts import each other by their names


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def small(name, folder, *words):
    """Run a benchmark as ``--small`` does; return its results, after a look at what stands beside them."""
    bench = load(name)
    options = bench.BENCHMARK.parse(bench.__doc__, ["--small", *words])
    written = json.loads(json.dumps(bench.BENCHMARK.run(name, folder, options)))
    assert written["benchmark"] == name
    assert written["baseline"]
    assert written["ratios"]
    assert written["machine"]["cores"] >= 1
    assert {"torch", "zarr", "python"} <= written["versions"].keys()
    return written["result"]


@pytest.mark.slow
def test_the_command_lists_every_script_and_passes_small_on(tmp_path, monkeypatch, capsys):
    command = load("__main__")
    assert {"store", "extract_unchanged", "kills", "prepare", "score", "feeding", "sequence", "end_to_end"} <= set(
        command.names()
    )
    assert command.main(["--small", "--only", "score", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "score.json").read_text())
    assert written["parameters"]["slices"] == 600
    assert "score (" in capsys.readouterr().out
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    (tmp_path / "broken.py").write_text("import sys\nBENCHMARK = sys.exit(3)\n")
    assert command.names() == ["broken"]
    assert command.main(["--only", "broken", "--out", str(tmp_path)]) == 1
    assert "broken: exit code 3" in capsys.readouterr().out


def test_store(tmp_path):
    result = small("store", tmp_path)
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


@pytest.mark.soak
def test_extract_unchanged(tmp_path):
    result = small("extract_unchanged", tmp_path)
    assert len(result["seconds"]) == 3
    assert result["said"] == "slice CNN: all 3000 slices are there"


@pytest.mark.slow
def test_prepare(tmp_path):
    result = small("prepare", tmp_path)["sizes"]["600"]  # outputs that differ would end it
    assert result["bare_pydicom"]["ratio"] > 0
    assert result["ratio_of_the_whole_command"] > 0
    for name in ("one_worker", "again", "workers", "stopped"):
        assert result[name]["peak_mb"] > 0


@pytest.mark.slow
def test_score(tmp_path):
    result = small("score", tmp_path)
    assert len(result["seconds"]) == 4
    assert min(result["seconds"].values()) > 0


@pytest.mark.slow
def test_kills(tmp_path):
    result = small("kills", tmp_path)
    assert result["kills"] >= 2
    assert result["wrong_numbers_read_after_a_kill"] == 0
    assert result["rows_identical_to_an_undisturbed_store"]
    assert result["chunk_files_identical"]


@pytest.mark.soak
def test_sequence(tmp_path):
    result = small("sequence", tmp_path)
    assert result["labels"]["linear_head_loss"] == pytest.approx(0.063, abs=0.002)
    drawn, wanted = (result["labels"][name]["any"] for name in ("prevalence", "prevalence_of_the_table"))
    assert drawn == pytest.approx(wanted, abs=0.06)
    assert len(result["arms"]["paper"]["epochs"]) == 2
    assert all(one["seconds"] > 0 for one in result["arms"]["paper"]["epochs"])
    assert result["end_to_end_epoch_over_cached_epoch"] > 0
    scores = {row["arm"]: row["weighted_log_loss"]["mean"] for row in result["compare"]["arms"]}
    assert set(scores) == {"slice-cnn", "moving-average", "paper"}


def test_simulated_series_hold_the_rows_of_real_ones_in_runs():
    simulate = load("simulate")
    ids = [f"ID_{number}" for number in range(19)]
    table = pd.DataFrame({"ID": ids, "series": ["A"] * 8 + ["B"] * 6 + ["C"] * 5}).sample(frac=1.0, random_state=0)
    labels = pd.DataFrame(0, index=range(19), columns=list(CLASSES))
    labels.iloc[range(14, 19), range(1, 6)] = 1  # C: each slice has every class
    labels.loc[14:, "any"] = 1
    labels.loc[[1, 4, 6], ["any", "subdural"]] = 1
    labels.loc[2, ["any", "epidural"]] = 1
    series = simulate.real_series(table, labels.assign(ID=ids))
    assert [len(rows) for rows in series] == [8, 6, 5]
    assert series[0].sum(axis=0).tolist() == [4, 1, 0, 0, 0, 3]
    assert not series[1].any()
    runs = set()
    for seed in range(40):
        arranged, shown = simulate.arrange(series[0], np.random.default_rng(seed))
        assert sorted(map(tuple, arranged)) == sorted(map(tuple, series[0]))
        assert ((shown > 0) == (arranged > 0)).all()
        runs.add(int((np.diff(arranged[:, 0], prepend=0) == 1).sum()))
        positive = arranged[arranged[:, 0] == 1]
        assert int(np.argmax(positive[:, 1])) in {0, 3}  # rows alike stand together
    assert runs == {1, 2}
    drawn = simulate.simulate(np.ones(300, dtype=np.intp), labels.to_numpy(np.float32), series=series)
    assert set(drawn.lengths.tolist()) == {5, 6, 8}
    assert len(drawn.labels) == drawn.lengths.sum() == len(drawn.signal)
    with pytest.raises(ValueError, match="19 slices"):
        simulate.real_series(table, labels.assign(ID=[f"X{name}" for name in ids]))


def test_simulated_neighbours_correlate_as_asked():
    simulate = load("simulate")
    lengths = np.full(400, 30)
    noise = simulate.neighbourly(lengths, 4, 0.7, np.random.default_rng(0)).reshape(400, 30, 4)
    assert float((noise[:, 1:] * noise[:, :-1]).mean()) == pytest.approx(0.7, abs=0.03)
    assert float(noise.std()) == pytest.approx(1, abs=0.03)
    assert abs(float((noise[1:, 0] * noise[:-1, -1]).mean())) < 0.1  # another study's neighbour is no neighbour


@pytest.mark.soak
def test_end_to_end(tmp_path):
    result = small("end_to_end", tmp_path)
    assert [one["slices"] for one in result["chunked"]] == [4, 12]
    assert all(one["seconds"] > 0 for one in result["chunked"] + result["plain"])
    assert result["ratios"][0]["slices"] == 12


def test_feeding(tmp_path):
    pytest.importorskip("gdcm")
    (found,) = small("feeding", tmp_path)["sizes"]
    assert set(found["cache_over_decoding"]) == {"uncompressed", "jpeg_lossless", "jpeg_2000_lossless"}
    assert all(value > 0 for value in found["slices_per_second"].values())


@pytest.mark.soak
def test_growth(tmp_path):
    sizes = small("growth", tmp_path)["sizes"]
    assert [(one["slices"], one["computed"]) for one in sizes] == [(100, 100), (400, 400), (2000, 200)]
    assert all(one["peak_mb"] > one["start_mb"] > 0 for one in sizes)


@pytest.mark.soak
def test_alternatives(tmp_path):
    result = small("alternatives", tmp_path)
    assert {"ichpipe", "npz", "memmap"} <= result["rounds"].keys()  # monai, where it is installed
    assert ("monai" in result["rounds"]) == bool(importlib.util.find_spec("monai"))
    ours, *others = (rounds[0] for rounds in result["rounds"].values())
    for other in others:  # all cached the same numbers, and trained on them
        assert other["first"]["mean_magnitude"] == pytest.approx(ours["first"]["mean_magnitude"], rel=1e-3)
        assert 0 < other["first"]["losses"]["train"] < 1
        assert other["second"]["seconds"] > 0


def written(name, result, **ratios):
    machine = {"cores": 2, "cpu": "a processor"}
    versions = dict.fromkeys(("python", "torch", "zarr", "dask"), "1.0")
    facts = {"date": "2026-01-01T00:00", "commit": "abc", "machine": machine, "versions": versions}
    return {"benchmark": name, **facts, "baseline": "b", "ratios": ratios, "result": result}


def test_pictures_show_what_was_written(tmp_path):
    first = {"seconds": 9.0, "list": 1.0, "fill": 5.0, "epoch": 2.0}
    rounds = {name: [{"first": first}] for name in ("ichpipe", "npz")}
    seconds = {name: {"first": 9.0, "second": 3.0} for name in rounds}
    sizes = [{"slices": n, "computed": n, "seconds": 1.0, "start_mb": 5.0, "peak_mb": 9.0} for n in (10, 100)]
    run = {"tasks": 3, "starts": 4, "started_again": 1, "seconds_of_tasks": 2.0, "same_bytes": True}
    results = {
        "alternatives": {"slices": 10, "rounds": rounds, "seconds": seconds},
        "growth": {"sizes": sizes},
        "cluster": {"runs": {"1 workers": run, "one of two killed": run, "without a cluster": {"same_bytes": True}}},
    }
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(written(name, result, ratio=2.0, not_measured=None)))
    assert load("__main__").main(["plot", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"speed-{n}.png" for n in ("alternatives", "cluster", "growth", "ratios")]
    assert all(2_000 < file.stat().st_size < 100_000 for file in files)


@pytest.mark.slow
def test_extract(tmp_path):
    pytest.importorskip("gdcm")
    result = small("extract", tmp_path)
    assert result["loaders"] == 2
    assert set(result["encodings"]) == {"uncompressed", "jpeg_lossless"}
    for one in result["encodings"].values():
        assert one["slices"] == 130
        assert 0 < one["extract_over_forward"]["whole_call"] <= one["extract_over_forward"]["from_first_slice"]
        assert all(value > 0 for value in one["slices_per_second"].values())


def test_without_a_gpu_the_benchmark_of_one_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **_: None)
    assert load("__main__").main(["gpu", "--out", str(tmp_path / "gpu.json")]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_a_bare_machine_is_told_what_to_install(tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    lacking = {"zarr", "dask", "pydicom"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in lacking else find_spec(name))
    assert load("gpu").main(["--tiny", "--out", str(tmp_path / "gpu.json")]) == 2
    told = capsys.readouterr().err
    assert f"install: {sys.executable} -m pip install -c constraints.txt pydicom zarr dask\n" in told
    assert "pip download -c constraints.txt -d wheels pydicom zarr dask\n" in told


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_on_a_cpu_and_says_what_had_no_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **_: None)
    out = tmp_path / "gpu.json"
    assert load("gpu").main(["--tiny", "--only", "train", "finetune", "--out", str(out)]) == 0
    assert "no GPU" in capsys.readouterr().err
    written = json.loads(out.read_text())
    assert (written["device"], written["tiny"], list(written["result"])) == ("cpu", True, ["train", "finetune"])
    for part in written["result"].values():
        for precision in ("auto", "bf16"):
            assert part[precision]["steps"] == 2
            assert part[precision]["slices_per_second"] > 0
    assert load("gpu").main(["--tiny", "--minutes", "0", "--only", "extract", "--out", str(out)]) == 1
    assert "no time was left" in json.loads(out.read_text())["result"]["extract"]["error"]


@pytest.mark.soak
def test_all_parts_of_the_benchmark_of_a_gpu_run_on_a_cpu(tmp_path):
    assert load("gpu").main(["--tiny", "--out", str(tmp_path / "gpu.json")]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())["result"]
    assert list(result) == ["tests", "extract", "train", "finetune", "sequence"]
    assert "skipped" in result["tests"]["summary"] or "passed" in result["tests"]["summary"]
    assert result["extract"]["result"]["encodings"]["uncompressed"]["slices"] == 130
    assert len(result["sequence"]["result"]["arms"]["paper"]["epochs"]) == 1
