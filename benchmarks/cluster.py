"""``ichpipe extract`` on a real dask.distributed cluster of this machine: one, two, four worker processes; one killed.

python benchmarks/cluster.py --out cluster.json

``dask scheduler`` and ``dask worker`` run as a user would start them. The stores are compared file by file. A worker
and the nanny that would start it again get SIGKILL while the worker computes; starts of tasks are counted on the
workers. "Without a cluster" is the command's own worker, with as many threads as torch takes by itself.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import cloudpickle
import kit
import torch
import yaml
from distributed import Client, WorkerPlugin

from ichpipe.cache.location import PARTIAL
from ichpipe.common.artifacts import Artifacts
from ichpipe.common.files import digest_of_file
from ichpipe.index.slice_index import read_index
from ichpipe.models.slice_cnn import SliceCnn, spec_for
from ichpipe.models.weights import save_model
from ichpipe.params.schema import PAPER_WINDOWS, PhantomParams, load_params
from ichpipe.stages import phantom, prepare

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

# Workers can't import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Journal(WorkerPlugin):
    """Writes down when a task of the store begins and ends on this worker: ``seconds key state``."""

    name = "benchmark-journal"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def transition(self, key: Any, _start: str, finish: str, **_: Any) -> None:
        """Append one line, at once: the process may be killed."""
        if finish in {"executing", "memory"} and str(key).startswith("compute_chunk"):
            with (self.folder / f"{os.getpid()}.txt").open("a", encoding="ascii") as lines:
                lines.write(f"{time.time()} {key} {finish}\n")


class Cluster:
    """Processes of ``dask scheduler`` and ``dask worker`` on 127.0.0.1; each worker with its nanny is a group."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.folder, self.n_workers = folder, workers
        self.journal = folder / "journal"
        self.journal.mkdir(parents=True)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.address = ""

    def __enter__(self) -> Cluster:
        """Start all, and wait until all workers are there."""
        file = self.folder / "scheduler.json"
        self._start("scheduler", "--port", "0", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", file)
        while not file.exists() or not file.read_text(encoding="utf-8").strip():
            time.sleep(0.05)
        self.address = json.loads(file.read_text(encoding="utf-8"))["address"]
        for _ in range(self.n_workers):
            self._start("worker", self.address, "--nthreads", "1", "--no-dashboard", "--local-directory", self.folder)
        with self.client() as client:
            client.wait_for_workers(self.n_workers, timeout=120)
            client.register_plugin(Journal(self.journal))
        return self

    def client(self) -> Any:
        """Return a client of the benchmark's own."""
        return Client(self.address, timeout=60)

    def _start(self, *words: object) -> None:
        command = [sys.executable, "-m", "dask", *map(str, words), "--host", "127.0.0.1"]
        heap = kit.own_heap()  # as docs/cluster.md has it
        log = (self.folder / f"log-{len(self.processes)}.txt").open("wb")
        with log:
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=heap))

    def kill_worker(self, number: int) -> None:
        """Send SIGKILL to a worker and its nanny."""
        os.killpg(self.processes[1 + number].pid, signal.SIGKILL)
        self.processes[1 + number].wait()

    def events(self) -> list[tuple[float, str, str]]:
        """Return (seconds, key, state) of all workers, in order."""
        lines = [line.rsplit(" ", 2) for file in self.journal.iterdir() for line in file.read_text().splitlines()]
        return sorted((float(at.split(" ")[0]), key, state) for at, key, state in lines)

    def __exit__(self, *_: object) -> None:
        """End all that was started here."""
        for process in reversed(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what can be chosen."""
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--studies", type=int, default=60, help="of the phantom")
    parser.add_argument("--size", type=int, default=128, help="pixels a side, of files and network")
    parser.add_argument("--backbone", default="resnet10t")
    parser.add_argument("--chunk-rows", type=int, default=64)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Extract with each number of workers, with one killed, and without a cluster; compare all with the first."""
    base, slices = make_data(folder, options)
    runs: dict[str, dict[str, Any]] = {}
    for workers in options.workers:
        runs[f"{workers} workers"] = extract(folder, base, f"w{workers}", workers, kill=False)
    runs["one of two killed"] = extract(folder, base, "killed", 2, kill=True)
    runs["without a cluster"] = extract(folder, base, "alone", 0, kill=False)
    reference = runs[f"{options.workers[0]} workers"].pop("files")
    for one in runs.values():
        one["same_bytes"] = one.pop("files", reference) == reference
    return {"slices": slices, "chunks": -(-slices // options.chunk_rows), "runs": runs}


def make_data(folder: Path, options: argparse.Namespace) -> tuple[list[object], int]:
    """Make files, index and network; return the words before the command, and the number of slices."""
    phantom.run(PhantomParams(studies=options.studies, size_px=options.size, seed=0), folder / "phantom")
    artifacts, file = Artifacts(folder / "artifacts"), folder / "params.yaml"
    values = {"dicom_dir": str(folder / "phantom" / "dicom"), "labels": str(folder / "phantom" / "stage_2_train.csv")}
    content = {"prepare": values | {"size_px": options.size}, "extract": {"chunk_rows": options.chunk_rows}}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    prepare.run(load_params(file, ()).prepare, artifacts.index_dir, 1, artifacts.resume("prepare"))
    torch.manual_seed(0)
    cnn = SliceCnn(spec_for(options.backbone, PAPER_WINDOWS, options.size, 0.0))
    save_model(artifacts.slice_cnn, cnn, {"index": digest_of_file(artifacts.index)})
    return ["--params", file, "--artifacts", artifacts.root], len(read_index(artifacts.index))


def extract(folder: Path, base: list[object], name: str, workers: int, *, kill: bool) -> dict[str, Any]:
    """Run the command on a cluster (0 workers: without one) into a store of its own."""
    store = folder / f"{name}.zarr"
    command = kit.ichpipe("--quiet", *base, "--set", f"extract.store={store}", "extract", "--gpu", "cpu")
    if not workers:
        own = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        subprocess.run(command, check=True, env=own)
        return {"files": contents(store)}
    with Cluster(folder / f"cluster-{name}", workers) as cluster:
        before: dict[Path, int] = {}
        with subprocess.Popen([*command, "--scheduler", cluster.address]) as process:
            if kill:
                wait_for_starts(cluster, process, 2 * workers + 1)
                cluster.kill_worker(0)
                before = chunk_stamps(store)
        if process.returncode:
            raise RuntimeError(f"extract: exit code {process.returncode}")
        found = {"files": contents(store), **counts(cluster.events())}
    if kill:
        again = sum(stamp != before.get(file, stamp) for file, stamp in chunk_stamps(store).items())
        found |= {"chunk_files_before_the_kill": len(before), "of_these_written_again": again}
    return found


def wait_for_starts(cluster: Cluster, process: subprocess.Popen[Any], starts: int) -> None:
    """Wait until that many tasks have begun."""
    while process.poll() is None:
        if sum(state == "executing" for _, _, state in cluster.events()) >= starts:
            return
        time.sleep(0.01)


def counts(events: list[tuple[float, str, str]]) -> dict[str, Any]:
    """Return starts of tasks, tasks, and the seconds between the first start and the last end."""
    starts = Counter(key for _, key, state in events if state == "executing")
    return {
        "tasks": len(starts),
        "starts": starts.total(),
        "started_again": starts.total() - len(starts),
        "seconds_of_tasks": round(events[-1][0] - events[0][0], 2),
    }


def chunk_stamps(store: Path) -> dict[Path, int]:
    """Return when each chunk was written: its embeddings, which are written last."""
    return {file: file.stat().st_mtime_ns for file in store.glob("*/segment-*/embedding/c/*/0")}


def contents(store: Path) -> dict[str, str]:
    """Return the digest of every file, but for what a killed worker was writing."""
    return {
        str(file.relative_to(store)): digest_of_file(file)
        for file in sorted(store.rglob("*"))
        if file.is_file() and not file.name.endswith(PARTIAL)
    }


def ratios(result: dict[str, Any]) -> dict[str, float | None]:
    """Pick the ratios: times as fast as the first number of workers, and tasks that were computed twice."""
    runs = {name: one for name, one in result["runs"].items() if "seconds_of_tasks" in one}
    first = next(iter(runs.values()))["seconds_of_tasks"]
    found: dict[str, float | None] = {
        f"{name}, times as fast": first / one["seconds_of_tasks"]
        for name, one in itertools.islice(runs.items(), 1, None)
    }
    found["share of tasks computed twice after the kill"] = (
        runs["one of two killed"]["started_again"] / result["chunks"]
    )
    return found


BENCHMARK = kit.Benchmark(
    "one worker process", measure, ratios, add_options,
    {"workers": [1, 2], "studies": 6, "size": 64, "chunk_rows": 16},
)  # fmt: skip

if __name__ == "__main__":
    BENCHMARK.main(__file__, __doc__)
