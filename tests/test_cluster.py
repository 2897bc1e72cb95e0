"""A real dask.distributed cluster, ``dask scheduler`` and ``dask worker`` processes, one of which is killed."""

import contextlib
import importlib.util
import sys
import time
from pathlib import Path

import cloudpickle
import pytest
import store_kit as kit

from ichpipe.cache.location import StoreLocation
from ichpipe.cache.worker import ComputePlugin, Inputs, compute_chunk, numbers_of
from ichpipe.cache.writer import Work, update
from ichpipe.features.dask_client import connect

FOLDER = Path(__file__).parents[1] / "benchmarks"
SECONDS_A_CHUNK = 0.15


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location("benchmark_cluster", FOLDER / "cluster.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    mine = (kit, sys.modules[__name__])
    for one in mine:
        cloudpickle.register_pickle_by_value(one)  # the workers can't import it
    yield module
    for one in mine:
        cloudpickle.unregister_pickle_by_value(one)


def slow_features(inputs):
    time.sleep(SECONDS_A_CHUNK)
    return kit.features(inputs)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_worker_processes_change_no_byte_and_one_that_dies_loses_its_chunk_in_flight(tmp_path, bench, workers):
    slices = kit.Slices([3] * 32)
    with connect(1, None) as client:
        kit.write(tmp_path / "alone", slices, client)
    with bench.Cluster(tmp_path / "cluster", workers) as cluster, cluster.client() as several:
        steps = filling(tmp_path / "together", slices, several)
        done = [next(steps), next(steps), next(steps)]
        if workers > 1:
            cluster.kill_worker(0)
        before = bench.chunk_stamps(tmp_path / "together")
        done += list(steps)
        after = bench.chunk_stamps(tmp_path / "together")
        found = bench.counts(cluster.events())
    assert sum(done) == len(slices.rows)
    # A killed worker may leave the file that it was writing; the next run removes it.
    whole = {name: content for name, content in kit.all_bytes(tmp_path / "together").items() if ".partial" not in name}
    assert kit.all_bytes(tmp_path / "alone") == whole
    assert found["tasks"] == 24
    assert len(list((tmp_path / "cluster" / "journal").iterdir())) == workers
    assert before
    assert before.items() <= after.items()  # what was written is not computed again
    assert found["started_again"] <= 2 * (workers > 1)  # in flight, or written and not yet said so


def test_a_chunk_that_is_there_is_not_computed_when_its_task_comes_again(tmp_path):
    slices, nothing = kit.Slices(), Inputs([None] * 4)
    with connect(1, None) as client:
        kit.write(tmp_path / "s", slices, client)
        segment = next((tmp_path / "s").glob("*/segment-*")).relative_to(tmp_path / "s").as_posix()
        stamps = [file.stat().st_mtime_ns for file in kit.chunk_files(tmp_path / "s")]
        once_more = [
            client.submit(compute_chunk, str(tmp_path / "s"), segment, slice(4 * n, 4 * n + 4), nothing) for n in (0, 1)
        ]
        assert [one.result() for one in once_more] == [4, 4]  # None can't be computed
        assert [file.stat().st_mtime_ns for file in kit.chunk_files(tmp_path / "s")] == stamps
        file = kit.chunk_files(tmp_path / "s")[0]
        file.write_bytes(file.read_bytes()[:-1])
        broken = client.submit(compute_chunk, str(tmp_path / "s"), segment, slice(0, 4), nothing, pure=False)
        with pytest.raises(AttributeError):
            broken.result()


def filling(path, slices, client):
    work = Work(slices.inputs, kit.maker(compute=slow_features), lambda: contextlib.nullcontext(client))
    return update(StoreLocation(path), kit.generation(), slices.rows, work)


@pytest.mark.parametrize("ports", [{"10.0.0.1": (40, 41), "10.0.0.2": (40, 41)}, {"b": (1, 2), "a": (9, 10, 11)}])
def test_workers_of_one_machine_have_different_numbers(ports):
    numbers = numbers_of([f"tcp://{host}:{port}" for host, of_host in ports.items() for port in of_host])
    for host, of_host in ports.items():
        assert sorted(numbers[f"tcp://{host}:{port}"] for port in of_host) == list(range(len(of_host)))


@pytest.mark.parametrize(
    ("name", "address", "number"), [(3, "tcp://a:1", 3), ("SLURM-0-1", "tcp://a:2", 1), ("x", "tcp://later:9", 0)]
)
def test_a_worker_builds_what_falls_to_its_number(name, address, number):
    class Worker:
        pass

    worker = Worker()
    worker.name, worker.address = name, address
    built = []
    ComputePlugin(built.append, {"tcp://a:1": 0, "tcp://a:2": 1}).setup(worker)
    assert built == [number]


@pytest.mark.soak
def test_small_version_of_the_benchmark(tmp_path, bench):
    options = bench.BENCHMARK.parse(bench.__doc__, ["--small"])
    result = bench.BENCHMARK.run("cluster", tmp_path, options)["result"]
    assert result["chunks"] == 9
    on_clusters = {name: one for name, one in result["runs"].items() if name != "without a cluster"}
    assert len(on_clusters) == 3
    assert all(one["same_bytes"] for one in on_clusters.values())
    assert all(one["tasks"] == 9 for one in on_clusters.values())
    killed = on_clusters["one of two killed"]
    assert killed["chunk_files_before_the_kill"] > 0
    assert killed["of_these_written_again"] == 0
